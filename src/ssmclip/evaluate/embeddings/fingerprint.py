"""What decides an embedding, as hashes: of models, preprocessing and tokenizers.

Weights do not decide alone: the number of heads, an activation, an epsilon, a resize are in no weight, and in no repr.
So every setting that objects hold is taken in (`describe`), and what they make of fixed pictures and texts as well.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import re
import types
from collections.abc import Callable, Mapping, Sequence, Set
from enum import Enum
from importlib import metadata
from typing import Any

import numpy as np
import torch
from PIL import Image, features
from torch import Tensor, nn

# Sizes (width, height) and modes of the pictures of noise that a preprocessing is recognised by: smaller and larger
# than any model's input, in both directions.
PICTURES = (
    ((61, 47), "RGB"), ((40, 90), "RGB"), ((640, 480), "RGB"), ((1, 1), "RGB"), ((1700, 300), "RGB"),
    ((224, 224), "RGB"), ((50, 60), "L"), ((50, 60), "RGBA"),
)  # fmt: skip
SHOWN = 3  # of these a model is shown

# What a tokenizer is recognised by: case, spaces, entities, other alphabets, and where it cuts.
TEXTS = (
    "a photo of a dog.", "A Photo of 2 DOGS, long ago!", "", "  two  spaces,\ta tab\nand lines ",
    "na\u00efve caf\u00e9 \u2014 \u201cquotes\u201d &amp; &lt;b&gt; #1 it's \U0001f600 \u65e5\u672c\u8a9e \u0416",
    "zero " * 300,
)  # fmt: skip
LONG = " ".join(f"word{number}" for number in range(2000))  # beyond the limits of most; shown to tokenizers alone

PACKAGES = ("ssmclip", "torch", "torchvision", "timm", "open_clip_torch", "pillow", "numpy", "numba", "triton")
PACKAGES += ("transformers", "tokenizers", "ftfy", "regex")
CODECS = ("jpg", "webp", "avif", "libtiff")

RAISES = "raises"
ADDRESS = re.compile(r" at 0x[0-9a-f]+")

# Attributes that decide no output: modes, what is found again each time, where something came from.
_PASSING = frozenset({"training", "pretrained_cfg", "default_cfg", "_name_or_path", "name_or_path"})
_PASSING |= {"transformers_version", "_commit_hash"}
# What torch keeps in each module for itself; weights and persistent buffers are hashed as such.
_TORCHS_OWN = frozenset(vars(nn.Module())) - {"_forward_hooks", "_forward_pre_hooks"}


class Unsure(ValueError):
    """Something whose settings cannot all be seen, so that no key can answer for what it makes."""


def model_hash(model: nn.Module) -> str:
    """Return a hash of a model's weights and of every setting it holds. Raises Unsure."""
    try:
        made_of = {"weights": weights_hash(model), "settings": settings_hash(model)}
    except (AttributeError, RuntimeError, NotImplementedError) as error:  # packed or sparse weights
        raise Unsure(f"the weights of a {type(model).__name__} cannot all be read ({error})") from error
    return combined(made_of)


def weights_hash(model: nn.Module) -> str:
    """Return a hash of the architecture as it prints, and of every weight and buffer."""
    digest = _digest()
    digest.update(f"{type(model).__qualname__} {ADDRESS.sub('', repr(model))}".encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} ".encode())
        _add_tensor(digest, value)
    return digest.hexdigest()


def settings_hash(value: Any) -> str:
    """Return a hash of every setting an object holds, at any depth, without the weights of modules. Raises Unsure."""
    digest = _digest()
    _Describer(digest).add(value)
    return digest.hexdigest()


def preprocess_hash(preprocess: Callable[[Image.Image], Any]) -> str:
    """Return a hash of a preprocessing's settings, and of what it makes of fixed pictures.

    Raises Unsure, also for one that makes something else of the same picture the second time.
    """
    made = _outcomes("the preprocessing", preprocess, probe_pictures())
    return combined({"settings": settings_hash(preprocess), "made": " ".join(made)})


def tokenizer_hash(tokenizer: Callable[[list[str]], Any] | None) -> str:
    """Return a hash of a tokenizer's settings and vocabulary, and of the tokens of fixed texts.

    Raises Unsure, also for one that leaves out tokens at random.
    """
    if tokenizer is None:
        return ""
    made = _outcomes("the tokenizer", tokenizer, [list(TEXTS), *([text] for text in (*TEXTS, LONG))])
    return combined({"settings": settings_hash(tokenizer), "made": " ".join(made)})


def outputs_hash(encode: Callable[[Any], Tensor], inputs: Sequence[Any]) -> str:
    """Return a hash of what a model makes of fixed inputs, one after another, bit for bit.

    Raises Unsure for a model that makes something else the second time, and for one that cannot take an input.
    """
    made = _outcomes("the model", encode, inputs)
    if failed := next((outcome for outcome in made if outcome.startswith(RAISES)), ""):
        raise Unsure(f"the model {failed} for one of the inputs it would be recognised by")
    return " ".join(made)


def probe_pictures() -> list[Image.Image]:
    """Return the fixed pictures, of noise over a ramp: both fine and coarse structure, for filters of any width."""
    pictures = []
    for number, ((width, height), mode) in enumerate(PICTURES):
        noise = np.random.RandomState(number).randint(0, 128, (height, width, 4), dtype=np.uint8)
        ramp = np.linspace(0, 127, width).astype(np.uint8)[None, :, None]
        pictures.append(Image.fromarray(noise + ramp, "RGBA").convert(mode))
    return pictures


@functools.cache
def versions() -> str:
    """Return the versions of the packages that have a part in an embedding."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = ""
    found |= {name: str(features.version(name)) for name in CODECS if name in features.modules | features.codecs}
    return json.dumps(found)


def texts_hash(texts: Sequence[str] | Any) -> str:
    """Return a hash of texts, each with its length."""
    digest = _digest()
    for text in texts:
        encoded = text.encode("utf-8", "surrogatepass")
        digest.update(f"{len(encoded)} ".encode() + encoded)
    return digest.hexdigest()


def combined(made_of: Mapping[str, str]) -> str:
    """Return one hash of several by name."""
    return hashlib.blake2b(json.dumps(made_of, sort_keys=True).encode(), digest_size=16).hexdigest()


def _outcomes(what: str, function: Callable[[Any], Any], inputs: Sequence[Any]) -> list[str]:
    """What a function makes of each input, as hashes. Raises Unsure for nothing, and for something else each time."""
    made = [_outcome(function, value) for value in inputs]
    if all(outcome.startswith(RAISES) for outcome in made):
        raise Unsure(f"{what} {made[0]} for everything it would be recognised by")
    if [_outcome(function, value) for value in inputs] != made:
        raise Unsure(f"{what} is random: it makes something else of the same each time")
    return made


def _outcome(function: Callable[[Any], Any], value: Any) -> str:
    """A hash of what a function makes of a value, or the error it raises: it may not take every picture."""
    digest = _digest()
    try:
        made = function(value)
    except Exception as error:  # a foreign function may raise anything, and which it raises tells it apart
        return f"{RAISES} {type(error).__name__}"
    _Describer(digest).add(made)
    return digest.hexdigest()


def _digest():
    return hashlib.blake2b(digest_size=16)


def _add_tensor(digest: Any, value: Tensor) -> None:
    value = value.detach().cpu().contiguous()
    digest.update(f"{value.dtype} {tuple(value.shape)} ".encode())
    digest.update(value.reshape(-1).view(torch.uint8).numpy() if value.numel() else b"")


class _Describer:
    """Feeds what an object holds into a digest. Objects met again are named by their number: rings end."""

    def __init__(self, digest: Any):
        self.digest = digest
        self.met: dict[int, int] = {}
        self.alive: list[Any] = []  # an address is a name only as long as its object lives

    def say(self, *words: Any) -> None:
        for word in words:
            encoded = str(word).encode("utf-8", "surrogatepass")
            self.digest.update(f"{len(encoded)}:".encode() + encoded)

    def add(self, value: Any) -> None:
        if value is None or isinstance(value, (bool, int, float, complex, str, bytes)) or value is Ellipsis:
            return self.say(type(value).__name__, repr(value))
        if isinstance(value, (torch.device, logging.Logger)):  # where and what is logged
            return self.say(type(value).__name__)
        if isinstance(value, (torch.dtype, torch.layout, torch.memory_format, slice, range)):
            return self.say(type(value).__name__, value)
        if isinstance(value, Enum):
            return self.say(_name(type(value)), value.name)
        if id(value) in self.met:
            return self.say("again", self.met[id(value)])
        self.met[id(value)] = len(self.met)
        self.alive.append(value)
        return self._add_object(value)

    def _add_object(self, value: Any) -> None:
        if isinstance(value, Tensor):
            self.say("tensor")
            _add_tensor(self.digest, value)
        elif isinstance(value, (np.ndarray, np.generic)) and value.dtype != object:
            self.say("array", value.dtype, value.shape)
            self.digest.update(np.ascontiguousarray(value).tobytes())
        elif isinstance(value, (torch.jit.ScriptModule, torch.Generator)):
            raise Unsure(f"a {type(value).__name__} does not show all its settings")
        elif isinstance(value, nn.Module):
            self._add_module(value)
        elif isinstance(value, Mapping):
            self._add_mapping(value)
        elif isinstance(value, (list, tuple)):
            self.say(type(value).__name__, len(value))
            for item in value:
                self.add(item)
        elif isinstance(value, Set):
            self.say("set", *sorted(settings_hash(item) for item in value))
        else:
            self._add_other(value)

    def _add_module(self, module: nn.Module) -> None:
        self.say("module", _name(type(module)))
        own = {name: value for name, value in vars(module).items() if name not in _TORCHS_OWN}
        self._add_attributes(own)
        passing = {name: module._buffers[name] for name in sorted(module._non_persistent_buffers_set)}
        self._add_mapping({name: value for name, value in passing.items() if not _is_passing(name)})
        for name, child in module._modules.items():
            self.say(name)
            self.add(child)

    def _add_mapping(self, mapping: Mapping) -> None:
        self.say("mapping", len(mapping))
        if all(map(_is_plain, mapping)) and all(map(_is_plain, mapping.values())):  # a vocabulary, in one go
            return self.say(repr(list(mapping.items())))
        for key, value in mapping.items():
            self.add(key)
            self.add(value)

    def _add_attributes(self, attributes: Mapping[str, Any]) -> None:
        for name in sorted(attributes):
            if not _is_passing(name):
                self.say(name)
                self.add(attributes[name])

    def _add_other(self, value: Any) -> None:
        if isinstance(value, functools.partial):
            self.say("partial")
            self.add([value.func, list(value.args), dict(value.keywords)])
        elif isinstance(value, types.MethodType):
            self.say("method", value.__name__)
            self.add([value.__func__, value.__self__])
        elif isinstance(value, types.FunctionType):
            self._add_function(value)
        elif hasattr(value, "cache_info") and hasattr(value, "__wrapped__"):
            self.add(value.__wrapped__)
        elif isinstance(value, (types.BuiltinFunctionType, type, types.ModuleType, np.ufunc, np.dtype)):
            self.say(type(value).__name__, _name(value))
        elif type(value).__name__ == "Pattern" and hasattr(value, "pattern"):  # of re, and of regex
            self.say("pattern", value.pattern, value.flags)
        elif type(value).__module__.partition(".")[0] == "tokenizers" and hasattr(value, "to_str"):
            about = json.loads(value.to_str())
            self.say("tokenizer", json.dumps({k: v for k, v in about.items() if k not in ("truncation", "padding")}))
        elif (attributes := _attributes(value)) is not None:
            self.say("object", _name(type(value)))
            self._add_attributes(attributes)
        else:
            raise Unsure(f"a {_name(type(value))} does not show all its settings")

    def _add_function(self, function: types.FunctionType) -> None:
        self.say("function", _name(function))
        # A function that can be imported is known by its name; of any other the name says nothing.
        if "<" in function.__qualname__ or function.__module__ == "__main__":
            self._add_code(function.__code__)
            self.add([function.__defaults__, function.__kwdefaults__])
            for cell in function.__closure__ or ():
                self.add(_contents(cell))

    def _add_code(self, code: types.CodeType) -> None:
        self.say(code.co_code.hex(), code.co_names)
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                self._add_code(constant)
            else:
                self.add(constant)


def _is_passing(name: str) -> bool:
    return name in _PASSING or "cache" in name.lower()


def _is_plain(value: Any) -> bool:
    kind = type(value)
    return kind in (str, int, float, bool, bytes) or (kind is tuple and all(map(_is_plain, value)))


def _name(value: Any) -> str:
    module = getattr(value, "__module__", None)
    return f"{module}.{getattr(value, '__qualname__', None) or getattr(value, '__name__', None) or repr(value)}"


def _contents(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def _attributes(value: Any) -> dict[str, Any] | None:
    """What an object of Python holds, None for one whose inside is not Python's."""
    slots = [name for cls in type(value).__mro__ for name in _listed(getattr(cls, "__slots__", ()))]
    if not hasattr(value, "__dict__") and not slots:
        return None
    held = {
        name: getattr(value, name) for name in slots if name not in ("__dict__", "__weakref__") and hasattr(value, name)
    }
    return {**held, **getattr(value, "__dict__", {})}


def _listed(slots: Any) -> Sequence[str]:
    return (slots,) if isinstance(slots, str) else tuple(slots)
