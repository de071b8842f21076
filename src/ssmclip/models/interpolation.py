"""Interpolate the weights of two models of one architecture: a model between them, for the cost of either.

Between a CLIP and its fine-tuned copy this keeps most of what either knows (WiSE-FT, Wortsman et al. 2022,
arXiv:2109.01903):

    blend = (1 - weight) first + weight second
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import open_clip
from torch import Tensor, nn

from ssmclip.models.classifier import classes_of
from ssmclip.models.classifier_files import CONFIG, save_classifier
from ssmclip.models.clip import save_model, save_tokenizer
from ssmclip.models.files.weights import CheckpointError
from ssmclip.models.names import Source, find_checkpoint, source
from ssmclip.models.tokenizer import FILES as TOKENIZER_FILES
from ssmclip.models.towers import behaviour

__all__ = ["blend", "interpolate"]

log = logging.getLogger(__name__)
_NAMED = 6  # keys named in a message

State = dict[str, Tensor]


def blend(first: str | Path, second: str | Path, weights: Sequence[float], folder: str | Path) -> list[Path]:
    """Write blends of two models as folders that `ssmclip.find` reads, and return the folders.

    first, second: names of two CLIPs, or of two classifiers, the second of which is a folder; weights: shares of the
    second, from 0 to 1; folder: for one weight the blend's, for several that of a folder for each, named by its weight.
    Configuration, preprocessing, tokenizer and classes are the second's. Statistics of batch norms are interpolated
    like weights, which is not what the blend would measure.
    Raises CheckpointError, key by key, for another architecture; ValueError for a weight out of range, for two kinds of
    models, and for a folder that holds one of the two; what `find` raises.
    """
    folder = Path(folder)
    _check_weights(weights)
    folders = [folder] if len(weights) == 1 else [folder / f"{weight:g}" for weight in weights]
    for path in (folder, *folders):
        _check_folder(path, first, second)
    known = [source(name) for name in (first, second)]
    networks = [each.load(None) for each in known]
    _check_alike(known, networks)
    write = _writer(known, networks[1])
    states = [network.state_dict() for network in networks]
    for path, weight in zip(folders, weights, strict=True):
        networks[1].load_state_dict(interpolate(*states, weight), assign=True)
        write(path)
    return folders


def interpolate(first: State, second: State, weight: float) -> State:
    """Return (1 - weight) first + weight second; of whole numbers those of the nearer one.

    Raises CheckpointError naming the keys that only one of them has, or that differ in shape.
    """
    misfits = [f"{key} is missing in the {where}" for where, key in _missing(first, second)]
    misfits += [
        f"{key} {tuple(first[key].shape)} and {tuple(second[key].shape)}"
        for key in first
        if key in second and first[key].shape != second[key].shape
    ]
    if misfits:
        more = " …" if len(misfits) > _NAMED else ""
        raise CheckpointError(
            f"models to blend must have the same architecture; {len(misfits)} weights differ: "
            f"{', '.join(misfits[:_NAMED])}{more}"
        )
    return {key: _between(first[key], second[key], weight) for key in first}


def _missing(first: State, second: State) -> list[tuple[str, str]]:
    lacking = [("second", key) for key in first if key not in second]
    return lacking + [("first", key) for key in second if key not in first]


def _between(first: Tensor, second: Tensor, weight: float) -> Tensor:
    if not first.is_floating_point():
        return second if weight >= 0.5 else first
    return ((1 - weight) * first.double() + weight * second.double()).to(second.dtype)


def _check_weights(weights: Sequence[float]) -> None:
    if not weights or not all(0 <= weight <= 1 for weight in weights):
        raise ValueError(f"the weight of a blend must be from 0, the first model, to 1, the second (got {weights})")


def _check_folder(folder: Path, *names: str | Path) -> None:
    """Raise ValueError for a folder whose model would be overwritten, or that is a training run."""
    given = [Path(name) for name in names]
    kept = [(path.parent if path.is_file() else path).resolve() for path in given if path.exists()]
    if folder.resolve() in kept or (folder / "checkpoints").is_dir():
        raise ValueError(f"{folder} contains a model to blend, or a training run: choose another folder")


def _check_alike(known: Sequence[Source], networks: Sequence[nn.Module]) -> None:
    """Raise an error for models that differ, though their weights may have the same shapes."""
    if (known[0].config is None) != (known[1].config is None):
        encoder = next(each.name for each in known if each.config is None)
        raise ValueError(f"both models to blend must be CLIPs, or neither of them (got {encoder}, an image encoder)")
    if (classes := classes_of(networks[0])) != classes_of(networks[1]):
        raise ValueError(
            f"both classifiers to blend must have the same classes; the first has {', '.join(classes[:4])} …"
        )
    first, second = map(behaviour, networks)
    other = [
        f"{name} {first[name]} and {second[name]}"
        for name in sorted(first.keys() & second)
        if first[name] != second[name]
    ]
    if other:
        raise CheckpointError(
            f"models to blend must have the same architecture; {len(other)} layers differ: {', '.join(other[:_NAMED])}"
        )
    if _preprocessing(known[0], networks[0]) != _preprocessing(known[1], networks[1]):
        log.warning("the two models preprocess images differently: the blend does so like %s", known[1].name)


def _preprocessing(known: Source, network: nn.Module) -> dict[str, Any]:
    """Return how images are preprocessed, in the form of open_clip's configurations or of timm's."""
    if known.config is None:
        keys = ("mean", "std", "interpolation", "crop_pct")
        return {key: (network.pretrained_cfg or {}).get(key) for key in keys}
    preprocess = known.config["preprocess_cfg"] or open_clip.get_model_preprocess_cfg(network)
    return {
        key: tuple(value) if isinstance(value, list) else value for key, value in preprocess.items() if key != "size"
    }


def _writer(known: Sequence[Source], network: nn.Module) -> Callable[[Path], None]:
    """Return the function that writes a network to a folder, in the form of the second model."""
    second = known[1]
    if second.config is None:
        config = _classifier_config(second)
        return lambda folder: save_classifier(network, config, folder)
    config = {**second.config, "preprocess_cfg": _preprocessing(second, network)}

    def write(folder: Path) -> None:
        save_model(network, config, folder)
        files = [second.folder / name for name in TOKENIZER_FILES if second.folder is not None]
        if present := [file for file in files if file.is_file()]:
            for file in present:
                shutil.copyfile(file, folder / file.name)
        else:
            save_tokenizer(config, folder)

    return write


def _classifier_config(known: Source) -> dict[str, Any]:
    """Return the configuration of a classifier's folder. Raises ValueError for a model that is none."""
    file = find_checkpoint(Path(known.name)) / CONFIG if Path(known.name).is_dir() else None
    if file is None or "architecture" not in (config := json.loads(file.read_text(encoding="utf-8"))):
        raise ValueError(
            f"the second classifier must be a training run's folder, or one in timm's form (got {known.name})"
        )
    return config
