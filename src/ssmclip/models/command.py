"""The commands about models: which there are, and published weights into folders that others read."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

MODELS_HELP = "the CLIP models there are: towers, parameters, published weights and their row in a paper"
CONVERT_HELP = "published weights -> a folder of safetensors and configuration, read by open_clip, timm or transformers"
EXPORT_HELP = "an image encoder -> an ONNX file, checked against PyTorch; onnxruntime runs it on any CPU"
PUSH_HELP = "upload a model folder to the Hugging Face hub"

log = logging.getLogger(__name__)


# name: where its published weights are, "" for nowhere; and its row in a paper
PUBLISHED = {
    "CLIP-VMamba-T220": ("hf-hub:weiquan/mamba-clip", "CLIP-Mamba: mean of 26 data sets 33.50"),
    "CLIP-VMamba-S": ("hf-hub:weiquan/mamba-clip", "CLIP-Mamba: mean of 26 data sets 35.34"),
    "CLIP-VMamba-B": ("hf-hub:weiquan/mamba-clip", "CLIP-Mamba: mean of 26 data sets 35.04"),
    "CLIP-SiMBA-L": ("hf-hub:weiquan/mamba-clip", "CLIP-Mamba: mean of 26 data sets 36.71"),
    "CLIP-ViT-B-16": ("", "CLIP-Mamba: mean of 26 data sets 34.21"),
    "CLIP-ViT-L-16": ("", "CLIP-Mamba: mean of 26 data sets 37.35"),
    "CLIMP-Mamba1": ("hf-hub:NimrodShabtay1986/CLIMP-Mamba1", "CLIMP: NoCaps at 224 px, image R@1 38.2, text R@1 51.8"),
    "CLIMP-Mamba2": ("hf-hub:NimrodShabtay1986/CLIMP-Mamba2", "CLIMP: NoCaps at 224 px, image R@1 37.4, text R@1 51.0"),
}


def run_models(args: argparse.Namespace) -> None:
    import torch

    from ssmclip.models import clip_config, create_clip, list_clips

    print(
        f"{'name':26} {'image tower':26} {'image M':>8} {'text M':>8}  {'text tower':12} {'published weights':38} row"
    )
    for name in list_clips():
        config = clip_config(name)
        with torch.device("meta"):
            model = create_clip(config)
        total = sum(p.numel() for p in model.parameters())
        image = sum(p.numel() for p in model.visual.parameters())
        trunk = config["model_cfg"]["vision_cfg"]["timm_model_name"]
        text = config["model_cfg"]["text_cfg"].get("mamba", {}).get("model_type", "transformer")
        weights, row = PUBLISHED.get(name, ("", ""))
        numbers = f"{image / 1e6:8.2f} {(total - image) / 1e6:8.2f}"
        print(f"{name:26} {trunk:26} {numbers}  {text:12} {weights:38} {row}".rstrip())


def add_convert_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="checkpoint file, its folder, or hf-hub:OWNER/NAME[/FILE]")
    parser.add_argument("folder", metavar="DST", help="folder to write")
    parser.add_argument(
        "--weights", default="online", help="online, ema, or ema_online_bn: the average with online batch statistics"
    )
    parser.add_argument("--text-heads", type=int, help="of CLIP's text transformer, where not 64 channels each")
    parser.add_argument("--n-groups", type=int, default=1, help="of a Mamba-2 text tower")


def run_convert(args: argparse.Namespace) -> None:
    from ssmclip.models import convert

    kind = convert(args.source, args.folder, weights=args.weights, text_heads=args.text_heads, n_groups=args.n_groups)
    log.info("wrote the %s to %s", {"clip": "CLIP"}.get(kind, kind.replace("_", " ")), args.folder)


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a CLIP's name, its folder, or a file of published weights")
    parser.add_argument("file", metavar="FILE", help="ONNX file to write: input image, output features")
    parser.add_argument("--image-size", default="224", help="pixels, or HEIGHTxWIDTH (default: %(default)s)")


def run_export(args: argparse.Namespace) -> None:
    from ssmclip.models import load, load_published
    from ssmclip.models.export import export_onnx

    sides = [int(side) for side in args.image_size.split("x")]
    size = (sides[0], sides[-1])
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
