"""Read Mamba language models in Hugging Face's format."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ssmclip.models.files.hub import download
from ssmclip.models.files.weights import INDEX, CheckpointError, load_into, load_state, read_json
from ssmclip.models.networks.mamba_text import LanguageModel, _config_type, read_config
from ssmclip.models.published.layout import LAYOUTS, Architecture, Hints, Layout, State, WrongShape, guess, shape
from ssmclip.models.published.shapes import count


def load_language_model(folder: str | Path) -> LanguageModel:
    """Load the language model from a folder that Hugging Face's `save_pretrained` wrote, or in a repository of its hub.

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
    """Return from Hugging Face's config.json the model_type and the fields that affect the output, with defaults.

    Raises UnknownName for another model_type, CheckpointError for another activation.
    """
    if config.get("hidden_act", "silu") not in ("silu", "swish"):  # two names of one function
        raise CheckpointError(f"{source}: hidden_act must be 'silu' (got {config['hidden_act']!r})")
    model_type = config.get("model_type", "")
    known = {field.name: field.default for field in dataclasses.fields(_config_type(model_type))}
    said = {key: value for key, value in config.items() if key in known and value is not None}
    return {"model_type": model_type, **known, **said}


def own_keys(state: State) -> State:
    """Return the weights of a `...ForCausalLM` without its output head; old checkpoints use the key "embedding"."""
    return {
        key.removeprefix("backbone.").replace("embedding.", "embeddings."): value
        for key, value in state.items()
        if key != "lm_head.weight"
    }


def read(state: State, hints: Hints) -> Architecture:
    state = own_keys(state)
    return Architecture("language_model", language_model_config(state, hints), state)


LAYOUTS.register("language_model")(
    Layout(
        "Mamba or Mamba-2 language models",
        "language_model",
        lambda state: "layers.0.norm.weight" in own_keys(state),
        read,
    )
)


def language_model_config(state: State, hints: Hints, configured: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the fields given by shapes; the others come from hints, the configuration, or a guess, which is logged.

    configured: what a configuration says, with every field. Raises CheckpointError where it is of another model_type.
    """
    fields = language_model_fields(state)
    if configured and configured.get("model_type", "mamba") != fields["model_type"]:
        raise CheckpointError(
            f"the configuration is for {configured['model_type']}, but the weights are for {fields['model_type']}"
        )
    known = dict(configured or {})
    if hints.layer_norm_epsilon is not None or "layer_norm_epsilon" not in known:
        known["layer_norm_epsilon"] = guess(hints.layer_norm_epsilon, "layer_norm_epsilon", 1e-5)
    if fields["model_type"] == "mamba2":
        n_groups = hints.n_groups or known.get("n_groups") or guess(None, "n_groups", 1)
        fields = language_model_fields(state, n_groups)
    return known | fields


def language_model_fields(state: State, n_groups: int = 1) -> dict[str, Any]:
    """Return the fields of a language model's config, with its `model_type`.

    n_groups: of Mamba-2, whose weights tell n_groups * state_size but not the two. Raises CheckpointError where it does
    not divide that.
    """
    mixer = "layers.0.mixer"
    vocab_size, hidden_size = shape(state, "embeddings.weight", 2)
    channels, _, conv_kernel = shape(state, f"{mixer}.conv1d.weight", 3)
    fields = dict(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=count(state, "layers."),
        conv_kernel=conv_kernel,
        use_bias=f"{mixer}.in_proj.bias" in state,
        use_conv_bias=f"{mixer}.conv1d.bias" in state,
    )
    if f"{mixer}.x_proj.weight" in state:
        inner, state_size = shape(state, f"{mixer}.A_log", 2)
        _, rank = shape(state, f"{mixer}.dt_proj.weight", 2)
        return fields | dict(
            model_type="mamba",
            state_size=state_size,
            expand=inner // hidden_size,
            time_step_rank="auto" if rank == math.ceil(hidden_size / 16) else rank,
        )
    (_, inner), (num_heads,) = shape(state, f"{mixer}.out_proj.weight", 2), shape(state, f"{mixer}.A_log", 1)
    both = (channels - inner) // 2  # of B, as of C: n_groups * state_size
    if both < 1 or num_heads > inner:
        raise WrongShape(
            f"{mixer} has {num_heads} heads, {inner} inner and {channels} convolved channels, which do not fit together"
        )
    if both % n_groups:
        raise CheckpointError(f"n_groups must divide n_groups * state_size = {both} of these weights (got {n_groups})")
    return fields | dict(
        model_type="mamba2",
        state_size=both // n_groups,
        n_groups=n_groups,
        expand=inner // hidden_size,
        num_heads=num_heads,
        head_dim=inner // num_heads,
    )
