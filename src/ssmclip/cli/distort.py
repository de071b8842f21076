"""ssmclip distort: a folder of images, or ImageNet and the human data -> distorted images."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

HELP = "distorted copies of a folder of images, or the published out-of-distribution sets rebuilt from ImageNet"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder", nargs="?", type=Path, help="folder of images, searched recursively; its structure is kept"
    )
    parser.add_argument(
        "--out", required=True, type=Path, help="output folder, filled with DISTORTION/LEVEL/your/folders/NAME.png"
    )
    parser.add_argument(
        "--distortions",
        help="distortions, separated by commas: contrast,imagenet-c/fog, or FILE.py:NAME for your own "
        "(default: the 12 of Geirhos et al.)",
    )
    parser.add_argument(
        "--levels", help="numbers or labels of levels, separated by commas (default: all levels of each distortion)"
    )
    parser.add_argument(
        "--size",
        type=int,
        default=224,
        help="side in pixels to crop images to before distorting; 0: no cropping (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="random seed for noise, phases and eidolons (default: %(default)s)"
    )
    parser.add_argument("--amplitude", type=Path, help="table of mean amplitudes for power-equalisation, .npy")
    parser.add_argument("--gamma", type=Path, help="table of screen luminance for false-colour, .npy")
    parser.add_argument(
        "--humans",
        type=Path,
        help="human data in parquet; its parametric sets are rebuilt from the images in --imagenet",
    )
    parser.add_argument(
        "--imagenet", type=Path, help="folder of the ILSVRC2012 training images: n01234567/n01234567_89.JPEG"
    )


def run(args: argparse.Namespace) -> int:
    from ssmclip.data.distortions import GEIRHOS
    from ssmclip.data.distortions.folder import folder_jobs, run_jobs
    from ssmclip.data.distortions.registry import find
    from ssmclip.humans.rebuild import rebuild_jobs

    names = [find(word) for word in args.distortions.split(",")] if args.distortions else list(GEIRHOS)
    levels = args.levels.split(",") if args.levels else None
    if (args.folder is None) == (args.humans is None) or (args.humans is None) != (args.imagenet is None):
        raise ValueError("give either a folder of images, or both --humans FILE.parquet and --imagenet DIR")
    if args.folder is not None:
        jobs, missing = folder_jobs(args.folder, args.out, names, levels, args.seed), {}
    elif levels:
        raise ValueError("--levels cannot be used with --humans, because the human data determine the levels")
    else:
        recipe = rebuild_jobs(args.humans, args.imagenet, args.out, names, args.seed)
        jobs, missing = recipe.jobs, recipe.missing
    outcome = run_jobs(jobs, side=args.size or None, amplitude=args.amplitude, gamma=args.gamma)
    if missing:
        sys.stdout.write(
            f"{len(missing)} images, needed for {sum(missing.values())} stimuli, are not in {args.imagenet}:\n"
        )
        sys.stdout.write("".join(f"missing: {name}\n" for name in missing))
    sys.stdout.write(f"{outcome.summary()}\n")
    return 1 if missing or outcome.unreadable else 0
