"""Download model folders from the Hugging Face hub, and upload them."""

from __future__ import annotations

import fnmatch
import hashlib
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError
from tqdm import tqdm

from ssmclip.models.files.weights import CONFIG_NAME, CONFIGS, INDEX, WEIGHTS_NAME, CheckpointError, first_line, shards

HUB = "hf-hub:"
# In the order of preference: where there is one of the first kind, those of the others are left alone.
WEIGHT_FILES = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.pth.tar", "*.ckpt")

# Of a training run's checkpoint the optimizer's state, twice the model, from which nothing but that run goes on.
NOT_SENT = ["state.pt", ".*"]


def download(name: str) -> Path:
    """Download a repository of the hub to a folder on this machine, or one of its files; return the path.

    name: OWNER/NAME, or OWNER/NAME/FILE, with or without "hf-hub:" before it. Of a whole repository its configurations
    and weights, whole or in shards. Files come with a progress bar, are compared with the hub's SHA-256 and kept in its
    cache; when the hub cannot be reached, what is in the cache is taken.

    Raises FileNotFoundError where there is neither, CheckpointError for a file that is not what the hub says, and, with
    nothing downloaded, for several checkpoints of which none is named.
    """
    owner, _, rest = name.removeprefix(HUB).partition("/")
    repository, _, file = rest.partition("/")
    repo = f"{owner}/{repository}"
    if not owner or not repository:
        raise FileNotFoundError(f"{name!r} is not a folder; a repository of the Hugging Face hub must be OWNER/NAME")
    try:
        info = huggingface_hub.HfApi().model_info(repo, files_metadata=True)
    except (OSError, ValueError, HfHubHTTPError) as error:
        return _from_cache(repo, file, error)
    checksums = {s.rfilename: s.lfs.sha256 if s.lfs else None for s in info.siblings}

    def fetch(name: str) -> Path:
        if name not in checksums:
            raise FileNotFoundError(f"{repo} has no file {name}; it has {', '.join(checksums)}")
        return _fetch(repo, name, info.sha, checksums[name])

    top = [name for name in checksums if "/" not in name]
    weights = file or choose_weights(top, repo)
    wanted = [file] if file else [*fnmatch.filter(top, "*.json"), *([weights] if weights else [])]
    if not wanted:
        raise FileNotFoundError(f"{repo} contains no configurations and no weights, only {', '.join(checksums)}")
    paths = [fetch(name) for name in wanted]
    if file and (config := str(PurePosixPath(file).parent / CONFIGS.get(PurePosixPath(file).name, "."))) in checksums:
        fetch(config)  # which says what shapes cannot
    if weights and weights.endswith(INDEX):
        for shard in shards(paths[-1]):
            fetch(str(PurePosixPath(weights).parent / shard))
    return paths[0] if file else paths[0].parent


def choose_weights(names: Sequence[str], source: str | Path) -> str | None:
    """Return the checkpoint among the files of a folder or repository: the one with its configuration, else the only
    one of the first kind there is; of one in shards, its index. None where there is none.

    Raises CheckpointError where there are several.
    """
    for name, config in CONFIGS.items():
        if {name, config} <= set(names):
            return name
    for kind in WEIGHT_FILES:
        files, indices = fnmatch.filter(names, kind), fnmatch.filter(names, kind + INDEX)
        if not {index.removesuffix(INDEX) for index in indices} & set(files):  # no whole one beside its shards
            files = indices or files
        if len(files) > 1:
            raise CheckpointError(f"{source} contains several checkpoints, {', '.join(files)}: name one")
        if files:
            return files[0]
    return None


def _fetch(repo: str, name: str, revision: str | None, sha256: str | None) -> Path:
    cached = huggingface_hub.try_to_load_from_cache(repo, name, revision=revision)
    if isinstance(cached, str):
        return Path(cached)
    path = Path(huggingface_hub.hf_hub_download(repo, name, revision=revision))
    if sha256 and (found := _sha256(path)) != sha256:
        path.resolve().unlink()
        raise CheckpointError(
            f"the checksum of {name} of {repo} must be {sha256} (got {found}); it was deleted, try again"
        )
    return path


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file, tqdm(total=path.stat().st_size, unit="B", unit_scale=True, desc="checking") as bar:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
            bar.update(len(chunk))
    return digest.hexdigest()


def _from_cache(repo: str, file: str, reason: Exception) -> Path:
    try:
        folder = Path(huggingface_hub.snapshot_download(repo, local_files_only=True))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{repo} was not found locally and could not be downloaded ({first_line(reason)})"
        ) from error
    if file and not (folder / file).is_file():
        raise FileNotFoundError(f"{file} of {repo} was not found locally, and the hub cannot be reached")
    return folder / file if file else folder


def push(folder: str | Path, repo: str, *, private: bool = False) -> str:
    """Upload a model folder (`convert` and `save_model` write them) to the hub; returns the repository's address.

    repo: OWNER/NAME, made where it does not exist. What a training run goes on from, and hidden files, stay here. The
    token is the one `hf auth login` keeps. Raises CheckpointError for a folder that holds no model.
    """
    folder = Path(folder)
    forms = [(CONFIG_NAME, WEIGHTS_NAME), ("config.json", "model.safetensors")]
    if not any(all((folder / name).is_file() for name in form) for form in forms):
        raise CheckpointError(
            f"{folder} contains no model: it has neither {' and '.join(forms[0])} nor {' and '.join(forms[1])}; "
            "write them with `ssmclip convert`"
        )
    api = huggingface_hub.HfApi()
    url = api.create_repo(repo, private=private, exist_ok=True)
    api.upload_folder(folder_path=folder, repo_id=repo, commit_message="Add model", ignore_patterns=NOT_SENT)
    return str(url)
