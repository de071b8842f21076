"""ssmclip distort: a folder of pictures, or ImageNet and the human data -> distorted pictures."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ssmclip.cli.options import distortion_list

HELP = "distorted copies of a folder of pictures; or the published out-of-distribution sets, rebuilt from ImageNet"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", nargs="?", type=Path, help="pictures, in any folders, which are kept")
    parser.add_argument("--out", required=True, type=Path, help="folder for DISTORTION/LEVEL/your/folders/NAME.png")
    parser.add_argument(
        "--distortions",
        help="names, with commas: contrast,imagenet-c/fog, or FILE.py:NAME for one of your own "
        "(default: the 12 of Geirhos et al.)",
    )
    parser.add_argument("--levels", help="numbers or labels of levels, with commas (default: all levels of each)")
    parser.add_argument(
        "--size",
        type=int,
        default=224,
        help="side in pixels that pictures are cropped to first; 0: as they are (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="random seed of noise, phases and eidolons (default: %(default)s)"
    )
    parser.add_argument("--amplitude", type=Path, help="power-equalisation's table of mean amplitudes, .npy")
    parser.add_argument("--gamma", type=Path, help="false-colour's table of the screen's light, .npy")
    parser.add_argument(
        "--humans", type=Path, help="human data, parquet: rebuild its parametric sets from the images in --imagenet"
    )
    parser.add_argument("--imagenet", type=Path, help="ILSVRC2012's training images: n01234567/n01234567_89.JPEG")


def run(args: argparse.Namespace) -> int:
    from ssmclip.data.distortions import GEIRHOS
    from ssmclip.data.distortions.folder import folder_jobs, run_jobs
    from ssmclip.data.distortions.registry import find
    from ssmclip.humans.rebuild import rebuild_jobs

    names = [find(word) for word in distortion_list(args.distortions)] if args.distortions else list(GEIRHOS)
    levels = args.levels.split(",") if args.levels else None
    if (args.folder is None) == (args.humans is None) or (args.humans is None) != (args.imagenet is None):
        raise ValueError("give either a folder of pictures, or both --humans FILE.parquet and --imagenet DIR")
    if args.folder is not None:
        jobs, missing = folder_jobs(args.folder, args.out, names, levels, args.seed), {}
    elif levels:
        raise ValueError("--levels does not go with --humans: the human data say at which levels")
    else:
        recipe = rebuild_jobs(args.humans, args.imagenet, args.out, names, args.seed)
        jobs, missing = recipe.jobs, recipe.missing
    outcome = run_jobs(jobs, side=args.size or None, amplitude=args.amplitude, gamma=args.gamma)
    if missing:
        sys.stdout.write(f"{len(missing)} images of {sum(missing.values())} stimuli are not in {args.imagenet}:\n")
        sys.stdout.write("".join(f"missing: {name}\n" for name in missing))
    sys.stdout.write(f"{outcome.summary()}\n")
    return 1 if missing or outcome.unreadable else 0
