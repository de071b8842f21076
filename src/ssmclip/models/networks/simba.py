"""SiMBA: a pyramid whose tokens are mixed by Mamba, read once from the top left to the bottom right, as a timm model.

Patro and Agneeswaran 2024, "SiMBA: Simplified Mamba-based Architecture for Vision and Multivariate Time Series"; the
widths and depths are those of CLIP-Mamba. Maps are channels last (B, H, W, C) throughout. Parameter names are those
of the published checkpoints.

    image -> stem (1/4) -> 4 stages of blocks, each begun by a halving (the stem for the first) and ended by a LN
          -> the mean of the last map, through one more block -> LN -> head
    block:  x += Mamba(LN(x));  x += channel mixer(LN(x))

There is no positional table: any height and width work.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import timm.layers
import torch
import torch.fx
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from timm.models import checkpoint, generate_default_cfgs
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from ssmclip.models.networks.mamba import Mamba
from ssmclip.models.networks.parts import at_least_float32, build_head
from ssmclip.models.networks.registration import default_cfg, register_variants

__all__ = ["EinFFT", "SiMBA"]

# Leaves of torch.fx's graphs: they look at types and axes, which a traced tensor does not have.
torch.fx.wrap("rearrange")
torch.fx.wrap("at_least_float32")

EPS = 1e-6  # of the norms between blocks; those inside Mamba layers and patch embeddings have PyTorch's 1e-5


class MambaLayer(nn.Module):
    """LN, then Mamba over the map's positions, row by row."""

    def __init__(self, dim: int, **mamba):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.mamba = Mamba(dim, **mamba)

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        y = self.mamba(rearrange(self.norm(x), "b h w c -> b (h w) c"))
        return rearrange(y, "b (h w) c -> b h w c", h=x.shape[1])


class DepthwiseConv(nn.Module):
    """3x3, each channel by itself. A module of its own to keep the published parameter names."""

    def __init__(self, dim: int):
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        return rearrange(self.dwconv(rearrange(x, "b h w c -> b c h w")), "b c h w -> b h w c")


class Mlp(nn.Module):
    """fc1 -> 3x3 depthwise convolution, where `conv` -> GELU -> fc2."""

    def __init__(self, dim: int, hidden: int, conv: bool = True):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = DepthwiseConv(hidden) if conv else nn.Identity()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        return self.fc2(F.gelu(self.dwconv(self.fc1(x))))


class EinFFT(nn.Module):
    """SiMBA's channel mixer (section 3.2): a two-layer complex MLP on the Fourier transform over positions and blocks.

    The channels are cut into `blocks` blocks with a matrix each. The transform is in float32, or float64 for float64.
    Raises ValueError when `blocks` does not divide `dim`.
    """

    def __init__(self, dim: int, blocks: int = 4, shrink: float = 0.01):
        super().__init__()
        if dim % blocks:
            raise ValueError(f"EinFFT's channels must be a multiple of its {blocks} blocks (got {dim})")
        size = dim // blocks
        self.blocks, self.shrink = blocks, shrink
        # The first axis is real and imaginary part: optimisers and checkpoints see real numbers.
        self.complex_weight_1 = nn.Parameter(0.02 * torch.randn(2, blocks, size, size))
        self.complex_weight_2 = nn.Parameter(0.02 * torch.randn(2, blocks, size, size))
        self.complex_bias_1 = nn.Parameter(0.02 * torch.randn(2, blocks, size))
        self.complex_bias_2 = nn.Parameter(0.02 * torch.randn(2, blocks, size))

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        y = rearrange(at_least_float32(x), "b h w (k d) -> b (h w) k d", k=self.blocks)
        y = torch.fft.fft2(y, dim=(1, 2), norm="ortho")
        y = torch.cat([y.real, y.imag], -1)
        y = F.relu(self._linear(y, self.complex_weight_1, self.complex_bias_1))
        y = F.softshrink(self._linear(y, self.complex_weight_2, self.complex_bias_2), self.shrink)
        real, imag = y.chunk(2, -1)
        y = torch.fft.ifft2(torch.complex(real, imag), dim=(1, 2), norm="ortho").real
        return rearrange(y, "b (h w) k d -> b h w (k d)", h=x.shape[1]).to(x.dtype)

    @staticmethod
    def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Multiply [real, imaginary]: (x + iy)(v + iw) = xv - yw + i(xw + yv). ONNX has no complex product."""
        real, imag = weight.to(x.dtype)
        matrix = torch.cat([torch.cat([real, imag], -1), torch.cat([-imag, real], -1)], -2)
        bias_real, bias_imag = bias.to(x.dtype)
        return torch.einsum("bnkd,kde->bnke", x, matrix) + torch.cat([bias_real, bias_imag], -1)


class Block(nn.Module):
    """x += Mamba(LN(x)); x += channel_mixer(LN(x))."""

    def __init__(self, dim: int, channel_mixer: nn.Module, drop_path: float = 0.0, **mamba):
        super().__init__()
        self.attn = MambaLayer(dim, **mamba)  # the published name; there is no attention
        self.norm2 = nn.LayerNorm(dim, eps=EPS)
        self.mlp = channel_mixer
        self.drop_path = timm.layers.DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        x = x + self.drop_path(self.attn(x))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    """The halving that begins a stage: a 3x3 convolution of stride 2, then LN.

    stem_dim: before it, the stem: three convolutions of so many channels, the first of them 7x7 with stride 2.
    """

    def __init__(self, in_chans: int, dim: int, stem_dim: int = 0):
        super().__init__()
        self.conv = nn.Identity()
        if stem_dim:
            layers = []
            for channels, size, stride in ((in_chans, 7, 2), (stem_dim, 3, 1), (stem_dim, 3, 1)):
                conv = nn.Conv2d(channels, stem_dim, size, stride=stride, padding=size // 2, bias=False)
                layers += [conv, nn.BatchNorm2d(stem_dim), nn.ReLU(inplace=True)]
            self.conv = nn.Sequential(*layers)
        self.proj = nn.Conv2d(stem_dim or in_chans, dim, 3, stride=2, padding=1)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b h2 w2 d"]:
        return self.norm(rearrange(self.proj(self.conv(x)), "b d h w -> b h w d"))


class SiMBA(nn.Module):
    """SiMBA for images of any size, with timm's interface.

    depths, dims, mlp_ratios: blocks, channels and hidden channels over dim of the stages; stem_dim: channels of the
    stem; d_state, d_conv, expand: see `Mamba`; channel_mixer: "mlp" (with a depthwise convolution, as in CLIP-Mamba) |
    "einfft"; drop_rate: dropout before the head; drop_path_rate: of the last block, growing linearly from 0;
    global_pool: "token" (the mean of the last map, through the class block) | "" for that map itself; aux_head: the
    second head of models trained with token labelling, whose logits at each position, the largest of each class over
    the pooled map, are added by half (in training too, where the original gives the parts to a loss of its own).

    forward: (B, in_chans, H, W) -> (B, num_classes), or (B, num_features) when num_classes is 0.

    The formats of maps, torch.fx and TorchScript: as for `ssmclip.models.networks.vmamba.VMamba`.
    """

    def __init__(
        self,
        depths: Sequence[int] = (3, 4, 6, 3),
        dims: Sequence[int] = (64, 128, 320, 448),
        mlp_ratios: Sequence[int | float] = (8, 8, 4, 4),
        stem_dim: int = 32,
        d_state: int = 64,
        d_conv: int = 4,
        expand: int = 2,
        channel_mixer: Literal["mlp", "einfft"] = "mlp",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "token",
        aux_head: bool = False,
    ):
        super().__init__()
        if not len(depths) == len(dims) == len(mlp_ratios):
            raise ValueError(
                f"depths {depths}, dims {dims} and mlp_ratios {mlp_ratios} must name the same number of stages"
            )
        if channel_mixer not in ("mlp", "einfft"):
            raise ValueError(f"channel_mixer must be 'mlp' or 'einfft' (got {channel_mixer!r})")
        self.in_chans = in_chans
        self.num_features = self.head_hidden_size = dims[-1]
        self.output_fmt = "NHWC"  # of forward_features, and of forward where nothing is pooled
        self.num_stages = len(dims)
        self.drop_rate = drop_rate
        self.grad_checkpointing = False
        mamba = dict(d_state=d_state, d_conv=d_conv, expand=expand)
        rates = (drop_path_rate * i / max(sum(depths) - 1, 1) for i in range(sum(depths)))

        def mixer(dim: int, ratio: int | float, conv: bool = True) -> nn.Module:
            return EinFFT(dim) if channel_mixer == "einfft" else Mlp(dim, int(ratio * dim), conv)

        channels = in_chans
        for i, (depth, dim, ratio) in enumerate(zip(depths, dims, mlp_ratios, strict=True), start=1):
            blocks = [Block(dim, mixer(dim, ratio), next(rates), **mamba) for _ in range(depth)]
            self.add_module(f"patch_embed{i}", PatchEmbed(channels, dim, stem_dim if i == 1 else 0))
            self.add_module(f"block{i}", nn.ModuleList(blocks))
            self.add_module(f"norm{i}", nn.LayerNorm(dim, eps=EPS))  # the last one is the class token's
            channels = dim
        self.post_network = nn.ModuleList([Block(dims[-1], mixer(dims[-1], mlp_ratios[-1], conv=False), **mamba)])
        self.reset_classifier(num_classes, global_pool)
        if aux_head and num_classes > 0:
            self.aux_head = nn.Linear(self.num_features, num_classes)
        self.feature_info = [
            dict(num_chs=dim, reduction=4 * 2**i, module=f"block{i + 1}") for i, dim in enumerate(dims)
        ]
        self.apply(_init_weights)

    def _forward_stage(self, i: int, x: Float[Tensor, "b ..."]) -> Float[Tensor, "b h w d"]:
        """Apply stage i, counted from 1, to the image or to the previous stage's map."""
        if i > 1:
            x = rearrange(getattr(self, f"norm{i - 1}")(x), "b h w c -> b c h w")
        x = getattr(self, f"patch_embed{i}")(x)
        for block in getattr(self, f"block{i}"):
            x = checkpoint(block, x) if self.grad_checkpointing and torch.is_grad_enabled() else block(x)
        return x

    def forward_features(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b h2 w2 d"]:
        """Return the last map, channels last, not normalised: the class block begins with a norm."""
        for i in range(1, self.num_stages + 1):
            x = self._forward_stage(i, x)
        return x

    def forward_head(self, x: Float[Tensor, "b h w d"], pre_logits: bool = False) -> Tensor:
        """Apply the class block and its norm to the mean of all positions, then the head, or both heads."""
        positions = x
        if self.global_pool == "token":
            x = x.mean(dim=(1, 2), keepdim=True)
            for block in self.post_network:
                x = block(x)
            x = getattr(self, f"norm{self.num_stages}")(x[:, 0, 0])
        if pre_logits:
            return x
        logits = self.head(F.dropout(x, self.drop_rate, self.training))
        if self.aux_head is None or self.global_pool != "token":
            return logits
        return logits + 0.5 * self.aux_head(getattr(self, f"norm{self.num_stages}")(positions)).amax(dim=(1, 2))

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
        """Return the maps after each chosen stage's blocks (and, with norm, its norm) and the final one, as in timm."""
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NHWC' (got {output_fmt!r})")
        take, last = feature_take_indices(self.num_stages, indices)
        maps = []
        for i in range(last + 1 if stop_early else self.num_stages):
            x = self._forward_stage(i + 1, x)
            if i in take:
                y = getattr(self, f"norm{i + 1}")(x) if norm else x
                maps.append(rearrange(y, "b h w c -> b c h w").contiguous() if output_fmt == "NCHW" else y)
        return maps if intermediates_only else (x, maps)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what the chosen stages do not need, as in timm."""
        take, last = feature_take_indices(self.num_stages, indices)
        for i in range(last + 2, self.num_stages + 1):
            for name in ("patch_embed", "block", "norm"):
                delattr(self, f"{name}{i}")
        self.num_stages = last + 1
        self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if prune_norm:
            self.add_module(f"norm{self.num_stages}", nn.Identity())
        if prune_head:
            self.post_network = nn.ModuleList()
            self.reset_classifier(0, "")
        return take

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        if global_pool not in (None, "", "token"):
            raise ValueError(
                f"SiMBA's global_pool must be 'token' (its class block) or '' (the map) (got {global_pool!r})"
            )
        if global_pool is not None:
            self.global_pool = global_pool
        self.num_classes = num_classes
        self.aux_head = None  # a new task has labels for images, not for positions
        self.head = build_head(self, self.num_features, num_classes)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.endswith((".A_log", ".mamba.D", "dt_proj.bias"))}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        between = rf"^norm([1-{self.num_stages - 1}])\."
        return dict(
            stem=r"^patch_embed1\.",
            blocks=r"^(?:patch_embed|block)(\d+)|" + between
            if coarse
            else [
                (r"^patch_embed(\d+)", (-1,)),
                (r"^block(\d+)\.(\d+)", None),
                (between, (99999,)),
            ],
            class_block=rf"^(?:post_network|norm{self.num_stages})\.",
        )


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, Mamba):
        module.reset_parameters()  # the original loses delta's initialisation to the lines above, unintended


# name: the fields that make it
VARIANTS: dict[str, dict[str, Any]] = {
    "simba_small": dict(depths=(3, 4, 6, 3), dims=(64, 128, 320, 448), stem_dim=32),
    "simba_base": dict(depths=(3, 4, 12, 3), dims=(64, 128, 320, 512), stem_dim=64),
    "simba_large": dict(depths=(3, 6, 18, 3), dims=(96, 192, 384, 512), stem_dim=64),
    "test_simba": dict(depths=(1, 1, 1, 1), dims=(16, 16, 32, 32), mlp_ratios=(2, 2, 2, 2), stem_dim=8, d_state=8),
    "simba": dict(dims=(64, 128, 320, 448)),  # for whatever fields it is given
}
default_cfgs = generate_default_cfgs(
    {name: default_cfg(first_conv="patch_embed1.conv.0", classifier="head") for name in VARIANTS}
)
register_variants(SiMBA, VARIANTS, second_classifier="aux_head")
