"""The published stimuli, fetched by name from model-vs-human's release.

The release names no checksums. The first download is recorded in SHA256SUMS next to the data, in the form that
`sha256sum --check` reads, and later copies have to be the same; commit that file and others get the same stimuli.
"""

from __future__ import annotations

import hashlib
import tarfile
import tempfile
from pathlib import Path

from ssmclip.data.lines import read_lines
from ssmclip.humans.stimuli import STIMULUS_SETS, Stimulus, find_stimuli

RELEASE = "https://github.com/bethgelab/model-vs-human/releases/download/v0.1/{name}.tar.gz"
SUMS = "SHA256SUMS"


def download_stimuli(
    dataset: str, root: Path | str, *, sha256: str | None = None, url: str = RELEASE
) -> list[Stimulus]:
    """Return the stimuli of the data set under `root`, downloading them unless all are there.

    sha256: of the archive; default: what root/SHA256SUMS says of it, where it says anything.
    Raises OSError when it cannot be fetched, ValueError when it is another file than before, or holds other stimuli
    than the data set has.
    """
    known, root = STIMULUS_SETS[dataset], Path(root)
    try:
        stimuli = find_stimuli(root, dataset)
    except FileNotFoundError:
        stimuli = []
    if len(stimuli) == known.count:
        return stimuli
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root, prefix=".download-") as folder:
        archive = Path(folder) / f"{dataset}.tar.gz"
        _fetch(url.format(name=dataset), archive)
        digest = hashlib.sha256(archive.read_bytes()).hexdigest()
        recorded = _recorded(root / SUMS)
        expected = sha256 or recorded.get(archive.name, digest)
        if digest != expected:
            raise ValueError(
                f"{archive.name} should have the SHA-256 {expected} (got {digest}); check the URL and the checksum"
            )
        try:
            with tarfile.open(archive) as tar:
                tar.extractall(folder, filter="data")
            found = find_stimuli(folder, dataset)
        except (tarfile.TarError, EOFError, FileNotFoundError) as error:
            raise ValueError(f"{url.format(name=dataset)} is not an archive of {dataset}: {error}") from error
        if len(found) != known.count:
            raise ValueError(
                f"{url.format(name=dataset)} should contain {known.count} stimuli of {dataset} (got {len(found)})"
            )
        for stimulus in found:
            target = root / stimulus.path.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            stimulus.path.replace(target)
    recorded[archive.name] = digest
    (root / SUMS).write_text("".join(f"{digest}  {name}\n" for name, digest in recorded.items()), encoding="utf-8")
    return find_stimuli(root, dataset)


def _fetch(url: str, target: Path) -> None:
    from torch.hub import download_url_to_file

    try:
        download_url_to_file(url, str(target))
    except OSError as error:
        raise OSError(
            f"{url} cannot be downloaded: {error}. Download it elsewhere and unpack it in {target.parents[1]}"
        ) from error


def _recorded(sums: Path) -> dict[str, str]:
    """Read name -> digest from a file, which may be missing."""
    lines = read_lines(sums) if sums.is_file() else []
    return {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
