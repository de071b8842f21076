"""ssmclip evaluate: models x data sets -> a rows file."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssmclip.cli.ood import ood_task
from ssmclip.cli.options import (
    MODELS,
    add_device,
    add_precision,
    default_cache,
    distortion_list,
    image_size,
    labelled,
    line,
    path_list,
    require_writable,
    task_list,
)

if TYPE_CHECKING:
    from ssmclip.models.names import Model

log = logging.getLogger(__name__)

HELP = "accuracy of classifiers and of probes, zero-shot accuracy and retrieval recall of CLIPs, as rows"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        required=True,
        help=MODELS,
    )
    parser.add_argument(
        "--tasks",
        required=True,
        help="data sets, separated by commas, such as digits,cifar10,flickr8k (`ssmclip datasets` lists them). Also "
        "table1: the 26 of CLIP-Mamba; datacomp: DataComp's 38 and their mean, also vtab, vtab+ and "
        "imagenet_robustness; found: all data sets in --data; folder:PATH: your own class folders; "
        "card:FILE.toml: the data set that your own card describes; ood: comparison with people (see --humans); "
        "distorted:cifar10: accuracy at each level of distortion (see --distortions); and probes of the frozen image "
        "encoder, trained on the training split: linear:cifar10: logistic regression, its penalty chosen on a "
        "validation split; knn:cifar10, knn-200:cifar10: 20 or 200 nearest neighbours; fewshot-16:cifar10: logistic "
        "regression on 16 images of each class, drawn three times",
    )
    parser.add_argument(
        "--data",
        default="data",
        help="folder that contains the data sets, or hub:clip-benchmark to download them (default: %(default)s)",
    )
    parser.add_argument(
        "--protocol",
        default="own",
        help="source of prompts and preprocessing: own, clip-mamba or clip-benchmark (default: own). Under clip-mamba, "
        "linear:NAME is its linear evaluation: SGD, 90 epochs",
    )
    parser.add_argument(
        "--metrics",
        help="metrics of classification besides the usual ones, separated by commas, such as "
        "nll,ece,temperature,calibrated_ece: calibration, and one temperature fitted on half of the images, judged on "
        "the other half (default: none)",
    )
    parser.add_argument(
        "--features",
        default="pooled",
        help="features that probes see: pooled, before the projection or classifier, or embedding, behind a CLIP's "
        "projection (default: %(default)s)",
    )
    parser.add_argument(
        "--prompts", help="labels and templates: JSON files separated by commas, or the folder that contains them"
    )
    parser.add_argument(
        "--cache",
        default=str(default_cache() or "none"),
        help="folder of cached embeddings; none: no cache (default: %(default)s)",
    )
    parser.add_argument(
        "--truncate",
        type=int,
        default=77,
        help="number of tokens at which captions are also evaluated truncated; 0: never (default: 77)",
    )
    parser.add_argument(
        "--out",
        required=True,
        type=Path,
        help="rows file (JSON lines); existing rows are kept and updated; it is an error if the settings differ",
    )
    parser.add_argument("--batch-size", type=int, default=64, help="number of images in a batch (default: %(default)s)")
    parser.add_argument(
        "--workers",
        type=int,
        default=0,
        help="number of processes that open images; 0: this one (default: %(default)s)",
    )
    add_device(parser)
    add_precision(parser)
    parser.add_argument(
        "--seed", type=int, default=0, help="random seed for intervals, examples and subsets (default: %(default)s)"
    )
    parser.add_argument(
        "--image-size",
        type=image_size,
        help="image size, in pixels or as HEIGHTxWIDTH (default: the size the model was trained at)",
    )
    parser.add_argument(
        "--crop-pct",
        type=float,
        help="part of the resized picture's shorter side that a classifier's crop keeps (default: the model's)",
    )
    parser.add_argument(
        "--use-test-size", action="store_true", help="classifiers at timm's test size and crop, where a model has them"
    )
    parser.add_argument(
        "--test-pool", action="store_true", help="timm's test-time pooling of classifiers above their training size"
    )
    parser.add_argument(
        "--max-images",
        type=int,
        help="size of a random subset of each data set, recorded in the rows (default: all images)",
    )
    parser.add_argument(
        "--examples", type=int, default=8, help="number of example images kept per data set; 0: none (default: 8)"
    )
    parser.add_argument("--humans", nargs="+", type=Path, help="human trials for the task ood: parquet or csv files")
    parser.add_argument(
        "--distortions",
        help="distortions for distorted:NAME, separated by commas: contrast,imagenet-c/fog, or FILE.py:NAME for your "
        "own (default: the 12 of Geirhos et al., except those that need a table that is not given)",
    )
    parser.add_argument("--amplitude", type=Path, help="table of mean amplitudes for power-equalisation, .npy")
    parser.add_argument("--gamma", type=Path, help="table of screen luminance for false-colour, .npy")
    parser.add_argument(
        "--ood-prompts",
        default="imagenet",
        help="prompts for the task ood: imagenet or categories (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    from ssmclip.config.lists import split_list
    from ssmclip.data.testsets.prompts import read_prompts
    from ssmclip.evaluate.distorted import choose
    from ssmclip.evaluate.embeddings.embed import Settings
    from ssmclip.evaluate.embeddings.ranks import launched
    from ssmclip.evaluate.statistics.metrics import METRICS
    from ssmclip.evaluate.study import Study
    from ssmclip.evaluate.suites import SUITES
    from ssmclip.evaluate.tasks import DISTORTED, open_tasks, split_name
    from ssmclip.models.classifier import View
    from ssmclip.models.frozen import FEATURES
    from ssmclip.ops.memory import keep_freed_memory
    from ssmclip.report.tables import classifier_table
    from ssmclip.rows import read_rows
    from ssmclip.rows.condition import LEVEL, SEED
    from ssmclip.rows.precision import as_models
    from ssmclip.rows.tasks import OOD

    keep_freed_memory()
    models = labelled(args.model)
    prompts = read_prompts(path_list(args.prompts)) if args.prompts else None
    asked = task_list(args.tasks)
    names = [task for task in asked if task != OOD]
    how = None
    if any(split_name(task)[0] == DISTORTED for task in names):
        chosen = distortion_list(args.distortions) if args.distortions else None
        how = choose(chosen, args.amplitude, args.gamma, args.seed)
    FEATURES[args.features]  # an unknown one raises
    also = [METRICS[name] and name for name in split_list(args.metrics or "")]  # an unknown one raises
    given = dict(protocol=args.protocol, how=how, features=args.features, also=also)
    tasks = open_tasks(names, args.data, prompts, **given) if names or not asked else []
    require_writable(args.out, args.humans or ())  # before the hours, not after
    tasks += [ood_task(args)] if OOD in asked else []
    cache = None if args.cache == "none" else Path(args.cache)
    truncate = args.truncate or None
    settings = Settings(args.batch_size, args.workers, args.seed, args.max_images, args.examples, cache, truncate)
    about = {"prompts": args.prompts, "features": args.features}
    view = View(None, args.crop_pct, args.use_test_size, args.test_pool)
    suites = [name for name in names if name in SUITES]
    seen = (args.protocol, args.device, args.image_size)
    study = Study(models, tasks, settings, *seen, args.out, about, view, cost, suites, args.precision)
    rows = study.rows()
    if launched(args.device)[0] == 0:
        shown = [
            row for row in rows if not {LEVEL, SEED} & set(row.where)
        ]  # those are curves and draws, for the report
        sys.stdout.write("\n".join(map(line, shown)) + f"\n{len(read_rows(args.out)[1])} rows in {args.out}\n")
        sys.stdout.write(classifier_table(as_models(rows)))
    return 0


def cost(model: Model, size: tuple[int, int]) -> dict[str, Any]:
    """Return the multiply-accumulates of a classifier for one image, {} where an operator has no formula."""
    from ssmclip.analyze.cost.macs import count_macs

    try:
        return {"macs": count_macs(model.network, size).image.total}
    except (NotImplementedError, ValueError) as error:
        log.warning("the operations of %s cannot be counted: %s", model.label, error)
        return {}
