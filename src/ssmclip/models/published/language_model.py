"""Mamba language models as Hugging Face keeps them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from torch import Tensor

from ssmclip.models.files.hub import download
from ssmclip.models.files.weights import INDEX, CheckpointError, load_into, load_state, read_json
from ssmclip.models.networks.mamba_text import LanguageModel, _config_type, read_config


def load_language_model(folder: str | Path) -> LanguageModel:
    """The language model in a folder that Hugging Face's `save_pretrained` wrote, or in a repository of its hub.

    folder: a folder, or a repository's name ("state-spaces/mamba-130m-hf"), which is downloaded once.

    Reads config.json and model.safetensors, whole or in shards; a `...ForCausalLM`'s output head is left out.
    Raises FileNotFoundError, CheckpointError, UnknownName for a model_type that is none of these.
    """
    folder = Path(folder) if Path(folder).is_dir() else download(str(folder))
    model = LanguageModel(read_config(known_fields(read_json(folder / "config.json"), folder)))
    index = folder / f"model.safetensors{INDEX}"
    state = load_state(index if index.is_file() else folder / "model.safetensors")
    load_into(model, own_keys(state), folder)
    return model


def known_fields(config: dict[str, Any], source: str | Path) -> dict[str, Any]:
    """Of Hugging Face's config.json the model_type and the fields that decide what is computed, defaults among them.

    Raises UnknownName for another model_type, CheckpointError for another activation.
    """
    if config.get("hidden_act", "silu") not in ("silu", "swish"):  # two names of one function
        raise CheckpointError(f"{source}: hidden_act {config['hidden_act']!r}; only 'silu' is known")
    model_type = config.get("model_type", "")
    known = {field.name: field.default for field in dataclasses.fields(_config_type(model_type))}
    said = {key: value for key, value in config.items() if key in known and value is not None}
    return {"model_type": model_type, **known, **said}


def own_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a `...ForCausalLM` without its output head; the first converted checkpoints said "embedding"."""
    return {
        key.removeprefix("backbone.").replace("embedding.", "embeddings."): value
        for key, value in state.items()
        if key != "lm_head.weight"
    }
