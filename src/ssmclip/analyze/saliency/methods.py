"""The methods of explanation. A new one is a function from a `Question` to a `View`, registered in METHODS."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ssmclip.analyze.saliency.explanation import METHODS, Method, Number, Question, View
from ssmclip.analyze.saliency.gradcam import gradcam, usual_layer
from ssmclip.analyze.saliency.positions import embed_positions, evaluating, grid_of
from ssmclip.analyze.saliency.receptive_field import logarithmic, receptive_field, share_of_area
from ssmclip.analyze.saliency.scans import DIRECTIONS, LayerScans, recorded_scans
from ssmclip.models.towers import encode_image, is_clip
from ssmclip.registry import UnknownName

SHARES = (50, 99)  # per cent of a receptive field


def method(name: str, scope: Literal["picture", "pictures", "text"] = "picture"):
    """Return a decorator that registers a method."""

    def add(look: Callable[[Question], View]) -> Callable[[Question], View]:
        METHODS.register(name)(Method(look, scope))
        return look

    return add


@method("similarity")
def similarity(question: Question) -> View:
    """Score each position of the last map by itself: a CLIP's cosine similarity, or a classifier's logit."""
    target = question.target
    with evaluating(target.network), torch.no_grad():
        outputs = embed_positions(target.network, question.pixels)[0]
        score = target.score(question.pixels).item()
        values = target.of(outputs.flatten(0, 1)).unflatten(0, outputs.shape[:2])
    return View({target.text: values}, (Number("target_score", score),), target.text)


@method("gradcam")
def gradient_weighted(question: Question) -> View:
    """Weight the channels of a layer by the mean gradient of the score: Grad-CAM."""
    target, layer = question.target, question.layer or usual_layer(question.model.network)
    maps = gradcam(target, question.pixels, layer)
    with evaluating(target.network), torch.no_grad():
        score = target.score(question.pixels).item()
    return View({target.text: maps[0]}, (Number("target_score", score),), target.text, layer)


@method("receptive-field", scope="pictures")
def effective_receptive_field(question: Question) -> View:
    """Show which pixels move the middle of the last map, on a logarithmic scale, after and before training."""
    networks = {"trained": question.model.network, "before training": question.untrained}
    fields = {case: receptive_field(net, question.pixels) for case, net in networks.items() if net is not None}
    numbers = tuple(
        Number(f"receptive_field_{share}", share_of_area(values, share / 100), case if len(fields) > 1 else "")
        for case, values in fields.items()
        for share in SHARES
    )
    return View({case: logarithmic(values) for case, values in fields.items()}, numbers, span=(0.0, 1.0))


@method("scan")
def scan_of_the_image(question: Question) -> View:
    """Show the attention that the scan of a layer implies, mean magnitudes over channels: what a position reads, in
    each direction and in all; and how much each position is read by all others."""
    model = question.model
    with evaluating(model.network):
        layers = recorded_scans(model.network, lambda: encode_image(model.network, question.pixels))
    scanned = _layer(layers, question.layer, f"image tower of {model.label}")
    height, width = grid = scanned.grid or grid_of(scanned.directions[0].length, question.pixels.shape[-2:])
    matrices = [scan.attention() for scan in scanned.directions]
    total = torch.stack(matrices).sum(0)
    place = _place(question.position, grid)
    named = zip(DIRECTIONS[len(matrices)], matrices, strict=True)
    maps = {name: matrix[place].view(grid) for name, matrix in named}
    if len(maps) > 1:
        maps["all directions"] = total[place].view(grid)
    maps["read by all"] = total.mean(0).view(grid)
    pixels = question.pixels.shape[-2] / height, question.pixels.shape[-1] / width
    number = Number("attention_distance", mean_distance(total, grid, pixels))
    reads_something = question.text is not None or not is_clip(model.network)
    return View(maps, (number,), "read by all" if reads_something else "", scanned.layer)


@method("text-scan", scope="text")
def scan_of_the_text(question: Question) -> View:
    """Show the attention that the scan of a text tower's layer implies, from token to token."""
    model = question.model
    if not is_clip(model.network) or not question.text:
        raise ValueError(f"the scan of a text needs a CLIP and a text (got {model.label} and {question.text!r})")
    tokens = model.tokenizer([question.text]).to(model.device)
    with evaluating(model.network):
        layers = recorded_scans(model.network, lambda: model.network.encode_text(tokens))
    scanned = _layer(layers, question.layer, f"text tower of {model.label}")
    matrix = scanned.directions[0].attention()
    number = Number("attention_distance", mean_distance(matrix, (1, len(matrix)), (1.0, 1.0)))
    return View({"from token to token": matrix}, (number,), "", scanned.layer)


def mean_distance(matrix: Float[Tensor, "l l"], grid: tuple[int, int], pixels: tuple[float, float]) -> float:
    """Return how far away what a position reads is, on average, weighted by how much it is read.

    pixels: height and width of a position; the result is in that unit (Dosovitskiy et al. 2021, arXiv:2010.11929,
    figure 7).
    """
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    places = torch.stack([rows.flatten() * pixels[0], columns.flatten() * pixels[1]], -1).to(matrix)
    weights = matrix / matrix.sum(-1, keepdim=True).clamp(min=torch.finfo(matrix.dtype).tiny)
    return float((weights * torch.cdist(places, places)).sum(-1).mean())


def _layer(layers: Sequence[LayerScans], name: str | None, tower: str) -> LayerScans:
    """The last layer that scans more than one position, or the one of this name."""
    scanning = [scanned for scanned in layers if scanned.directions[0].length > 1]
    if not scanning:
        raise ValueError(f"the {tower} has no state-space scan: choose another method")
    if name is None:
        return scanning[-1]
    named = {scanned.layer: scanned for scanned in scanning}
    if name not in named:
        raise UnknownName("layer with a scan", name, named)
    return named[name]


def _place(position: tuple[float, float], grid: tuple[int, int]) -> int:
    column, row = (min(int(share * side), side - 1) for share, side in zip(position, grid[::-1], strict=True))
    return row * grid[1] + column
