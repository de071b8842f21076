"""Counts of a model's multiply-accumulates by kind of layer, and MambaOut's criterion of a long sequence.

Nothing is computed: the model runs on PyTorch's `meta` device, where tensors have shapes and no numbers.

D width of a transformer · L tokens · N states per channel of a scan
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import timm
import torch
from open_clip.transformer import VisionTransformer as OpenClipVisionTransformer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ssmclip.models import names, towers
from ssmclip.models.networks.vit import CausalAttention

__all__ = ["Macs", "count_macs", "long_sequence", "sequence_criterion", "transformer_macs"]


# Every token attends to every other; in timm's Swin, say, it does not.
PLAIN_TRANSFORMERS = (timm.models.VisionTransformer, timm.models.Eva, timm.models.Beit, OpenClipVisionTransformer)


@dataclass(frozen=True)
class Parts:
    """Multiply-accumulates of one input by kind of layer. The kinds and their conventions: `count_macs`."""

    linear: int = 0
    conv: int = 0
    attention: int = 0
    scan: int = 0
    norm: int = 0

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))

    @property
    def matmul(self) -> int:
        """linear + conv + attention: what `torch.utils.flop_counter` counts, halved."""
        return self.linear + self.conv + self.attention


@dataclass(frozen=True)
class Macs:
    """The result of `count_macs`: the parts of one image and of one text, and their sum.

    image_size: (height, width) in pixels; text_length: tokens, None where no text was counted;
    image_parameters, text_parameters: of the towers; parameters: of the whole model.
    """

    image: Parts
    text: Parts
    image_size: tuple[int, int]
    text_length: int | None
    image_parameters: int
    text_parameters: int
    parameters: int

    @property
    def parts(self) -> dict[str, int]:
        """Return kind -> image and text together."""
        return {f.name: getattr(self.image, f.name) + getattr(self.text, f.name) for f in fields(Parts)}

    @property
    def total(self) -> int:
        return self.image.total + self.text.total


def count_macs(
    name_or_model: str | nn.Module,
    image_size: int | tuple[int, int] = 224,
    *,
    text_length: int | None = None,
) -> Macs:
    """Count the MACs of one image of this size and, with text_length, of one text of that many tokens.

    name_or_model: a CLIP by name (`list_clips()`, `open_clip:NAME`, a checkpoint folder), a timm model by name, or any
    module, which is left as it is; image_size: pixels, or (height, width).

    The total is what papers and timm's tables list as "GMACs" or "FLOPs" (fvcore's sum, with VMamba's term for the
    scan), so that numbers can be compared with theirs. By kind:

    - linear: products with a weight matrix; conv: convolutions; one multiply-add counts as 1, a complex product as 4.
    - attention: products of activations with each other, queries x keys and weights x values, of all L x L pairs:
      masked pairs are computed and thrown away, so they count. Half of them in a `ViT` with mixing="causal" (MambaOut's
      2 D L^2 floating-point operations instead of 4 D L^2): its kernel is not given a mask but told to skip them.
    - scan: 9 N + 1 per channel, position and direction, one more with a gate (state-spaces/mamba#110, as in VMamba's
      code). These are floating-point operations, not MACs; the recurrence itself is 4 N + 1 multiply-adds and N
      exponentials.
    - norm: 5 per number of a layer norm, 2 of a batch norm (fvcore's), floating-point operations too.

    Activations, poolings, softmax, Fourier transforms, embeddings and sums are not counted.

    Raises UnknownName; ValueError for a size the model cannot take, a text length of 0 or beyond the model's positions,
    and for text_length with a model that reads no text; NotImplementedError for an operator of ours without a formula.

    >>> count = count_macs("vit_base_patch16_224", image_size=896)
    >>> round(count.total / 1e9, 1), round(transformer_macs(768, 12, 56 * 56) / 1e9, 1)
    (450.0, 447.6)
    """
    size = towers.as_size(image_size)
    model = _on_meta(name_or_model, size, text_length)
    image = _count(model, lambda: towers.encode_image(model, torch.empty(1, 3, *size, device="meta")), f"{size}")
    text = Parts()
    if text_length is not None:
        if not towers.is_clip(model):
            raise ValueError(
                f"text_length cannot be given for {type(model).__name__}, which reads no text (got {text_length})"
            )
        tokens = towers.tokens_of(model, 1, text_length, "meta")
        text = _count(model, lambda: model.encode_text(tokens), f"{text_length} tokens")
    image_parameters = sum(p.numel() for p in towers.tower_parameters(model, "image"))
    text_parameters = sum(p.numel() for p in towers.tower_parameters(model, "text")) if towers.is_clip(model) else 0
    parameters = sum(p.numel() for p in model.parameters())
    return Macs(image, text, size, text_length, image_parameters, text_parameters, parameters)


def transformer_macs(width: int, depth: int, tokens: int, *, causal: bool = False) -> int:
    """Return equation 6 of MambaOut (arXiv:2405.07992) for `depth` blocks: (24 D^2 L + 4 D L^2) / 2 each, MLP ratio 4.

    Patch embedding, class token, norms and head are left out. causal: only pairs a causal mask leaves, 2 D L^2.
    """
    return depth * (24 * width**2 * tokens + (2 if causal else 4) * width * tokens**2) // 2


def long_sequence(width: int, tokens: int, *, causal: bool = False) -> float:
    """Return equation 7 of MambaOut: r = 4 D L^2 / (24 D^2 L) = L / (6 D), with a causal mask L / (12 D).

    Above 1, attention's quadratic part is the larger one and the sequence counts as long.

    >>> long_sequence(768, 4608), long_sequence(512, 6144, causal=True)
    (1.0, 1.0)
    """
    return tokens / ((12 if causal else 6) * width)


def sequence_criterion(
    name_or_model: str | nn.Module, image_size: int | tuple[int, int] = 224, *, text_length: int | None = 77
) -> list[dict[str, Any]]:
    """Return MambaOut's criterion as a dict for each transformer tower; none for a model without attention.

    tower: "image" | "text"; width: D; tokens: L, of the patches or of the text; causal; ratio: r, see `long_sequence`;
    threshold: the tokens at which it is 1; side: the square image's side in pixels at which it is (None for texts).
    Towers that attend within windows, and hybrids, have no single L and are left out. Raises as `count_macs`.

    >>> [tower] = sequence_criterion("vit_base_patch16_224", 896)
    >>> tower["threshold"], round(tower["side"]), round(tower["ratio"], 2)
    (4608, 1086, 0.68)
    """
    size = towers.as_size(image_size)
    model = _on_meta(name_or_model, size, text_length)
    tower = towers.image_tower(model)
    found = []
    hybrid = hasattr(getattr(tower, "patch_embed", None), "backbone")  # its patches are of a map, not of the image
    if isinstance(tower, PLAIN_TRANSFORMERS) and not hybrid:
        patch = towers.patch_size(tower)
        width = tower.embed_dim if hasattr(tower, "embed_dim") else tower.transformer.width
        tokens = math.prod(side // step for side, step in zip(size, patch, strict=True))
        criterion = _criterion("image", width, tokens, causal=getattr(tower, "mixing", "full") == "causal")
        found.append(criterion | {"side": math.sqrt(math.prod(patch) * criterion["threshold"])})
    text = getattr(model, "text", model)
    if (
        text_length is not None
        and towers.is_clip(model)
        and (width := getattr(getattr(text, "transformer", None), "width", None))
    ):
        causal = getattr(text, "attn_mask", None) is not None
        found.append(_criterion("text", width, text_length, causal=causal) | {"side": None})
    return found


def _criterion(tower: str, width: int, tokens: int, causal: bool) -> dict[str, Any]:
    ratio = long_sequence(width, tokens, causal=causal)
    threshold = (12 if causal else 6) * width
    return {"tower": tower, "width": width, "tokens": tokens, "causal": causal, "ratio": ratio, "threshold": threshold}


def _on_meta(name_or_model: str | nn.Module, size: tuple[int, int], text_length: int | None) -> nn.Module:
    """Return the model on the meta device, in evaluation mode, at this image size and text length."""
    if text_length is not None and text_length < 1:
        raise ValueError(f"text_length must be at least 1 token (got {text_length})")
    if isinstance(name_or_model, str):
        return names.build_model_on_meta(name_or_model, size, text_length)
    # The copy shares no numbers: every parameter and buffer is replaced on the way.
    tensors = [*name_or_model.parameters(), *name_or_model.buffers()]
    model = copy.deepcopy(name_or_model, {id(t): _meta_like(t) for t in tensors}).eval().float()
    towers.set_image_size(model, size)
    return model


def _meta_like(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


@torch.no_grad()
def _count(model: nn.Module, run: Callable[[], Any], what: str) -> Parts:
    counter = _Counter(model)
    try:
        with counter, _told_of_causal_attention(counter, model):
            run()
    except NotImplementedError:  # a RuntimeError too, but no fault of the input's: an operator lacks its formula
        raise
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"{type(model).__name__} cannot take an input of {what}: {error}") from error
    return Parts(**counter.parts)


@contextmanager
def _told_of_causal_attention(counter: _Counter, model: nn.Module) -> Iterator[None]:
    """Tell the counter when the model is inside attention that skips pairs: its operators do not say so on `meta`."""

    def enter(*_: Any) -> None:
        counter.causal = True

    def leave(*_: Any) -> None:
        counter.causal = False

    layers = [module for module in model.modules() if isinstance(module, CausalAttention)]
    hooks = [hook for m in layers for hook in (m.register_forward_pre_hook(enter), m.register_forward_hook(leave))]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _Counter(TorchDispatchMode):
    """A mode that adds up every operator. A product with a matrix made from weights alone counts as a linear layer.

    causal: whether half of the pairs of tokens are skipped at present.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.causal = False
        self.parts = {field.name: 0 for field in fields(Parts)}
        self.weights = [*model.parameters(), *model.buffers()]  # kept, so that no other tensor takes their place
        self.known = {_memory(weight) for weight in self.weights}

    def add(self, kind: str, macs: int) -> None:
        self.parts[kind] += macs

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        self._remember(args, out)
        name = op.name().removesuffix(".default")
        formula = FORMULAS.get(name) or FORMULAS.get(name.partition(".")[0])
        if formula is not None:
            kind, macs = formula(self, args, out)
            self.add(kind, macs)
        elif name.startswith("ssmclip::"):
            raise NotImplementedError(f"{name} has no formula in {__name__}.FORMULAS")
        return out

    def _remember(self, args: tuple, out: Any) -> None:
        """Mark a tensor as a weight if it is made of weights alone."""
        tensors = [x for x in args if isinstance(x, Tensor)]
        if tensors and isinstance(out, Tensor) and all(self.is_weight(x) for x in tensors):
            self.weights.append(out)
            self.known.add(_memory(out))

    def is_weight(self, x: Tensor) -> bool:
        return _memory(x) in self.known


def _memory(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def _product(counter: _Counter, a: Tensor, b: Tensor) -> tuple[str, int]:
    """Count a product (..., m, k) x (..., k, n)."""
    macs = a.numel() * b.shape[-1] * (4 if a.is_complex() else 1)
    if counter.is_weight(a) or counter.is_weight(b):
        return "linear", macs
    return "attention", macs // 2 if counter.causal else macs


def _convolution(counter: _Counter, args: tuple, out: Tensor) -> tuple[str, int]:
    """Count a convolution: each output is a sum over one filter; transposed, each input meets one filter."""
    x, weight, transposed = args[0], args[1], args[6]
    return "conv", (x if transposed else out).numel() * weight[0].numel()


def _selective_scan(counter: _Counter, args: tuple, out: Any) -> tuple[str, int]:
    u, _, A, _, _, D, z = args[:7]
    return "scan", u.numel() * (9 * A.shape[1] + (D is not None) + (z is not None))


def _cross_selective_scan(counter: _Counter, args: tuple, out: Any) -> tuple[str, int]:
    x, _, A, _, _, D, _, delta_weight = args[:8]
    read = A.shape[0] * x.numel()  # once in each direction
    if delta_weight is not None:
        counter.add("linear", read * delta_weight.shape[2])
    return "scan", read * (9 * A.shape[2] + (D is not None))


def _ssd(counter: _Counter, args: tuple, out: Any) -> tuple[str, int]:
    x, _, _, B = args[:4]
    return "scan", x.numel() * (9 * B.shape[-1] + 1)


def _norm(per_number: int) -> Callable:
    return lambda counter, args, out: ("norm", per_number * args[0].numel())


# operator -> its kind and MACs, from its arguments and result
FORMULAS: dict[str, Callable[[_Counter, tuple, Any], tuple[str, int]]] = {
    "aten::mm": lambda counter, args, out: _product(counter, args[0], args[1]),
    "aten::addmm": lambda counter, args, out: _product(counter, args[1], args[2]),
    "aten::bmm": lambda counter, args, out: _product(counter, args[0], args[1]),
    "aten::baddbmm": lambda counter, args, out: _product(counter, args[1], args[2]),
    "aten::convolution": _convolution,
    "aten::native_layer_norm": _norm(5),
    "aten::native_group_norm": _norm(5),
    "aten::native_batch_norm": _norm(2),
    "aten::_native_batch_norm_legit_no_training": _norm(2),
    "ssmclip::selective_scan": _selective_scan,
    "ssmclip::cross_selective_scan": _cross_selective_scan,
    "ssmclip::ssd": _ssd,
    "ssmclip::causal_conv1d": lambda counter, args, out: ("conv", args[0].numel() * args[1].shape[1]),
}
