"""Training: a thin loop on Accelerate, open_clip's losses, checkpoints that a run continues from exactly."""

from ssmclip.train.loop import train
from ssmclip.train.progress import NonFinite
from ssmclip.train.signals import Stopped

__all__ = ["NonFinite", "Stopped", "train"]
