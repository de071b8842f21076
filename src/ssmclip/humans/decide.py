"""Decisions of a model on stimuli: one of 16 categories, from 1,000 ImageNet logits or from prompts, in parquet.

n stimuli · k classes scored

As Geirhos et al. 2021 (arXiv:2106.07411): softmax over the classes, the mean over each category's ImageNet classes,
the largest of the 16. Only 207 of the 1,000 classes belong to a category, and the softmax's denominator is the same for
all categories: so a CLIP is asked about these 207 alone, and probabilities are written as shares that sum to one.
"""

from __future__ import annotations

import json
import logging
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ssmclip.data.images import open_image
from ssmclip.evaluate.embeddings.embed import UNREADABLE, Settings, embed_texts, hashes, inference, subset
from ssmclip.evaluate.embeddings.fingerprint import Unsure, combined, model_hash, preprocess_hash, texts_hash
from ssmclip.evaluate.zeroshot import class_embeddings
from ssmclip.files import parse_json, whole
from ssmclip.humans.stimuli import CATEGORIES, STIMULUS_SETS, Stimulus, find_stimuli
from ssmclip.models.names import Model
from ssmclip.models.towers import image_dtype

log = logging.getLogger(__name__)


def _indices(text: str) -> tuple[int, ...]:
    """
    >>> _indices("8 10-12")
    (8, 10, 11, 12)
    """
    ends = [part.partition("-") for part in text.split()]
    return tuple(i for first, _, last in ends for i in range(int(first), int(last or first) + 1))


# The ImageNet-1k classes of each category (WordNet's subtrees, as the human experiments chose them).
IMAGENET = {
    "airplane": _indices("404"),
    "bear": _indices("294-297"),
    "bicycle": _indices("444 671"),
    "bird": _indices("8 10-16 18-20 22-24 80-83 87-96 98-100 127-133 135-145"),
    "boat": _indices("472 554 625 814 914"),
    "bottle": _indices("440 720 737 898 899 901 907"),
    "car": _indices("436 511 817"),
    "cat": _indices("281-286"),
    "chair": _indices("423 559 765 857"),
    "clock": _indices("409 530 892"),
    "dog": _indices("152-191 193-203 205-226 228-241 243-250 252-257 259 261-263 265-268"),
    "elephant": _indices("385 386"),
    "keyboard": _indices("508 878"),
    "knife": _indices("499"),
    "oven": _indices("766"),
    "truck": _indices("555 569 656 675 717 734 864 867"),
}
SCORED = tuple(sorted(i for indices in IMAGENET.values() for i in indices))  # the 207
IMAGENET_CLASSES = 1000
LOGIT_SCALE = 100.0  # of the published zero-shot classifier, whatever scale a model learnt
PROMPTS = ("imagenet", "categories")
SAVE_EVERY_S = 30
SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("dataset", "subject", "image_id", "condition", "category", "object_response")]
    + [("probabilities", pa.list_(pa.float32(), len(CATEGORIES)))]
)
MADE_BY = b"ssmclip"  # the metadata's key: subject -> fingerprint of what decided


@dataclass(frozen=True)
class Decider:
    """A model that decides. logits: a batch of preprocessed images -> (n, k); columns: each category's classes among
    the k; classes: k; fingerprint: differs where weights, prompts or preprocessing differ."""

    name: str
    model: nn.Module
    preprocess: Callable[[Any], Tensor]
    logits: Callable[[Tensor], Tensor]
    columns: tuple[tuple[int, ...], ...]
    classes: int
    fingerprint: str


def imagenet_decider(model: nn.Module, preprocess: Callable[[Any], Tensor], name: str) -> Decider:
    """Return the decider of a model that gives the 1,000 logits of ImageNet-1k, in their usual order."""
    columns = tuple(IMAGENET[category] for category in CATEGORIES)
    known = _fingerprint(lambda: {"model": model_hash(model), "preprocess": preprocess_hash(preprocess)})
    return Decider(name, model, preprocess, model, columns, IMAGENET_CLASSES, known)


def _fingerprint(made_of: Callable[[], dict[str, str]]) -> str:
    """A hash of what decides; of what cannot all be seen one of its own, by which no file is continued."""
    try:
        return combined(made_of())
    except Unsure as error:
        log.warning("these decisions can't be continued by another run: %s", error)
        return f"unsure {uuid.uuid4().hex}"


def clip_decider(
    clip: Model,
    settings: Settings,
    *,
    prompts: str = "imagenet",
    templates: Sequence[str] | None = None,
) -> Decider:
    """Return the zero-shot decider of a CLIP. Logits are 100 times the cosine. The prompts' embeddings are kept in
    `settings.cache`.

    prompts: "imagenet", OpenAI's names of the 207 ImageNet classes that belong to a category, or "categories", the 16
    names themselves; templates: with {} for the name, left out OpenAI's 80, so 16,560 or 1,280 prompts.
    Raises ValueError for other prompts.
    """
    if prompts not in PROMPTS:
        raise ValueError(f"unknown prompts {prompts!r}; known: {', '.join(PROMPTS)}")
    from open_clip import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES  # seconds to import

    templates = tuple(templates or (template("{}") for template in OPENAI_IMAGENET_TEMPLATES))
    if prompts == "imagenet":
        names = [IMAGENET_CLASSNAMES[i] for i in SCORED]
        columns = tuple(tuple(SCORED.index(i) for i in IMAGENET[category]) for category in CATEGORIES)
    else:
        names, columns = list(CATEGORIES), tuple((i,) for i in range(len(CATEGORIES)))
    classes = class_embeddings(lambda texts: embed_texts(clip, texts, settings), names, templates).to(clip.device).T

    def logits(images: Tensor) -> Tensor:
        features = clip.network.encode_image(images)
        return LOGIT_SCALE * nn.functional.normalize(features.float(), dim=-1) @ classes

    known = _fingerprint(lambda: hashes(clip) | {"prompts": texts_hash([*names, *templates])})
    return Decider(clip.label, clip.network, clip.preprocess, logits, columns, len(names), known)


def category_probabilities(logits: Float[Tensor, "n k"], columns: Sequence[Sequence[int]]) -> Float[Tensor, "n c"]:
    """Return the mean softmax probability of each category's classes, as shares of their sum, in float64.

    >>> category_probabilities(torch.tensor([[0.0, 0.0, 0.0, 5.0]]), [[0], [1, 2]]).tolist()
    [[0.5, 0.5]]
    """
    used = [list(classes) for classes in columns]
    logits = logits.double()
    logits = logits - logits[:, [i for classes in used for i in classes]].amax(dim=1, keepdim=True)
    means = torch.stack([logits[:, classes].exp().mean(dim=1) for classes in used], dim=1)
    return means / means.sum(dim=1, keepdim=True)


def open_stimuli(root: str | Path, names: Sequence[str] | None = None) -> list[Stimulus]:
    """Return the stimuli of the named data sets under `root` (default: all found); misnamed files are logged.

    Raises UnknownName, and FileNotFoundError for a missing named set and if there is none at all.
    """
    found: list[Stimulus] = []
    missing = []
    for name in names or STIMULUS_SETS:
        rejected: list[str] = []
        try:
            found += find_stimuli(root, name, rejected=rejected)
        except FileNotFoundError as error:
            if names:
                raise
            missing.append(str(error))
        if rejected:
            log.warning(
                "%s: ignoring %d files whose names do not follow the set's form; the first: %s",
                name,
                len(rejected),
                rejected[0],
            )
    if not found:
        raise FileNotFoundError(f"no data set of stimuli under {root}; searched for\n  " + "\n  ".join(missing))
    return found


def decide(decider: Decider, stimuli: Sequence[Stimulus], out: str | Path, settings: Settings) -> int:
    """Add the model's missing decisions on `stimuli` to the parquet file `out`; return how many were added.

    Columns: dataset, subject (the decider's name), image_id, condition, category, object_response, probabilities (of
    the 16 categories, alphabetical, as shares). Saved every half minute and however it ends, whole or not at all.
    Stimuli that can't be read are counted and logged. Raises ValueError when `out` has decisions of the same name by
    another model (weights, prompts or preprocessing), for another number of logits than the decider's classes, and for
    logits that are not finite.
    """
    out = Path(out)
    old, marks = _open_decisions(out)
    if marks.setdefault(decider.name, decider.fingerprint) != decider.fingerprint:
        raise ValueError(
            f"{out} has decisions of another {decider.name!r} (weights, settings, prompts or preprocessing differ): "
            "give this one another name, or the decisions another file"
        )
    keys = zip(*(old[name].to_pylist() for name in ("subject", "dataset", "image_id", "condition")), strict=True)
    done = {key[1:] for key in keys if key[0] == decider.name}
    drawn = [stimuli[place] for place in subset(len(stimuli), settings)]
    left = [s for s in drawn if (s.dataset, s.image_id, s.condition) not in done]
    rows: list[dict[str, Any]] = []
    saved = time.monotonic()
    try:
        for row in _decisions(decider, left, settings):
            rows.append(row)
            if time.monotonic() - saved > SAVE_EVERY_S:
                _save(out, old, rows, marks)
                saved = time.monotonic()
    finally:
        if rows:
            _save(out, old, rows, marks)
    return len(rows)


def _decisions(decider: Decider, stimuli: Sequence[Stimulus], settings: Settings):
    device = next(decider.model.parameters()).device
    dtype = image_dtype(decider.model)
    loader = DataLoader(
        _Inputs(stimuli, decider.preprocess),
        batch_size=settings.batch_size,
        num_workers=settings.workers,
        collate_fn=_collate,
        generator=torch.Generator().manual_seed(settings.seed),  # else the loader draws from the global generator
    )
    unreadable: list[str] = []
    with inference(decider.model):
        for images, places, failures in tqdm(loader, desc=decider.name, unit="batch", leave=False, disable=None):
            unreadable += failures
            if not places:
                continue
            logits = decider.logits(images.to(device, dtype)).float().cpu()
            here = [stimuli[place] for place in places]
            _check_logits(decider, logits, here)
            probabilities = category_probabilities(logits, decider.columns)
            for stimulus, shares in zip(here, probabilities.tolist(), strict=True):
                values = (stimulus.dataset, decider.name, stimulus.image_id, stimulus.condition, stimulus.category)
                said = CATEGORIES[shares.index(max(shares))]
                yield dict(zip(SCHEMA.names, (*values, said, shares), strict=True))
    if unreadable:
        log.warning("%d stimuli could not be read; the first: %s", len(unreadable), unreadable[0])


def _check_logits(decider: Decider, logits: Tensor, stimuli: Sequence[Stimulus]) -> None:
    if logits.ndim != 2 or logits.shape[1] != decider.classes:
        raise ValueError(
            f"{decider.name} must give {decider.classes:,} logits (got {'x'.join(map(str, logits.shape[1:]))}): use a "
            "model with the classes of ImageNet-1k in their usual order, or a CLIP"
        )
    if not logits.isfinite().all():
        first = int((~logits.isfinite().all(dim=1)).nonzero()[0])
        raise ValueError(f"{decider.name}: the logits of {stimuli[first].path} are not finite")


class _Inputs(Dataset):
    """Preprocessed stimuli with their places, or the reason why one cannot be read."""

    def __init__(self, stimuli: Sequence[Stimulus], preprocess: Callable[[Any], Tensor]):
        self.stimuli, self.preprocess = stimuli, preprocess

    def __len__(self) -> int:
        return len(self.stimuli)

    def __getitem__(self, place: int) -> tuple[int, Tensor | None, str]:
        try:
            image = open_image(self.stimuli[place].path)
        except UNREADABLE as error:
            return place, None, f"{self.stimuli[place].path}: {error}"
        return place, self.preprocess(image), ""


def _collate(items: list[tuple[int, Tensor | None, str]]):
    read = [item for item in items if item[1] is not None]
    images = torch.stack([item[1] for item in read]) if read else torch.empty(0)
    return images, [item[0] for item in read], [why for _, tensor, why in items if tensor is None]


def _open_decisions(path: Path) -> tuple[pa.Table, dict[str, str]]:
    """Return the table (empty if there is none) and who made it. Raises ValueError for a file not made by `decide`."""
    if not path.exists():
        return SCHEMA.empty_table(), {}
    try:
        table = pq.read_table(path)
        marks = parse_json(table.schema.metadata[MADE_BY])
        return table.select(SCHEMA.names).cast(SCHEMA), marks
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is not a file of decisions written by `ssmclip ood decide` ({error}); give another file"
        ) from error


def _save(path: Path, old: pa.Table, rows: Sequence[dict[str, Any]], marks: dict[str, str]) -> None:
    table = pa.concat_tables([old, pa.Table.from_pylist(list(rows), SCHEMA)])
    with whole(path) as part:
        pq.write_table(table.replace_schema_metadata({MADE_BY: json.dumps(marks)}), part, compression="zstd")
