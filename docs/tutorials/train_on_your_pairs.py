# %% [markdown]
# # Train on your own pairs
#
# A pair is a picture and a text that describes it. Here a CLIP with a small state-space image encoder learns from 240
# pairs in a table; then it is evaluated on pictures it has not seen, and searched with words. Everything is drawn by
# this page: no download, no GPU.

# %%
import csv
import random
import tempfile
from pathlib import Path

import torch
from PIL import Image, ImageDraw

import ssmclip
from ssmclip.config import (
    DataConfig,
    LoggingConfig,
    ModelConfig,
    OptimiserConfig,
    ScheduleConfig,
    TrainConfig,
)
from ssmclip.evaluate import evaluate
from ssmclip.train import train

folder = Path(tempfile.mkdtemp())

# %% [markdown]
# ## Pictures and a table
#
# A table is a csv, tsv or parquet file with the columns `image` and `caption`; paths are relative to it. Webdataset
# shards (`shards/{0000..0099}.tar`) work the same way, and are faster from a network disk.

# %%
COLOURS = {"red": (220, 40, 40), "green": (40, 170, 60), "blue": (40, 70, 220), "white": (245, 245, 245)}
WORDINGS = ("a {} disc", "a photo of a {} disc", "the colour of this disc is {}")


def draw(colour: str, chance: random.Random) -> Image.Image:
    """Return a disc of the colour on a grey ground, at a random place and of a random size."""
    picture = Image.new("RGB", (48, 48), (chance.randint(90, 140),) * 3)
    x, y, radius = chance.randint(16, 32), chance.randint(16, 32), chance.randint(9, 15)
    ImageDraw.Draw(picture).ellipse((x - radius, y - radius, x + radius, y + radius), fill=COLOURS[colour])
    return picture


chance = random.Random(0)
(folder / "train").mkdir()
with open(folder / "train" / "pairs.csv", "w", newline="", encoding="utf-8") as file:
    table = csv.writer(file)
    table.writerow(["image", "caption"])
    for i in range(240):
        colour = chance.choice(list(COLOURS))
        draw(colour, chance).save(folder / "train" / f"{i:03}.png")
        table.writerow([f"{i:03}.png", chance.choice(WORDINGS).format(colour)])

# %% [markdown]
# The pictures to test on lie in one folder per class, whose name is the class name.

# %%
for colour in COLOURS:
    (folder / "test" / colour).mkdir(parents=True)
    for i in range(20):
        draw(colour, chance).save(folder / "test" / colour / f"{i:02}.png")

# %% [markdown]
# ## A recipe
#
# A run is described by one frozen dataclass. In a file of its own, say `recipes/discs.py`, the same function is what
# `ssmclip train recipes/discs.py --out runs/discs` runs, and `--set steps=100 lr=1e-3` changes any field.
#
# The encoder is the smallest VMamba, at 32 pixels, so that this page takes seconds. For real data leave `changes` out:
# `CLIP-VMamba-Nano` has 3 million parameters in its image tower, `CLIP-VMamba-S` 50 million.


# %%
def discs() -> TrainConfig:
    return TrainConfig(
        steps=40,
        batch_size=32,
        device="cpu",
        model=ModelConfig(
            name="CLIP-VMamba-Nano",
            changes={
                "embed_dim": 16,
                "vision_cfg": {"timm_model_name": "test_vmamba"},
                "text_cfg": {"context_length": 12, "width": 32, "heads": 2, "layers": 1},
            },
        ),
        data=DataConfig(source=str(folder / "train" / "pairs.csv"), image_sizes=((0.0, 32),)),
        optimiser=OptimiserConfig(lr=3e-3),
        schedule=ScheduleConfig(warmup_steps=10),
        logging=LoggingConfig(every=5, tensorboard=False, progress=False),
    )


run = train(discs(), folder / "run")

# %% [markdown]
# The run's folder has its settings, its checkpoints and its rows. The loss starts near the logarithm of the batch size,
# ln 32 = 3.47: every text is as likely as any other. It does not go to zero here, as many of the 32 texts are alike.

# %%
losses = [row for row in ssmclip.read_rows(run / "rows.jsonl")[1] if row.metric == "loss"]
print(f"loss {losses[0].value:.2f} after {losses[0].where['step']} steps, {losses[-1].value:.2f} at the end")
assert losses[-1].value < losses[0].value - 0.5

# %% [markdown]
# ## Evaluation
#
# `ssmclip evaluate --model runs/discs --tasks folder:TEST --out rows.jsonl` is the same as a command. Each row is one
# number with its 95 % interval.

# %%
model = ssmclip.load(run)
rows = evaluate(*model, [f"folder:{folder / 'test'}"], "", model_name="discs", examples=0)
top1 = next(row for row in rows if row.metric == "top1")
print(f"top-1 accuracy {top1.value:.1%}  (95 % interval {top1.ci_low:.1%} to {top1.ci_high:.1%}, n = {top1.n})")
assert top1.n == 80
assert top1.value > 0.9  # chance is 25 %

# %% [markdown]
# ## Search
#
# An `Embedder` turns pictures and texts into unit vectors: their dot product says how well they match.

# %%
embedder = ssmclip.Embedder(model)
pictures = sorted((folder / "test").rglob("*.png"))
similarity = embedder.encode_texts("a blue disc") @ embedder.encode_images(pictures).T
best = [pictures[i].parent.name for i in similarity[0].topk(10).indices]
print("a blue disc:", best)
assert best.count("blue") >= 9
assert torch.allclose(embedder.encode_images(pictures[:3]).norm(dim=1), torch.ones(3))

# %% [markdown]
# ## From here
#
# - `ssmclip train … --resume` continues a run that was stopped, on a CPU bit for bit.
# - `accelerate launch -m ssmclip train …` uses several GPUs.
# - [Fine-tune a published CLIP](fine_tune.py) instead of starting from random weights.
