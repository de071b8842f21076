"""ssmclip datasets: which data sets were found, and how to get the others."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ssmclip.data.testsets.card import Card

HELP = "list of supported data sets: which were found, and how to get the others"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data",
        default="data",
        help="folder that contains the data sets, or hub:clip-benchmark (default: %(default)s)",
    )
    parser.add_argument("names", nargs="*", help="names of data sets (default: all)")


def run(args: argparse.Namespace) -> int:
    from ssmclip.data.testsets.open import list_cards, load_card

    cards = [load_card(name) for name in args.names or list_cards()]
    sys.stdout.write(f"{'name':16} {'metric':16} {'images':>15} {'expected':>9}  location, or how to get it\n")
    for card in cards:
        sys.stdout.write(described(card, args.data) + "\n")
    sys.stdout.write(
        f"\n{len(cards)} data sets. `--data hub:clip-benchmark` downloads those that CLIP_benchmark provides. Others "
        "are read\nfrom --data as the files their authors published, class folders, wds_* shards or parquet files.\n"
    )
    return 0


def described(card: Card, root: str) -> str:
    """Return the line of one data set."""
    from ssmclip.data.testsets.open import HUB, open_dataset

    start = f"{card.name:16} {card.metric:16} "
    size = f"{card.test_size:,}" if card.test_size else "?"
    try:
        found = open_dataset(card, root, download=False)
    except FileNotFoundError:
        if root.startswith(HUB):
            return (
                f"{start}{'-':>15} {size:>9}  not downloaded yet; evaluate does it if {root.removeprefix(HUB)} has it"
            )
        return f"{start}{'-':>15} {size:>9}  get it: {card.source}"
    except (OSError, ValueError) as error:
        return f"{start}{'unreadable':>15} {size:>9}  {(str(error) or type(error).__name__).splitlines()[0]}"
    count = len(found.questions or ()) or found.n
    short = {True: ", partial", False: ", another split" if count > found.expected else ""}[found.partial]
    said = f" ({found.said})" if found.said else ""
    return f"{start}{count:>15,} {size:>9}  {found.where}{short}{said}"
