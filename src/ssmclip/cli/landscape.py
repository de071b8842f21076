"""ssmclip analyze hessian, landscape: the loss around a model -> a rows file, which a killed run goes on with."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

from ssmclip.cli.options import add_device, image_size
from ssmclip.rows.resume import _is_part, drop_half_a_line, files_of, refuse_other_settings


def add_analyses(kinds: argparse._SubParsersAction) -> None:
    says = "eigenvalues of the loss's Hessian, batch by batch"
    hessian = kinds.add_parser("hessian", help=says, description=says)
    hessian.set_defaults(analyse=_hessian)
    _shared(hessian, batches=200, batch_size=15)
    hessian.add_argument("--k", type=int, default=5, help="eigenvalues at each end (default: %(default)s)")
    protocols = "lanczos, park-kim (the paper's), power (that one, to --tol), with commas (default: lanczos)"
    hessian.add_argument("--protocol", default="lanczos", help=protocols)
    which = "both ends, largest, smallest, or magnitude: fewer products (default: %(default)s)"
    hessian.add_argument("--which", default="both", help=which)
    hessian.add_argument("--tol", type=float, default=1e-3, help="relative residual to reach (default: %(default)s)")
    products = "per batch; what is unconverged then is marked (default: %(default)s)"
    hessian.add_argument("--max-products", type=int, default=200, help=products)
    hessian.add_argument("--copies", action="store_true", help="search for equal eigenvalues too: half as much again")
    hessian.add_argument("--towers", default="whole", help="whole, image, text, with commas (default: whole)")
    hessian.add_argument("--density", type=int, default=0, metavar="PROBES", help="of density and trace (default: 0)")
    hessian.add_argument("--weight-decay", type=float, help="of an L2 term (default: none; park-kim 0.05)")
    hessian.add_argument("--along-training", action="store_true", help="every checkpoint of the run, and its beginning")
    says = "loss surfaces along filter-normalised directions"
    landscape = kinds.add_parser("landscape", help=says, description=says)
    landscape.set_defaults(analyse=_landscape)
    _shared(landscape, batches=1, batch_size=60)
    landscape.add_argument("--dimensions", type=int, choices=(1, 2), default=2, help="default: %(default)s")
    landscape.add_argument("--points", type=int, default=21, help="along each direction (default: %(default)s)")
    landscape.add_argument("--distance", type=float, default=1.0, help="each way (default: %(default)s)")


def _shared(parser: argparse.ArgumentParser, batches: int, batch_size: int) -> None:
    parser.add_argument("--model", required=True, help="a name, a run or checkpoint folder, open_clip:NAME")
    parser.add_argument("--label", help="the model's name in the rows (default: the last part of --model)")
    parser.add_argument("--data", required=True, help="pairs: shards, a csv, tsv or parquet file, synthetic:NAME")
    parser.add_argument("--out", required=True, type=Path, help="the rows file; goes on, with other models too")
    parser.add_argument("--batches", type=int, default=batches, help="default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=batch_size, help="pairs (default: %(default)s)")
    parser.add_argument(
        "--image-size", type=image_size, help="pixels or HEIGHTxWIDTH; default: what the model was trained at"
    )
    parser.add_argument("--precision", choices=("float32", "float64"), default="float32", help="default: %(default)s")
    add_device(parser)
    parser.add_argument("--seed", type=int, default=0, help="of batches, weights, directions (default: %(default)s)")


def _hessian(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from ssmclip.analyze.curvature.hessian import HessianStudy, batch_rows, settings
    from ssmclip.analyze.curvature.parameters import TOWERS
    from ssmclip.analyze.curvature.park_kim import WEIGHT_DECAY
    from ssmclip.analyze.curvature.summary import summary_rows
    from ssmclip.registry import UnknownName
    from ssmclip.rows import Result

    studies = [
        HessianStudy(
            protocol=protocol,
            k=args.k,
            which=args.which,
            tol=args.tol,
            max_products=args.max_products,
            copies=args.copies,
            weight_decay=(WEIGHT_DECAY if protocol == "park-kim" else 0.0)
            if args.weight_decay is None
            else args.weight_decay,
            density_probes=args.density,
            seed=args.seed,
        )
        for protocol in args.protocol.split(",")
    ]
    towers = args.towers.split(",")
    for tower in towers:
        if tower not in TOWERS:
            raise UnknownName("tower", tower, TOWERS)

    def units() -> Iterator[tuple[str, Callable[[], list[Result]]]]:
        for step, folder in _folders(args):
            model, data = _open(args, folder)
            for number, (images, texts) in enumerate(data):
                for tower, study in product(towers, studies):
                    other = "" if study.protocol == "lanczos" else f"protocol={study.protocol}"
                    condition = ",".join(filter(None, [step, f"batch={number}", f"tower={tower}", other]))

                    def measure(model=model, images=images, texts=texts, tower=tower, study=study, condition=condition):
                        with tqdm(desc=condition, unit="product", leave=False, disable=None) as told:
                            return batch_rows(
                                model,
                                images,
                                texts,
                                study,
                                model_name=_label(args),
                                condition=condition,
                                tower=tower,
                                progress=lambda _: told.update(),
                            )

                    yield condition, measure

    total = args.batches * len(towers) * len(studies) * len(_folders(args))
    asked = {**settings(studies[0]), "weight_decay": args.weight_decay}
    del asked["protocol"]  # each row's condition says it
    return _collect(args, asked, units(), total, lambda rows: summary_rows(rows, args.k, args.seed))


def _landscape(args: argparse.Namespace) -> int:
    from ssmclip.analyze.curvature.landscape import grid, surface
    from ssmclip.rows import Result

    grid(args.points, args.distance)  # refuses before the model is loaded

    def units() -> Iterator[tuple[str, Callable[[], list[Result]]]]:
        model, data = _open(args, args.model)
        yield from surface(
            model,
            list(data),
            model_name=_label(args),
            dimensions=args.dimensions,
            points=args.points,
            distance=args.distance,
            seed=args.seed,
        )

    total = args.points**args.dimensions
    asked = {"points": args.points, "distance": args.distance, "dimensions": args.dimensions}
    return _collect(args, asked, units(), total, lambda rows: [])


def _label(args: argparse.Namespace) -> str:
    return args.label or Path(args.model).name


def _folders(args: argparse.Namespace) -> list[tuple[str, str]]:
    """(step, model) of what is measured: the model, or its run's beginning and every checkpoint. Raises ValueError."""
    if not args.along_training:
        return [("", args.model)]
    from ssmclip.train.checkpoint import checkpoints

    found = checkpoints(Path(args.model))
    if not found:
        raise ValueError(f"{args.model} has no checkpoints; keep more of them with --set checkpoint.keep=100")
    steps = [(f"step={int(folder.name.removeprefix('step_'))}", str(folder)) for folder in found]
    return [("step=0", args.model), *steps]


def _open(args: argparse.Namespace, name: str) -> tuple[Any, Iterable[Any]]:
    """The model in evaluation mode and its batches. A run's folder at step 0 gives the weights its seed starts from."""
    import torch

    import ssmclip
    from ssmclip.analyze.curvature.batches import read_batches

    torch.manual_seed(args.seed)  # of a model with fresh weights
    model, preprocess, tokenizer = ssmclip.load(name, device=args.device, image_size=args.image_size)
    if getattr(args, "along_training", False) and name == args.model:
        model = _as_it_began(Path(name)).to(args.device).eval()
    data = read_batches(
        args.data, preprocess, tokenizer, batches=args.batches, batch_size=args.batch_size, seed=args.seed
    )
    return model.to(getattr(torch, args.precision)), data


def _as_it_began(run: Path) -> Any:
    from ssmclip.config import from_dict
    from ssmclip.models import create_clip, load_config
    from ssmclip.train.state import seed_everything

    seed_everything(from_dict(json.loads((run / "config.json").read_text(encoding="utf-8"))).seed)
    return create_clip(load_config(run))


def _collect(
    args: argparse.Namespace,
    asked: dict[str, Any],
    units: Iterator[tuple[str, Callable[[], list]]],
    total: int,
    summarise: Callable[[list], list],
) -> int:
    """Measure every unit that isn't in the rows file yet, this process's share of them; write the rows as they come.

    What the file has of other models stays, and is compared with in the summary.
    Raises ValueError for a file that was measured otherwise.
    """
    from accelerate import PartialState
    from tqdm import tqdm

    from ssmclip.rows import append_rows, describe_run, read_rows, write_rows

    state = PartialState(cpu=args.device == "cpu")
    rank, world, label = state.process_index, state.num_processes, _label(args)
    data = {"data": args.data, "batch_size": args.batch_size, "precision": args.precision, "analysis": args.subcommand}
    asked = {**asked, **data}
    described = describe_run(args.seed, args.device, analysis=asked)
    part = args.out if world == 1 else args.out.with_name(f"{args.out.name}.rank{rank}")
    finished: set[str] = set()
    places: dict[str, int] = {}
    for file in files_of(args.out):
        drop_half_a_line(file)
        run_before, rows = read_rows(file)
        refuse_other_settings(file, run_before, described)
        # The last unit may have been cut short between two of its rows: it is measured again.
        finished |= {row.condition for row in rows if row.model == label} - {row.condition for row in rows[-1:]}
    state.wait_for_everyone()  # before anyone writes
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tqdm(total=total, desc=args.subcommand, unit="unit", disable=None if rank == 0 else True) as told:
        for place, (condition, measure) in enumerate(units):
            places[condition] = place
            if condition not in finished and place % world == rank:
                append_rows(part, measure(), described)
            told.update()
    state.wait_for_everyone()
    if state.is_main_process:
        rows = [row for file in files_of(args.out) for row in read_rows(file)[1]]
        kept = {(row.model, row.condition, row.metric): row for row in rows if _is_part(row.condition)}
        # In one process' order, whoever measured them; other models' before.
        rows = sorted(kept.values(), key=lambda row: places.get(row.condition, -1) if row.model == label else -1)
        rows += summarise(rows)
        write_rows(args.out, rows, described)
        for file in args.out.parent.glob(f"{args.out.name}.rank*"):
            file.unlink()
        sys.stdout.write(f"{len(rows)} rows in {args.out}\n")
    return 0
