"""Figures that contain images: retrieval examples and image-text similarity."""

from __future__ import annotations

import base64
import binascii
import io

import matplotlib.image
from matplotlib.offsetbox import AnnotationBbox, OffsetImage
from PIL import Image

from ssmclip.report.figures.base import Drawing, canvas, figure, shortened
from ssmclip.report.store import by_task, final
from ssmclip.report.words import title_of

MAX_SIDE = 512  # pixels of a thumbnail; more is none


def picture(encoded: str) -> Image.Image:
    """Return a row's thumbnail from the base64 of a small JPEG. Raises ValueError for anything else."""
    try:
        image = Image.open(io.BytesIO(base64.b64decode(encoded, validate=True)), formats=["JPEG"])
        if max(image.size) > MAX_SIDE:
            raise ValueError(f"{image.size} pixels")
        image.load()
    except (OSError, ValueError, TypeError, SyntaxError, binascii.Error) as error:
        raise ValueError(
            f"a row's thumbnail must be a small JPEG in base64 (got {str(encoded)[:40]!r}: {error})"
        ) from error
    return image


class Pictured(Drawing):
    """A figure of one row, with the thumbnails its `extra` carries."""

    key = ""
    says = ""

    @classmethod
    def each(cls, rows, looks):
        for row in by_task(final(rows)):
            if row.extra.get(cls.key):
                yield cls(f"{title_of(row.task, rows)}: {cls.says} ({row.model})", [row], looks)

    @property
    def thumbnails(self) -> dict[str, str]:
        """Return the thumbnails, checked to be small JPEGs."""
        found = self.rows[0].extra["thumbnails"]
        for encoded in found.values():
            picture(encoded)
        return found


@figure("similarity")
class Similarity(Pictured):
    """Cosine similarity of each image and text; true pairs are on the diagonal."""

    key = "similarity"
    says = "image–text similarity"
    section = "details"
    wide = True

    def frame(self):
        shown = self.rows[0].extra["similarity"]
        return [
            {"image": image, "text": text, "score": score}
            for image, line in zip(shown["images"], shown["scores"], strict=True)
            for text, score in zip(shown["texts"], line, strict=True)
        ]

    def plot(self):
        shown, thumbnails = self.rows[0].extra["similarity"], self.thumbnails
        n = len(shown["images"])
        fig, axes = canvas(1.0 + 0.42 * n, width=3.2 + 0.42 * n)
        texts_down = [[line[j] for line in shown["scores"]] for j in range(n)]
        axes.imshow(texts_down, cmap="cividis", aspect="equal")
        low, high = min(map(min, texts_down)), max(map(max, texts_down))
        for i, line in enumerate(texts_down):
            for j, score in enumerate(line):
                ink = "white" if score < (low + high) / 2 else "black"
                weight = "bold" if i == j else "normal"
                axes.text(j, i, f"{round(100 * score)}", ha="center", va="center", size=7.5, color=ink, weight=weight)
        for j, place in enumerate(shown["images"]):
            image = picture(thumbnails[place])
            box = OffsetImage(matplotlib.image.pil_to_array(image), zoom=26 / max(image.size))
            place_box = AnnotationBbox(
                box, (j, -0.5), xybox=(0, 15), boxcoords="offset points", frameon=False, pad=0, annotation_clip=False
            )
            axes.add_artist(place_box)
        axes.set_yticks(range(n), [shortened(text, 44) for text in shown["texts"]])
        axes.set_xticks([])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_xlabel("cosine × 100; true pairs are on the diagonal")
        axes.grid(False)
        return fig


@figure("examples")
class Examples(Pictured):
    """The texts found for images, and the images found for texts. The page sets them as text and pictures."""

    key = "image_to_text"
    says = "examples"
    section = "examples"

    def frame(self):
        extra = self.rows[0].extra
        return [
            {"query": query, "way": way, "rank": rank, **hit}
            for way, asked in (("image_to_text", "image"), ("text_to_image", "text"))
            for query, hits in ((example[asked], example["found"]) for example in extra.get(way, []))
            for rank, hit in enumerate(hits, start=1)
        ]

    def plot(self):
        extra, thumbnails = self.rows[0].extra, self.thumbnails
        shown = extra["image_to_text"]
        fig, axes = canvas(1.1 * len(shown))
        axes.set_axis_off()
        axes.set(xlim=(0, 1), ylim=(len(shown), 0))
        for i, example in enumerate(shown):
            image = picture(thumbnails[example["image"]])
            box = OffsetImage(matplotlib.image.pil_to_array(image), zoom=60 / max(image.size))
            axes.add_artist(AnnotationBbox(box, (0.1, i + 0.5), frameon=False))
            said = [f"{'+' if hit['right'] else '-'} {shortened(hit['item'], 44)}" for hit in example["found"]]
            axes.text(0.25, i + 0.5, "\n".join(said), va="center", size=8)
        return fig
