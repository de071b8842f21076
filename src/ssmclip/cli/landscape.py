"""ssmclip analyze hessian, ssmclip analyze landscape: the loss around a model as rows."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from ssmclip.cli.options import MODEL, add_device, image_size


def add_analyses(kinds: argparse._SubParsersAction) -> None:
    summary = "eigenvalues of the loss's Hessian, batch by batch"
    hessian = kinds.add_parser("hessian", help=summary, description=summary)
    hessian.set_defaults(analyse=run_hessian)
    _add_subject(hessian, batches=200, batch_size=15)
    hessian.add_argument("--k", type=int, default=5, help="number of eigenvalues at each end (default: %(default)s)")
    hessian.add_argument(
        "--protocol",
        default="lanczos",
        help="protocols, separated by commas: lanczos; park-kim, the paper's power iteration; power, the same "
        "continued to --tol (default: lanczos)",
    )
    hessian.add_argument(
        "--which",
        default="both",
        help="eigenvalues to converge: both (ends of the spectrum), largest, smallest, or magnitude (those of largest "
        "magnitude, which takes fewer products) (default: %(default)s)",
    )
    hessian.add_argument("--tol", type=float, default=1e-3, help="relative residual to reach (default: %(default)s)")
    hessian.add_argument(
        "--max-products",
        type=int,
        default=200,
        help="maximum number of Hessian-vector products per batch; unconverged eigenvalues are marked "
        "(default: %(default)s)",
    )
    hessian.add_argument(
        "--copies", action="store_true", help="also find repeated eigenvalues (about 50%% more products)"
    )
    hessian.add_argument(
        "--towers", default="whole", help="towers, separated by commas: whole, image, text (default: whole)"
    )
    hessian.add_argument(
        "--density",
        type=int,
        default=0,
        metavar="PROBES",
        help="number of random probes for spectral density and trace (default: 0)",
    )
    hessian.add_argument(
        "--weight-decay", type=float, help="coefficient of an L2 term in the loss (default: none; 0.05 with park-kim)"
    )
    hessian.add_argument(
        "--along-training", action="store_true", help="also measure the initial weights and every checkpoint of the run"
    )
    summary = "loss surfaces along filter-normalised directions"
    landscape = kinds.add_parser("landscape", help=summary, description=summary)
    landscape.set_defaults(analyse=run_landscape)
    _add_subject(landscape, batches=1, batch_size=60)
    landscape.add_argument(
        "--dimensions", type=int, choices=(1, 2), default=2, help="number of directions (default: %(default)s)"
    )
    landscape.add_argument(
        "--points", type=int, default=21, help="number of points along each direction (default: %(default)s)"
    )
    landscape.add_argument(
        "--distance", type=float, default=1.0, help="distance to each side, in filter norms (default: %(default)s)"
    )


def _add_subject(parser: argparse.ArgumentParser, batches: int, batch_size: int) -> None:
    parser.add_argument("--model", required=True, help=MODEL)
    parser.add_argument("--label", help="name of the model in the rows (default: the last part of --model)")
    parser.add_argument(
        "--data", required=True, help="image-text pairs: shards, a csv, tsv or parquet file, or synthetic:NAME"
    )
    parser.add_argument("--out", required=True, type=Path, help="rows file; rows of other models in it are kept")
    parser.add_argument("--batches", type=int, default=batches, help="number of batches (default: %(default)s)")
    parser.add_argument(
        "--batch-size", type=int, default=batch_size, help="number of pairs in a batch (default: %(default)s)"
    )
    parser.add_argument(
        "--image-size",
        type=image_size,
        help="image size, in pixels or as HEIGHTxWIDTH (default: the size the model was trained at)",
    )
    parser.add_argument(
        "--precision", choices=("float32", "float64"), default="float32", help="arithmetic (default: %(default)s)"
    )
    add_device(parser)
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="random seed for batches, fresh weights and directions (default: %(default)s)",
    )


def run_hessian(args: argparse.Namespace) -> int:
    from ssmclip.analyze.curvature.hessian import SpectrumSettings
    from ssmclip.analyze.curvature.park_kim import WEIGHT_DECAY
    from ssmclip.analyze.curvature.study import hessian_study
    from ssmclip.rows.tasks import PARK_KIM

    names = ("k", "which", "tol", "max_products", "copies")
    shared = {name: getattr(args, name) for name in names} | {"density_probes": args.density, "seed": args.seed}
    decay = {PARK_KIM: WEIGHT_DECAY} if args.weight_decay is None else {}
    spectra = [
        SpectrumSettings(protocol=protocol, weight_decay=decay.get(protocol, args.weight_decay or 0.0), **shared)
        for protocol in args.protocol.split(",")
    ]
    asked = {name: getattr(spectra[0], name) for name in (*shared, "density_steps")}
    rows = hessian_study(
        _subject(args),
        spectra,
        args.towers.split(","),
        along_training=args.along_training,
        out=args.out,
        asked=asked | {"weight_decay": args.weight_decay},
    )
    return _report(rows, args.out)


def run_landscape(args: argparse.Namespace) -> int:
    from ssmclip.analyze.curvature.study import landscape_study

    how = {name: getattr(args, name) for name in ("dimensions", "points", "distance")}
    return _report(landscape_study(_subject(args), **how, out=args.out), args.out)


def _subject(args: argparse.Namespace) -> Any:
    from ssmclip.analyze.curvature.study import Subject

    names = ("model", "data", "batches", "batch_size", "precision", "device", "image_size", "seed")
    return Subject(label=args.label or "", **{name: getattr(args, name) for name in names})


def _report(rows: list[Any], out: Path) -> int:
    from accelerate import PartialState

    if PartialState().is_main_process:
        sys.stdout.write(f"{len(rows)} rows in {out}\n")
    return 0
