"""No pair twice in a batch: across passes, workers and processes; what repeats otherwise is counted and told."""

import io
import json
import tarfile
from collections import Counter

import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from ssmclip.config import ModelConfig, TrainConfig, apply_overrides
from ssmclip.data.pairs.loader import open_pairs
from ssmclip.data.pairs.stream import BatchTooLarge
from ssmclip.rows import read_rows
from ssmclip.train import train
from ssmclip.train.checkpoint import checkpoints
from ssmclip.train.objective import OBJECTIVES, Objective, objective
from ssmclip.train.progress import Repeats


def png(number):
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (number, 255 - number, 0)).save(file, "png")
    return file.getvalue()


def write_table(folder, count, empty=()):
    """A csv of `count` pairs; those of `empty` have no caption and can't be used."""
    for number in range(count):
        (folder / f"{number}.png").write_bytes(png(number))
    lines = [f"{number}.png,{'' if number in empty else f'caption {number}'}\n" for number in range(count)]
    (folder / "pairs.csv").write_text("image,caption\n" + "".join(lines))
    return folder / "pairs.csv"


def write_shards(folder, sizes, empty=()):
    number = 0
    for shard, size in enumerate(sizes):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for _ in range(size):
                caption = b"" if number in empty else f"caption {number}".encode()
                for name, content in ((f"{number:04}.png", png(number)), (f"{number:04}.txt", caption)):
                    entry = tarfile.TarInfo(name)
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
                number += 1
    return folder


def read(source, batch_size, rank=0, world_size=1, workers=0, cursor=None, **more):
    return open_pairs(
        source,
        transform=lambda picture, generator: torch.rand(1, generator=generator),
        tokenize=lambda texts: torch.zeros(len(texts), 1, dtype=torch.long),
        batch_size=batch_size,
        seed=3,
        rank=rank,
        world_size=world_size,
        workers=workers,
        cursor=cursor,
        shuffle_buffer=7,
        **more,
    )


def keys_of(loader, count):
    return [next(loader).keys for _ in range(count)]


def read_steps(source, batch, world, workers, count, **more):
    """The keys of each step's batch, those of all ranks together."""
    ranks = [keys_of(read(source, batch, rank, world, workers, **more), count) for rank in range(world)]
    return [[key for part in parts for key in part] for parts in zip(*ranks, strict=True)]


SOURCES = {
    "table": lambda folder: write_table(folder, 47, empty={5, 6, 7}),
    "a shard or more for each reader": lambda folder: write_shards(folder, [9, 11, 7, 8, 9, 10], empty={0, 1, 30}),
    "fewer shards than readers": lambda folder: write_shards(folder, [53], empty={0, 6, 12}),
}
USABLE = dict(zip(SOURCES, (44, 51, 50), strict=True))


@pytest.mark.parametrize(("world", "workers", "batch"), [(1, 0, 8), (2, 0, 5), (2, 2, 3)])
@pytest.mark.parametrize("kind", SOURCES)
def test_no_pair_is_twice_in_a_step_whatever_reads_it(tmp_path, kind, world, workers, batch):
    source = SOURCES[kind](tmp_path)

    steps = read_steps(source, batch, world, workers, 50, distinct=True)
    assert all(len(set(step)) == world * batch for step in steps)
    seen = Counter(key for step in steps for key in step)
    assert len(seen) == USABLE[kind]
    if world == 1:  # as often as there were passes, but for the last, and for what waits for a batch to come
        assert max(seen.values()) - min(seen.values()) <= 1


@pytest.mark.parametrize("world", [1, 2])
def test_without_the_option_pairs_repeat(tmp_path, world):
    """In one reader, and between two whose passes drift apart, as one has bad samples."""
    steps = read_steps(write_table(tmp_path, 21, empty={0}), 8, world, 0, 60)
    assert any(len(set(step)) < len(step) for step in steps)


@pytest.mark.parametrize("kind", SOURCES)
def test_each_pair_is_in_one_batch_in_every_pass_in_a_new_order(tmp_path, kind):
    batches = keys_of(read(SOURCES[kind](tmp_path), 40, distinct=True), 24)
    counts = Counter()
    for number, keys in enumerate(batches, 1):
        counts.update(keys)
        passes = 40 * number / USABLE[kind]
        assert max(counts.values()) <= passes + 1
        assert passes - 2 <= min(counts.values()) or number == 1
    assert len(counts) == USABLE[kind]
    assert len({tuple(keys) for keys in batches}) == len(batches)


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_goes_on_where_it_stood(tmp_path, kind, workers):
    source, batch_size = SOURCES[kind](tmp_path), 20 if workers else 40  # most of what a reader has
    loader = read(source, batch_size, workers=workers, distinct=True)
    cursors, batches = [json.loads(json.dumps(loader.cursor))], []
    for _ in range(16):
        batches.append(next(loader))
        cursors.append(json.loads(json.dumps(loader.cursor)))
    if "fewer" not in kind:  # one shard, shuffled a little: its end and its beginning are never in one batch
        assert any("held" in state for cursor in cursors for state in cursor["states"])
    for place in range(12) if not workers else (3, 7, 9):
        again = read(source, batch_size, workers=workers, cursor=cursors[place], distinct=True)
        for expected in batches[place : place + 4]:
            batch = next(again)
            assert batch.keys == expected.keys
            assert torch.equal(batch.images, expected.images)
        assert again.skipped == Counter(cursors[place + 4]["skipped"])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_larger_than_its_readers_share_is_refused(tmp_path, workers):
    source = write_table(tmp_path, 20, empty={0})
    told = (
        r"distinct samples must have as many as its reader \(got 20, .*pairs.csv 20 (has 19|gives reader 0 \d+)\): make"
    )
    with pytest.raises(BatchTooLarge, match=told):
        next(read(source, 20, workers=workers, distinct=True))
    assert len(set(next(read(source, 19, distinct=True)).keys)) == 19


def test_a_cursor_belongs_to_one_way_of_reading_and_older_ones_still_fit(tmp_path):
    source = write_table(tmp_path, 20)
    loader = read(source, 8)
    first, cursor, second = next(loader), loader.cursor, next(loader)
    with pytest.raises(ValueError, match=r"distinct must be the cursor's, False \(got True\)"):
        read(source, 8, cursor=cursor, distinct=True)
    del cursor["distinct"]
    assert next(read(source, 8, cursor=cursor)).keys == second.keys != first.keys


def test_repeats_are_counted_over_all_processes():
    """Two processes' parts of three steps; a Counter of each whole batch is the truth."""
    parts = [["abcd", "efgh", "aaab"], ["dexy", "ijkl", "abcd"]]
    truth = sum(sum(Counter(a + b).values()) - len(Counter(a + b)) for a, b in zip(*parts, strict=True))
    counters = [Repeats(10) for _ in parts]
    for repeats, steps in zip(counters, parts, strict=True):
        for keys in steps:
            repeats.add(list(keys))
    sent = []
    alone = counters[1].look(lambda own: (sent.append(own), own)[1], torch.device("cpu"))
    assert alone == 10  # none is twice in its own parts
    assert counters[0].look(lambda own: torch.cat([own, sent[0]]), torch.device("cpu")) == 10 + truth == 15
    assert counters[0].look(lambda own: pytest.fail("nothing is new"), torch.device("cpu")) == 15
    alone = Repeats()
    alone.add(list("abca"))
    assert alone.look(Accelerator(cpu=True).gather, torch.device("cpu")) == 1


def config(source, *overrides):
    changes = {"embed_dim": 16, "vision_cfg": {"timm_model_name": "test_vmamba"}}
    changes["text_cfg"] = {"width": 16, "heads": 2, "layers": 1}
    usual = [f"source={source}", "steps=4", "batch_size=16", "warmup_steps=0", "image_sizes=[[0, 32]]", "device=cpu"]
    usual += ["tensorboard=false", "progress=false", "logging.every=1", "checkpoint.every=2"]
    return apply_overrides(TrainConfig(model=ModelConfig(changes=changes)), [*usual, *overrides])


def repeated(out):
    return [row.value for row in read_rows(out / "rows.jsonl")[1] if row.metric == "samples_repeated"]


def test_training_counts_them_and_warns_once(tmp_path, capsys):
    source = write_table(tmp_path, 8)
    train(config(source), tmp_path / "run")
    assert repeated(tmp_path / "run") == [8, 16, 24, 32]  # of 16 pairs each, 8 are there a second time
    told = capsys.readouterr().err
    assert told.count("warning: 50.0% of the pairs were in their batch already") == 1
    assert "data.distinct=true, or lower batch_size" in told
    for folder in checkpoints(tmp_path / "run")[1:]:
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    train(config(source), tmp_path / "run", resume=True)
    assert repeated(tmp_path / "run") == [8, 16, 24, 32]


def test_training_with_distinct_pairs_has_none(tmp_path, capsys):
    train(config(write_table(tmp_path, 20), "batch_size=8", "distinct=true", "steps=7"), tmp_path / "run")
    assert repeated(tmp_path / "run") == [0] * 7
    assert "warning" not in capsys.readouterr().err


def test_a_few_repeats_between_passes_are_counted_and_not_worth_a_warning(tmp_path, capsys):
    """Two in 200: less than the 1 % that is worth one."""
    repeats = Repeats()
    loader = read(write_table(tmp_path, 100), 40)
    for keys in keys_of(loader, 5):
        repeats.add(keys)
    truth = repeats.look(lambda own: own, torch.device("cpu"))
    train(config(tmp_path / "pairs.csv", "batch_size=40", "steps=5", "seed=3", "shuffle_buffer=7"), tmp_path / "run")
    assert repeated(tmp_path / "run")[-1] == truth
    assert ("warning" in capsys.readouterr().err) == (truth > 2)


def test_an_objective_without_negatives_is_not_warned_about(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(OBJECTIVES, "_items", dict(OBJECTIVES._items))

    @objective("distance")
    class Distance(Objective):
        def forward(self, image_features, text_features, **_):
            return (image_features - text_features).square().sum(1).mean()

    train(config(write_table(tmp_path, 8), "kind=distance"), tmp_path / "run")
    assert repeated(tmp_path / "run") == [8, 16, 24, 32]
    assert "warning" not in capsys.readouterr().err
