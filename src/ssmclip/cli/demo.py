"""ssmclip demo: models in a browser."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from ssmclip.cli.options import MODELS, add_device, distortion_list, labelled, listed
from ssmclip.demo.server import PORT

HELP = "page in the browser on which to try models: classify, search, compare, resolution, distort, where it looks"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", help=f"{MODELS} (default: the model of --index, else a small one that comes with the package)"
    )
    parser.add_argument("--index", type=Path, help="index to search, written by `ssmclip embed`")
    parser.add_argument(
        "--labels", default="", help="labels that the page opens with, separated by commas, or a file with one a line"
    )
    parser.add_argument(
        "--distortions", default="", help="distortions of your own to offer, as FILE.py:NAME, separated by commas"
    )
    parser.add_argument("--amplitude", type=Path, help="table of mean amplitudes for power-equalisation, .npy")
    parser.add_argument("--gamma", type=Path, help="table of screen luminance for false-colour, .npy")
    parser.add_argument(
        "--port", type=int, default=PORT, help="port on this machine, 0 for any that is free (default: %(default)s)"
    )
    add_device(parser)


def run(args: argparse.Namespace) -> int:
    """Serve until stopped."""
    from tempfile import TemporaryDirectory

    from ssmclip.data.distortions.registry import find, load_table
    from ssmclip.demo.answers import open_gallery, open_subjects
    from ssmclip.demo.server import HOST, build_app, listen, require_gradio, serve

    require_gradio()
    for word in distortion_list(args.distortions):
        find(word)
    given = {"amplitude": args.amplitude, "gamma": args.gamma}
    tables = {kind: load_table(kind, path, "the page") for kind, path in given.items() if path is not None}
    with listen(args.port) as listening, TemporaryDirectory(prefix="ssmclip-demo-") as folder:
        subjects = open_subjects(labelled(args.model), args.device) if args.model else ()
        gallery = open_gallery(args.index, subjects, args.device) if args.index else None
        if gallery is not None and not gallery.folder.is_dir():
            sys.stderr.write(f"the pictures of {args.index} are gone: there is no folder {gallery.folder}\n")
        session = _session(subjects, gallery, tables, listed(args.labels), Path(folder), args.device)
        app = build_app(session, Path(folder) / "uploads")
        sys.stdout.write(f"http://{HOST}:{listening.getsockname()[1]} shows {session.names}; Ctrl-C stops it\n")
        sys.stdout.flush()
        serve(app, listening)
    return 0


def _session(subjects: Any, gallery: Any, tables: dict[str, Any], labels: list[str], folder: Path, device: str) -> Any:
    """What the page shows: without a model the index's, and without either the package's own, with its pictures."""
    from ssmclip.demo import packaged
    from ssmclip.demo.answers import Subject, make_gallery, open_subjects
    from ssmclip.demo.session import Session

    if subjects:
        return Session(subjects, gallery, tables, labels)
    if gallery is not None:
        clip = gallery.embedder.clip
        return Session((Subject(clip.label, clip),), gallery, tables, labels)
    subjects = open_subjects({packaged.NAME: str(packaged.FOLDER)}, device)
    pictures = packaged.draw_pictures(folder / "pictures")
    gallery = make_gallery(folder / "pictures", subjects[0], folder / "index.parquet")
    return Session(subjects, gallery, tables, labels or packaged.LABELS, pictures[: packaged.TO_TRY])
