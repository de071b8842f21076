"""Write published weights as folders that other libraries read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
from torch import nn

from ssmclip.models.clip import save_model
from ssmclip.models.files.weights import CheckpointError
from ssmclip.models.published.layout import Hints
from ssmclip.models.published.read import build, describe, find_weights, read_published
from ssmclip.models.tokenizer import FILES as TOKENIZER_FILES

__all__ = ["convert"]

HUGGING_FACE = {"mamba": "MambaModel", "mamba2": "Mamba2Model"}
Source = str | Path | Mapping[str, Any]


def convert(source: Source, folder: str | Path, weights: str = "online", **hints: Any) -> str:
    """Write published weights as a folder that others read without this function: safetensors and a configuration.

    source, weights, hints: as in `load_published`. Of a CLIP `open_clip_config.json` and weights, and the tokenizer's
    files where the original has them, which `ssmclip.load(folder)` reads, and
    `open_clip.create_model_and_transforms("local-dir:" + folder)` too once ssmclip is imported (but for text towers
    that are no transformers: open_clip cannot build them, and its error names `ssmclip.load`); of an image encoder
    timm's form, `timm.create_model("local-dir:" + folder, pretrained=True)`; of a language model Hugging Face's.
    Returns which of these: "clip" | "encoder" | "language_model".

    Raises what `load_published` raises, and CheckpointError for CLIP's text tower alone, which no library reads.
    """
    architecture = read_published(source, weights, Hints(**hints))
    if architecture.kind not in WRITERS:
        raise CheckpointError(f"{describe(source)} is CLIP's text tower alone, for which no library has a file format")
    model = build(architecture, describe(source))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    WRITERS[architecture.kind](model, architecture.config, folder, source)
    return architecture.kind


def _write_clip(model: nn.Module, config: dict[str, Any], folder: Path, source: Source) -> None:
    save_model(model, config, folder)
    if isinstance(source, str | Path):
        original = find_weights(source).parent
        for name in TOKENIZER_FILES:
            if (original / name).is_file():
                shutil.copyfile(original / name, folder / name)


def _write_encoder(model: nn.Module, config: dict[str, Any], folder: Path, source: Source) -> None:
    arguments = {key: value for key, value in config["model_args"].items() if key != "num_classes"}
    name = {"architecture": config["architecture"]}
    timm.models.save_for_hf(model, str(folder), model_config=name, model_args=arguments, safe_serialization=True)


def _write_language_model(model: nn.Module, config: dict[str, Any], folder: Path, source: Source) -> None:
    config = {**config, "architectures": [HUGGING_FACE[config["model_type"]]]}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    safetensors.torch.save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})


WRITERS: dict[str, Callable[[nn.Module, dict[str, Any], Path, Source], None]] = {
    "clip": _write_clip,
    "encoder": _write_encoder,
    "language_model": _write_language_model,
}
