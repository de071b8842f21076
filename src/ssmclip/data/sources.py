"""Pictures from anywhere: files, folders, http and https addresses, encoded bytes.

An address is read within a time and a number of bytes; every picture within the pixels that `open_image` allows.
"""

from __future__ import annotations

import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Mapping
from http.client import HTTPException, HTTPResponse
from pathlib import Path

from PIL import Image

from ssmclip.data.images import SUFFIXES, BadImage, open_image, pictures_below, to_rgb

__all__ = ["MAX_BYTES", "Picture", "Pictures", "download", "named_pictures", "picture_paths", "read_picture"]

Picture = str | Path | bytes | Image.Image
Pictures = Mapping[str, Picture] | Iterable[Picture] | Picture

MAX_BYTES = 50_000_000  # of a picture that comes from elsewhere
TIMEOUT_S = 20.0  # to download one picture
CHUNK = 1 << 16


def picture_paths(sources: Iterable[str | Path]) -> list[str]:
    """Return paths and addresses in the order given, each once, with the pictures of a folder in its place.

    Raises ValueError for a folder without pictures, and for no sources.
    """
    paths: dict[str, None] = {}
    for source in map(str, sources):
        if not _is_address(source) and Path(source).is_dir():
            pictures = pictures_below(Path(source))
            if not pictures:
                raise ValueError(f"no pictures in {source}; supported formats: {', '.join(SUFFIXES)}")
            paths |= dict.fromkeys(map(str, pictures))
        else:
            paths[source] = None
    if not paths:
        raise ValueError("no pictures given: name at least one file, folder or address")
    return list(paths)


def named_pictures(pictures: Pictures) -> Iterator[tuple[str, Picture]]:
    """Return pictures with names: those of a mapping, paths and addresses, or "picture 1" for the first."""
    if isinstance(pictures, Mapping):
        return iter(pictures.items())
    if isinstance(pictures, str | Path | bytes | Image.Image):
        pictures = [pictures]
    return (
        (str(picture) if isinstance(picture, str | Path) else f"picture {place}", picture)
        for place, picture in enumerate(pictures, start=1)
    )


def read_picture(source: Picture) -> Image.Image:
    """Return a picture in mode RGB, from a path, an http or https address, encoded bytes, or a PIL image.

    Raises BadImage for one that cannot be read, also where there are more than MAX_BYTES bytes.
    """
    if isinstance(source, Image.Image):
        return to_rgb(source)
    if isinstance(source, bytes):
        if len(source) > MAX_BYTES:
            raise _too_long("the picture", MAX_BYTES)
        return open_image(source)
    if _is_address(str(source)):
        return open_image(download(str(source)))
    return open_image(source)


def download(url: str, *, max_bytes: int = MAX_BYTES, timeout_s: float = TIMEOUT_S) -> bytes:
    """Return what an http or https address holds, following redirections to such addresses alone.

    Raises BadImage for more than max_bytes, for one that takes longer than timeout_s, that cannot be reached, or that
    is of another kind (file:, ftp:, data: ...).
    """
    deadline = time.monotonic() + timeout_s
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "ssmclip"})
        if request.type not in ("http", "https"):
            raise BadImage("unsupported address", f"only http and https addresses can be read (got {url})")
        with _opener().open(request, timeout=timeout_s) as response:
            return _read(response, url, max_bytes, deadline)
    except BadImage:
        raise
    except TimeoutError as error:
        raise _too_slow(url, timeout_s) from error
    except urllib.error.HTTPError as error:
        error.close()  # it is also the open response
        raise BadImage("unreachable address", f"{url}: {error.code} {error.reason}") from error
    except (OSError, HTTPException, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        if isinstance(reason, TimeoutError):
            raise _too_slow(url, timeout_s) from error
        raise BadImage("unreachable address", f"{url}: {reason}") from error


def _is_address(source: str) -> bool:
    return "://" in source and not Path(source).exists()


def _opener() -> urllib.request.OpenerDirector:
    """An opener that knows no local files: urllib's own would follow a redirection to ftp:."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPErrorProcessor,
        urllib.request.UnknownHandler,
    ):
        opener.add_handler(handler())
    return opener


def _read(response: HTTPResponse, url: str, max_bytes: int, deadline: float) -> bytes:
    if int(response.headers.get("Content-Length") or 0) > max_bytes:
        raise _too_long(url, max_bytes)
    content = bytearray()
    # read1: what has arrived. `read` would wait for a full chunk, for as long as a slow server likes.
    while part := response.read1(CHUNK):
        content += part
        if len(content) > max_bytes:
            raise _too_long(url, max_bytes)
        if time.monotonic() > deadline:
            raise TimeoutError
    return bytes(content)


def _too_long(what: str, max_bytes: int) -> BadImage:
    return BadImage("too many bytes", f"{what} has more than {max_bytes:,}: save a smaller copy")


def _too_slow(url: str, timeout_s: float) -> BadImage:
    return BadImage("address too slow", f"{url} took more than {timeout_s:g} s: download it first")
