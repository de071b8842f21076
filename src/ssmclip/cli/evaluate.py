"""ssmclip evaluate: models x data sets -> a rows file."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ssmclip.cli.ood import ood_task
from ssmclip.cli.options import (
    MODELS,
    add_device,
    default_cache,
    distortion_list,
    image_size,
    labelled,
    line,
    path_list,
    require_writable,
    task_list,
)

HELP = "zero-shot accuracy and retrieval recall of one or more models, as rows"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        required=True,
        help=MODELS,
    )
    parser.add_argument(
        "--tasks",
        required=True,
        help="data sets, with commas: digits,cifar10,flickr8k; table1: CLIP-Mamba's 26; found: all that are under "
        "--data; folder:PATH: class folders of your own; card:FILE.toml: the data set that a card of yours describes; "
        "`ssmclip datasets` lists them. ood: see --humans; "
        "distorted:cifar10: accuracy over the level of each distortion, see --distortions",
    )
    parser.add_argument(
        "--data",
        default="data",
        help="the folder the data sets are under, or hub:clip-benchmark to download them (default: %(default)s)",
    )
    parser.add_argument(
        "--protocol", default="own", help="own, clip-mamba or clip-benchmark: whose prompts and sizes (default: own)"
    )
    parser.add_argument("--prompts", help="labels and templates: JSON files with commas, or the folder that holds them")
    parser.add_argument(
        "--cache",
        default=str(default_cache() or "none"),
        help="where embeddings are kept; none: nowhere (default: %(default)s)",
    )
    parser.add_argument(
        "--truncate", type=int, default=77, help="tokens at which captions are cut besides (default: 77)"
    )
    parser.add_argument(
        "--out",
        required=True,
        type=Path,
        help="the rows file (JSON lines); rows it has stay, but for those measured anew; other settings are refused",
    )
    parser.add_argument("--batch-size", type=int, default=64, help="images at a time (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=0, help="processes that open images (default: this one)")
    add_device(parser)
    parser.add_argument("--seed", type=int, default=0, help="of intervals, examples and subsets (default: %(default)s)")
    parser.add_argument(
        "--image-size", type=image_size, help="pixels or HEIGHTxWIDTH; default: what the model was trained at"
    )
    parser.add_argument("--max-images", type=int, help="a random subset of each data set; the rows say so")
    parser.add_argument("--examples", type=int, default=8, help="pictures kept per data set; 0: none (default: 8)")
    parser.add_argument("--humans", nargs="+", type=Path, help="of the task ood: people's trials, parquet or csv files")
    parser.add_argument(
        "--distortions",
        help="names for distorted:NAME, with commas: contrast,imagenet-c/fog, or FILE.py:NAME for one of your own "
        "(default: the 12 of Geirhos et al., without those whose tables are not given)",
    )
    parser.add_argument("--amplitude", type=Path, help="power-equalisation's table of mean amplitudes, .npy")
    parser.add_argument("--gamma", type=Path, help="false-colour's table of the screen's light, .npy")
    parser.add_argument(
        "--ood-prompts", default="imagenet", help="of the task ood: imagenet or categories (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    from ssmclip.data.testsets.prompts import read_prompts
    from ssmclip.evaluate.distorted import choose
    from ssmclip.evaluate.embeddings.embed import Settings
    from ssmclip.evaluate.embeddings.ranks import launched
    from ssmclip.evaluate.study import Study
    from ssmclip.evaluate.tasks import DISTORTED, open_tasks
    from ssmclip.ops.memory import keep_freed_memory
    from ssmclip.rows import read_rows
    from ssmclip.rows.condition import LEVEL
    from ssmclip.rows.tasks import OOD

    keep_freed_memory()
    models = labelled(args.model)
    prompts = read_prompts(path_list(args.prompts)) if args.prompts else None
    asked = task_list(args.tasks)
    names = [task for task in asked if task != OOD]
    how = None
    if any(task.startswith(DISTORTED) for task in asked):
        chosen = distortion_list(args.distortions) if args.distortions else None
        how = choose(chosen, args.amplitude, args.gamma, args.seed)
    tasks = open_tasks(names, args.data, prompts, protocol=args.protocol, how=how) if names or not asked else []
    require_writable(args.out, args.humans or ())  # before the hours, not after
    tasks += [ood_task(args)] if OOD in asked else []
    cache = None if args.cache == "none" else Path(args.cache)
    truncate = args.truncate or None
    settings = Settings(args.batch_size, args.workers, args.seed, args.max_images, args.examples, cache, truncate)
    about = {"prompts": args.prompts}
    study = Study(models, tasks, settings, args.protocol, args.device, args.image_size, args.out, about)
    rows = study.rows()
    if launched(args.device)[0] == 0:
        shown = [row for row in rows if LEVEL not in row.where]  # those are curves, for the report
        sys.stdout.write("\n".join(map(line, shown)) + f"\n{len(read_rows(args.out)[1])} rows in {args.out}\n")
    return 0
