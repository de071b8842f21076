"""Published checkpoints of other code bases. The modules named here register the layouts that come with this package."""

from ssmclip.models.published import clip, clip_mamba, climp, language_model, mambaout, simba, text, vmamba

__all__ = ["clip", "clip_mamba", "climp", "language_model", "mambaout", "simba", "text", "vmamba"]
