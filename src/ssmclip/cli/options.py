"""Options shared by several commands. Argparse shows the message of an ArgumentTypeError, and of no other error."""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ssmclip.config.lists import split_label, split_list
from ssmclip.rows.precision import FLOAT32, PRECISIONS

# What every command takes as a model: the grammar of `ssmclip.models.names`.
MODEL = (
    "the name of a CLIP; a run or checkpoint folder; a checkpoint file; open_clip:NAME/PRETRAINED; timm:NAME.TAG; or "
    "hf-hub:OWNER/NAME[/FILE]"
)
STANDARD_INPUT = "-"
MODELS = f"models, separated by commas; LABEL=MODEL sets the name used in the rows. A model is {MODEL}"


def add_device(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--device", type=device, default="cpu", help="device to run on: cpu, cuda, cuda:1 ... (default: %(default)s)"
    )


def add_precision(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default=FLOAT32,
        help="arithmetic of the network; auto: bfloat16 where the device computes it natively, else float32 "
        "(default: %(default)s)",
    )


def device(name: str) -> str:
    """Return the name of an available device. Only "cpu" is accepted without importing torch, which takes a second.

    Raises ArgumentTypeError.
    """
    if name == "cpu":
        return name
    import torch

    try:
        found = torch.device(name)
        if found.type != "cuda":  # there a first tensor takes memory for good, also from a process that measures it
            torch.zeros(1, device=found).item()
    except (RuntimeError, AssertionError, ImportError) as error:  # whatever a build without that device says
        raise ArgumentTypeError(
            f"device must be cpu, cuda or cuda:1 (got {name!r}: {str(error).split('. ')[0]})"
        ) from error
    count = torch.cuda.device_count()
    if found.type == "cuda" and (found.index or 0) >= count:
        raise ArgumentTypeError(f"device {name} does not exist: this machine has {count} CUDA devices; use cpu")
    return name


def image_size(text: str) -> int | tuple[int, int]:
    """Parse an image size for argparse (see `parse_image_size`). Raises ArgumentTypeError."""
    try:
        return parse_image_size(text)
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from error


def labelled(models: str) -> dict[str, str]:
    r"""Return label -> model, from "A,B" or "LABEL=A,OTHER=B"; a folder's label is its name.

    A path that exists is taken as it is, with commas and equal signs in it; other commas and equal signs that belong to
    a name or label are written with a backslash before them.
    Raises ValueError for no models and for equal labels.

    >>> labelled("CLIP-VMamba-S,runs/first/,mine=runs/second")
    {'CLIP-VMamba-S': 'CLIP-VMamba-S', 'first': 'runs/first/', 'mine': 'runs/second'}
    """

    def exists(name: str) -> bool:
        return bool(name) and os.path.exists(_file_of(name))

    def is_item(text: str) -> bool:
        label, name = split_label(text, exists)
        return "," not in label and exists(name)

    labels: dict[str, str] = {}
    for part in split_list(models, is_item):
        label, name = split_label(part, exists)
        label = label or Path(name).name
        if label in labels:
            raise ValueError(
                f"{labels[label]} and {name} are both called {label!r}: give one a label, as in LABEL={name}"
            )
        labels[label] = name
    if not labels:
        raise ValueError("no model given: name at least one")
    return labels


def _file_of(name: str) -> str:
    """The path in a model's name: all of it, or what follows NAME/ in open_clip:NAME/FILE and timm:NAME/FILE."""
    start, _, file = name.partition("/")
    return file if start.startswith(("open_clip:", "timm:")) else name


def task_list(tasks: str) -> list[str]:
    """Return the tasks of a list with commas between; commas in a folder:PATH or card:PATH that exists are its own."""
    return split_list(tasks, _is_path)


def path_list(paths: str) -> list[str]:
    """Return the paths of a list with commas between; commas in a path that exists are its own."""
    return split_list(paths, os.path.exists)


def distortion_list(names: str) -> list[str]:
    """Return the distortions of a list with commas between; commas in the path of a FILE.py:NAME are its own."""

    def is_item(item: str) -> bool:
        file, _, name = item.rpartition(":")
        return "," not in name and os.path.exists(file)

    return split_list(names, is_item)


def _is_path(task: str) -> bool:
    start, colon, path = task.partition(":")
    if start not in ("folder", "card"):  # what is done with it, such as distorted:folder:PATH
        start, colon, path = path.partition(":")
    return bool(colon) and start in ("folder", "card") and os.path.exists(path)


def listed(text: str) -> list[str]:
    r"""Return the entries of a list with commas between, or the lines of a file of that name that are not blank.

    A comma that is part of an entry is written with a backslash before it; in a file it is one like any other.
    Raises ValueError for a file that is not UTF-8.

    >>> listed(r"a dog,a cat,red\, green"), listed("")
    (['a dog', 'a cat', 'red, green'], [])
    """
    if os.path.isfile(text):
        from ssmclip.data.lines import read_lines

        return [entry.strip() for entry in read_lines(Path(text)) if entry.strip()]
    return [entry.strip() for entry in split_list(text) if entry.strip()]


def pictures_of(sources: list[str]) -> dict[str, Any]:
    """Return name -> picture for `ssmclip.data.sources.read_picture`; "-" stands for the bytes of standard input."""
    from ssmclip.data.sources import MAX_BYTES, picture_paths

    pictures = {path: path for path in picture_paths(sources)}
    if STANDARD_INPUT in pictures:
        pictures[STANDARD_INPUT] = sys.stdin.buffer.read(MAX_BYTES + 1)  # one more than is allowed, to be told so
    return pictures


def default_cache() -> Path | None:
    """Return $XDG_CACHE_HOME/ssmclip, or ~/.cache/ssmclip, beside what other tools keep; None for a user without home.

    A container may run as a user that its system does not know.
    """
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        return None
    return folder / "ssmclip" / "embeddings"


def require_writable(path: Path, read: Iterable[Path] = ()) -> None:
    """Raise OSError now if `path` can't be written later, ValueError if it is one of the files that are read.

    An existing file is left as it is.
    """
    if path.resolve() in {file.resolve() for file in read}:
        raise ValueError(f"--out {path} is also an input file: give another file")
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; --out takes a file")
    probe = path.with_name(path.name + ".partial")
    probe.touch()
    probe.unlink(missing_ok=True)  # another process may probe at the same moment


def line(row) -> str:
    """Return one row as a line of text."""
    interval = "" if row.ci_low is None else f" [{row.ci_low:.4f}, {row.ci_high:.4f}]"
    return f"{row.model:24} {row.task:16} {row.metric:24} {row.value:.4f}{interval}  n={row.n}"


def parse_image_size(text: str) -> int | tuple[int, int]:
    """Return an image size from pixels or HEIGHTxWIDTH. Raises ValueError for anything else.

    >>> parse_image_size("224"), parse_image_size("97x160")
    (224, (97, 160))
    """
    sides = text.split("x")
    if len(sides) > 2 or not all(side.isdigit() and int(side) for side in sides):
        raise ValueError(f"image size must be pixels or HEIGHTxWIDTH, all above 0 (got {text!r})")
    return int(text) if len(sides) == 1 else (int(sides[0]), int(sides[1]))
