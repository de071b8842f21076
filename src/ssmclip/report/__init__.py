"""Rows -> figures and one HTML page. Needs no torch: a report can be made, and made again, anywhere."""

from ssmclip.report.figures.base import FIGURES, Drawing, drawings, figure
from ssmclip.report.figures.curvature import (
    Contour,
    Eigenvalues,
    EigenvaluesOverTraining,
    Line,
    Relief,
    SpectralDensity,
)
from ssmclip.report.figures.efficiency import Efficiency, Memory
from ssmclip.report.figures.examples import Examples, Similarity
from ssmclip.report.figures.humans import AccuracyByLevel, ConsistencyMatrix, Overall, ShapeBias, Stimuli, WithoutLevels
from ssmclip.report.page import write_report
from ssmclip.report.store import Store, read_store
from ssmclip.report.tables import table, update_readme

__all__ = [
    "FIGURES",
    "AccuracyByLevel",
    "ConsistencyMatrix",
    "Contour",
    "Drawing",
    "Efficiency",
    "Eigenvalues",
    "EigenvaluesOverTraining",
    "Examples",
    "Line",
    "Memory",
    "Overall",
    "Relief",
    "ShapeBias",
    "Similarity",
    "SpectralDensity",
    "Stimuli",
    "Store",
    "WithoutLevels",
    "drawings",
    "figure",
    "read_store",
    "table",
    "update_readme",
    "write_report",
]
