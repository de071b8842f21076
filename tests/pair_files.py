"""Small sources of training pairs, and a stream over them, for several test files."""

import io
import json
import tarfile
from pathlib import Path

import torch
from PIL import Image

from ssmclip.data.pairs.loader import open_pairs, train_transform

TRANSFORM = train_transform(8, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), flip=True)


def png(number: int, size: tuple[int, int] = (12, 10)) -> bytes:
    """A picture whose colour says its number."""
    out = io.BytesIO()
    Image.new("RGB", size, (number * 7 % 256, number * 31 % 256, number % 256)).save(out, "PNG")
    return out.getvalue()


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def numbered(numbers, name: str = "") -> dict[str, bytes]:
    """Files of one sample for each number, with the caption NAME NUMBER."""
    pairs = [(f"{n:04d}", {"png": png(n), "txt": f"{name} {n}".encode()}) for n in numbers]
    return {f"{key}.{suffix}": data for key, files in pairs for suffix, data in files.items()}


def described(number: int, **fields) -> dict[str, bytes]:
    return {f"{number:04d}.png": png(number), f"{number:04d}.json": json.dumps(fields).encode()}


def tokenize(texts: list[str]) -> torch.Tensor:
    """The caption's bytes, padded: a caption can be read back from its tokens."""
    rows = [list(text.encode()[:40]) for text in texts]
    return torch.tensor([row + [0] * (40 - len(row)) for row in rows])


def captions_of(batch) -> list[str]:
    return [bytes(v for v in row if v).decode() for row in batch.texts.tolist()]


def opened(source, batch_size=4, **settings):
    settings = {"transform": TRANSFORM, "tokenize": tokenize, "seed": 0, **settings}
    return open_pairs(source, batch_size=batch_size, **settings)


def take(loader, count: int) -> list:
    return [next(loader) for _ in range(count)]


def same(a, b) -> bool:
    return a.keys == b.keys and torch.equal(a.images, b.images) and torch.equal(a.texts, b.texts)


def assert_continues(open_again, before: int = 3, after: int = 5) -> None:
    """A stream stopped after each of a few batches goes on, from its cursor as JSON, as if it had not been."""
    whole = open_again(None)
    batches = take(whole, before + after)
    for stopped_after in range(1, before + 1):
        first = open_again(None)
        take(first, stopped_after)
        cursor = json.loads(json.dumps(first.cursor))
        first.close()
        second = open_again(cursor)
        for i in range(stopped_after, before + after):
            assert same(next(second), batches[i]), (stopped_after, i)
        assert json.dumps(second.cursor, sort_keys=True) == json.dumps(whole.cursor, sort_keys=True)
        second.close()
    whole.close()
