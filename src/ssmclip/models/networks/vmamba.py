"""VMamba: one implementation of every published version, as a timm model.

Liu et al. 2024, "VMamba: Visual State Space Model". Maps are channels last (B, H, W, C) throughout; what differs
between the published versions is a field of `VMamba`. Parameter names are those of the published checkpoints.

    image -> patch embedding (1/4) -> 4 stages of blocks, a halving between stages -> norm -> mean -> head
    block:  x += SS2D(LN(x));  x += MLP(LN(x))
    SS2D:   in_proj -> depthwise conv -> SiLU -> scan along 4 directions, summed -> LN [-> * SiLU(z)] -> out_proj
            (directions=2, 1: rows in both directions, or forwards only, to ask what the directions are good for;
            mixer="gated_conv": the same without the scan, to ask what the scan is good for)

There is no positional table: any height and width work.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, TypeAlias

import timm.layers
import torch
import torch.fx
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from timm.models import checkpoint, generate_default_cfgs
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from ssmclip import ops
from ssmclip.models.networks.parts import at_least_float32, build_head, dtype_of
from ssmclip.models.networks.registration import default_cfg, register_variants
from ssmclip.ops.cross_scan import check_directions

__all__ = ["SS2D", "GatedConv", "VMamba"]

# Leaves of torch.fx's graphs: they look at types and axes, which a traced tensor does not have.
torch.fx.wrap("rearrange")
torch.fx.wrap("at_least_float32")


class SS2D(nn.Module):
    """Selective scan over a map in four directions: row by row, column by column, and both backwards.

    directions: 4 as published; 2, the rows forwards and backwards; 1, the rows forwards. The scan of one direction is
    causal, but not the block: the convolution before it sees the neighbours below and to the right.
    dim: channels of the map; ssm_ratio: inner channels D = ssm_ratio * dim; d_state: N, states per channel;
    gated: multiply the result by SiLU(z), z a second half of the input projection;
    conv_bias: of the 3x3 depthwise convolution; dt_rank: of the projection to delta, None for dim / 16 rounded up.
    The directions share projections and convolution; each has its own A, B, C, D and delta.
    Raises ValueError for another number of directions.
    """

    def __init__(
        self,
        dim: int,
        d_state: int = 1,
        ssm_ratio: float = 2.0,
        gated: bool = False,
        conv_bias: bool = False,
        dt_rank: int | None = None,
        directions: Literal[4, 2, 1] = 4,
    ):
        super().__init__()
        check_directions(directions)
        inner = int(ssm_ratio * dim)
        self.inner, self.d_state, self.gated, self.directions = inner, d_state, gated, directions
        self.dt_rank = math.ceil(dim / 16) if dt_rank is None else dt_rank
        self.in_proj = nn.Linear(dim, inner * (2 if gated else 1), bias=False)
        self.conv2d = nn.Conv2d(inner, inner, 3, padding=1, groups=inner, bias=conv_bias)
        self.x_proj_weight = nn.Parameter(torch.empty(directions, self.dt_rank + 2 * d_state, inner))
        self.dt_projs_weight = nn.Parameter(torch.empty(directions, inner, self.dt_rank))
        self.dt_projs_bias = nn.Parameter(torch.empty(directions, inner))
        self.A_logs = nn.Parameter(torch.empty(directions * inner, d_state))
        self.Ds = nn.Parameter(torch.empty(directions * inner))
        self.out_norm = nn.LayerNorm(inner)
        self.out_proj = nn.Linear(inner, dim, bias=False)
        self.reset_parameters()

    def reset_parameters(self, dt_min: float = 1e-3, dt_max: float = 1e-1) -> None:
        """Initialise as Mamba does: A = -(1..N), D = 1, delta log-uniform in [dt_min, dt_max] at zero input."""
        for weight in self.x_proj_weight:
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
        nn.init.uniform_(self.dt_projs_weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
        with torch.no_grad():
            dt = torch.empty_like(self.dt_projs_bias).uniform_(math.log(dt_min), math.log(dt_max)).exp()
            self.dt_projs_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
            self.A_logs.copy_(torch.arange(1, self.d_state + 1).log().expand_as(self.A_logs))
            self.Ds.fill_(1.0)

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        x = self.in_proj(x)
        if self.gated:
            x, z = x.chunk(2, dim=-1)
        x = F.silu(self.conv2d(rearrange(x, "b h w d -> b d h w")))
        x = rearrange(x, "b d h w -> b h w d").contiguous()
        y = self.scan(x)
        y = self.out_norm(y.to(dtype_of(self.out_norm, y.dtype)))
        if self.gated:
            y = y * F.silu(z)
        return self.out_proj(y.to(x.dtype))

    def scan(self, x: Float[Tensor, "b h w d"]) -> Float[Tensor, "b h w d"]:
        """Compute delta, B and C of each direction from the map, then scan. Positions stay in map order."""
        x_proj = F.linear(x, rearrange(self.x_proj_weight, "k r d -> (k r) d"))
        dt, B, C = rearrange(x_proj, "b h w (k r) -> b k h w r", k=self.directions).split(
            [self.dt_rank, self.d_state, self.d_state], -1
        )
        A = -torch.exp(at_least_float32(self.A_logs))
        return ops.cross_selective_scan(
            x,
            dt,
            rearrange(A, "(k d) n -> k d n", k=self.directions),
            B,
            C,
            rearrange(self.Ds, "(k d) -> k d", k=self.directions),
            self.dt_projs_bias,
            delta_softplus=True,
            delta_weight=self.dt_projs_weight,
        )


class GatedConv(nn.Module):
    """A gated SS2D without its scan: what MambaOut asks of Mamba's block (Yu and Wang 2025, arXiv:2405.07992).

    dim, ssm_ratio, conv_bias: as in `SS2D`, and so are the names of the parameters. The gate is always there.
    """

    def __init__(self, dim: int, ssm_ratio: float = 2.0, conv_bias: bool = False):
        super().__init__()
        inner = int(ssm_ratio * dim)
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False)
        self.conv2d = nn.Conv2d(inner, inner, 3, padding=1, groups=inner, bias=conv_bias)
        self.out_norm = nn.LayerNorm(inner)
        self.out_proj = nn.Linear(inner, dim, bias=False)

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        x, z = self.in_proj(x).chunk(2, dim=-1)
        y = F.silu(self.conv2d(rearrange(x, "b h w d -> b d h w")))
        return self.out_proj(self.out_norm(rearrange(y, "b d h w -> b h w d")) * F.silu(z))


class Block(nn.Module):
    """x += mixer(LN(x)); x += MLP(LN(x)). mlp_ratio 0 leaves the second half out; mixer is built from dim."""

    def __init__(self, dim: int, mlp_ratio: float, drop_path: float, mixer: Callable[[int], nn.Module]):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.op = mixer(dim)
        self.drop_path = timm.layers.DropPath(drop_path) if drop_path > 0 else nn.Identity()
        if mlp_ratio > 0:
            self.norm2 = nn.LayerNorm(dim)
            self.mlp = timm.layers.Mlp(dim, int(mlp_ratio * dim))

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        x = x + self.drop_path(self.op(self.norm(x)))
        if hasattr(self, "mlp"):
            x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x


class Permute(nn.Module):
    """Channels first to last, or back: a view. It has no weights; it keeps the published numbering of a Sequential."""

    def __init__(self, to: Literal["bhwc", "bchw"]):
        super().__init__()
        self.order = (0, 2, 3, 1) if to == "bhwc" else (0, 3, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(self.order)


def _layer_norm(dim: int, to: Literal["bhwc", "bchw"]) -> list[nn.Module]:
    return [Permute("bhwc"), nn.LayerNorm(dim), *([Permute("bchw")] if to == "bchw" else [])]


def _batch_norm(dim: int, to: Literal["bhwc", "bchw"]) -> list[nn.Module]:
    # The identities keep the numbering that a norm of channels last has.
    return [nn.Identity(), nn.BatchNorm2d(dim), nn.Identity() if to == "bchw" else Permute("bhwc")]


# What follows a convolution, from its map with channels first to one of the order `to`.
ConvNorm: TypeAlias = Callable[[int, Literal["bhwc", "bchw"]], list[nn.Module]]
CONV_NORMS: dict[str, ConvNorm] = {
    "layer": _layer_norm,
    "batch": _batch_norm,
}


class PatchMerging(nn.Module):
    """The first version's halving: four neighbours side by side -> LN -> Linear. Odd sizes are padded with zeros."""

    def __init__(self, dim: int, out_dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, out_dim, bias=False)

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h2 w2 c2"]:
        h, w = x.shape[1:3]
        x = F.pad(x, (0, 0, 0, w % 2, 0, h % 2))
        return self.reduction(self.norm(rearrange(x, "b (h i) (w j) c -> b h w (j i c)", i=2, j=2)))


def build_patch_embed(
    in_chans: int, dim: int, version: Literal["v1", "v2"], norm: ConvNorm, act: bool
) -> nn.Sequential:
    """Return the stem. v1: 4x4 convolution. v2: two overlapping 3x3 convolutions of stride 2. act: GELU at the end."""
    last = [nn.GELU()] if act else []
    if version == "v1":
        return nn.Sequential(nn.Conv2d(in_chans, dim, 4, stride=4), *norm(dim, "bhwc"), *last)
    return nn.Sequential(
        nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1),
        *norm(dim // 2, "bchw"),
        nn.GELU(),
        nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1),
        *norm(dim, "bhwc"),
        *last,
    )


def build_downsample(dim: int, out_dim: int, version: Literal["v1", "v3"], norm: ConvNorm, act: bool) -> nn.Module:
    """Return a halving. v1: patch merging with its norm. v3: a 3x3 convolution of stride 2; act: GELU at the end."""
    if version == "v1":
        return PatchMerging(dim, out_dim)
    convolution = nn.Conv2d(dim, out_dim, 3, stride=2, padding=1)
    last = [nn.GELU()] if act else []
    return nn.Sequential(Permute("bchw"), convolution, *norm(out_dim, "bhwc"), *last)


class Stage(nn.Module):
    """Blocks at one resolution, then the halving that leads to the next (nothing after the last stage)."""

    def __init__(self, blocks: list[Block], downsample: nn.Module | None):
        super().__init__()
        self.blocks = nn.Sequential(*blocks)
        self.downsample = downsample or nn.Identity()
        self.grad_checkpointing = False

    def forward_blocks(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        for block in self.blocks:
            x = checkpoint(block, x) if self.grad_checkpointing and torch.is_grad_enabled() else block(x)
        return x

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h2 w2 c2"]:
        return self.downsample(self.forward_blocks(x))


class Classifier(nn.Module):
    """LN at every position, then the mean over positions, then dropout and the linear head (no head for 0 classes)."""

    def __init__(self, dim: int, num_classes: int, global_pool: str = "avg", drop_rate: float = 0.0):
        super().__init__()
        self.drop_rate = drop_rate
        self.norm = nn.LayerNorm(dim)
        self.reset(dim, num_classes, global_pool)

    def reset(self, dim: int, num_classes: int, global_pool: str | None = None) -> None:
        if global_pool not in (None, "", "avg"):
            raise ValueError(f"VMamba's global_pool must be 'avg' or '' (the map) (got {global_pool!r})")
        if global_pool is not None:
            self.global_pool = global_pool
        self.head = build_head(self, dim, num_classes)

    def forward(self, x: Float[Tensor, "b h w c"], pre_logits: bool = False) -> Tensor:
        """Return logits or features. x: normalised map."""
        if self.global_pool == "avg":
            x = x.mean(dim=(1, 2))
        return x if pre_logits else self.head(F.dropout(x, self.drop_rate, self.training))


class VMamba(nn.Module):
    """VMamba for images of any size, with timm's interface.

    depths, dims: blocks and channels of the four stages; mixer: "ss2d" | "gated_conv", the same block without the
    state-space model, always gated (compare it with gated=True to change only the scan; d_state, dt_rank and directions
    are the scan's and ignored);
    d_state: N; ssm_ratio, gated, conv_bias, dt_rank, directions: see `SS2D`;
    mlp_ratio: hidden channels of the MLP over dim, 0 for none; patch_embed: "v1" | "v2"; downsample: "v1" | "v3";
    conv_norm: what follows their convolutions, "layer" as published | "batch"; conv_act: and then a GELU, where the
    published ones have none, but in the middle of the stem. Both make it learn faster from few images;
    drop_rate: dropout before the head; drop_path_rate: of the last block, growing linearly from 0.

    forward: (B, in_chans, H, W) -> (B, num_classes), or (B, num_features) when num_classes is 0.

    Maps are channels last, and `output_fmt` is "NHWC", as of timm's Swin and MambaOut: that is what `forward_features`
    gives, and a feature extractor that takes the stages' outputs. `forward_intermediates` gives the format it is asked
    for, "NCHW" by default; so does `features_only=True`, whose extractor's own `output_fmt` says which.
    torch.fx traces the model, with each operator of `ssmclip.ops` as one node; `torch.jit.trace` does,
    `torch.jit.script` does not: the operators choose their implementation at every call, which TorchScript cannot say.
    """

    def __init__(
        self,
        depths: Sequence[int] = (2, 2, 8, 2),
        dims: Sequence[int] = (96, 192, 384, 768),
        mixer: Literal["ss2d", "gated_conv"] = "ss2d",
        d_state: int = 1,
        ssm_ratio: float = 2.0,
        gated: bool = False,
        conv_bias: bool = False,
        dt_rank: int | None = None,
        directions: Literal[4, 2, 1] = 4,
        mlp_ratio: float = 4.0,
        patch_embed: Literal["v1", "v2"] = "v2",
        downsample: Literal["v1", "v3"] = "v3",
        conv_norm: Literal["layer", "batch"] = "layer",
        conv_act: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
    ):
        super().__init__()
        if len(depths) != len(dims):
            raise ValueError(f"depths {depths} and dims {dims} must name the same number of stages")
        if patch_embed not in ("v1", "v2") or downsample not in ("v1", "v3"):
            raise ValueError(
                f"patch_embed must be 'v1' or 'v2' and downsample 'v1' or 'v3' (got {patch_embed!r}, {downsample!r})"
            )
        if conv_norm not in CONV_NORMS:
            raise ValueError(f"conv_norm must be one of {', '.join(CONV_NORMS)} (got {conv_norm!r})")
        self.num_classes, self.in_chans = num_classes, in_chans
        self.num_features = self.head_hidden_size = dims[-1]
        self.output_fmt = "NHWC"  # of forward_features, and of forward where nothing is pooled
        self.patch_embed = build_patch_embed(in_chans, dims[0], patch_embed, CONV_NORMS[conv_norm], conv_act)
        rates = (drop_path_rate * i / max(sum(depths) - 1, 1) for i in range(sum(depths)))
        if mixer == "ss2d":
            shape = dict(d_state=d_state, ssm_ratio=ssm_ratio, gated=gated, conv_bias=conv_bias, dt_rank=dt_rank)
            op = partial(SS2D, directions=directions, **shape)
        elif mixer == "gated_conv":
            op = partial(GatedConv, ssm_ratio=ssm_ratio, conv_bias=conv_bias)
        else:
            raise ValueError(f"mixer must be 'ss2d' or 'gated_conv' (got {mixer!r})")
        block = partial(Block, mlp_ratio=mlp_ratio, mixer=op)
        self.layers = nn.ModuleList()
        for i, (depth, dim) in enumerate(zip(depths, dims, strict=True)):
            blocks = [block(dim, drop_path=next(rates)) for _ in range(depth)]
            halving = None
            if i + 1 < len(dims):
                halving = build_downsample(dim, dims[i + 1], downsample, CONV_NORMS[conv_norm], conv_act)
            self.layers.append(Stage(blocks, halving))
        self.classifier = Classifier(dims[-1], num_classes, global_pool, drop_rate)
        self.feature_info = [dict(num_chs=dim, reduction=4 * 2**i, module=f"layers.{i}") for i, dim in enumerate(dims)]
        self.apply(_init_linear)

    def _embed(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b h2 w2 d"]:
        # Convolutions keep the memory order of what they get: with this one copy, all maps are channels last in memory.
        return self.patch_embed(x.contiguous(memory_format=torch.channels_last))

    def forward_features(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b h2 w2 d"]:
        """Return the normalised last map, channels last."""
        x = self._embed(x)
        for stage in self.layers:
            x = stage(x)
        return self.classifier.norm(x)

    def forward_head(self, x: Float[Tensor, "b h w d"], pre_logits: bool = False) -> Tensor:
        return self.classifier(x, pre_logits)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Float[Tensor, "b c h w"],
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ):
        """Return the maps after each chosen stage's blocks (before its halving) and the final one, as in timm."""
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NHWC' (got {output_fmt!r})")
        take, last = feature_take_indices(len(self.layers), indices)
        x = self._embed(x)
        maps = []
        for i, stage in enumerate(self.layers[: last + 1] if stop_early else self.layers):
            x = stage.forward_blocks(x)
            if i in take:
                y = self.classifier.norm(x) if norm and i == len(self.layers) - 1 else x
                maps.append(rearrange(y, "b h w c -> b c h w").contiguous() if output_fmt == "NCHW" else y)
            x = stage.downsample(x)
        if intermediates_only:
            return maps
        return (self.classifier.norm(x) if len(self.layers) == last + 1 or not stop_early else x), maps

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what the chosen stages do not need, as in timm; the head goes with the last stage."""
        take, last = feature_take_indices(len(self.layers), indices)
        shorter = last + 1 < len(self.layers)
        self.layers = self.layers[: last + 1]
        self.layers[-1].downsample = nn.Identity()
        self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if prune_norm or shorter:
            self.classifier.norm = nn.Identity()
        if prune_head or shorter:
            self.reset_classifier(0)
        return take

    def get_classifier(self) -> nn.Module:
        return self.classifier.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        self.num_classes = num_classes
        self.classifier.reset(self.num_features, num_classes, global_pool)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for stage in self.layers:
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.endswith(("A_logs", "Ds", "dt_projs_bias"))}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        return dict(
            stem=r"^patch_embed",
            blocks=r"^layers\.(\d+)"
            if coarse
            else [
                (r"^layers\.(\d+)\.blocks\.(\d+)", None),
                (r"^layers\.(\d+)\.downsample", (0,)),
                (r"^classifier\.norm", (99999,)),
            ],
        )


def _init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


TINY, BASE = (96, 192, 384, 768), (128, 256, 512, 1024)
FIRST_VERSION = dict(d_state=16, gated=True, conv_bias=True, mlp_ratio=0.0, patch_embed="v1", downsample="v1")

# name: the fields that make it
VARIANTS: dict[str, dict[str, Any]] = {
    "vmamba_tiny_s1l8": dict(depths=(2, 2, 8, 2), dims=TINY, ssm_ratio=1.0),
    "vmamba_tiny_s2l5": dict(depths=(2, 2, 5, 2), dims=TINY),
    "vmamba_tiny_gated": dict(depths=(2, 2, 4, 2), dims=TINY, gated=True),
    # not published
    "vmamba_tiny_gated_conv": dict(depths=(2, 2, 4, 2), dims=TINY, gated=True, mixer="gated_conv"),
    "vmamba_small_s1l20": dict(depths=(2, 2, 20, 2), dims=TINY, ssm_ratio=1.0),
    "vmamba_small_s2l15": dict(depths=(2, 2, 15, 2), dims=TINY),
    "vmamba_base_s1l20": dict(depths=(2, 2, 20, 2), dims=BASE, ssm_ratio=1.0),
    "vmamba_base_s2l15": dict(depths=(2, 2, 15, 2), dims=BASE),
    "vmamba_tiny_v0": dict(depths=(2, 2, 9, 2), dims=TINY, **FIRST_VERSION),
    "vmamba_small_v0": dict(depths=(2, 2, 27, 2), dims=TINY, **FIRST_VERSION),
    "vmamba_base_v0": dict(depths=(2, 2, 27, 2), dims=BASE, **FIRST_VERSION),
    "vmamba_nano": dict(depths=(1, 1, 4, 1), dims=(40, 80, 160, 320), ssm_ratio=1.0, conv_norm="batch", conv_act=True),
    "test_vmamba": dict(depths=(1, 1, 1, 1), dims=(16, 16, 32, 32)),
    "vmamba": dict(dims=TINY),  # for whatever fields it is given
}
default_cfgs = generate_default_cfgs(
    {name: default_cfg(first_conv="patch_embed.0", classifier="classifier.head") for name in VARIANTS}
)
register_variants(VMamba, VARIANTS)
