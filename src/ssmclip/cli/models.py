"""The commands about models: which there are, and published weights into folders that others read."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from pathlib import Path

from ssmclip.cli.options import image_size
from ssmclip.rows.paper_tables import PUBLISHED

MODELS_HELP = "the CLIP models there are: towers, parameters, operations, published weights and their row in a paper"
CONVERT_HELP = "published weights -> a folder of safetensors and configuration, read by open_clip, timm or transformers"
EXPORT_HELP = "an image encoder -> an ONNX file, checked against PyTorch; onnxruntime runs it on any CPU"
PUSH_HELP = "upload a model folder to the Hugging Face hub"

log = logging.getLogger(__name__)


def run_models(args: argparse.Namespace, count_macs: Callable) -> None:
    """count_macs: `ssmclip.count_macs`."""
    print(models_table(count_macs))


def models_table(count_macs: Callable) -> str:
    """The CLIPs as a table in Markdown. Parameters in millions, GMACs of one image, text excluded."""
    from ssmclip.models import clip_config, list_clips

    columns = "name | image tower | text tower | image M | text M | GMACs at 224 px | published weights | paper row"
    lines = [columns.split(" | "), ("---", "---", "---", "--:", "--:", "--:", "---", "---")]
    for name in list_clips():
        config = clip_config(name)["model_cfg"]
        text = config["text_cfg"]
        kind = "bag of words" if text.get("layers") == 0 else text.get("mamba", {}).get("model_type", "transformer")
        count = count_macs(name, 224)
        numbers = (count.image_parameters / 1e6, count.text_parameters / 1e6, count.image.total / 1e9)
        numbers = (f"{number:.2f}" for number in numbers)
        lines.append((name, config["vision_cfg"]["timm_model_name"], kind, *numbers, *PUBLISHED.get(name, ("", ""))))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def add_convert_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="checkpoint file, its folder, or hf-hub:OWNER/NAME[/FILE]")
    parser.add_argument("folder", metavar="DST", help="folder to write")
    parser.add_argument(
        "--weights",
        default="online",
        help="online, ema, or ema_online_bn: the average with online batch statistics (default: %(default)s)",
    )
    parser.add_argument("--text-heads", type=int, help="of CLIP's text transformer, where not 64 channels each")
    parser.add_argument("--n-groups", type=int, help="of Mamba-2 (default: what its configuration says, else 1)")


def run_convert(args: argparse.Namespace) -> None:
    from ssmclip.models import convert

    kind = convert(args.source, args.folder, weights=args.weights, text_heads=args.text_heads, n_groups=args.n_groups)
    log.info("wrote the %s to %s", {"clip": "CLIP"}.get(kind, kind.replace("_", " ")), args.folder)


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a CLIP's name, its folder, or a file of published weights")
    parser.add_argument("file", metavar="FILE", help="ONNX file to write: input image, output features")
    parser.add_argument(
        "--image-size", type=image_size, default=224, help="pixels or HEIGHTxWIDTH (default: %(default)s)"
    )


def run_export(args: argparse.Namespace) -> None:
    from ssmclip.models import load, load_published
    from ssmclip.models.export import export_onnx

    size = args.image_size
    model = load_published(args.model) if Path(args.model).is_file() else load(args.model, image_size=size).model
    difference = export_onnx(model, args.file, size)
    log.info("wrote %s; largest difference from PyTorch %.1e of the largest feature", args.file, difference)


def add_push_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DST", help="what convert wrote, or a checkpoint folder of a training run")
    parser.add_argument("repo", metavar="REPO", help="OWNER/NAME, made where it does not exist")
    parser.add_argument("--private", action="store_true", help="seen by you alone")


def run_push(args: argparse.Namespace) -> None:
    from ssmclip.models import push

    log.info("%s", push(args.folder, args.repo, private=args.private))
