"""Text towers by kind: the keys of their configuration, the function that builds them, and their tokenizer.

A kind from outside this package is one entry: `TEXT_TOWERS.register("gru")(TextTower(keys=..., build=...))`, and
`text_cfg: {"kind": "gru", ...}` in a model's configuration.
"""

from __future__ import annotations

import dataclasses
import inspect
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
from torch import nn

from ssmclip.models.networks.bag_of_words import BagOfWords
from ssmclip.models.networks.mamba_text import CONFIGS as LANGUAGE_MODELS
from ssmclip.models.networks.mamba_text import MambaText
from ssmclip.models.tokenizer import FILE_NAME, LanguageModelTokenizer, find_tokenizer, named_tokenizer
from ssmclip.registry import Registry

__all__ = ["KIND", "TEXT_TOWERS", "TRANSFORMER", "TextTower", "text_tower_kind", "text_tower_of"]

KIND = "kind"  # the key of `text_cfg` that names a text tower
TRANSFORMER = "transformer"  # the kind where nothing says otherwise

TextConfig = dict[str, Any]


def clip_tokenizer(text_cfg: TextConfig, folder: Path | None) -> Callable[..., Any]:
    """Return the tokenizer that `hf_tokenizer_name` names, as open_clip makes it, else CLIP's byte pairs.

    folder: where the model's files are; tokenizer files there are used instead of downloading the named ones.
    A caption that is cut keeps its end token. Raises FileNotFoundError.
    """
    arguments = dict(context_length=text_cfg.get("context_length") or 77, **(text_cfg.get("tokenizer_kwargs") or {}))
    name = text_cfg.get("hf_tokenizer_name")
    if not name:
        return open_clip.SimpleTokenizer(**arguments)
    source = str(folder) if _has_tokenizer(folder) else name
    return named_tokenizer(source, tokenizer_mode=text_cfg.get("tokenizer_mode"), **arguments)


def save_clip_tokenizer(text_cfg: TextConfig, folder: Path) -> None:
    """Write the files of the named tokenizer. CLIP's byte pairs come with open_clip and need none."""
    if text_cfg.get("hf_tokenizer_name"):
        clip_tokenizer(text_cfg, None).save_pretrained(str(folder))


@dataclass(frozen=True)
class TextTower:
    """One kind of text tower.

    keys: what its `text_cfg` may contain, apart from `kind`;
    build: (embed_dim, text_cfg without `kind`) -> a module from tokens (B, L) to features (B, embed_dim), with the
    attributes `context_length` and `vocab_size` and open_clip's methods `lock` and `set_grad_checkpointing`; None where
    open_clip itself builds it from the same `text_cfg`;
    tokenizer: (text_cfg, folder of the model's files or None) -> a function from n strings to tokens (n, L);
    save_tokenizer: (text_cfg, folder) -> None, writes the files that `tokenizer` then finds in that folder;
    matches: whether a `text_cfg` without `kind` means this one, for configurations older than that key;
    replaceable_tokenizer: whether `hf_tokenizer_name` may be another copy of the tokenizer's file;
    ignores_padding: whether a text's features are the same however far it is padded with `pad_id`.
    """

    keys: frozenset[str]
    build: Callable[[int, TextConfig], nn.Module] | None
    tokenizer: Callable[[TextConfig, Path | None], Callable[..., Any]] = clip_tokenizer
    save_tokenizer: Callable[[TextConfig, Path], None] = save_clip_tokenizer
    matches: Callable[[TextConfig], bool] = lambda text_cfg: False
    replaceable_tokenizer: bool = False
    ignores_padding: bool = False


TEXT_TOWERS: Registry[TextTower] = Registry("text tower")


def text_tower_kind(text_cfg: TextConfig) -> str:
    """Return the kind of text tower that a `text_cfg` describes. Raises UnknownName for a kind that is not registered.

    >>> text_tower_kind({"width": 512, "layers": 12}), text_tower_kind({"width": 512, "layers": 0})
    ('transformer', 'bag_of_words')
    """
    if (kind := text_cfg.get(KIND)) is not None:
        TEXT_TOWERS[kind]  # raises for an unknown one
        return kind
    return next((kind for kind, tower in TEXT_TOWERS.items() if tower.matches(text_cfg)), TRANSFORMER)


def text_tower_of(text_cfg: TextConfig) -> TextTower:
    """Return the registered entry of a `text_cfg`. Raises UnknownName."""
    return TEXT_TOWERS[text_tower_kind(text_cfg)]


def _has_tokenizer(folder: Path | None) -> bool:
    return folder is not None and (folder / FILE_NAME).is_file()


# ---- CLIP's transformer, and the bag of words, which is configured as one without layers

OPEN_CLIP_KEYS = frozenset(field.name for field in dataclasses.fields(open_clip.CLIPTextCfg))

TEXT_TOWERS.register(TRANSFORMER)(TextTower(keys=OPEN_CLIP_KEYS, build=None))


def _build_bag_of_words(embed_dim: int, text_cfg: TextConfig) -> BagOfWords:
    return BagOfWords(embed_dim, *(text_cfg[key] for key in ("vocab_size", "width", "context_length")))


TEXT_TOWERS.register("bag_of_words")(
    TextTower(keys=OPEN_CLIP_KEYS, build=_build_bag_of_words, matches=lambda text_cfg: text_cfg.get("layers") == 0)
)


# ---- Mamba language models

TOKENIZER_NAME = "hf_tokenizer_name"


def language_model_tokenizer(text_cfg: TextConfig, folder: Path | None) -> Callable[..., Any]:
    """Return the language model's tokenizer unchanged: `tokenizer.json` in `folder`, else the named one, else CLIP's.

    Raises FileNotFoundError.
    """
    name = text_cfg.get(TOKENIZER_NAME)
    if not name and not _has_tokenizer(folder):
        return clip_tokenizer(text_cfg, folder)
    file = folder / FILE_NAME if _has_tokenizer(folder) else find_tokenizer(name)
    return LanguageModelTokenizer(file, text_cfg.get("context_length"), text_cfg.get("pad_id", 0))


def _save_language_model_tokenizer(text_cfg: TextConfig, folder: Path) -> None:
    if text_cfg.get(TOKENIZER_NAME):
        shutil.copyfile(find_tokenizer(text_cfg[TOKENIZER_NAME]), folder / FILE_NAME)


def _register_language_model(kind: str, matches: Callable[[TextConfig], bool]) -> None:
    def build(embed_dim: int, text_cfg: TextConfig) -> MambaText:
        fields = {"model_type": kind, **text_cfg.get("mamba", {})}
        if fields["model_type"] in LANGUAGE_MODELS and fields["model_type"] != kind:
            raise ValueError(f"text_cfg.kind must match its mamba.model_type {fields['model_type']!r} (got {kind!r})")
        arguments = {key: value for key, value in text_cfg.items() if key != TOKENIZER_NAME}
        return MambaText(embed_dim, **{**arguments, "mamba": fields})

    keys = {*inspect.signature(MambaText).parameters, TOKENIZER_NAME} - {"embed_dim"}
    TEXT_TOWERS.register(kind)(
        TextTower(
            keys=frozenset(keys),
            build=build,
            tokenizer=language_model_tokenizer,
            save_tokenizer=_save_language_model_tokenizer,
            matches=matches,
            replaceable_tokenizer=True,
            ignores_padding=True,
        )
    )


def _is_mamba2(text_cfg: TextConfig) -> bool:
    return text_cfg.get("mamba", {}).get("model_type") == "mamba2"


_register_language_model("mamba", lambda text_cfg: "mamba" in text_cfg and not _is_mamba2(text_cfg))
_register_language_model("mamba2", _is_mamba2)
