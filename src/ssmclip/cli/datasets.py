"""ssmclip datasets: which data sets are there, and how to get the others."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ssmclip.data.testsets.card import Card

HELP = "the data sets there are cards for, what was found of each, and how to get what is missing"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", default="data", help="the folder the data sets are under (default: %(default)s)")
    parser.add_argument("names", nargs="*", help="data sets; default: all")


def run(args: argparse.Namespace) -> int:
    from ssmclip.data.testsets.open import list_cards, load_card

    cards = [load_card(name) for name in args.names or list_cards()]
    sys.stdout.write(f"{'name':16} {'metric':16} {'images':>15} {'expected':>9}  where, or how to get it\n")
    for card in cards:
        sys.stdout.write(described(card, args.data) + "\n")
    sys.stdout.write(
        f"\n{len(cards)} data sets. Those CLIP_benchmark has, `--data hub:clip-benchmark` downloads; every other "
        "copy is found\nunder --data in the files its authors published, as class folders, wds_* shards or parquet.\n"
    )
    return 0


def described(card: Card, root: str) -> str:
    """One data set's line."""
    from ssmclip.data.testsets.open import HUB, open_dataset

    start = f"{card.name:16} {card.metric:16} "
    size = f"{card.test_size:,}" if card.test_size else "?"
    try:
        found = open_dataset(card, root, download=False)
    except FileNotFoundError:
        if root.startswith(HUB):
            return (
                f"{start}{'-':>15} {size:>9}  not downloaded yet; evaluate does, where {root.removeprefix(HUB)} has it"
            )
        return f"{start}{'-':>15} {size:>9}  get it: {card.source}"
    except (OSError, ValueError) as error:
        return f"{start}{'can not be read':>15} {size:>9}  {(str(error) or type(error).__name__).splitlines()[0]}"
    short = {True: ", partial", False: ", another split" if found.n > found.expected else ""}[found.partial]
    said = f" ({found.said})" if found.said else ""
    return f"{start}{found.n:>15,} {size:>9}  {found.where}{short}{said}"
