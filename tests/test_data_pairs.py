"""The stream of pairs: every sample once a pass, resumed bit for bit, bad input counted and named."""

import bz2
import gzip
import io
import json
import lzma
import tarfile
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
import webdataset
from PIL import Image
from scipy.stats import chisquare

from ssmclip.config import TrainConfig, apply_overrides
from ssmclip.data.images import open_image
from ssmclip.data.pairs import stream
from ssmclip.data.pairs.loader import NoUsableSamples, TableFormat, open_pairs, train_transform
from ssmclip.data.pairs.samples import generator_for, permutation
from ssmclip.data.pairs.shards import count_samples, find_shards, read_shard
from ssmclip.data.pairs.tables import table_source
from ssmclip.registry import UnknownName
from ssmclip.train.blueprint import blueprint
from ssmclip.train.build import open_stream

TRANSFORM = train_transform(16, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), flip=True)


def tokenize(texts: list[str]) -> torch.Tensor:
    """The caption's bytes, padded: a caption can be read back from its tokens."""
    rows = [list(text.encode()[:60]) for text in texts]
    return torch.tensor([row + [0] * (60 - len(row)) for row in rows])


def captions_of(batch) -> list[str]:
    return [bytes(v for v in row if v).decode() for row in batch.texts.tolist()]


def jpeg(number: int, size: tuple[int, int] = (24, 20)) -> bytes:
    """A picture whose colour says its number."""
    out = io.BytesIO()
    Image.new("RGB", size, (number * 7 % 256, number * 31 % 256, number % 256)).save(out, "JPEG")
    return out.getvalue()


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def sample(number: int, captions: int = 3) -> dict[str, bytes]:
    texts = [f"caption {c} of {number}" for c in range(captions)]
    return {
        f"{number:04d}.jpg": jpeg(number),
        f"{number:04d}.txt": texts[0].encode(),
        f"{number:04d}.json": json.dumps({"captions": texts}).encode(),
    }


@pytest.fixture
def shards(tmp_path) -> Path:
    """A folder of 5 shards with 8 + 9 + 10 + 11 + 12 = 50 samples."""
    folder = tmp_path / "shards"
    folder.mkdir()
    number = 0
    for shard in range(5):
        files = {}
        for _ in range(8 + shard):
            files |= sample(number)
            number += 1
        write_tar(folder / f"{shard:04d}.tar", files)
    return folder


@pytest.fixture
def table(tmp_path) -> Path:
    """A csv of 23 pictures, the first 10 with a second caption."""
    (tmp_path / "pictures").mkdir()
    lines = ["caption,id,filepath"]
    for number in range(23):
        (tmp_path / f"pictures/{number}.jpg").write_bytes(jpeg(number))
        lines.append(f'"one, of {number}",{number},pictures/{number}.jpg')
    lines += [f"two of {number},{number},pictures/{number}.jpg" for number in range(10)]
    path = tmp_path / "pairs.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def opened(source, batch_size=4, **settings):
    settings = {"transform": TRANSFORM, "tokenize": tokenize, "seed": 0, **settings}
    return open_pairs(source, batch_size=batch_size, **settings)


def take(loader, count: int) -> list:
    return [next(loader) for _ in range(count)]


def same(a, b) -> bool:
    return a.keys == b.keys and torch.equal(a.images, b.images) and torch.equal(a.texts, b.texts)


# ---- what is in a pass -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shuffle_buffer", [7, 1000])
@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (2, 0), (1, 2), (3, 2), (7, 0)])
def test_readers_together_see_every_sample_once_a_pass(shards, world_size, workers, shuffle_buffer):
    # One reader's state says which pass it is in; reading one sample at a time shows what each pass holds.
    listed = set()
    for path in sorted(shards.iterdir()):
        with tarfile.open(path) as tar:
            listed |= {name.split(".")[0] for name in tar.getnames()}
    seen = Counter()
    readers = max(workers, 1)
    for rank in range(world_size):
        loader = opened(
            shards, 1, workers=workers, rank=rank, world_size=world_size, shuffle_buffer=shuffle_buffer, cache_mib=0
        )
        assert loader.num_samples == len(listed) == 50
        done = [False] * readers
        turn = 0
        while not all(done):
            batch = next(loader)
            done[turn] = loader.cursor["states"][turn]["pass"] >= 2
            seen.update((loader.cursor["states"][turn]["pass"], key) for key in batch.keys if not done[turn])
            turn = (turn + 1) % readers
        loader.close()
    for number in (0, 1):
        assert {key: count for (n, key), count in seen.items() if n == number} == dict.fromkeys(listed, 1)


def test_passes_are_ordered_differently_and_mixed(shards):
    loader = opened(shards, 50, shuffle_buffer=20)
    first, second = take(loader, 2)
    assert sorted(first.keys) == sorted(second.keys) == [f"{n:04d}" for n in range(50)]
    assert first.keys != second.keys
    assert first.keys != sorted(first.keys)
    assert opened(shards, 50, shuffle_buffer=20, seed=1).__next__().keys != first.keys


def test_several_captions_of_an_image_stand_together_and_none_comes_twice_while_there_are_others(tmp_path):
    files = {name: data for n in range(20) for name, data in sample(n, captions=2 + n % 4).items()}
    write_tar(tmp_path / "a.tar", files)
    loader = opened(tmp_path / "a.tar", 10, captions_per_image=3)
    drawn = defaultdict(list)
    for batch in take(loader, 200):
        captions = captions_of(batch)
        assert len(captions) == 30
        for key, three in zip(batch.keys, zip(captions[::3], captions[1::3], captions[2::3], strict=True), strict=True):
            assert {c.split(" of ")[1] for c in three} == {str(int(key))}
            numbers = [int(c.split()[1]) for c in three]
            assert len(set(numbers)) == min(3, 2 + int(key) % 4)
            drawn[2 + int(key) % 4].append(numbers)
    for captions, threes in drawn.items():  # any of them as often as any other, in every place
        for place in range(3):
            assert chisquare(np.bincount([three[place] for three in threes], minlength=captions)).pvalue > 1e-3


def test_views_of_an_image_stand_together_and_differ(shards):
    one, two = (take(opened(shards, 5, views_per_image=views), 10) for views in (1, 2))
    for single, double in zip(one, two, strict=True):
        assert double.keys == single.keys
        assert torch.equal(double.texts, single.texts)
        assert torch.equal(double.images[::2], single.images)  # the first view is what there is without a second
    crops = train_transform(16, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), color_jitter=0.5)
    batch = next(opened(shards, 5, transform=crops, views_per_image=2))
    assert all(not torch.equal(a, b) for a, b in zip(batch.images[::2], batch.images[1::2], strict=True))


def test_pictures_and_captions_belong_to_their_key(shards):
    loader = opened(shards, 50, transform=train_transform(8, (0.0,) * 3, (1.0,) * 3))
    batch = next(loader)
    for key, picture, caption in zip(batch.keys, batch.images, captions_of(batch), strict=True):
        number = int(key)
        colour = torch.tensor([number * 7 % 256, number * 31 % 256, number % 256])
        assert (picture.mean((1, 2)) * 255 - colour).abs().max() < 4
        assert caption.endswith(f" of {number}")


def test_captions_are_drawn_uniformly_and_anew_each_pass(tmp_path):
    write_tar(tmp_path / "a.tar", {name: data for n in range(20) for name, data in sample(n, captions=5).items()})
    loader = opened(tmp_path / "a.tar", 20)
    drawn = {key: [] for key in (f"{n:04d}" for n in range(20))}
    for batch in take(loader, 60):
        for key, caption in zip(batch.keys, captions_of(batch), strict=True):
            drawn[key].append(int(caption.split()[1]))
    counts = Counter(number for numbers in drawn.values() for number in numbers)
    assert chisquare([counts[c] for c in range(5)]).pvalue > 0.001
    # Successive passes are independent: pairs of successive draws are uniform over 25 too.
    pairs = Counter(pair for numbers in drawn.values() for pair in pairwise(numbers))
    assert chisquare([pairs[a, b] for a in range(5) for b in range(5)]).pvalue > 0.001


def test_random_numbers_are_the_same_on_every_machine():
    # Written down once: checkpoints made elsewhere must continue here.
    assert permutation(8, 0, "window", 3).tolist() == [5, 1, 3, 7, 6, 4, 2, 0]
    assert torch.rand(3, generator=generator_for(0, 1, "key"), dtype=torch.float64).tolist() == pytest.approx(
        [0.15246849788264139, 0.7805266381489042, 0.46932368734427155], rel=1e-12
    )


# ---- resuming --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("kind", ["shards", "table", "synthetic"])
def test_cursor_continues_bit_for_bit(kind, workers, request):
    source = "synthetic:digits" if kind == "synthetic" else request.getfixturevalue(kind)
    batch_size, length, stops = (300, 7, (4,)) if kind == "synthetic" else (7, 16, (1, 5, 10))
    settings = {"batch_size": batch_size, "workers": workers, "shuffle_buffer": 6}
    whole = opened(source, **settings)
    expected = take(whole, length)
    for stop in stops:
        loader = opened(source, **settings)
        assert all(same(a, b) for a, b in zip(take(loader, stop), expected, strict=False))
        cursor = json.loads(json.dumps(loader.cursor))
        loader.close()
        again = opened(source, cursor=cursor, **settings)
        assert again.cursor == cursor
        assert all(same(a, b) for a, b in zip(take(again, length - stop), expected[stop:], strict=True))
        assert again.cursor == whole.cursor
        again.close()
    whole.close()


def test_skipped_samples_do_not_shift_the_cursor(shards):
    files = sample(100) | {"0101.jpg": b"broken", "0101.txt": b"x"} | sample(102) | {"0103.jpg": jpeg(1)} | sample(104)
    write_tar(shards / "bad.tar", files)
    expected = take(opened(shards, shuffle_buffer=10), 26)
    for stop in (1, 2, 3, 5, 8, 13):
        loader = opened(shards, shuffle_buffer=10)
        take(loader, stop)
        again = opened(shards, shuffle_buffer=10, cursor=loader.cursor)
        assert all(same(a, b) for a, b in zip(take(again, 26 - stop), expected[stop:], strict=True))
        assert again.skipped["no caption"] + again.skipped["broken image"] >= 2


def test_close_and_go_on(shards):
    expected = take(opened(shards), 6)
    loader = opened(shards, workers=1)
    first = take(loader, 2)
    loader.close()
    assert all(same(a, b) for a, b in zip(first + take(loader, 4), expected, strict=True))
    loader.close()


def test_the_cache_does_not_change_the_batches(shards):
    cached, plain = opened(shards, cache_mib=64), opened(shards, cache_mib=0)
    assert all(same(a, b) for a, b in zip(take(cached, 26), take(plain, 26), strict=True))


def test_neither_loading_nor_workers_touch_the_global_generator(shards):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    for workers in (0, 1):
        loader = opened(shards, workers=workers)
        take(loader, 3)
        loader.close()
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("name", "other"), [("seed", {"seed": 1}), ("batch_size", {"batch_size": 5}), ("workers", {"workers": 2})]
)
def test_cursor_of_another_stream_is_refused(shards, name, other):
    cursor = opened(shards).cursor
    with pytest.raises(ValueError, match=f"{name} must be the cursor's"):
        opened(shards, cursor=cursor, **other)


def test_cursor_of_other_files_is_refused(shards, table):
    with pytest.raises(ValueError, match=r"source must be the cursor's, 'pairs.csv 23'"):
        opened(shards, cursor=opened(table).cursor)


def test_any_transform_gets_a_picture_and_its_generator(shards):
    def transform(image: Image.Image, generator: torch.Generator) -> torch.Tensor:
        return torch.rand(3, 2, 2, generator=generator) + image.width

    batch = next(opened(shards, transform=transform))
    assert torch.equal(batch.images[0], torch.rand(3, 2, 2, generator=_after_caption(batch.keys[0])) + 24)


def _after_caption(key: str) -> torch.Generator:
    generator = generator_for(0, 0, key)
    torch.randint(3, (), generator=generator)
    return generator


# ---- where pairs come from -------------------------------------------------------------------------------------------


def test_shards_as_folder_glob_braces_or_file(shards):
    names = [str(path) for path in sorted(shards.iterdir())]
    assert find_shards(shards) == names
    assert find_shards(f"{shards}/*.tar") == names
    assert find_shards(f"{shards}/{{0001..0003}}.tar") == names[1:4]
    assert find_shards(names[2]) == names[2:3]
    assert find_shards("https://host/{00..02}.tar") == [f"https://host/0{n}.tar" for n in range(3)]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("g/**/*.tar", ["g/top.tar", "g/x/0.tar", "g/y/0.tar", "g/y/z/0.tar"]),
        ("g/*/*.tar", ["g/x/0.tar", "g/y/0.tar"]),
        ("g/{y,x}/*.tar", ["g/y/0.tar", "g/x/0.tar"]),
        ("b[1]/0.tar", ["b[1]/0.tar"]),
        ("b[1]/{0,1}.tar", ["b[1]/0.tar", "b[1]/1.tar"]),
        ("[bg]/top.tar", ["g/top.tar"]),
    ],
)
def test_a_glob_finds_every_shard_and_brackets_in_a_name_are_no_glob(tmp_path, monkeypatch, source, expected):
    monkeypatch.chdir(tmp_path)
    for name in ("g/top.tar", "g/x/0.tar", "g/y/0.tar", "g/y/z/0.tar", "b[1]/0.tar", "b[1]/1.tar"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
    assert find_shards(source) == expected


def test_a_part_of_a_pattern_that_matches_nothing_is_told(shards):
    with pytest.raises(FileNotFoundError, match=r"no file matches .*/val\*\.tar; .* holds 0000\.tar"):
        find_shards(f"{shards}/{{00,val}}*.tar")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset leaves its file open
def test_read_shard_is_what_webdataset_reads(shards):
    path = shards / "0002.tar"
    pipeline = webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False)
    expected = [(s["__key__"], s["jpg"], json.loads(s["json"])["captions"]) for s in pipeline]
    assert [(s.key, s.image, s.captions) for s in read_shard(str(path))] == expected
    assert count_samples(str(path)) == len(expected) == 10


PACKERS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}


@pytest.mark.parametrize("url", ["{}", "pipe:cat {}"])
@pytest.mark.parametrize(
    ("packer", "name"),
    [("gz", "a.tar.gz"), ("gz", "a.tar"), ("bz2", "a.tar.bz2"), ("bz2", "a.tar"), ("xz", "a.tar.xz"), ("xz", "a.tar")],
)
def test_a_packed_shard_is_read_whole_whatever_it_is_called(shards, tmp_path, packer, name, url):
    plain = shards / "0001.tar"
    packed = tmp_path / name
    packed.write_bytes(PACKERS[packer](plain.read_bytes()))
    assert list(read_shard(url.format(packed))) == list(read_shard(str(plain)))
    assert count_samples(str(packed)) == 9
    assert find_shards(tmp_path) == [str(packed)]
    # Random bytes at the end, so that what is cut off can't be guessed; in it lies the last picture.
    with tarfile.open(plain, "a") as tar:
        info = tarfile.TarInfo("9999.jpg")
        info.size = 100_000
        tar.addfile(info, io.BytesIO(np.random.default_rng(0).bytes(info.size)))
    packed.write_bytes(PACKERS[packer](plain.read_bytes())[:-50_000])
    *whole, cut = read_shard(url.format(packed))
    assert cut.problem == "truncated shard"
    assert {s.key for s in whole} <= {f"{n:04d}" for n in range(8, 17)}
    count_samples(str(packed))


@pytest.mark.parametrize("before", ["", "cat {}; "])
def test_a_pipe_that_fails_is_counted(shards, before):
    *whole, only = read_shard(f"pipe:{before.format(shards / '0000.tar')}exit 3")
    assert {s.problem for s in whole} <= {""}
    assert only.problem == "truncated shard"
    assert "exit 3" in only.detail


def test_a_pipe_is_read_and_its_length_unknown(shards):
    loader = opened(f"pipe:cat {shards}/0000.tar", 8)
    assert loader.num_samples is None
    assert sorted(next(loader).keys) == [f"{n:04d}" for n in range(8)]


def test_sizes_json_is_believed(shards):
    (shards / "sizes.json").write_text(json.dumps({f"{n:04d}.tar": 100 for n in range(5)}))
    assert opened(shards).num_samples == 500


def test_shards_are_counted_only_when_asked(shards, monkeypatch):
    monkeypatch.setattr(tarfile, "open", _noting_paths(tarfile.open))
    loader = opened(shards, 4, cache_mib=0)
    next(loader)
    assert tarfile.open.paths == []
    assert loader.num_samples == loader.num_samples == 50
    assert tarfile.open.paths == sorted(map(str, shards.iterdir()))  # each of them once


def _noting_paths(opener):
    """tarfile.open that notes the files it opens; streams, which are read for their samples, have no path."""

    def noting(name=None, *args, **kwargs):
        if name is not None:
            noting.paths.append(str(name))
        return opener(name, *args, **kwargs)

    noting.paths = []
    return noting


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", r" is not JSON \(Expecting value"),
        (b"<html>", r" is not JSON \(Expecting value"),
        (b"\xff\xfe", r" is not JSON \('utf-8' codec"),
        (b"[100, 100]", r" must be \{shard: samples\} \(got list\)"),
        (b'{"0000.tar": null}', r": 0000\.tar must have a number of samples \(got None\)"),
        (b'{"0000.tar": {"width": 224}}', r": 0000\.tar must have a number of samples \(got \{'width': 224\}\)"),
    ],
)
def test_a_sizes_json_that_is_none_is_named(shards, content, said):
    (shards / "sizes.json").write_bytes(content)
    loader = opened(shards)
    next(loader)  # which needs no sizes
    with pytest.raises(ValueError, match=rf"shards/sizes\.json{said}.*: fix or remove"):
        _ = loader.num_samples


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"txt": b" plain \n"}, [" plain \n"]),
        ({"txt": b"text", "json": b'{"caption": "in json"}'}, ["text"]),
        ({"json": b'{"caption": "in json"}'}, ["in json"]),
        ({"txt": b"text", "json": b'{"captions": ["a", "b"]}'}, ["a", "b"]),
        ({"txt": b"text", "json": b'{"captions": []}'}, ["text"]),
        ({"json": b'{"width": 3}'}, []),
        ({"json": b'{"captions": ["x", null]}'}, ["x"]),
        ({"json": b'{"captions": [null]}'}, []),
        ({"json": b'{"captions": "only"}'}, ["only"]),
    ],
)
def test_where_captions_are_looked_for(tmp_path, files, expected):
    write_tar(tmp_path / "a.tar", {"k.jpg": jpeg(0), **{f"k.{suffix}": data for suffix, data in files.items()}})
    (only,) = read_shard(str(tmp_path / "a.tar"))
    assert only.captions == expected


@pytest.mark.parametrize(
    ("captions", "said"),
    [
        ('{"captions": {"en": "a cat"}}', "a caption must be text (got dict)"),
        ('{"captions": ["a cat", {"raw": "a cat"}]}', "a caption must be text (got dict)"),
        ('{"captions": ["a cat", 3]}', "a caption must be text (got int)"),
        ('{"caption": 3}', "a caption must be text (got int)"),
        ('{"caption": {"en": "a cat"}}', "a caption must be text (got dict)"),
    ],
)
def test_a_caption_that_is_no_text_is_broken_json(tmp_path, captions, said):
    write_tar(tmp_path / "a.tar", {"k.jpg": jpeg(0), "k.json": captions.encode()})
    (only,) = read_shard(str(tmp_path / "a.tar"))
    assert (only.problem, only.detail, only.captions) == ("broken json", said, [])


def test_table_rows_of_one_picture_are_its_captions(table):
    loader = opened(table, 23)
    assert loader.num_samples == 23
    seen = {key: set() for key in (f"pictures/{n}.jpg" for n in range(23))}
    for batch in take(loader, 20):
        for key, caption in zip(batch.keys, captions_of(batch), strict=True):
            seen[key].add(caption)
    for number in range(23):
        expected = {f"one, of {number}"} | ({f"two of {number}"} if number < 10 else set())
        assert seen[f"pictures/{number}.jpg"] == expected


def test_tables_in_every_form_give_the_same_pairs(table, tmp_path):
    images = [f"pictures/{n}.jpg" for n in range(23)]
    texts = [f"number {n}" for n in range(23)]
    tsv = "\n".join(["image\ttitle", *(f"{i}\t{t}" for i, t in zip(images, texts, strict=True))])
    (tmp_path / "a.tsv").write_text(tsv)
    (tmp_path / "a.tsv.gz").write_bytes(gzip.compress(tsv.encode()))
    pa.parquet.write_table(pa.table({"image": images, "text": texts}), tmp_path / "a.parquet")
    encoded = [{"bytes": jpeg(n), "path": None} for n in range(23)]
    pa.parquet.write_table(pa.table({"image": encoded, "caption": texts}), tmp_path / "b.parquet")
    batches = {name: next(opened(tmp_path / name, 23)) for name in ("a.tsv", "a.tsv.gz", "a.parquet", "b.parquet")}
    for batch in batches.values():
        assert sorted(captions_of(batch)) == sorted(texts)
    assert same(batches["a.tsv"], batches["a.tsv.gz"])
    assert same(batches["a.tsv"], batches["a.parquet"])
    for caption, picture in zip(captions_of(batches["b.parquet"]), batches["b.parquet"].images, strict=True):
        number = int(caption.split()[1])
        red = np.asarray(open_image(jpeg(number)))[..., 0].mean() / 255
        assert abs(picture[0].mean() * 0.25 + 0.5 - red) < 0.01


@pytest.mark.parametrize("name", ["pairs.csv", "a.tsv", "a.tsv.gz", "a.parquet", "shards/0000.tar"])
def test_the_case_of_a_name_does_not_matter(table, shards, tmp_path, name):
    if name.startswith("a."):
        lines = ["image\ttitle", *(f"pictures/{n}.jpg\tnumber {n}" for n in range(23))]
        (tmp_path / "a.tsv").write_text("\n".join(lines))
        (tmp_path / "a.tsv.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
        columns = zip(*(line.split("\t") for line in lines[1:]), strict=True)
        pa.parquet.write_table(pa.table(dict(zip(("image", "title"), columns, strict=True))), tmp_path / "a.parquet")
    (tmp_path / name).rename(tmp_path / "x")
    lower, upper = tmp_path / name, (tmp_path / name).with_name(Path(name).name.upper())
    batches = []
    for path in (lower, upper):
        (tmp_path / "x").rename(path)
        batches.append(next(opened(path, 8)))
        path.rename(tmp_path / "x")
    assert same(*batches)


def test_a_folder_takes_shards_in_capitals(shards):
    (shards / "0001.tar").rename(shards / "0001.TAR")
    assert [Path(path).name for path in find_shards(shards)] == [
        "0000.tar",
        "0001.TAR",
        *(f"000{n}.tar" for n in (2, 3, 4)),
    ]


def test_captions_that_look_like_numbers_stay_text(tmp_path):
    (tmp_path / "1.jpg").write_bytes(jpeg(1))
    (tmp_path / "a.csv").write_text("image,caption\n1.jpg,007\n")
    assert captions_of(next(opened(tmp_path / "a.csv", 1))) == ["007"]


# ---- bad input -------------------------------------------------------------------------------------------------------


def test_missing_shards_are_named_with_what_is_there(shards):
    with pytest.raises(
        FileNotFoundError, match=r"2 of 3 shards are missing: .*0005\.tar, .*0006\.tar; .*holds 0000\.tar"
    ):
        opened(f"{shards}/{{0004..0006}}.tar")
    with pytest.raises(FileNotFoundError, match=r"no file matches .*/x\*\.tar; .* holds 0000\.tar"):
        opened(f"{shards}/x*.tar")
    with pytest.raises(FileNotFoundError, match=r"contains no \.tar, only shards/"):
        opened(shards.parent)
    with pytest.raises(FileNotFoundError, match="1 of 1 shards are missing"):
        opened(shards / "nowhere" / "0000.tar")


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl", "p.zip", "shard-0"])
def test_a_file_of_an_unknown_kind_is_refused_with_the_known(tmp_path, name):
    (tmp_path / name).write_text("a.jpg a cat\n")
    with pytest.raises(
        ValueError, match=rf"{name} is of unknown type: pass shards \(\.tar, .*a table \(\.csv, .*\.parquet"
    ):
        opened(tmp_path / name)
    with pytest.raises(ValueError, match=f"{name} is of unknown type"):
        opened(f"{tmp_path}/*")


def test_unknown_synthetic_source_lists_the_known():
    with pytest.raises(UnknownName, match=r"did you mean 'digits'.*quickstart, scenes"):
        opened("synthetic:digit")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("cut", ["in a file", "in a header", "gzip"])
def test_a_truncated_shard_is_survived_and_counted(shards, cut, workers):
    path = shards / "0001.tar"
    data = path.read_bytes()
    with tarfile.open(path) as tar:
        middle = tar.getmembers()[12]  # the first file of the fifth sample
    if cut == "gzip":
        path.unlink()
        path = shards / "0001.tar.gz"
        data = gzip.compress(data)[:-200]
    path.write_bytes(data[: middle.offset_data + 10] if cut == "in a file" else data[: middle.offset + 100])
    if cut == "gzip":
        path.write_bytes(data)
    loader = opened(shards, 10, workers=workers)
    seen = {key for batch in take(loader, 30) for key in batch.keys}
    loader.close()
    assert loader.skipped["truncated shard"] >= 3
    (example,) = loader.skipped_examples["truncated shard"]
    assert f"{path} after " in example
    assert {f"{n:04d}" for n in range(8)} | {f"{n:04d}" for n in range(17, 50)} <= seen
    if cut != "gzip":
        assert "after 3 samples" in example or "after 4 samples" in example
        assert not {f"{n:04d}" for n in range(12, 17)} & seen


def test_a_shard_that_vanishes_is_counted(shards):
    loader = opened(shards, 10, cache_mib=0)
    take(loader, 1)
    (shards / "0003.tar").unlink()
    take(loader, 20)
    assert loader.skipped["missing shard"] >= 2
    assert "0003.tar" in loader.skipped_examples["missing shard"][0]


def test_a_file_that_is_no_tar_is_counted(shards):
    (shards / "0009.tar").write_bytes(b"<html>not found</html>" * 100)
    (shards / "0010.tar").write_bytes(b"")
    loader = opened(shards, 10)
    take(loader, 10)
    assert loader.skipped["truncated shard"] >= 2
    examples = loader.skipped_examples["truncated shard"]
    assert {Path(text.split(":")[0]).name for text in examples} == {"0009.tar", "0010.tar"}


BAD = {
    "broken image": {"jpg": b"no picture", "txt": b"x"},
    "image too small": {"jpg": jpeg(0, (1, 1)), "txt": b"x"},
    "no image": {"txt": b"x", "mp3": b"x"},
    "no caption": {"jpg": jpeg(0)},
    "empty caption": {"jpg": jpeg(0), "txt": b" \n"},
    "caption is not utf-8": {"jpg": jpeg(0), "txt": "café".encode("latin-1")},
    "broken json": {"jpg": jpeg(0), "json": b"{"},
}


@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_skipped_is_counted_by_reason_with_examples(shards, workers):
    files = {f"{r.replace(' ', '_')}.{s}": data for r, suffixes in BAD.items() for s, data in suffixes.items()}
    write_tar(shards / "bad.tar", files)
    loader = opened(shards, 50, workers=workers)
    batches = take(loader, 8)
    loader.close()
    assert set(loader.skipped) == set(BAD)
    for reason, examples in loader.skipped_examples.items():
        assert len(examples) == 1
        assert examples[0].startswith(reason.replace(" ", "_"))
        assert 2 <= loader.skipped[reason] <= 16
    assert not {key for batch in batches for key in batch.keys} & {reason.replace(" ", "_") for reason in BAD}


def test_a_picture_of_400_million_pixels_is_skipped(shards):
    from test_data_images import huge_png

    write_tar(shards / "bad.tar", {"huge.png": huge_png(20_000, 20_000), "huge.txt": b"x"})
    loader = opened(shards, 60)
    take(loader, 2)
    assert loader.skipped["image too large"] >= 1
    assert loader.skipped_examples["image too large"][0].startswith("huge: ")


def test_blank_captions_among_others_are_never_drawn(tmp_path):
    files = {"a.jpg": jpeg(1), "a.json": json.dumps({"captions": ["", "full", "  "]}).encode()}
    loader = opened(write_tar(tmp_path / "a.tar", files), 1)
    assert {captions_of(batch)[0] for batch in take(loader, 30)} == {"full"}


def test_a_caption_of_ten_thousand_words_is_cut_by_the_tokenizer(tmp_path):
    import open_clip

    tokenizer = open_clip.SimpleTokenizer()
    text = " ".join(["word"] * 10_000)
    path = write_tar(tmp_path / "a.tar", {"a.jpg": jpeg(1), "a.txt": text.encode()})
    batch = next(opened(path, 1, tokenize=tokenizer))
    assert batch.texts.shape == (1, 77)
    assert batch.texts[0, -1] == tokenizer.eot_token_id


@pytest.mark.parametrize("workers", [0, 1])
def test_a_pass_without_a_usable_sample_is_an_error_with_the_counts(tmp_path, workers):
    files = {f"{n}.{s}": b"broken" for n in range(4) for s in ("jpg", "txt")}
    del files["3.txt"]
    loader = opened(write_tar(tmp_path / "a.tar", files), 2, workers=workers)
    with pytest.raises(NoUsableSamples, match=r"no usable sample: 3 x broken image, 1 x no caption; for example"):
        next(loader)


def test_more_readers_than_samples_is_an_error_that_says_so(tmp_path):
    path = write_tar(tmp_path / "a.tar", sample(1) | sample(2))
    with pytest.raises(NoUsableSamples, match="it holds none; 4 readers"):
        next(opened(path, 1, rank=3, world_size=4))


def _with_a_bad_shard(folder: Path, data: bytes) -> Path:
    for shard in range(3):
        write_tar(folder / f"{shard}.tar", sample(shard))
    (folder / "3.tar").write_bytes(data)
    return folder


def _with_a_missing_picture(folder: Path) -> Path:
    for number in range(3):
        (folder / f"{number:04d}").write_bytes(jpeg(number))
    (folder / "pairs.csv").write_text("image,caption\n" + "".join(f"{n:04d},number {n}\n" for n in range(4)))
    return folder / "pairs.csv"


@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (4, 0), (2, 2)])
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda folder: _with_a_bad_shard(folder, b"<html>not found</html>" * 40), "truncated shard"),
        (lambda folder: _with_a_bad_shard(folder, b""), "truncated shard"),
        (_with_a_missing_picture, "missing image file"),
    ],
    ids=["damaged shard", "empty shard", "missing picture"],
)
def test_a_reader_dealt_only_what_is_bad_goes_on_to_the_next_pass(tmp_path, make, reason, world_size, workers):
    source = make(tmp_path)
    keys, skipped, passes = Counter(), Counter(), []
    for rank in range(world_size):
        loader = opened(source, 1, workers=workers, rank=rank, world_size=world_size)
        keys.update(key for batch in take(loader, 120 // world_size) for key in batch.keys)
        skipped += loader.skipped
        passes += [state["pass"] for state in loader.cursor["states"]]
        loader.close()
    assert set(keys) == {f"{n:04d}" for n in range(3)}
    assert chisquare(list(keys.values())).pvalue > 1e-3  # none more often than the others
    assert set(skipped) == {reason}
    assert min(passes) <= skipped[reason] <= max(passes) + 1  # in every pass one of the readers meets it


def test_a_share_that_is_never_usable_is_an_error_that_says_whose_and_what_would_do(tmp_path, monkeypatch):
    (tmp_path / "a.csv").write_text("image,caption\n" + "nowhere.jpg,x\nnor here.jpg,y\n")
    said = r"reader 1's share of a\.csv 2 gave no usable sample, {} passes in a row: {} x missing image file; for exam"
    with pytest.raises(NoUsableSamples, match=said.format(100, 100) + ".*2 readers .*: take fewer, or mend the source"):
        next(opened(tmp_path / "a.csv", 1, rank=1, world_size=2))
    monkeypatch.setattr(stream, "MOST_BARREN_SAMPLES", 7)  # of a large source the passes in a row take too long
    with pytest.raises(NoUsableSamples, match=said.format(7, 7)):
        next(opened(tmp_path / "a.csv", 1, rank=1, world_size=2))


def test_latin1_table_names_file_byte_and_remedy(table):
    text = "image,caption\n" + "pictures/0.jpg,un café\n" * 3
    for name, data in (("a.csv", text.encode("latin-1")), ("b.csv.gz", gzip.compress(text.encode("latin-1")))):
        path = table.with_name(name)
        path.write_bytes(data)
        position = text.index("é")
        with pytest.raises(ValueError, match=rf"{name} is not utf-8: byte 0xe9 at position {position} \(line 2\)"):
            opened(path)
        with pytest.raises(ValueError, match="encoding='latin-1'"):
            opened(path)
        batch = next(opened(path, 1, table_format=TableFormat(encoding="latin-1")))
        assert captions_of(batch) == ["un café"]


def test_tables_that_can_not_be_used_say_why(tmp_path):
    (tmp_path / "a.csv").write_text("picture,words\nx.jpg,hello\n")
    with pytest.raises(ValueError, match=r"no image column: looked for image, .*its columns are picture, words"):
        opened(tmp_path / "a.csv")
    with pytest.raises(ValueError, match=r"no caption column: looked for wordz, its columns are picture, words"):
        opened(tmp_path / "a.csv", table_format=TableFormat("picture", "wordz"))
    (tmp_path / "b.csv").write_text("image,caption\na,b\na,b,c\n")
    with pytest.raises(ValueError, match=r"b\.csv is not a readable table: .*Expected 2 columns, got 3"):
        opened(tmp_path / "b.csv")
    (tmp_path / "c.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ValueError, match=r"c\.parquet is not a readable parquet file"):
        opened(tmp_path / "c.parquet")
    with pytest.raises(FileNotFoundError, match=r"no such table: .*d\.csv"):
        opened(tmp_path / "d.csv")


TEXTS = [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())]


@pytest.mark.parametrize("text", TEXTS, ids=str)
@pytest.mark.parametrize(
    ("captions", "expected"),
    [
        (["a", "b", None, "d"], [["a", "d"], ["b"], []]),
        ([["a", "A"], ["b"], None, ["d", None]], [["a", "A", "d"], ["b"], []]),
        ([7, 8, 9, 10], [["7", "10"], ["8"], ["9"]]),
        ([0.5, 1.5, None, 2.5], [["0.5", "2.5"], ["1.5"], []]),
        ([[7], [8, 9], [], [10]], [["7", "10"], ["8", "9"], []]),
    ],
)
def test_captions_of_a_path_are_together_in_every_type_of_column(tmp_path, text, captions, expected):
    images = pa.array(["0.jpg", "1.jpg", "2.jpg", "0.jpg"]).cast(text)
    captions = pa.array(captions)
    if pa.types.is_string(captions.type):
        captions = captions.cast(text)
    pa.parquet.write_table(pa.table({"image": images, "caption": captions}), tmp_path / "a.parquet", row_group_size=2)
    for resident_bytes in (0, 2**20):
        samples = table_source(tmp_path / "a.parquet", TableFormat(), seed=0, resident_bytes=resident_bytes).samples
        assert [(s.key, s.captions) for s in samples] == list(zip(["0.jpg", "1.jpg", "2.jpg"], expected, strict=True))


@pytest.mark.parametrize(
    ("images", "captions", "said"),
    [
        ([1, 2], ["a", "b"], r'images must be paths, encoded bytes or \{"bytes", "path"\} \(got int64'),
        (["a", "b"], [{"raw": "x"}] * 2, r"captions must be texts or lists of texts \(got struct<"),
        (["a", "b"], [[{"raw": "x"}]] * 2, r"captions must be texts or lists of texts \(got list<"),
        ([b"a", b"b"], [b"\xff", b"b"], r"captions must be texts .*got binary.*UTF8"),
    ],
)
def test_a_parquet_column_that_holds_something_else_is_told(tmp_path, images, captions, said):
    pa.parquet.write_table(pa.table({"image": images, "caption": captions}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=rf"a\.parquet: {said}"):
        opened(tmp_path / "a.parquet")


def test_more_than_2_gib_of_pictures_are_read_in_their_chunks(tmp_path, monkeypatch):
    # As one array their ends don't fit 32 bits. The gigabytes are zeros that nobody reads, so they take no memory.
    ends = np.array([0, 2**30], np.int32)
    gigabyte = pa.Array.from_buffers(
        pa.binary(), 1, [None, pa.py_buffer(ends), pa.py_buffer(np.zeros(2**30, np.uint8))]
    )
    images = pa.chunked_array([gigabyte, gigabyte, gigabyte, pa.array([jpeg(3)], pa.binary())])
    table = pa.table({"image": images, "caption": pa.chunked_array([["a", "b", "c"], ["d"]])})
    pa.parquet.write_table(pa.table({"image": [b""], "caption": [""]}), tmp_path / "a.parquet")
    monkeypatch.setattr(pa.parquet, "read_table", lambda *args, **kwargs: table)
    samples = table_source(tmp_path / "a.parquet", TableFormat(), seed=0, resident_bytes=0).samples
    assert len(samples) == 4
    assert (samples[3].key, samples[3].image, samples[3].captions) == ("row 3", jpeg(3), ["d"])


@pytest.mark.parametrize("name", ["a.csv", "a.parquet"])
def test_every_row_without_a_picture_is_counted(tmp_path, name):
    (tmp_path / "0.jpg").write_bytes(jpeg(0))
    images, captions = ["0.jpg", None, "", None, "0.jpg", ""], list("abcdef")
    lines = [f"{image or ''},{caption}\n" for image, caption in zip(images, captions, strict=True)]
    (tmp_path / "a.csv").write_text("image,caption\n" + "".join(lines))
    pa.parquet.write_table(pa.table({"image": images, "caption": captions}), tmp_path / "a.parquet")
    loader = opened(tmp_path / name, 1)
    take(loader, 30)
    assert loader.num_samples == 5
    passes = loader.cursor["states"][0]["pass"]
    assert 4 * passes <= loader.skipped["no image"] <= 4 * (passes + 1)
    assert set(loader.skipped_examples["no image"]) == {f"row {n}" for n in (1, 2, 3, 5)}


@pytest.mark.parametrize("kind", ["csv", "parquet"])
@pytest.mark.parametrize(
    ("header", "named"),
    [
        (("Image", "Caption"), {}),
        (("image", " caption"), {}),
        (("FilePath ", "TITLE"), {}),
        (("url", "alt_text"), {"image_column": "url", "caption_column": "alt_text"}),
        (("Url", "Alt_Text "), {"image_column": "url", "caption_column": "alt_text"}),
        (("Image", "caption", "CAPTION"), {}),  # the one that is named exactly so
    ],
)
def test_columns_are_found_in_any_case_or_by_their_given_name(tmp_path, header, named, kind):
    (tmp_path / "1.jpg").write_bytes(jpeg(1))
    row = ["1.jpg", "a cat", "another"][: len(header)]
    (tmp_path / "a.csv").write_text(",".join(header) + "\n" + ",".join(row) + "\n")
    pa.parquet.write_table(
        pa.table({name: [value] for name, value in zip(header, row, strict=True)}), tmp_path / "a.parquet"
    )
    assert captions_of(next(opened(tmp_path / f"a.{kind}", 1, table_format=TableFormat(**named)))) == ["a cat"]


def test_a_known_name_as_it_is_comes_before_one_in_another_case(tmp_path):
    (tmp_path / "1.jpg").write_bytes(jpeg(1))
    (tmp_path / "a.csv").write_text("Image,filepath,Caption,title\nhttp://x/1,1.jpg,no,a cat\n")
    assert captions_of(next(opened(tmp_path / "a.csv", 1))) == ["a cat"]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_paths_of_a_table_are_in_the_order_that_arrow_groups_them(tmp_path, kind):
    """Runs of older versions go on from places in it."""
    names = [f"{n % 150:03d}.jpg" for n in np.random.default_rng(0).permutation(300)]
    table = pa.table({"image": names, "caption": [f"words {n}" for n in range(300)]})
    pa.parquet.write_table(table.set_column(0, "image", table["image"].cast(kind)), tmp_path / "a.parquet")
    source = table_source(tmp_path / "a.parquet", TableFormat(), seed=0, resident_bytes=0)
    wanted = table.group_by("image", use_threads=False).aggregate([("caption", "list")])
    assert (
        [sample.key for sample in source.samples] == wanted["image"].to_pylist() != sorted(set(names), key=names.index)
    )
    assert [sample.captions for sample in source.samples] == wanted["caption_list"].to_pylist()


def test_columns_that_can_not_be_told_apart_are_not_guessed(tmp_path):
    (tmp_path / "a.csv").write_text("image,Caption,CAPTION\n1.jpg,a,b\n")
    with pytest.raises(
        ValueError, match=r"no caption column: .* its columns are image, Caption, CAPTION\. Name it: --set"
    ):
        opened(tmp_path / "a.csv")


def test_messages_name_the_setting_that_would_do(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes("url,words\n1.jpg,un café\n".encode("latin-1"))
    (tmp_path / "1.jpg").write_bytes(jpeg(1))
    config = apply_overrides(TrainConfig(), [f"source={path}", "batch_size=1"])
    for setting, value in (("image_column", "url"), ("caption_column", "words"), ("encoding", "latin-1")):
        with pytest.raises(ValueError, match=f"--set data.{setting}="):
            open_stream(config, blueprint(config), 16, 0, 1)
        config = apply_overrides(config, [f"data.{setting}={value}"])
    assert next(open_stream(config, blueprint(config), 16, 0, 1)).keys == ["1.jpg"]
    with pytest.raises(
        ValueError, match=r"a\.csv: unknown encoding: klingon; choose one that Python knows, such as utf-8"
    ):
        open_stream(apply_overrides(config, ["encoding=klingon"]), blueprint(config), 16, 0, 1)


def test_rows_without_picture_or_caption_are_counted(table):
    lines = ["image,caption", "pictures/0.jpg,fine", "nowhere.jpg,lost", "pictures/1.jpg,", ",no picture"]
    table.write_text("\n".join(lines) + "\n")
    loader = opened(table, 2)
    take(loader, 4)
    assert set(loader.skipped) == {"missing image file", "empty caption", "no image"}
    assert loader.skipped_examples["missing image file"][0].startswith("nowhere.jpg: ")


def test_rank_outside_the_world():
    with pytest.raises(ValueError, match=r"rank must be from 0 to world_size - 1 \(got 2 of 2"):
        opened("synthetic:digits", rank=2, world_size=2)


# ---- real data -------------------------------------------------------------------------------------------------------


def test_flickr8k_shards(shared):
    folder = shared / "data" / "captions"
    loader = opened(folder / "train", 200)
    assert loader.num_samples == 6000
    with gzip.open(folder / "captions_train_all5.tsv.gz", "rt", encoding="utf-8") as file:
        known = {(key, caption[:60].strip()) for key, _, _, caption in (line.split("\t") for line in list(file)[1:])}
    for batch in take(loader, 3):
        assert all((key, text.strip()) in known for key, text in zip(batch.keys, captions_of(batch), strict=True))
    assert not loader.skipped
