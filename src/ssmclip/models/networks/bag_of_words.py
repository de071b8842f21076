"""A control for text towers: the mean of the words' embeddings, without order or layers."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


class BagOfWords(nn.Module):
    """The text tower for `layers: 0`; open_clip's would read only the end token.

    embed_dim: E; vocab_size: of CLIP's byte pairs, whose last two mark start and end; width: of an embedding,
    projected to E where they differ. Start, end and padding (0) don't count; a text of nothing else is all zeros.
    """

    def __init__(self, embed_dim: int, vocab_size: int, width: int, context_length: int):
        super().__init__()
        self.context_length, self.vocab_size = context_length, vocab_size
        self.token_embedding = nn.Embedding(vocab_size, width)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        self.proj = nn.Identity() if width == embed_dim else nn.Linear(width, embed_dim, bias=False)

    def forward(self, text: Int[Tensor, "B L"]) -> Float[Tensor, "B E"]:
        embedded = self.token_embedding(text)
        word = ((text > 0) & (text < self.vocab_size - 2)).to(embedded.dtype)
        total = torch.einsum("bl,blc->bc", word, embedded)
        return self.proj(total / word.sum(1, keepdim=True).clamp(min=1))

    def lock(self, unlocked_layers: int = 0, freeze_layer_norm: bool = True, pooler_in_head: bool = True) -> None:
        """Freeze the whole tower: it has no layers, norms or pooler to leave out. The arguments are open_clip's."""
        self.requires_grad_(False)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True, impl: str = "inline") -> None:
        """Do nothing: there are no layers to recompute. The arguments are open_clip's."""
