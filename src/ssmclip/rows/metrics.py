"""The display names of metrics and the format of their values; code with a new metric registers it. Needs no torch."""

from __future__ import annotations

from typing import NamedTuple

from ssmclip.registry import Registry


class Shown(NamedTuple):
    """A metric's display name, and whether its values are fractions that are written as percentages."""

    title: str
    fraction: bool = False


SHOWN: Registry[Shown] = Registry("metric of a report")

_FRACTIONS = {
    "top1": "top-1 accuracy",
    "top5": "top-5 accuracy",
    "mean_top1_top5": "mean of top-1 and top-5 accuracy",
    "mean_per_class": "mean accuracy over classes",
    "worst_group": "accuracy in the worst group",
    "average_group": "mean accuracy over groups",
    "group_gap": "accuracy in the best group minus that in the worst",
    "worst_group_top5": "top-5 accuracy in the worst group",
    "mean_average_precision": "mean average precision over classes",
    "text_score": "pictures with the right texts above all wrong ones",
    "image_score": "texts with the right pictures above all wrong ones",
    "group_score": "questions with both right",
    "jaccard": "overlap of the chosen and the right pictures (Jaccard index)",
    "mean_per_category": "mean over categories",
    "text_only": "right texts chosen without the picture",
    "suite_mean": "mean of the data sets' main metrics",
    "roc_auc": "area under the ROC curve",
    "aupr": "area under the precision-recall curve of outliers",
    "ece": "expected calibration error",
    "mean_recall": "mean of the recalls",
    "accuracy": "accuracy",
    "ood_accuracy": "accuracy",
    "shape_bias": "shape bias",
    "negative_share": "negative among the eigenvalues of largest magnitude",
    "converged_share": "eigenvalues that are converged",
    "negative_mass": "negative part of all eigenvalues' magnitude",
    "receptive_field_50": "area that holds half of the effective receptive field",
    "receptive_field_99": "area that holds 99 % of the effective receptive field",
    "power_iteration_missed": "largest eigenvalues that the usual power iteration misses by 1 %",
}
_NUMBERS = {
    "images_per_s": "images per second",
    "nll": "negative log-likelihood",
    "accuracy_difference": "squared accuracy difference",
    "observed_consistency": "observed consistency with humans",
    "error_consistency": "error consistency with humans",
    "top_magnitude": "mean magnitude of the largest eigenvalues",
    "products": "Hessian-vector products a batch",
    "min_over_max": "most negative over most positive eigenvalue",
    "power_iteration_products": "Hessian-vector products of the usual power iteration a batch",
    "power_iteration_products_over_lanczos": "products of the usual power iteration over those of Lanczos",
    "power_iteration_residual": "largest relative residual of the usual power iteration",
    "power_iteration_error": "largest relative error of the usual power iteration",
    "trace": "trace of the Hessian",
    "texts_per_s": "texts per second",
    "training_images_per_s": "images per second in training",
    "training_texts_per_s": "texts per second in training",
    "macs": "multiply-accumulates",
    "inference_memory_mb": "peak memory of inference, MB",
    "training_memory_mb": "peak memory of a training step, MB",
    "latency_ms": "latency of one, ms",
    "energy_j": "energy of one, J",
    "training_energy_j": "energy of one in training, J",
    "target_score": "score of the text or class",
    "deletion": "area under the deletion curve",
    "insertion": "area under the insertion curve",
    "attention_distance": "mean distance of the scan's attention, pixels or tokens",
    "long_sequence_ratio": "tokens over MambaOut's threshold",
}

for _titles, _fraction in ((_FRACTIONS, True), (_NUMBERS, False)):
    for _name, _title in _titles.items():
        SHOWN.register(_name)(Shown(_title, _fraction))
