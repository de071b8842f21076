"""Evaluate a model on your own pictures: as a folder, or as an object.

A folder needs no code: one subfolder of pictures per class, whose name is the class name.

    ssmclip evaluate --model runs/mine --tasks folder:PICTURES --out rows.jsonl

Anything else is an object with the attributes below, given to `Task`.
"""

import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

import ssmclip
from ssmclip.evaluate import Task, evaluate

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 60), "blue": (40, 60, 220)}


class Patches:
    """Thirty noisy patches of three colours."""

    def __init__(self, n: int = 30):
        # The card: what is known of the set without opening it. metric is the headline; test_size the complete set's n.
        self.card = SimpleNamespace(
            name="patches", title="Coloured patches", kind="classification", metric="top1", test_size=n
        )
        self.labels = [i % len(COLOURS) for i in range(n)]  # an index into classnames for each picture
        self.classnames = tuple(COLOURS)
        self.templates = ("a photo of a {}.",)  # prompts; {} stands for the class name
        self.keys = [f"{self.classnames[label]}/{i:02}.png" for i, label in enumerate(self.labels)]  # to name pictures
        self.files = ()  # files whose change makes kept embeddings stale
        random = np.random.default_rng(0)
        colours = np.array(list(COLOURS.values()))[self.labels, None, None]
        noisy = (colours + random.normal(0, 40, (n, 48, 48, 3))).clip(0, 255).astype(np.uint8)
        self.pictures = [Image.fromarray(patch) for patch in noisy]

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return self.pictures[i], self.labels[i]


torch.manual_seed(0)
model, preprocess, tokenizer = ssmclip.load("CLIP-ViT-Nano")  # fresh weights, so the accuracy means nothing yet
patches = Patches()
rows = evaluate(model, preprocess, tokenizer, [Task(patches)], "", model_name="mine", examples=0)
top1 = next(row for row in rows if row.metric == "top1")
print(f"{top1.metric} {top1.value:.1%}  (95 % interval {top1.ci_low:.1%} to {top1.ci_high:.1%})")

# The same number by hand.
with torch.no_grad():
    texts = model.encode_text(tokenizer([f"a photo of a {name}." for name in COLOURS]), normalize=True)
    images = model.encode_image(torch.stack([preprocess(picture) for picture in patches.pictures]), normalize=True)
right = (images @ texts.T).argmax(1) == torch.tensor(patches.labels)
assert abs(top1.value - right.double().mean().item()) < 1e-12
assert top1.n == 30

# The same pictures as a folder of classes. Classes are in alphabetical order there, which changes no accuracy.
with tempfile.TemporaryDirectory() as folder:
    for key, picture in zip(patches.keys, patches.pictures, strict=True):
        path = Path(folder, "patches", key)
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
    task = f"folder:{folder}/patches"
    from_folder = evaluate(model, preprocess, tokenizer, [task], "", model_name="mine", examples=0)
assert next(row for row in from_folder if row.metric == "top1").value == top1.value
