"""The commands about models: which there are, and published weights into folders that others read."""

from __future__ import annotations

import argparse
import logging

MODELS_HELP = "the CLIP models there are, with their parameters"
CONVERT_HELP = "published weights -> a folder of safetensors and configuration, read by open_clip, timm or transformers"
PUSH_HELP = "upload a model folder to the Hugging Face hub"

log = logging.getLogger(__name__)


def run_models(args: argparse.Namespace) -> None:
    import torch

    from ssmclip.models import clip_config, create_clip, list_clips

    print(f"{'name':26} {'image tower':24} {'image M':>8} {'text M':>8}")
    for name in list_clips():
        config = clip_config(name)
        with torch.device("meta"):
            model = create_clip(config)
        total = sum(p.numel() for p in model.parameters())
        image = sum(p.numel() for p in model.visual.parameters())
        trunk = config["model_cfg"]["vision_cfg"]["timm_model_name"]
        print(f"{name:26} {trunk:24} {image / 1e6:8.2f} {(total - image) / 1e6:8.2f}")


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


def add_push_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DST", help="what convert wrote, or a checkpoint folder of a training run")
    parser.add_argument("repo", metavar="REPO", help="OWNER/NAME, made where it does not exist")
    parser.add_argument("--private", action="store_true", help="seen by you alone")


def run_push(args: argparse.Namespace) -> None:
    from ssmclip.models import push

    log.info("%s", push(args.folder, args.repo, private=args.private))
