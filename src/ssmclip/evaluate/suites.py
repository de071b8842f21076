"""Data sets that are reported together, and their mean: DataComp's 38, VTAB and VTAB+ as CLIP_benchmark groups them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import sqrt

from ssmclip.registry import Registry
from ssmclip.rows import Result
from ssmclip.rows.condition import CATEGORY

MEAN = "suite_mean"
USUAL = ("top1",)
PER_CLASS = ("mean_per_class",)
RECALLS = ("image_to_text_recall@1", "text_to_image_recall@1")


@dataclass(frozen=True)
class Suite:
    """Data sets that are reported together.

    source: who put them together; metrics: data set -> what counts of it, of several metrics their mean; categories:
    data set -> the category of its questions that counts.
    """

    title: str
    source: str
    metrics: Mapping[str, tuple[str, ...]]
    categories: Mapping[str, str] = field(default_factory=dict)


SUITES: Registry[Suite] = Registry("suite")

_ROBUSTNESS = ("imagenet_v2", "imagenet_sketch", "imagenet_a", "imagenet_r", "objectnet")
_VTAB = (
    *("caltech101", "cifar100", "clevr", "clevr_distance", "diabetic_retinopathy", "dmlab", "dsprites_orientation"),
    *("dsprites_x_position", "dtd", "eurosat", "kitti", "flowers", "pets", "pcam", "resisc45", "smallnorb_azimuth"),
    *("smallnorb_elevation", "sun397", "svhn"),
)
_PLUS = (
    *("imagenet", *_ROBUSTNESS, "fer2013", "voc2007", "voc2007_multilabel", "cars", "aircraft", "mnist", "stl10"),
    *("gtsrb", "country211", "sst2", "cifar10"),
)
_DATACOMP = (
    *("caltech101", "cifar10", "cifar100", "clevr", "clevr_distance", "country211", "dtd", "eurosat", "aircraft"),
    *("food101", "gtsrb", "imagenet", "imagenet_sketch", "imagenet_v2", "imagenet_a", "imagenet_o", "imagenet_r"),
    *("kitti", "mnist", "objectnet", "flowers", "pets", "voc2007", "pcam", "sst2", "resisc45", "cars", "stl10"),
    *("sun397", "svhn", "flickr30k", "coco_karpathy", "winogavil", "iwildcam", "camelyon17", "fmow"),
    *("dollar_street", "geode"),
)


def _top1(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    return dict.fromkeys(names, USUAL)


SUITES.register("datacomp")(
    Suite(
        "DataComp's 38 data sets",
        "S. Gadre et al. DataComp: In Search of the Next Generation of Multimodal Datasets. NeurIPS 2023. "
        "arXiv:2304.14108, table 15",
        _top1(_DATACOMP)
        | dict.fromkeys(("caltech101", "aircraft", "flowers", "pets"), PER_CLASS)
        | dict.fromkeys(("flickr30k", "coco_karpathy"), RECALLS)
        | {"winogavil": ("jaccard",), "iwildcam": ("macro_f1",), "dollar_street": ("worst_group_top5",)}
        | dict.fromkeys(("fmow", "geode"), ("worst_group",)),
        {"winogavil": "10-12 candidates"},
    )
)
SUITES.register("vtab")(Suite("VTAB", "X. Zhai et al. arXiv:1910.04867; as CLIP_benchmark 1.6.2", _top1(_VTAB)))
SUITES.register("vtab+")(
    Suite(
        "VTAB+",
        "C. Schuhmann et al. LAION-5B. NeurIPS 2022; as CLIP_benchmark 1.6.2",
        _top1((*_PLUS, *_VTAB)) | {"voc2007_multilabel": ("mean_average_precision",)},
    )
)
SUITES.register("imagenet_robustness")(
    Suite("Distribution shifts of ImageNet", "as CLIP_benchmark 1.6.2", _top1(_ROBUSTNESS))
)


def suite_rows(rows: Sequence[Result], suites: Iterable[str], models: Iterable[str]) -> list[Result]:
    """Return the mean of each suite for each model, over the data sets that there are rows of.

    Every data set counts equally, by its main metric. The interval takes those of the data sets as independent:
    half its width is the root of the sum of their half widths' squares, over their number; none where one has none.
    `extra` has each data set's value, and says which are missing. A suite without a row has no mean.
    Raises UnknownName.
    """
    known = {(row.model, row.task, row.metric, tuple(row.where.items())): row for row in rows if not row.against}
    made = []
    for name in suites:
        suite = SUITES[name]
        for model in models:
            counted = {task: found for task in suite.metrics if (found := _counted(known, model, task, suite))}
            if counted:
                made.append(_mean(model, name, suite, counted))
    return made


def _counted(known: Mapping[tuple, Result], model: str, task: str, suite: Suite) -> list[Result]:
    """Return the rows that count of a data set, none unless all of them are there."""
    where = ((CATEGORY, suite.categories[task]),) if task in suite.categories else ()
    found = [known.get((model, task, metric, where)) for metric in suite.metrics[task]]
    return [row for row in found if row is not None] if None not in found else []


def _mean(model: str, name: str, suite: Suite, counted: Mapping[str, list[Result]]) -> Result:
    values = {task: sum(row.value for row in rows) / len(rows) for task, rows in counted.items()}
    value = sum(values.values()) / len(values)
    # The recalls of a data set are of the same pictures: the mean of their widths is not less than the mean's width.
    low, high = (
        [_mean_of([abs(row.value - bound(row)) for row in rows if bound(row) is not None]) for rows in counted.values()]
        for bound in (lambda row: row.ci_low, lambda row: row.ci_high)
    )
    widths = None if None in (*low, *high) else [sqrt(sum(w**2 for w in part)) / len(values) for part in (low, high)]
    missing = [task for task in suite.metrics if task not in counted]
    extra = {"title": f"{suite.title}, mean", "source": suite.source, "values": values}
    if missing:
        extra["said"] = f"{len(values)} of {len(suite.metrics)} data sets; missing: {', '.join(missing)}"
    interval = (value - widths[0], value + widths[1]) if widths else (None, None)
    return Result(model, name, MEAN, value, *interval, len(values), extra=extra)


def _mean_of(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
