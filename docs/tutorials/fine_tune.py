# %% [markdown]
# # Fine-tune a published CLIP
#
# `model.weights` starts a run from trained weights: any name that `ssmclip.load` takes, such as `hf-hub:OWNER/NAME`, or
# a file that was downloaded by hand. Fine-tuning is then a run like any other, with a lower learning rate.
#
# ```sh
# ssmclip train recipes/finetune_clip.py --set source=PAIRS.parquet model.name= model.weights=hf-hub:OWNER/NAME
# ```
#
# No network is needed here: the first part makes a small CLIP and writes it in the form in which open_clip publishes
# models, two files in a folder. The second part does with that folder what you would do with a published one.

# %%
import random
import tempfile
from dataclasses import replace
from pathlib import Path

import open_clip
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
from ssmclip.models import blend
from ssmclip.train import train

folder = Path(tempfile.mkdtemp())

# %% [markdown]
# ## A stand-in for published weights
#
# A model that has seen discs of four colours, trained for a moment.

# %%
SEEN = {"red": (220, 40, 40), "green": (40, 170, 60), "blue": (40, 70, 220), "white": (245, 245, 245)}
COLOURS = SEEN | {"yellow": (240, 220, 50), "black": (10, 10, 10)}
WORDINGS = ("a {} disc", "a photo of a {} disc", "the colour of this disc is {}")


def draw(colour: str, chance: random.Random) -> Image.Image:
    """Return a disc of the colour on a grey ground, at a random place and of a random size."""
    picture = Image.new("RGB", (48, 48), (chance.randint(90, 140),) * 3)
    x, y, radius = chance.randint(16, 32), chance.randint(16, 32), chance.randint(9, 15)
    ImageDraw.Draw(picture).ellipse((x - radius, y - radius, x + radius, y + radius), fill=COLOURS[colour])
    return picture


def write_pairs(colours: list[str], count: int, out: Path) -> str:
    """Draw discs of these colours, and return the table of their pairs."""
    chance, lines = random.Random(count), ["image,caption"]
    out.mkdir()
    for i in range(count):
        colour = chance.choice(colours)
        draw(colour, chance).save(out / f"{i:03}.png")
        lines.append(f"{i:03}.png,{chance.choice(WORDINGS).format(colour)}")
    (out / "pairs.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(out / "pairs.csv")


BASE = TrainConfig(
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
    data=DataConfig(source=write_pairs(list(SEEN), 240, folder / "seen"), image_sizes=((0.0, 32),)),
    optimiser=OptimiserConfig(lr=3e-3),
    schedule=ScheduleConfig(warmup_steps=10),
    logging=LoggingConfig(every=5, tensorboard=False, progress=False),
)
pretrained = train(BASE, folder / "pretrained")
published = next((pretrained / "checkpoints").glob("step_*"))
print(sorted(path.name for path in published.iterdir()))

# %% [markdown]
# Every checkpoint is such a folder: `open_clip_config.json` and `open_clip_model.safetensors`. open_clip reads it
# without this package's help, and computes the same embeddings.

# %%
ours, preprocess, tokenizer = ssmclip.load(published)
theirs = open_clip.create_model(f"local-dir:{published}").eval()
picture = preprocess(draw("red", random.Random(0)))[None]
with torch.no_grad():
    assert torch.equal(ours.encode_image(picture), theirs.encode_image(picture))
    assert torch.equal(ours.encode_text(tokenizer(["a red disc"])), theirs.encode_text(tokenizer(["a red disc"])))

# %% [markdown]
# ## What it knows before
#
# Test on all six colours, two of which it has never seen.

# %%
chance = random.Random(7)
for colour in COLOURS:
    (folder / "test" / colour).mkdir(parents=True)
    for i in range(15):
        draw(colour, chance).save(folder / "test" / colour / f"{i:02}.png")


def accuracy(model: Path, label: str) -> float:
    """Return the zero-shot accuracy on the test pictures."""
    rows = evaluate(*ssmclip.load(model), [f"folder:{folder / 'test'}"], "", model_name=label, examples=0)
    return next(row.value for row in rows if row.metric == "top1")


before = accuracy(published, "published")
print(f"before: {before:.1%}")

# %% [markdown]
# ## Fine-tuning
#
# The same recipe with other pairs, fewer steps and a lower rate. An empty `model.name` takes the architecture from the
# weights. Weights that do not fit are an error that names them, and `start.json` says what became of each.

# %%
tuning = replace(
    BASE,
    steps=20,
    data=replace(BASE.data, source=write_pairs(list(COLOURS), 180, folder / "new")),
    model=ModelConfig(name="", weights=str(published)),
    optimiser=OptimiserConfig(lr=2e-3),
)
run = train(tuning, folder / "tuned")
tuned = accuracy(run, "tuned")
print(f"after 20 steps: {tuned:.1%}")
assert (run / "start.json").exists()

# %% [markdown]
# What was the pretraining worth? The same steps from random weights get less far.

# %%
scratch = accuracy(train(replace(tuning, model=BASE.model), folder / "scratch"), "from scratch")
print(f"20 steps from random weights: {scratch:.1%}")
assert tuned > before + 0.1
assert tuned > scratch + 0.1

# %% [markdown]
# ## Between before and after
#
# A blend of the weights before and after often keeps more of what each knows (WiSE-FT). Half of the tuned model is a
# folder like any other; its weights are the means.

# %%
(half,) = blend(published, run, [0.5], folder / "half")
print(f"half way: {accuracy(half, 'half'):.1%}")
models = [ssmclip.load(each).model for each in (published, run, half)]
for first, last, between in zip(*(model.parameters() for model in models), strict=True):
    torch.testing.assert_close(between, (first + last) / 2)

# %% [markdown]
# ## From here
#
# - [Models](../models.md#published-weights): which published checkpoints are read, and what is inferred from them.
# - [Commands](../commands.md#start-from-trained-weights): one tower's weights alone, towers that are locked or learn
#   at other rates, layer by layer.
# - `ssmclip convert` and `ssmclip push` write and upload the result.
