"""A model, pictures and a text -> maps of what the model looks at, by any of several methods, and their rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import Normalize
from torchvision.transforms.functional import to_pil_image

from ssmclip.analyze.saliency import curves
from ssmclip.analyze.saliency.target import Target, target_of
from ssmclip.data.images import thumbnail
from ssmclip.data.sources import Picture, Pictures, named_pictures, read_picture
from ssmclip.models.names import Model, find
from ssmclip.registry import Registry
from ssmclip.rows import Result
from ssmclip.rows.condition import CASE, METHOD, PICTURE, QUERY
from ssmclip.rows.payloads import Saliency, SaliencyMap
from ssmclip.rows.tasks import SALIENCY

__all__ = ["METHODS", "Explanation", "Method", "Number", "Question", "View", "explain"]

SIDE = 28  # most numbers to a side of a map in a row
THUMBNAIL = 192  # pixels of a picture in a row

Maps = dict[str, Float[Tensor, "h w"]]


class Number(NamedTuple):
    """A metric's value, and the case it is of where there are several."""

    metric: str
    value: float
    case: str = ""


@dataclass(frozen=True)
class Question:
    """What a method is asked.

    pixels: preprocessed pictures; text, against: what to look for, and what it competes with; layer: the one to look
    at, None for the method's own choice; position: of the picture, as shares of its width and height; untrained: the
    network with fresh weights, to compare with.
    """

    model: Model
    pixels: Float[Tensor, "n 3 h w"]
    text: str | None = None
    against: tuple[str, ...] = ()
    layer: str | None = None
    position: tuple[float, float] = (0.5, 0.5)
    untrained: nn.Module | None = None

    @cached_property
    def target(self) -> Target:
        return target_of(self.model, self.text, self.against, self.pixels[:1])


@dataclass(frozen=True)
class View:
    """What a method found.

    maps: by their titles; numbers: about them; judged: the map that deletion and insertion curves are drawn of; layer:
    the one looked at; span: the least and largest value that a map can have, None to draw each map on a scale of its
    own.
    """

    maps: Maps
    numbers: tuple[Number, ...] = ()
    judged: str = ""
    layer: str = ""
    span: tuple[float, float] | None = None


@dataclass(frozen=True)
class Method:
    """look: a question -> what is found; scope: whether it is asked about a picture, about all pictures together, or
    about the text alone."""

    look: Callable[[Question], View]
    scope: Literal["picture", "pictures", "text"] = "picture"


METHODS: Registry[Method] = Registry("method of explanation", ["ssmclip.analyze.saliency.methods"])


@dataclass(frozen=True)
class Explanation:
    """Maps of what a model looks at, over a picture as the model sees it.

    model, method, query, picture, layer: names; seen: the picture after preprocessing, None where the maps are over no
    picture; maps: by their titles, in the method's own size; numbers: about them.
    """

    model: str
    method: str
    query: str
    picture: str
    layer: str
    seen: Image.Image | None
    maps: Maps
    numbers: tuple[Number, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    span: tuple[float, float] | None = None

    def rows(self) -> list[Result]:
        """Return a row for each number, of which the first carries the maps, at most 28 x 28, and a thumbnail."""
        named = {METHOD: self.method, PICTURE: self.picture, QUERY: self.query}
        where = {key: name for key, name in named.items() if name}
        rows = []
        for number in self.numbers:
            case = {CASE: number.case} if number.case else {}
            extra = {} if rows else {"title": "what the model looks at", "saliency": self._payload(), **self.settings}
            rows.append(Result(self.model, SALIENCY, number.metric, number.value, where={**where, **case}, extra=extra))
        return rows

    def _payload(self) -> Saliency:
        return Saliency(
            method=self.method,
            query=self.query,
            name=self.picture,
            layer=self.layer,
            picture="" if self.seen is None else thumbnail(self.seen, THUMBNAIL),
            span=None if self.span is None else list(self.span),
            maps=[SaliencyMap(title=title, values=_small(values)) for title, values in self.maps.items()],
        )


def explain(
    model: Model | str | Path,
    pictures: Pictures,
    text: str | None = None,
    methods: Sequence[str] = ("similarity",),
    *,
    against: Sequence[str] = (),
    layer: str | None = None,
    position: tuple[float, float] = (0.5, 0.5),
    untrained: nn.Module | None = None,
    steps: int = 50,
) -> list[Explanation]:
    """Return maps of what a model looks at in each picture, by each of the methods of METHODS.

    model: what `ssmclip.find` takes, or what it returned; pictures: as for `ssmclip.classify`; text: what to look for:
    any text for a CLIP; the name or number of a class for a classifier, None for its most probable one; against: texts
    that it competes with in the curves of a CLIP; layer: a module's name; position: whose scan or receptive field is
    shown; untrained: the same network with fresh weights, whose receptive field is shown too; steps: of the deletion
    and insertion curves, 0 for none.

    Raises UnknownName for a method, layer or class, BadImage for a picture that cannot be read, ValueError for a model
    that a method cannot look into.
    """
    chosen = {name: METHODS[name] for name in dict.fromkeys(methods)}
    if not all(0 <= share <= 1 for share in position):
        raise ValueError(f"position must be shares of width and height, from 0 to 1 (got {position})")
    if steps < 0:
        raise ValueError(f"steps must be at least 0 (got {steps})")
    model = model if isinstance(model, Model) else find(model)
    pixels = {name: _pixels(model, picture) for name, picture in named_pictures(pictures)}
    if not pixels and any(method.scope != "text" for method in chosen.values()):
        raise ValueError("no pictures given: name at least one")
    none = torch.zeros(0, 3, 1, 1, device=model.device, dtype=model.dtype)
    asked = Question(model, none, text, tuple(against), layer, position, untrained)
    return [found for name, method in chosen.items() for found in _asked(name, method, asked, pixels, steps)]


def _asked(name: str, method: Method, asked: Question, pixels: dict[str, Tensor], steps: int) -> Iterator[Explanation]:
    if method.scope == "text":
        yield _explanation(name, "", asked, None, method.look(asked), 0)
    elif method.scope == "pictures":
        together = replace(asked, pixels=torch.cat(list(pixels.values())))
        picture = next(iter(pixels)) if len(pixels) == 1 else f"{len(pixels)} pictures"
        seen = next(iter(pixels.values())) if len(pixels) == 1 else None
        yield _explanation(name, picture, replace(together, text=None), seen, method.look(together), 0)
    else:
        for picture, one in pixels.items():
            question = replace(asked, pixels=one)
            yield _explanation(name, picture, question, one, method.look(question), steps)


def _explanation(
    method: str, picture: str, question: Question, pixels: Tensor | None, view: View, steps: int
) -> Explanation:
    numbers, settings = view.numbers, {}
    if view.judged:
        target = question.target
        settings = {"score": target.unit}
        if steps:
            numbers += tuple(_judged(target, question.pixels[0], view.maps[view.judged], steps))
            settings |= {"steps": steps}
    query = question.target.text if view.judged else question.text or ""
    seen = None if pixels is None else as_seen(question.model.preprocess, pixels[0])
    names = (question.model.label, method, query, picture, view.layer)
    return Explanation(*names, seen, view.maps, numbers, settings, view.span)


def _judged(target: Target, image: Tensor, saliency: Tensor, steps: int) -> Iterator[Number]:
    full = resized(saliency.to(image), image.shape[-2:])
    yield Number("deletion", curves.area(curves.deletion(target.probability, image, full, steps)))
    yield Number("insertion", curves.area(curves.insertion(target.probability, image, full, steps)))


def resized(values: Float[Tensor, "h w"], size: Sequence[int]) -> Float[Tensor, "y x"]:
    """Return a map at another size: averaged where it gets smaller, bilinear where it gets larger."""
    smaller = size[0] <= values.shape[0] and size[1] <= values.shape[1]
    how = dict(mode="area") if smaller else dict(mode="bilinear", align_corners=False)
    return F.interpolate(values[None, None], tuple(size), **how)[0, 0]


def as_seen(preprocess: Any, pixels: Float[Tensor, "3 h w"]) -> Image.Image:
    """Return preprocessed pixels as a picture: without the normalisation, or stretched where that cannot be seen."""
    pixels = pixels.detach().float().cpu()
    for step in getattr(preprocess, "transforms", []):
        if isinstance(step, Normalize):
            mean, std = (torch.as_tensor(values).view(-1, 1, 1) for values in (step.mean, step.std))
            return to_pil_image((pixels * std + mean).clamp(0, 1))
    low, high = pixels.min(), pixels.max()
    return to_pil_image((pixels - low) / (high - low).clamp(min=1e-12))


def _pixels(model: Model, picture: Picture) -> Float[Tensor, "1 3 h w"]:
    return model.preprocess(read_picture(picture))[None].to(model.device, model.dtype)


def _small(values: Float[Tensor, "h w"]) -> list[list[float]]:
    height, width = values.shape
    scale = min(1.0, SIDE / max(height, width))
    values = values.detach().float().cpu()
    if scale < 1:
        values = resized(values, [max(round(side * scale), 1) for side in (height, width)])
    return [[float(f"{value:.4g}") for value in line] for line in values.tolist()]
