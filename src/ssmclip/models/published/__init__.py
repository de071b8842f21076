"""Published checkpoints of other code bases. The modules named here register the layouts of this package."""

from ssmclip.models.published import (
    climp,
    clip,
    clip_mamba,
    efficientnet_lite,
    language_model,
    mambaout,
    simba,
    text,
    vmamba,
)

__all__ = ["climp", "clip", "clip_mamba", "efficientnet_lite", "language_model", "mambaout", "simba", "text", "vmamba"]
