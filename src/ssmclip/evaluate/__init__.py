"""Model x task -> rows: zero-shot classification and retrieval, with 95 % intervals. Imported when first used."""

from typing import TYPE_CHECKING

from ssmclip.lazy import lazily

if TYPE_CHECKING:
    from ssmclip.evaluate.embeddings.embed import Settings as Settings
    from ssmclip.evaluate.embeddings.embed import embed_images as embed_images
    from ssmclip.evaluate.embeddings.embed import embed_texts as embed_texts
    from ssmclip.evaluate.statistics.metrics import METRICS as METRICS
    from ssmclip.evaluate.statistics.metrics import bootstrap_interval as bootstrap_interval
    from ssmclip.evaluate.study import Study as Study
    from ssmclip.evaluate.study import evaluate as evaluate
    from ssmclip.evaluate.tasks import Task as Task
    from ssmclip.evaluate.tasks import open_tasks as open_tasks
    from ssmclip.evaluate.tasks import training_validation as training_validation
    from ssmclip.evaluate.zeroshot import class_embeddings as class_embeddings
    from ssmclip.models.names import Model as Model

_HOMES = {
    "METRICS": "ssmclip.evaluate.statistics.metrics",
    "Model": "ssmclip.models.names",
    "Settings": "ssmclip.evaluate.embeddings.embed",
    "bootstrap_interval": "ssmclip.evaluate.statistics.metrics",
    "class_embeddings": "ssmclip.evaluate.zeroshot",
    "embed_images": "ssmclip.evaluate.embeddings.embed",
    "embed_texts": "ssmclip.evaluate.embeddings.embed",
    "Study": "ssmclip.evaluate.study",
    "Task": "ssmclip.evaluate.tasks",
    "evaluate": "ssmclip.evaluate.study",
    "open_tasks": "ssmclip.evaluate.tasks",
    "training_validation": "ssmclip.evaluate.tasks",
}

__all__ = list(_HOMES)

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazily(__name__, _HOMES)
