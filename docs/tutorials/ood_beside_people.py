# %% [markdown]
# # Out of distribution, beside people
#
# Geirhos et al. (2021) showed distorted pictures of 16 categories to people and to models, and asked whether models
# that are as accurate as people also make the same errors. This page runs that experiment from beginning to end, on
# pictures it draws and with two invented observers in place of people. With the published stimuli and trials it is two
# commands:
#
# ```sh
# ssmclip ood download contrast,cue-conflict --out STIMULI
# ssmclip evaluate --model runs/mine --tasks ood --data STIMULI --humans HUMANS.parquet --out ood.jsonl
# ```

# %%
import csv
import re
import tempfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from sklearn.metrics import cohen_kappa_score
from torch import nn
from torchvision.transforms.functional import to_tensor

import ssmclip
from ssmclip.evaluate import Settings
from ssmclip.humans.decide import open_stimuli
from ssmclip.humans.scores import score_decisions
from ssmclip.humans.stimuli import CATEGORIES
from ssmclip.humans.study import Experiment
from ssmclip.humans.trials import read_trials
from ssmclip.models import Model

folder = Path(tempfile.mkdtemp())
random = np.random.default_rng(0)

# %% [markdown]
# ## Stimuli
#
# Each category is a mosaic of 4 x 4 greys, and a picture is that mosaic with noise. `ssmclip.distort` lowers the
# contrast as it was done in the study: at level "c10" a tenth of it is left. A file name says everything: number, data
# set, observer, condition, category, count and image.

# %%
LEVELS = ("c100", "c30", "c10", "c05")
MOSAICS = random.integers(30, 226, (16, 4, 4))
session = folder / "stimuli" / "contrast" / "dnn" / "session-1"
session.mkdir(parents=True)
for i in range(320):
    category, level = i % 16, LEVELS[i // 16 % 4]
    grey = np.kron(MOSAICS[category], np.ones((8, 8))) + random.normal(0, 40, (32, 32))
    picture = np.repeat(grey[..., None].clip(0, 255).astype(np.uint8), 3, axis=2)
    name = f"{i + 1:04}_cop_dnn_{level}_{CATEGORIES[category]}_00_n02690373_{i}.png"
    Image.fromarray(ssmclip.distort(picture, "contrast", level)).save(session / name)
stimuli = open_stimuli(folder / "stimuli")
assert len(stimuli) == 320

# %% [markdown]
# ## Observers
#
# Trials are a table with a line for each answer. The two observers find the same pictures hard, and all the harder the
# lower the contrast: this is what makes their errors consistent. The study's own trials are a file of this form.

# %%
COLUMNS = ("dataset", "subject", "image_id", "condition", "category", "object_response")
SEEN = {"c100": 0.98, "c30": 0.9, "c10": 0.7, "c05": 0.4}  # share of the pictures that are recognised
difficulty = {stimulus.image_id: random.random() for stimulus in stimuli}
answers = []
for subject in ("subject-01", "subject-02"):
    for stimulus in stimuli:
        seen = difficulty[stimulus.image_id] + random.normal(0, 0.1) < SEEN[stimulus.condition]
        answer = stimulus.category if seen else CATEGORIES[random.integers(16)]
        answers.append(("contrast", subject, stimulus.image_id, stimulus.condition, stimulus.category, answer))
with open(folder / "people.csv", "w", newline="", encoding="utf-8") as file:
    csv.writer(file).writerows([COLUMNS, *answers])
people = read_trials(folder / "people.csv")

# %% [markdown]
# ## Models
#
# A model decides by its similarity with prompts for the 16 categories. In place of trained models, here are two that
# compare a picture with the mosaics: one after subtracting the mean, so that contrast does not matter to it; the other
# as it is. Any name that `ssmclip.find` takes would do, a timm classifier too, which decides by its 1,000 logits.


# %%
class Matcher(nn.Module):
    """Compare a picture with the mosaic of the category that a text names; centred: after subtracting the mean."""

    def __init__(self, centred: bool):
        super().__init__()
        self.centred = centred
        self.mosaics = nn.Parameter(torch.from_numpy(MOSAICS / 255).float().flatten(1), requires_grad=False)

    def encode_image(self, images, normalize=False):  # (n, 3, 32, 32) -> (n, 16)
        return self._vector(nn.functional.avg_pool2d(images.mean(1), 8).flatten(1))

    def encode_text(self, tokens, normalize=False):  # (m, 1) -> (m, 16)
        return self._vector(self.mosaics[tokens[:, 0]])

    def _vector(self, greys):
        return nn.functional.normalize(greys - greys.mean(1, keepdim=True) * self.centred, dim=1)


def tokenize(texts: list[str]) -> torch.Tensor:
    """Return the place of the category that each text names, (m, 1)."""
    return torch.tensor([[CATEGORIES.index(*set(re.findall(r"\w+", text)) & set(CATEGORIES))] for text in texts])


models = {
    name: Model(Matcher(centred), to_tensor, tokenize, name) for name, centred in (("centred", True), ("raw", False))
}

# %% [markdown]
# ## Decisions and scores
#
# The decisions are kept in a file that a later run continues. Scores are those of the authors' toolbox, with intervals
# over pictures and people.

# %%
experiment = Experiment(stimuli, folder / "decisions.parquet", prompts="categories")
for name, added in experiment.run(models, Settings()):
    print(f"{name}: {added} decisions")
decisions = read_trials(folder / "decisions.parquet")
rows = score_decisions(people, decisions, resamples=200)
scores = {(row.model, row.metric): row for row in rows if row.plain and row.task == "ood/contrast"}
for metric in ("ood_accuracy", "error_consistency"):
    for model in ("humans", *models):
        row = scores[model, metric]
        print(f"{metric:18} {model:8} {row.value:6.3f}  ({row.ci_low:.3f} to {row.ci_high:.3f})")

# %% [markdown]
# Accuracy over the level: the raw model fails as contrast falls, the centred one hardly does.

# %%
for model in ("humans", *models):
    levels = {row.where["level"]: row.value for row in rows if row.model == model and row.metric == "accuracy"}
    print(f"{model:8}", {level: round(levels[level], 2) for level in LEVELS})
assert scores["centred", "ood_accuracy"].value > 0.95
assert scores["raw", "ood_accuracy"].value < 0.5

# %% [markdown]
# Error consistency is Cohen's kappa of being right or wrong on the same pictures: the mean over the levels that count
# (undistorted pictures do not) and over people. scikit-learn gives the same number.

# %%
table = pq.read_table(folder / "decisions.parquet").to_pylist()
right = {(t["subject"], t["image_id"].lower()): t["object_response"] == t["category"] for t in table}
right |= {(subject, image.lower()): answer == category for _, subject, image, _, category, answer in answers}
kappas = []
for subject in ("subject-01", "subject-02"):
    for level in LEVELS[1:]:
        images = [stimulus.image_id.lower() for stimulus in stimuli if stimulus.condition == level]
        pair = ([right[who, image] for image in images] for who in ("raw", subject))
        kappas.append(cohen_kappa_score(*pair))
np.testing.assert_allclose(scores["raw", "error_consistency"].value, np.mean(kappas), rtol=1e-12)
assert scores["humans", "error_consistency"].value > scores["raw", "error_consistency"].value + 0.2

# %% [markdown]
# ## From here
#
# - `ssmclip report` draws accuracy over levels, the matrix of error consistency, and shape bias.
# - [Commands](../commands.md#out-of-distribution): the published stimuli, and distortions of your own.
# - [Results](../results.md#classifiers): the shape bias of three classifiers.
