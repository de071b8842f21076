"""Pairs through Hugging Face's `datasets`: each once a pass, resumed bit for bit, whatever reads them."""

import json
import sys
from collections import Counter
from itertools import pairwise

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest

from pair_files import captions_of, opened, png, same, take, write_tar
from ssmclip.data.pairs.loader import TableFormat, Weighted


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)  # else a second for each iterator


@pytest.fixture
def folder(tmp_path):
    """Five parquet files with 23 pairs, as `Dataset.push_to_hub` writes them."""
    numbers, path = list(range(23)), tmp_path / "pairs"
    path.mkdir()
    for i, part in enumerate([numbers[:4], numbers[4:9], numbers[9:10], numbers[10:20], numbers[20:]]):
        table = {
            "image": [png(n) for n in part],
            "caption": [f"c {n}" for n in part],
            "title": [f"t {n}" for n in part],
        }
        data = datasets.Dataset.from_dict(table).cast_column("image", datasets.Image())
        data.to_parquet(path / f"train-{i}.parquet", batch_size=2)
    return path


def numbers(batch) -> list[int]:
    return [int(caption.split()[1]) for caption in captions_of(batch)]


@pytest.mark.parametrize(("workers", "world"), [(0, 1), (2, 1), (2, 2), (0, 7)])
def test_every_pair_once_a_pass(folder, workers, world):
    seen = Counter()
    for rank in range(world):
        loader = opened(f"hf-datasets:{folder}", 1, workers=workers, rank=rank, world_size=world, shuffle_buffer=6)
        done, turn = [False] * max(workers, 1), 0
        while not all(done):
            batch = next(loader)
            done[turn] = loader.cursor["states"][turn]["pass"] >= 1
            seen.update(numbers(batch) if not done[turn] else [])
            turn = (turn + 1) % len(done)
        loader.close()
    assert seen == dict.fromkeys(range(23), 1)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("settings", [{}, {"distinct": True}, {"caption_shares": {"caption": 0.5, "title": 0.5}}])
def test_it_continues_bit_for_bit(folder, workers, settings):
    """Not compared by cursors: the states of `datasets` have more than one form for one place."""
    source, settings = f"hf-datasets:{folder}", {"workers": workers, "shuffle_buffer": 3, **settings}
    whole = opened(source, 2, **settings)
    batches, cursor = take(whole, 30), None
    whole.close()
    for start, stop in pairwise([0, 1, 2, 5, 9, 10, 17, 30]):
        loader = opened(source, 2, cursor=cursor, **settings)
        assert all(same(a, b) for a, b in zip(take(loader, stop - start), batches[start:stop], strict=True)), start
        cursor = json.loads(json.dumps(loader.cursor))
        loader.close()


def test_passes_are_ordered_differently_and_windows_are_shuffled(folder):
    first, second = take(opened(f"hf-datasets:{folder}", 23, shuffle_buffer=8), 2)
    assert sorted(numbers(first)) == sorted(numbers(second)) == list(range(23))
    assert numbers(first) != numbers(second)
    stretch = numbers(first)[:8]
    assert stretch != sorted(stretch)


def test_pictures_and_captions_are_those_of_the_file(folder):
    table = pa.parquet.read_table(folder)
    read = {number: data["bytes"] for number, data in enumerate(table["image"].to_pylist())}
    alone = {}
    for number, data in read.items():
        (folder.parent / f"{number}.png").write_bytes(data)
        alone[number] = data
    assert all(alone[n] == png(n) for n in range(23))
    for batch in take(opened(f"hf-datasets:{folder}#train", 6, transform=lambda image, _: _pixel(image)), 10):
        for number, image in zip(numbers(batch), batch.images, strict=True):
            assert image[:, 0, 0].tolist() == [number * 7 % 256, number * 31 % 256, number % 256]


def test_in_a_mixture_and_with_columns_by_name(folder, tmp_path):
    other = write_tar(tmp_path / "o.tar", {"1.png": png(1), "1.txt": b"o 1"})
    parts = [Weighted(f"hf-datasets:{folder}", 1, "hub"), Weighted(str(other), 1, "tar")]
    loader = opened(parts, 8)
    take(loader, 10)
    assert set(loader.drawn) == {"hub", "tar"}
    assert min(loader.drawn.values()) > 20
    batch = next(opened(f"hf-datasets:{folder}", 4, table_format=TableFormat(caption_column="title")))
    assert all(caption.startswith("t ") for caption in captions_of(batch))


def test_a_broken_picture_and_an_empty_caption_are_counted(tmp_path):
    rows = {"image": [png(0), b"none", None], "caption": ["c 0", "c 1", "c 2"]}
    table = pa.table({"image": [{"bytes": data, "path": None} for data in rows["image"]], "caption": rows["caption"]})
    (tmp_path / "p").mkdir()
    pa.parquet.write_table(table, tmp_path / "p" / "train.parquet")
    loader = opened(f"hf-datasets:{tmp_path / 'p'}", 1)
    assert {n for batch in take(loader, 4) for n in numbers(batch)} == {0}
    assert set(loader.skipped) == {"broken image", "no image"}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("{}/nowhere", "hf-datasets:.*nowhere cannot be opened"),
        ("{}#validation", "#validation cannot be opened"),
        ("{}/empty", "hf-datasets:.*empty cannot be opened"),
    ],
)
def test_what_is_not_there_is_named(folder, name, said):
    (folder / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=said):
        opened(f"hf-datasets:{name.format(folder)}")


def test_columns_that_are_missing_and_settings_that_do_not_fit(folder):
    with pytest.raises(ValueError, match="has no caption column: looked for label, its columns are image, caption"):
        opened(f"hf-datasets:{folder}", table_format=TableFormat(caption_column="label"))
    with pytest.raises(ValueError, match=r"cannot be resampled: set data\.resample=false"):
        opened(f"hf-datasets:{folder}", resample=True)


def test_without_the_package_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"needs the package datasets: pip install 'ssmclip\[datasets\]'"):
        opened("hf-datasets:somebody/something")


def _pixel(image):
    import torch

    return torch.tensor(image.getpixel((0, 0))).view(3, 1, 1).expand(3, 2, 2).float()


def test_two_streams_of_one_seed_are_the_same(folder):
    a, b = (take(opened(f"hf-datasets:{folder}", 5), 6) for _ in range(2))
    assert all(map(same, a, b))
