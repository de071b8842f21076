"""Streams of several sources, drawn with replacement, with captions by field, of several sizes, sorted by length."""

import json
from collections import Counter
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from scipy.stats import chisquare

from pair_files import assert_continues, captions_of, described, numbered, opened, png, same, take, write_tar
from ssmclip.config import apply_overrides, load_recipe
from ssmclip.config.places import checkout
from ssmclip.data.pairs.captions import draw_by_field
from ssmclip.data.pairs.loader import NoUsableSamples, TableFormat, Weighted, train_transform
from ssmclip.data.pairs.samples import generator_for
from ssmclip.data.pairs.stream import text_lengths
from ssmclip.rows import read_rows
from ssmclip.train import train
from ssmclip.train.blueprint import blueprint
from ssmclip.train.build import build_model, open_stream


@pytest.fixture
def sources(tmp_path):
    """Shards of 3 x 10 samples named a, a table of 7 named b."""
    for shard in range(3):
        write_tar(tmp_path / f"a/{shard}.tar", numbered(range(10 * shard, 10 * shard + 10), "a"))
    for n in range(7):
        (tmp_path / f"{n}.png").write_bytes(png(n))
    rows = "".join(f"{n}.png,b {n}\n" for n in range(7))
    (tmp_path / "b.csv").write_text("image,caption\n" + rows)
    return [Weighted(str(tmp_path / "a"), 3.0, "a"), Weighted(str(tmp_path / "b.csv"), 1.0, "b")]


# ---- several sources


def test_samples_come_from_each_source_by_weight(sources):
    loader = opened(sources, 50, shuffle_buffer=7)
    batches = take(loader, 40)
    names = Counter(caption.split()[0] for batch in batches for caption in captions_of(batch))
    assert chisquare([names["a"], names["b"]], [1500, 500]).pvalue > 1e-3
    assert loader.drawn == names
    assert [key.split("/")[0] for key in batches[0].keys] == [text.split()[0] for text in captions_of(batches[0])]
    inside = [sum(caption.startswith("a") for caption in captions_of(batch)) for batch in batches]
    assert np.var(inside) == pytest.approx(50 * 0.75 * 0.25, rel=0.5)  # binomial: independent draws, not turns


def test_every_source_is_passed_through_as_if_alone(sources):
    """Between two samples of one source, others come; the source's own order and passes are those it has alone."""
    mixed = [c for batch in take(opened(sources, 10), 60) for c in captions_of(batch)]
    for source in sources:
        own = [c for c in mixed if c.startswith(source.name)]
        alone = [c for batch in take(opened(source.source, 10), 60) for c in captions_of(batch)]
        assert own == alone[: len(own)]
        assert len(own) > 100


@pytest.mark.parametrize(("workers", "settings"), [(0, {}), (2, {}), (0, {"distinct": True}), (0, {"resample": True})])
def test_a_mixture_continues_bit_for_bit(sources, workers, settings):
    assert_continues(lambda cursor: opened(sources, 6, workers=workers, cursor=cursor, shuffle_buffer=5, **settings))


def test_readers_draw_apart_and_together_see_every_sample(sources):
    ranks = [opened(sources, 5, rank=rank, world_size=2) for rank in range(2)]
    seen = [[key for batch in take(loader, 60) for key in batch.keys] for loader in ranks]
    sequences = [[key[0] for key in keys] for keys in seen]
    assert sequences[0] != sequences[1]
    assert {f"a/{n:04d}" for n in range(30)} | {f"b/{n}.png" for n in range(7)} == {*seen[0], *seen[1]}


def test_distinct_keeps_equal_keys_of_different_sources(tmp_path):
    parts = [Weighted(str(write_tar(tmp_path / f"{n}.tar", numbered(range(6), n))), 1, n) for n in "ab"]
    for batch in take(opened(parts, 8, distinct=True), 20):
        assert len(set(batch.keys)) == 8


def test_a_cursor_of_other_weights_is_refused(sources):
    loader = opened(sources)
    next(loader)
    other = [sources[0], Weighted(sources[1].source, 2.0, "b")]
    with pytest.raises(ValueError, match=r"source must be the cursor's, '0.75 x 3 shards"):
        opened(other, cursor=loader.cursor)
    with pytest.raises(ValueError, match=r"resample must be the cursor's, False \(got True\)"):
        opened(sources, cursor=loader.cursor, resample=True)


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ((0, 0), "the weights of a, b must not all be 0"),
        ((1, -2), r"the weight of b must be a number of at least 0 \(got -2\)"),
        ((1, float("nan")), r"the weight of b must be a number of at least 0 \(got nan\)"),
    ],
)
def test_weights_that_say_nothing_are_refused(sources, weights, said):
    with pytest.raises(ValueError, match=said):
        opened([Weighted(s.source, w, s.name) for s, w in zip(sources, weights, strict=True)])


def test_an_empty_source_is_named_and_one_of_weight_0_is_not_opened(sources, tmp_path):
    empty = write_tar(tmp_path / "empty.tar", {})
    with pytest.raises(ValueError, match="the source void has no samples: remove it"):
        opened([*sources, Weighted(str(empty), 1, "void")])
    (tmp_path / "none.csv").write_text("image,caption\n")
    with pytest.raises(ValueError, match=r"none.csv has no samples"):
        opened([*sources, Weighted(str(tmp_path / "none.csv"), 1)])
    with pytest.raises(FileNotFoundError, match=r"nowhere.csv"):
        opened([*sources, Weighted(str(tmp_path / "nowhere.csv"), 1)])
    next(opened([*sources, Weighted(str(tmp_path / "nowhere.csv"), 0)]))


def test_a_source_without_a_usable_sample_is_named(sources, tmp_path):
    broken = write_tar(tmp_path / "broken.tar", {"0.png": b"no picture", "0.txt": b"text"})
    loader = opened([*sources, Weighted(str(broken), 5, "broken")])
    with pytest.raises(NoUsableSamples, match=r"a whole pass over broken \(1 shards .* 1 x broken image; .* broken: 0"):
        take(loader, 20)


def test_rows_count_the_samples_of_each_source_and_go_on_counting(sources, tmp_path):
    pairs = json.dumps([[each.source, each.weight] for each in sources])
    changes = ["progress=false", "tensorboard=true", "logging.every=1", "warmup_steps=1", "batch_size=8", "device=cpu"]
    changes += ["steps=6", "checkpoint.every=3", "image_sizes=[[0, 32]]", f"sources={pairs}"]
    config = apply_overrides(load_recipe(checkout() / "recipes" / "tiny.py"), changes)

    def drawn(out):
        rows = [row for row in read_rows(out / "rows.jsonl")[1] if row.metric == "samples_drawn"]
        return {(row.where["step"], row.where["source"]): row.value for row in rows}

    counted = drawn(train(config, tmp_path / "run"))
    assert [sum(v for (step, _), v in counted.items() if step == s) for s in range(1, 7)] == [
        8 * s for s in range(1, 7)
    ]
    assert {source for _, source in counted} == {each.source for each in sources}
    last = tmp_path / "run" / "checkpoints"
    for link in last.glob("*"):
        if link.name.endswith("6"):
            (last / "last").unlink()
            (last / "last").symlink_to("step_00000003")
    assert drawn(train(config, tmp_path / "run", resume=True)) == counted


# ---- with replacement


def test_shards_are_drawn_with_replacement(tmp_path):
    """Each pass has as many shards as there are; how often one shard comes in a pass is binomial."""
    for shard in range(4):
        write_tar(tmp_path / f"{shard}.tar", numbered([0], str(shard)))
    loader = opened(tmp_path, 4, resample=True)
    counts = Counter()
    for batch in take(loader, 600):  # one batch a pass
        drawn = Counter(captions_of(batch))
        counts.update(drawn.get(f"{shard} 0", 0) for shard in range(4))
    expected = [2400 * p for p in (81 / 256, 108 / 256, 54 / 256, 12 / 256, 1 / 256)]
    assert chisquare([counts[k] for k in range(5)], expected).pvalue > 1e-3


def test_a_sample_drawn_again_is_seen_differently_and_is_the_same_sample(tmp_path):
    for shard in range(2):
        noise = np.random.default_rng(shard).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        write_tar(tmp_path / f"{shard}.tar", {"x.png": _encoded(noise), "x.txt": b"text"})
    for batch in take(opened(tmp_path, 2, resample=True), 20):
        if batch.keys[0] == batch.keys[1]:
            assert not torch.equal(batch.images[0], batch.images[1])
            return
    raise AssertionError("no shard was drawn twice")


@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_resampled_stream_continues_and_readers_draw_apart(sources, kind, workers):
    source = sources[kind].source
    settings = {"resample": True, "workers": workers, "shuffle_buffer": 7}
    assert_continues(lambda cursor: opened(source, 5, cursor=cursor, **settings))
    ranks = [opened(source, 5, resample=True, rank=rank, world_size=5) for rank in range(5)]  # more than shards
    keys = [[key for batch in take(loader, 8) for key in batch.keys] for loader in ranks]
    assert len({tuple(each) for each in keys}) == 5


def test_resample_contradicts_distinct(sources):
    with pytest.raises(ValueError, match="distinct must be false with resample"):
        opened(sources, resample=True, distinct=True)


# ---- captions by field


SHARES = {"caption": 0.5, "title": 0.3, "txt": 0.2}


def test_fields_are_drawn_with_their_probabilities_and_the_rest_scaled_up(tmp_path):
    both = described(0, caption="c", title=["t", "u"], other="never") | {"0000.txt": b"x"}
    without = described(1, caption=" ", title="t") | {"0001.txt": b"x"}
    write_tar(tmp_path / "a.tar", both | without)
    loader = opened(tmp_path / "a.tar", 2, caption_shares=SHARES)
    counts = {"0000": Counter(), "0001": Counter()}
    for batch in take(loader, 2000):
        for key, caption in zip(batch.keys, captions_of(batch), strict=True):
            counts[key][caption] += 1
    full, rest = counts["0000"], counts["0001"]
    assert chisquare([full[c] for c in "ctux"], [1000, 300, 300, 400]).pvalue > 1e-3
    assert chisquare([rest[c] for c in "tx"], [1200, 800]).pvalue > 1e-3
    assert full.total() == rest.total() == 2000
    assert loader.missing == {"caption": 2000}
    assert loader.skipped == {}


def test_several_captions_of_a_sample_differ_while_there_are_others():
    fields = ["a", "a", "b"]
    firsts = Counter()
    for n in range(3000):
        drawn = draw_by_field(5, fields, {"a": 3.0, "b": 1.0}, generator_for(n))
        assert sorted(drawn[:3]) == [0, 1, 2]
        assert len(set(drawn[3:])) == 2
        firsts[drawn[0]] += 1
    assert chisquare([firsts[i] for i in range(3)], [1125, 1125, 750]).pvalue > 1e-3


@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_columns_of_a_table_are_fields(tmp_path, suffix):
    paths = [f"{n}.png" for n in (0, 1, 1)]
    table = pa.table({"image": paths, "short": ["s0", "s1", None], "Long": ["l0", "l1", "m1"]})
    for n in range(2):
        (tmp_path / f"{n}.png").write_bytes(png(n))
    if suffix == "parquet":
        pa.parquet.write_table(table, tmp_path / "t.parquet")
    else:
        pa.csv.write_csv(table, tmp_path / "t.csv")
    loader = opened(tmp_path / f"t.{suffix}", 2, caption_shares={"short": 0.6, "long": 0.4})
    counts = Counter(c for batch in take(loader, 1000) for c in captions_of(batch))
    assert chisquare([counts[c] for c in ("s0", "s1", "l0", "l1", "m1")], [600, 600, 400, 200, 200]).pvalue > 1e-3
    with pytest.raises(ValueError, match=r"t\.\w+ has no caption column: looked for brief, its columns are"):
        opened(tmp_path / f"t.{suffix}", caption_shares={"brief": 1.0})


def test_a_sample_with_none_of_the_fields_is_skipped_and_what_is_no_text_is_broken(tmp_path):
    files = described(0, title="t") | described(1, caption=3) | described(2, other="o")
    loader = opened(write_tar(tmp_path / "a.tar", files), 1, caption_shares={"caption": 1.0, "title": 1.0})
    assert {key for batch in take(loader, 3) for key in batch.keys} == {"0000"}
    assert set(loader.skipped) == {"broken json", "no caption"}
    with pytest.raises(ValueError, match=r"the probability of the caption field 'title' must be above 0 \(got -1\)"):
        opened(tmp_path / "a.tar", caption_shares={"title": -1})


def test_captions_by_field_continue(tmp_path):
    files = {}
    for n in range(9):
        files |= described(n, **{"caption": f"c{n}"} | ({"title": f"t{n}"} if n % 2 else {}))
    write_tar(tmp_path / "a.tar", files)
    shares = {"caption": 0.5, "title": 0.5}
    assert_continues(lambda cursor: opened(tmp_path / "a.tar", 4, cursor=cursor, caption_shares=shares))


# ---- a size for each batch

SIZES = ((8, 8), (8, 16), (12, 6))


def test_all_ranks_and_any_number_of_workers_draw_the_same_sizes(sources):
    shapes = []
    for workers, rank in [(0, 0), (0, 1), (2, 0), (2, 1)]:
        loader = opened(sources[0].source, 3, workers=workers, rank=rank, world_size=2, sizes=SIZES)
        shapes.append([tuple(batch.images.shape[-2:]) for batch in take(loader, 30)])
        loader.close()
    assert shapes[0] == shapes[1] == shapes[2] == shapes[3]
    assert set(shapes[0]) == set(SIZES)
    assert chisquare([shapes[0].count(size) for size in SIZES]).pvalue > 1e-3


@pytest.mark.parametrize(
    ("workers", "settings"), [(0, {}), (2, {}), (0, {"distinct": True}), (2, {"length_buckets": 3})]
)
def test_sizes_continue_bit_for_bit(sources, workers, settings):
    settings = {"sizes": SIZES, "workers": workers, **settings}
    assert_continues(lambda cursor: opened(sources[1].source, 3, cursor=cursor, **settings))


def test_a_batch_of_one_size_is_what_its_transform_alone_makes(sources):
    source = sources[0].source
    mixed = take(opened(source, 5, sizes=SIZES), 12)
    for size in SIZES:
        transform = train_transform(size, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), flip=True)
        alone = take(opened(source, 5, transform=transform), 12)
        chosen = [i for i in range(12) if tuple(mixed[i].images.shape[-2:]) == size]
        assert chosen
        assert all(same(mixed[i], alone[i]) for i in chosen)


def test_a_wide_image_is_cropped_wide_so_that_it_is_distorted_as_little():
    """A grid of 10-pixel squares: after the crop, width and height of a square differ by at most the ratio."""
    ramp = np.stack(np.broadcast_arrays(np.arange(200)[None], np.arange(100)[:, None], 0), 2).astype(np.uint8)
    transform = train_transform((50, 100), (0.5,) * 3, (0.5,) * 3, scale=(0.3, 0.9))
    for n in range(50):
        out = transform.pixels(ramp, generator_for(n)).float()
        per_pixel = ((out[0, 25, -5] - out[0, 25, 4]) / 91, (out[1, -5, 50] - out[1, 4, 50]) / 41)
        assert 3 / 4 - 0.1 < per_pixel[0] / per_pixel[1] < 4 / 3 + 0.1


def test_training_takes_sizes_that_are_not_square(tmp_path):
    changes = ["progress=false", "tensorboard=false", "logging.every=1", "warmup_steps=1", "batch_size=4", "device=cpu"]
    config = apply_overrides(load_recipe(checkout() / "recipes" / "tiny.py"), [*changes, "steps=4"])
    for change, expected in [
        ("image_sizes=[[0, 32], [0.5, 32, 48]]", [(32, 32), (32, 32), (32, 48), (32, 48)]),
        ("multi_sizes=[[32, 48]]", [(32, 48)] * 4),
    ]:
        out = train(apply_overrides(config, [change]), tmp_path / change[:5])
        rows = {(row.where["step"], row.metric): row.value for row in read_rows(out / "rows.jsonl")[1] if row.where}
        sides = [[rows.get((step, f"image_{side}")) for side in ("size", "height", "width")] for step in range(1, 5)]
        assert [(s or h, s or w) for s, h, w in sides] == expected


def test_a_model_of_one_size_refuses_others():
    vision, text = {"layers": 1, "width": 64, "head_width": 32}, {"layers": 1, "width": 16, "heads": 1}
    changes = json.dumps({"vision_cfg": vision, "text_cfg": text})
    config = apply_overrides(
        load_recipe(checkout() / "recipes" / "tiny.py"),
        ["name=open_clip:ViT-B-32", f"changes={changes}", "image_sizes=[[0, 64]]", "multi_sizes=[[64, 64], [64, 96]]"],
    )
    with pytest.raises(ValueError, match=r"cannot take images of 64 x 96 pixels, one of data.multi_sizes=\(\(64, 64\)"):
        build_model(config, blueprint(config))


# ---- texts of similar length


@pytest.fixture
def lengths(tmp_path):
    files = {}
    for n in range(40):
        files |= {f"{n:04d}.png": png(n), f"{n:04d}.txt": f"{n:03d}".encode() + b"x" * (n * 7 % 30)}
    return write_tar(tmp_path / "texts.tar", files)


def test_buckets_hold_the_same_samples_with_less_padding(lengths):
    plain, sorted_ = opened(lengths, 4), opened(lengths, 4, length_buckets=5)
    for _ in range(3):
        mine, theirs = take(sorted_, 5), take(plain, 5)
        assert sorted(k for b in mine for k in b.keys) == sorted(k for b in theirs for k in b.keys)
        pictures = {k: (i, t) for b in theirs for k, i, t in zip(b.keys, b.images, b.texts, strict=True)}
        spans = []
        for batch in mine:
            width = batch.texts.shape[1]
            spans.append((min(text_lengths(batch.texts, 0)), width))
            assert (batch.texts[:, -1] != 0).any()
            for key, image, text in zip(batch.keys, batch.images, batch.texts, strict=True):
                assert torch.equal(image, pictures[key][0])
                assert torch.equal(text, pictures[key][1][:width])
                assert not pictures[key][1][width:].any()
        spans.sort()
        assert all(b[0] >= a[1] for a, b in pairwise(spans))  # no batch reaches into another
    assert [b.texts.shape[1] for b in mine] != sorted(b.texts.shape[1] for b in mine)  # in a random order


def test_one_bucket_cuts_the_padding_alone(lengths):
    for mine, theirs in zip(take(opened(lengths, 4, length_buckets=1), 12), take(opened(lengths, 4), 12), strict=True):
        assert mine.keys == theirs.keys
        longest = max(len(caption) for caption in captions_of(theirs))
        assert torch.equal(mine.texts, theirs.texts[:, :longest])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("distinct", [False, True])
def test_buckets_continue_bit_for_bit_and_count_what_is_skipped_once(lengths, tmp_path, workers, distinct):
    broken = write_tar(tmp_path / "more.tar", numbered(range(50, 60)) | {"x.png": b"?", "x.txt": b"t"})
    sources = [Weighted(str(lengths), 1, "a"), Weighted(str(broken), 1, "b")]
    settings = {"workers": workers, "length_buckets": 3, "distinct": distinct, "captions_per_image": 2}
    assert_continues(lambda cursor: opened(sources, 3, cursor=cursor, **settings), before=4, after=7)


def test_lengths_are_those_of_a_loop():
    tokens = torch.randint(0, 3, (200, 9), generator=torch.Generator().manual_seed(0))
    tokens[0] = 0
    expected = [max([1, *(i + 1 for i, t in enumerate(row) if t)]) for row in tokens.tolist()]
    assert text_lengths(tokens, 0).tolist() == expected


def test_features_of_a_mamba_tower_do_not_see_the_padding_that_is_cut():
    small = {"context_length": 24, "mamba": {"hidden_size": 16, "num_hidden_layers": 2}}
    changes = json.dumps({"embed_dim": 8, "vision_cfg": {"timm_model_name": "test_vmamba"}, "text_cfg": small})
    config = apply_overrides(
        load_recipe(checkout() / "recipes" / "tiny.py"),
        ["name=CLIMP-Nano", "length_buckets=4", "batch_size=8", "image_sizes=[[0, 32]]", f"changes={changes}"],
    )
    plan = blueprint(config)
    torch.manual_seed(0)
    model, tokenizer = plan.create().eval(), plan.texts()
    widths = set()
    for batch in take(open_stream(config, plan, 32, 0, 1), 6):
        widths.add(batch.texts.shape[1])
        whole = tokenizer([_decoded(row) for row in batch.texts])
        assert whole.shape == (8, 24)
        assert torch.equal(batch.texts, whole[:, : batch.texts.shape[1]])
        assert not whole[:, batch.texts.shape[1] :].any()
        with torch.no_grad():
            assert torch.equal(model.encode_text(batch.texts), model.encode_text(whole))
    assert len(widths) > 1


def test_a_tower_that_sees_padding_is_refused():
    config = apply_overrides(load_recipe(checkout() / "recipes" / "tiny.py"), ["length_buckets=2"])
    with pytest.raises(ValueError, match=r"data.length_buckets must be 0 for .*embeddings depend on the padding"):
        open_stream(config, blueprint(config), 32, 0, 1)


def test_buckets_as_large_as_their_source_are_refused_when_distinct(lengths):
    with pytest.raises(ValueError, match=r"as many as its reader \(got 60, and"):
        take(opened(lengths, 20, length_buckets=3, distinct=True), 4)


def test_unchanged_settings_leave_cursors_as_they_were(sources):
    loader = opened(sources[0].source, 4, table_format=TableFormat())
    next(loader)
    assert set(loader.cursor) == set(
        "source seed batch_size workers rank world_size distinct next states skipped skipped_examples".split()
    )
    assert loader.cursor["states"] == [{"pass": 0, "start": [0, 0], "taken": 4}]


def _encoded(pixels: np.ndarray) -> bytes:
    import io

    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def _decoded(row: torch.Tensor) -> str:
    from open_clip.tokenizer import SimpleTokenizer

    text = SimpleTokenizer().decode(row.tolist())
    return text.split("<start_of_text>")[1].split("<end_of_text>")[0]
