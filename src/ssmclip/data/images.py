"""Open unchecked image files as 8-bit RGB pictures, or raise a BadImage with the reason.

CMYK is converted by Pillow; greyscale is repeated over the channels; 16-bit values keep their upper 8 bits; what is
transparent is laid over white; of an animation the first frame is taken. Orientation tags are ignored, as in open_clip.
"""

from __future__ import annotations

import base64
import io
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

MAX_PIXELS = 80_000_000  # below the size at which Pillow itself warns of decompression bombs
# Preprocessing brings the shorter side to a model's size, and so makes a thin picture larger: at 1,000 : 1 and 224 px
# 50 million pixels, at 1,000,000 : 1 more than a machine holds. No photograph comes near it.
MAX_RATIO = 1_000

THUMBNAIL = 96  # pixels; about 2 kB

# Only formats decoded in this process: Pillow would hand an EPS file to Ghostscript.
# MPO is opened as JPEG; by a name of its own Pillow knows no MPO, and looks no further.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "pgm", "avif")

# Folders that operating systems, file servers and notebooks leave among pictures. Names that begin with a dot
# (.ipynb_checkpoints, macOS's ._NAME) are passed over without being listed here. In lower case.
LITTER = frozenset(
    {"__macosx", "__pycache__", "@eadir", "#recycle", "$recycle.bin", "lost+found", "system volume information"}
)


class BadImage(ValueError):
    """An image that cannot be opened. `reason` is short and shared by files of its kind, the message has details."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


def open_image(source: bytes | str | Path, *, max_pixels: int = MAX_PIXELS, min_side: int = 1) -> Image.Image:
    """Return the picture in `source` (encoded bytes, or a path), decoded, in mode RGB.

    Raises BadImage with reason "missing image file", "broken image", "image too large" (over max_pixels), "image too
    thin" (a side over MAX_RATIO times the other) or "image too small" (a side under min_side pixels). The size is read
    from the header, before anything is decoded.
    """
    stream = io.BytesIO(source) if isinstance(source, bytes) else _open_file(Path(source))
    with stream, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd metadata; a picture comes out or an error
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            try:
                return _decode(stream, max_pixels, min_side)
            except ValueError as error:
                if "MAX_TEXT_" not in str(error):  # Pillow's limits of what a PNG may hold as text
                    raise
                stream.seek(0)
                return _decode(io.BytesIO(_without_text(stream.read())), max_pixels, min_side)
        except BadImage:
            raise
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise BadImage("image too large", str(error)) from error
        except UnidentifiedImageError as error:  # its own message names an object in memory, another each time
            raise BadImage("broken image", f"not in one of the formats {', '.join(FORMATS)}") from error
        except Exception as error:  # decoders raise half a dozen types on damaged files
            raise BadImage("broken image", f"{type(error).__name__}: {error}") from error


def pictures_below(folder: Path) -> list[Path]:
    """Return the picture files at any depth below a folder, sorted; the one way in which pictures are looked for."""
    return files_below(folder, SUFFIXES)


def files_below(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    """Return the files with one of the suffixes (lower case, no dot) at any depth below a folder, sorted.

    Links to files and to folders are followed (but not back into a folder that is being walked). Hidden files and
    folders and those of LITTER are passed over. A link to nothing is listed: opening it says what is wrong.
    Raises OSError for a folder that cannot be read: a part of the files must not pass for all of them.
    """
    return sorted(_walk(Path(folder), tuple(f".{suffix}" for suffix in suffixes), frozenset()))


def folders_in(folder: Path) -> list[Path]:
    """Return the folders directly in a folder, links to folders among them, in the order of their names.

    Hidden folders and LITTER are passed over.
    """
    return sorted(path for path in Path(folder).iterdir() if not is_litter(path.name) and path.is_dir())


def is_litter(name: str) -> bool:
    """Return whether a file or folder of this name is hidden, or left there by a system.

    >>> is_litter("._a.png"), is_litter("__MACOSX"), is_litter("cat")
    (True, True, False)
    """
    return name.startswith(".") or name.lower() in LITTER


def _walk(folder: Path, endings: tuple[str, ...], above: frozenset[tuple[int, int]]) -> Iterator[Path]:
    """above: the folders on the way here, by device and inode: a link back to one of them is a loop."""
    state = folder.stat()
    own = (state.st_dev, state.st_ino)
    if own in above:
        return
    with os.scandir(folder) as entries:
        visible = [entry for entry in entries if not is_litter(entry.name)]
    for entry in visible:
        if _is_folder(entry):
            yield from _walk(folder / entry.name, endings, above | {own})
        elif entry.name.lower().endswith(endings) and _may_be_opened(entry):
            yield folder / entry.name


def _is_folder(entry: os.DirEntry) -> bool:
    # Not entry.is_dir() alone: it raises for a link to itself.
    return Path(entry.path).is_dir() if entry.is_symlink() else entry.is_dir()


def _may_be_opened(entry: os.DirEntry) -> bool:
    """A file, or a link to one or to nothing; not a pipe, at which opening would wait for ever."""
    path = Path(entry.path)
    return path.is_file() or not path.exists() if entry.is_symlink() else entry.is_file()


def _open_file(path: Path):
    try:
        if path.is_fifo():
            raise BadImage("missing image file", f"{path}: a named pipe, which would block the reader")
        return path.open("rb")
    except OSError as error:
        raise BadImage("missing image file", f"{path}: {error.strerror}") from error
    except ValueError as error:
        if isinstance(error, BadImage):
            raise
        raise BadImage("missing image file", f"{str(path)!r}: {error}") from error  # a zero byte in the name


def _decode(stream: io.BufferedIOBase, max_pixels: int, min_side: int) -> Image.Image:
    with Image.open(stream, formats=FORMATS) as image:
        _check_size(image, max_pixels, min_side)
        return to_rgb(image)


def _without_text(png: bytes) -> bytes:
    """Return a PNG without texts and colour profile, whose size may make Pillow refuse the pixels.

    After 8 bytes of signature come chunks: length (4 bytes), type (4), data of that length, checksum (4).
    """
    kept, start = [png[:8]], 8
    while start < len(png):
        end = start + 12 + int.from_bytes(png[start : start + 4], "big")
        if png[start + 4 : start + 8] not in (b"tEXt", b"zTXt", b"iTXt", b"iCCP"):
            kept.append(png[start:end])
        start = end
    return b"".join(kept)


def _check_size(image: Image.Image, max_pixels: int, min_side: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise BadImage("image too large", f"an image must have at most {max_pixels:,} pixels (got {width} x {height})")
    if min(width, height) < min_side:
        raise BadImage("image too small", f"each side must have at least {min_side} pixels (got {width} x {height})")
    check_ratio(image)


def check_ratio(image: Image.Image) -> None:
    """Raise BadImage for a picture so thin that preprocessing would make it too large."""
    width, height = image.size
    if max(width, height) > MAX_RATIO * min(width, height):
        limit = f"a side must have at most {MAX_RATIO:,} times the other's pixels"
        raise BadImage("image too thin", f"{limit} (got {width} x {height})")


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert a picture to mode RGB, by the rules above. Raises BadImage for floating-point pixels."""
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow's own conversion would clip at 255
        values = np.asarray(image).astype(np.int64)
        image = Image.fromarray((np.clip(values, 0, 65535) >> 8).astype(np.uint8))
    elif image.mode == "F":
        raise BadImage("broken image", "floating-point pixels have an unknown range: store 8 or 16 bits")
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def thumbnail(image: Image.Image, side: int = THUMBNAIL) -> str:
    """Return a JPEG of at most side x side pixels in base64. Small images (digits) are enlarged by whole factors."""
    image = image.convert("RGB")
    if (factor := side // max(image.size)) > 1:
        image = image.resize([factor * length for length in image.size], Image.Resampling.NEAREST)
    image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=75)
    return base64.b64encode(buffer.getvalue()).decode("ascii")
