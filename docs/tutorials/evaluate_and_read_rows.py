# %% [markdown]
# # Evaluate any model, and read the rows
#
# A model under test is a name (`CLIP-VMamba-S`, a run's folder, `open_clip:ViT-B-32/openai`, `timm:mambaout_tiny/FILE`;
# see [Models](../models.md#names)), or anything that encodes images and texts. Here it is the latter: two models
# of a few lines, so simple that every number can be checked by hand. Every measurement ends as rows, which are read,
# compared and drawn at the end.
#
# ```sh
# ssmclip evaluate --model A=runs/mine,B=open_clip:ViT-B-32/openai --tasks folder:PICTURES --out rows.jsonl
# ```

# %%
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import nn
from torchvision.transforms.functional import to_tensor

import ssmclip
from ssmclip.evaluate import Settings, Study, open_tasks
from ssmclip.report import table, write_report

folder = Path(tempfile.mkdtemp())

# %% [markdown]
# ## Two models
#
# Both compare a colour of the picture with the colour that the text names. One averages the whole picture, the other
# looks at its middle. An image and a text become vectors of three numbers, as they become 512 in a CLIP.

# %%
COLOURS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200)}


class ColourClip(nn.Module):
    """Compare the mean colour of the inner part of a picture, of `share` of its side, with a named colour."""

    def __init__(self, share: float):
        super().__init__()
        self.share = share
        self.palette = nn.Parameter(torch.tensor(list(COLOURS.values())) / 255 - 0.3, requires_grad=False)

    def encode_image(self, images, normalize=False):  # (n, 3, h, w) -> (n, 3)
        cut = round(images.shape[-1] * (1 - self.share) / 2)
        side = images.shape[-1] - cut
        colour = images[:, :, cut:side, cut:side].mean((2, 3)) - 0.3
        return nn.functional.normalize(colour, dim=1) if normalize else colour

    def encode_text(self, tokens, normalize=False):  # (m, 1) -> (m, 3)
        colour = self.palette[tokens[:, 0]]
        return nn.functional.normalize(colour, dim=1) if normalize else colour


def tokenize(texts: list[str]) -> torch.Tensor:
    """Return the place of the colour that each text names, (m, 1)."""
    return torch.tensor([[next(i for i, colour in enumerate(COLOURS) if colour in text)] for text in texts])


models = {"whole": (ColourClip(1.0), to_tensor, tokenize), "middle": (ColourClip(0.4), to_tensor, tokenize)}

# %% [markdown]
# ## A task
#
# Squares of one colour in a frame of another: the class is the colour of the square, and the frame misleads whoever
# averages. `folder:` makes a task of any folder with a subfolder per class; the data sets that `ssmclip datasets`
# lists, `card:` for a set of your own, `distorted:`, `linear:` and `ood` are used in the same way.

# %%
random = np.random.default_rng(0)
for i in range(60):
    square, frame = random.permutation(list(COLOURS))[:2]
    picture = Image.new("RGB", (40, 40), COLOURS[frame])
    side = int(random.integers(10, 19))
    ImageDraw.Draw(picture).rectangle((20 - side, 20 - side, 20 + side, 20 + side), fill=COLOURS[square])
    (folder / "pictures" / square).mkdir(parents=True, exist_ok=True)
    picture.save(folder / "pictures" / square / f"{i:02}.png")

# %% [markdown]
# ## The study
#
# All models on all tasks; then the differences between models on the same pictures.

# %%
tasks = open_tasks([f"folder:{folder / 'pictures'}"], "")
study = Study(models, tasks, Settings(examples=0), out=folder / "rows.jsonl")
for rows in study.measure():
    for row in rows:
        print(f"{row.model:8} {row.metric:12} {row.value:8.4f}  {row.condition}")

# %% [markdown]
# ## Reading
#
# A rows file is JSON lines: what made it, then a row for each number. A row has a model, a task, a metric and a value;
# a 95 % interval and the number of observations where there are some; `where`, what was varied; and `against`, the
# other model of a difference.

# %%
run, rows = ssmclip.read_rows(folder / "rows.jsonl")
top1 = {row.model: row for row in rows if row.metric == "top1" and row.plain}
print(f"PyTorch {run['versions']['torch']}; whole {top1['whole'].value:.1%}, middle {top1['middle'].value:.1%}")
assert top1["middle"].value == 1
assert top1["whole"].ci_low < top1["whole"].value < top1["whole"].ci_high
assert top1["whole"].n == 60

# %% [markdown]
# The same accuracy by hand, without the toolkit: a square of half-width s covers (2 s + 1)² of 1,600 pixels, so the
# average is nearer to the square's colour when that is more than half of them.

# %%
right = []
for path in sorted((folder / "pictures").rglob("*.png")):
    pixels = np.asarray(Image.open(path)).reshape(-1, 3)
    share = (pixels == COLOURS[path.parent.name]).all(1).mean()
    right.append(share > 0.5)
assert top1["whole"].value == np.mean(right)

# %% [markdown]
# The difference is paired: both saw the same pictures, so that its interval is over what only one of them got right.
# If it does not contain 0, the models differ by more than chance.

# %%
(difference,) = (row for row in rows if row.metric == "top1_difference")
print(f"{difference.model} minus {difference.against}: {difference.value:+.3f}")
print(f"95 % interval {difference.ci_low:+.3f} to {difference.ci_high:+.3f}")
assert difference.value == -np.mean(~np.array(right))
assert difference.ci_low < difference.value < difference.ci_high < 0

# %% [markdown]
# ## Tables and a report
#
# `table` gives Markdown; `write_report` (`ssmclip report rows.jsonl --out report`) draws any rows files as one page.

# %%
print(table(list(top1.values())))
page = write_report([folder / "rows.jsonl"], folder / "report")
assert "100.0" in page.read_text(encoding="utf-8")

# %% [markdown]
# ## From here
#
# - [Your own data set](../examples/your_data_set.py): as an object, where it is not a folder.
# - [Reading rows](../examples/reading_rows.py): curves over `where`, and rows of your own.
# - [Commands](../commands.md#evaluate): retrieval, classifiers, probes, distortions.
