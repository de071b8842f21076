"""ssmclip models: which CLIPs there are, and what they cost."""

from __future__ import annotations

import argparse

from ssmclip.rows.paper_tables import PUBLISHED

HELP = "table of the CLIP models: towers, parameters, operations, published weights and their row in a paper"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add no arguments: the table is always the same."""


def run(args: argparse.Namespace) -> None:
    print(models_table())


def models_table() -> str:
    """Return the CLIPs as a table in Markdown: parameters in millions, GMACs of one image (without text)."""
    from ssmclip.analyze.cost.macs import count_macs
    from ssmclip.models import clip_config, list_clips
    from ssmclip.models.text_towers import text_tower_kind

    columns = "name | image tower | text tower | image M | text M | GMACs at 224 px | published weights | paper row"
    lines = [columns.split(" | "), ("---", "---", "---", "--:", "--:", "--:", "---", "---")]
    for name in list_clips():
        config = clip_config(name)["model_cfg"]
        kind = text_tower_kind(config["text_cfg"]).replace("_", " ")
        count = count_macs(name, 224)
        numbers = (count.image_parameters / 1e6, count.text_parameters / 1e6, count.image.total / 1e9)
        numbers = (f"{number:.2f}" for number in numbers)
        lines.append((name, config["vision_cfg"]["timm_model_name"], kind, *numbers, *PUBLISHED.get(name, ("", ""))))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
