"""Mamba language models as text towers.

Gu and Dao 2023, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (arXiv:2312.00752, section 3.4);
Dao and Gu 2024, "Transformers are SSMs" (arXiv:2405.21060, section 7), Mamba-2.
Fields and parameters are named as in Hugging Face's `MambaModel` and `Mamba2Model`, so that their checkpoints load as
they are.

    tokens -> embeddings -> blocks, x += mixer(RMSNorm(x)) -> the last real token -> RMSNorm -> projection

B batch · L positions · E embedding dimensions. There is no positional table: any length works.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from timm.models import checkpoint
from torch import Tensor, nn

from ssmclip.models.networks.mamba import Mamba, Mamba2
from ssmclip.models.networks.parts import at_least_float32, dtype_of
from ssmclip.registry import UnknownName

__all__ = ["LanguageModel", "Mamba2Config", "MambaConfig", "MambaText"]


@dataclass(frozen=True)
class MambaConfig:
    """Mamba-1. The fields and defaults of Hugging Face's `MambaConfig` that decide what is computed."""

    vocab_size: int = 50280  # rows of the token table
    hidden_size: int = 768  # width between blocks
    num_hidden_layers: int = 32
    state_size: int = 16  # N, states per channel
    expand: int = 2  # inner channels over hidden_size
    conv_kernel: int = 4  # positions the convolution sees
    time_step_rank: int | str = "auto"  # of the projection to delta; "auto": hidden_size / 16, rounded up
    layer_norm_epsilon: float = 1e-5
    use_bias: bool = False  # of in_proj and out_proj
    use_conv_bias: bool = True

    def make_mixer(self) -> Mamba:
        return Mamba(
            self.hidden_size,
            d_state=self.state_size,
            d_conv=self.conv_kernel,
            expand=self.expand,
            dt_rank=None if self.time_step_rank == "auto" else self.time_step_rank,
            bias=self.use_bias,
            conv_bias=self.use_conv_bias,
        )


@dataclass(frozen=True)
class Mamba2Config:
    """Mamba-2. The fields and defaults of Hugging Face's `Mamba2Config` that decide what is computed.

    A checkpoint's shapes alone give n_groups * state_size, not the two. All published models have one group.
    """

    vocab_size: int = 32768  # rows of the token table
    hidden_size: int = 4096  # width between blocks
    num_hidden_layers: int = 64
    state_size: int = 128  # N, states per channel
    num_heads: int = 128  # num_heads * head_dim = expand * hidden_size
    head_dim: int = 64  # channels that share a decay
    n_groups: int = 8  # of heads that share B and C
    expand: int = 2  # inner channels over hidden_size
    conv_kernel: int = 4  # positions the convolution sees
    layer_norm_epsilon: float = 1e-5
    use_bias: bool = False  # of in_proj and out_proj
    use_conv_bias: bool = True
    time_step_limit: tuple[float, float] = (0.0, math.inf)  # of the steps, after the softplus

    def __post_init__(self):
        if self.num_heads * self.head_dim != self.expand * self.hidden_size:
            raise ValueError(
                f"num_heads={self.num_heads} times head_dim={self.head_dim} must be expand={self.expand} times "
                f"hidden_size={self.hidden_size}"
            )

    def make_mixer(self) -> Mamba2:
        return Mamba2(
            self.hidden_size,
            d_state=self.state_size,
            d_conv=self.conv_kernel,
            expand=self.expand,
            head_dim=self.head_dim,
            n_groups=self.n_groups,
            bias=self.use_bias,
            conv_bias=self.use_conv_bias,
            norm_eps=self.layer_norm_epsilon,
            dt_limit=self.time_step_limit,
        )


# model_type in a checkpoint's config.json: what builds it
CONFIGS: dict[str, type] = {"mamba": MambaConfig, "mamba2": Mamba2Config}


class Block(nn.Module):
    """x += mixer(RMSNorm(x)). The sum is at least float32 whatever the weights are."""

    def __init__(self, config: MambaConfig | Mamba2Config):
        super().__init__()
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.mixer = config.make_mixer()

    def forward(self, x: Float[Tensor, "B L C"]) -> Float[Tensor, "B L C"]:
        return at_least_float32(x) + self.mixer(self.norm(x.to(dtype_of(self.norm, x.dtype))))


class LanguageModel(nn.Module):
    """A Mamba language model without its output head; `state_dict` has the keys of Hugging Face's model."""

    def __init__(self, config: MambaConfig | Mamba2Config):
        super().__init__()
        self.config = config
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm_f = nn.RMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.grad_checkpointing = False
        nn.init.normal_(self.embeddings.weight, std=0.02)
        with torch.no_grad():
            for layer in self.layers:  # what the blocks add up to keeps its size however many there are
                layer.mixer.out_proj.weight /= math.sqrt(config.num_hidden_layers)

    def forward_blocks(self, tokens: Int[Tensor, "B L"]) -> Float[Tensor, "B L C"]:
        """Return the hidden states before the last norm. Later tokens do not affect a token's state."""
        x = self.embeddings(tokens)
        for layer in self.layers:
            x = checkpoint(layer, x) if self.grad_checkpointing and torch.is_grad_enabled() else layer(x)
        return x

    def forward(self, tokens: Int[Tensor, "B L"]) -> Float[Tensor, "B L C"]:
        """Return the hidden states at every position: what Hugging Face calls `last_hidden_state`."""
        x = self.forward_blocks(tokens)
        return self.norm_f(x.to(dtype_of(self.norm_f, x.dtype)))


class MambaText(nn.Module):
    """A language model as open_clip text tower: the state after the last real token, projected.

    embed_dim: E; mamba: fields of the language model's config, with `model_type` ("mamba", also when left out, or
    "mamba2"); context_length: tokens its tokenizer cuts a text at, None for no limit; pad_id: the token that fills up
    a text, before its first or after its last token; proj_bias: of the projection.

    An embedding depends neither on the other texts of the batch nor on how far, or on which side, a text was padded.
    Raises UnknownName for another model_type, TypeError for a field it does not have.
    """

    def __init__(
        self,
        embed_dim: int,
        mamba: dict[str, Any],
        context_length: int | None = None,
        pad_id: int = 0,
        proj_bias: bool = False,
    ):
        super().__init__()
        config = read_config(mamba)
        self.context_length, self.vocab_size, self.pad_id = context_length, config.vocab_size, pad_id
        self.transformer = LanguageModel(config)
        self.proj = nn.Linear(config.hidden_size, embed_dim, bias=proj_bias)
        nn.init.normal_(self.proj.weight, std=config.hidden_size**-0.5)

    def forward(self, text: Int[Tensor, "B L"]) -> Float[Tensor, "B E"]:
        tokens, last = left_align(text, self.pad_id)
        x = self.transformer.forward_blocks(tokens)
        x = x[torch.arange(x.shape[0], device=x.device), last]  # not len, which a traced graph would keep as a number
        norm = self.transformer.norm_f
        return self.proj(norm(x.to(dtype_of(norm, x.dtype))))

    def lock(self, unlocked_layers: int = 0, freeze_layer_norm: bool = True, pooler_in_head: bool = True) -> None:
        """Freeze the language model except its last layers, as open_clip asks for it; the projection goes on learning.

        unlocked_layers: how many of embeddings and blocks, from the last, still learn; freeze_layer_norm: norms too;
        pooler_in_head: accepted for open_clip's sake, as the last token's state is taken without weights of a pooler.
        """
        model = self.transformer
        model.requires_grad_(False)
        if unlocked_layers:
            for module in [*[model.embeddings, *model.layers][-unlocked_layers:], model.norm_f]:
                module.requires_grad_(True)
        if not freeze_layer_norm:
            for module in model.modules():
                if isinstance(module, nn.RMSNorm):
                    module.requires_grad_(True)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True, impl: str = "inline") -> None:
        """Recompute each block in the backward pass. impl: accepted for open_clip's sake; it is always "inline"."""
        self.transformer.grad_checkpointing = enable

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.endswith((".A_log", ".D", "bias"))}


def left_align(text: Int[Tensor, "B L"], pad_id: int) -> tuple[Int[Tensor, "B K"], Int[Tensor, " B"]]:
    """Move every text to position 0 and cut the batch after the longest; return it with the end of each text.

    A text reaches from the first token that is not padding to the last; one of padding alone is a single token.
    Raises ValueError when L is 0.
    """
    if text.shape[1] == 0:
        raise ValueError("texts must have at least one token: encode an empty text as one padding token")
    real = (text != pad_id).int()
    last_place = text.shape[1] - 1
    first = real.argmax(1)
    last = torch.where(real.any(1), last_place - real.flip(1).argmax(1) - first, 0)
    # A traced graph, or one of shapes alone, has one length for all batches: the padding stays, and nothing reads it.
    shapes_only = torch.compiler.is_compiling() or text.is_meta
    length = last_place + 1 if shapes_only else int(last.max()) + 1 if len(text) else 1
    places = (first[:, None] + torch.arange(length, device=text.device)).clamp(max=last_place)
    return text.gather(1, places), last


def read_config(fields: dict[str, Any]) -> MambaConfig | Mamba2Config:
    """Return the config of a language model from its fields and its `model_type`.

    Raises UnknownName, TypeError, ValueError.
    """
    fields = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
    return _config_type(fields.pop("model_type", "mamba"))(**fields)


def _config_type(model_type: str) -> type:
    if model_type not in CONFIGS:
        raise UnknownName("language model", model_type, CONFIGS)
    return CONFIGS[model_type]
