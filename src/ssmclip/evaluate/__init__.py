"""Model x task -> rows: zero-shot classification and retrieval, with 95 % intervals."""

from ssmclip.evaluate.embeddings.embed import Clip, Settings, embed_images, embed_texts
from ssmclip.evaluate.statistics.metrics import METRICS, bootstrap_interval
from ssmclip.evaluate.tasks import evaluate, training_validation
from ssmclip.evaluate.zeroshot import class_embeddings

__all__ = [
    "METRICS",
    "Clip",
    "Settings",
    "bootstrap_interval",
    "class_embeddings",
    "embed_images",
    "embed_texts",
    "evaluate",
    "training_validation",
]
