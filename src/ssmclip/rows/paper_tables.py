"""Numbers others have published, for standing beside measured ones. Percent; parameters of image towers in millions."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """A model's line: its parameters in millions (of the image tower), and its numbers in the table's columns."""

    model: str
    parameters: float
    values: tuple[float, ...]


@dataclass(frozen=True)
class Table:
    """A published table. columns: names of data sets' cards; titles: what stands over them, short enough for 26."""

    source: str
    columns: tuple[str, ...]
    titles: tuple[str, ...]
    rows: tuple[Row, ...]


def _read(name: str) -> Table:
    content = json.loads((Path(__file__).parent / name).read_text(encoding="utf-8"))
    rows = tuple(Row(row["model"], float(row["parameters"]), tuple(row["values"])) for row in content["rows"])
    return Table(content["source"], tuple(content["columns"]), tuple(content["titles"]), rows)


TABLE1 = _read("paper_tables.json")


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
