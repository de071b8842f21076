"""Tokenizers from files: those of language models, and of open_clip models that name one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import open_clip
import torch
from jaxtyping import Int
from tokenizers import Tokenizer
from torch import Tensor

from ssmclip.models.files.weights import first_line

FILE_NAME = "tokenizer.json"
# And what Hugging Face puts beside it: which tokens fill up and end a text, and which class reads them.
FILES = (FILE_NAME, "tokenizer_config.json", "special_tokens_map.json")


class LanguageModelTokenizer:
    """A language model's tokenizer, with padding on the right.

    file: a `tokenizer.json`; context_length: a text is cut after so many tokens, and all are padded to it (None: never
    cut, padded to the longest); pad_id: what fills up.
    """

    def __init__(self, file: str | Path, context_length: int | None = None, pad_id: int = 0):
        self.tokenizer = Tokenizer.from_file(str(file))
        # The file may hold settings of its own for both.
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self.context_length, self.pad_id = context_length, pad_id

    def __call__(self, texts: str | list[str], context_length: int | None = None) -> Int[Tensor, "n L"]:
        """Return tokens. texts: n strings, or one; context_length: instead of the tokenizer's."""
        context_length = context_length or self.context_length
        texts = [texts] if isinstance(texts, str) else texts
        # One by one: batches start threads of their own, which a worker process would inherit half alive.
        ids = [self.tokenizer.encode(text).ids[:context_length] for text in texts]
        width = context_length or max([1, *map(len, ids)])
        tokens = torch.full((len(ids), width), self.pad_id)
        for row, own in zip(tokens, ids, strict=True):
            row[: len(own)] = torch.tensor(own, dtype=torch.int64)
        return tokens


def find_tokenizer(name: str) -> Path:
    """Return the tokenizer.json of a name: a file, a folder that has one, or a repository of the Hugging Face hub.

    A repository's file is downloaded once, with a progress bar; if it is on disk, the network is not used.
    Raises FileNotFoundError naming the place that was searched.
    """
    path = Path(name)
    if path.is_file():
        return path
    if path.is_dir():
        if not (path / FILE_NAME).is_file():
            raise FileNotFoundError(f"{path} contains no {FILE_NAME}: pass a folder that does, or the file")
        return path / FILE_NAME
    try:
        cached = huggingface_hub.try_to_load_from_cache(name, FILE_NAME)
        return Path(cached if isinstance(cached, str) else huggingface_hub.hf_hub_download(name, FILE_NAME))
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        raise FileNotFoundError(
            f"the tokenizer of {name} was not found locally and could not be downloaded ({first_line(error)}). "
            f"Set text_cfg.hf_tokenizer_name to the path of its {FILE_NAME}, or of the folder with it"
        ) from error


def named_tokenizer(name: str, **how: Any) -> open_clip.tokenizer.HFTokenizer:
    """Return open_clip's tokenizer of a folder or a repository of the Hugging Face hub; how: its other arguments.

    Raises FileNotFoundError when it is not on disk and cannot be downloaded, ImportError without transformers.
    """
    try:
        return open_clip.tokenizer.HFTokenizer(name, **how)
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        raise FileNotFoundError(
            f"the tokenizer of {name} was not found locally and could not be downloaded ({first_line(error)}). "
            f"Set text_cfg.hf_tokenizer_name to the path of a folder with its {' and '.join(FILES[:2])}"
        ) from error
    except ImportError as error:
        raise ImportError(f"the tokenizer of {name} needs transformers: pip install 'ssmclip[transformers]'") from error
