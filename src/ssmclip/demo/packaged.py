"""The model that comes with the package, for a page that shows something in seconds, and how it is made.

`make demo-model` trains recipes/demo.py and writes the folder `model`. It needs no torch until it writes weights.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from random import Random

from ssmclip.data.synthetic import DIGIT_NAMES, HELD_OUT, PAIR_SOURCES, digits, make_scene, render

__all__ = [
    "FOLDER",
    "LABELS",
    "NAME",
    "TOKENIZER",
    "TO_TRY",
    "draw_pictures",
    "package",
    "vocabulary",
    "write_tokenizer",
]

NAME = "CLIMP-Demo"
FOLDER = Path(__file__).parent / "model"
TOKENIZER = FOLDER / "tokenizer.json"
SOURCE = "quickstart"
PADDING, UNKNOWN = "[PAD]", "[UNK]"

SIDE = 96  # pixels of a drawn picture
DIGITS = 24
TO_TRY = 6  # pictures that the page offers

# What the page opens with.
LABELS = ("a red circle", "a blue circle", "a red square", "a green star", "a handwritten seven", "a handwritten two")


def draw_pictures(folder: Path) -> list[Path]:
    """Draw pictures that the model was not trained on into a new folder; return their files, varied ones first."""
    folder.mkdir(parents=True)
    shapes = {"-".join(pair): partial(render, make_scene(*pair, Random("-".join(pair)))) for pair in HELD_OUT}
    numbers = {f"{DIGIT_NAMES[item.label]}-{item.key[-3:]}": item.draw for item in digits("test")[:DIGITS]}
    names = [*list(shapes)[::4], *list(numbers)[1:3], *shapes, *numbers]
    drawn = {folder / f"{name}.png": (shapes | numbers)[name] for name in dict.fromkeys(names)}
    for file, draw in drawn.items():
        draw(SIDE).save(file)
    return list(drawn)


def vocabulary(source: str = SOURCE) -> dict[str, int]:
    """Return word -> token: padding (0), what is in no caption (1), and the words of a source's captions, sorted."""
    words = {word for item in PAIR_SOURCES[source]() for caption in item.captions for word in _words(caption)}
    return {word: token for token, word in enumerate([PADDING, UNKNOWN, *sorted(words)])}


def _words(caption: str) -> list[str]:
    return caption.lower().replace(",", " , ").split()


def write_tokenizer(file: Path) -> None:
    """Write a tokenizer of whole words, in lower case."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel(vocabulary(), unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(file))


def package(run: Path, folder: Path = FOLDER) -> None:
    """Write a run's model into a folder, in half precision and without the paths of the machine that trained it."""
    from safetensors.torch import save_file

    from ssmclip.models.files.weights import CONFIG_NAME, WEIGHTS_NAME, load_config, load_state
    from ssmclip.models.names import find_checkpoint

    checkpoint = find_checkpoint(run)
    config = load_config(checkpoint)
    config["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = TOKENIZER.name
    state = load_state(checkpoint / WEIGHTS_NAME)
    weights = {name: value.half() if value.is_floating_point() else value for name, value in state.items()}
    write_tokenizer(folder / TOKENIZER.name)
    save_file(weights, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    (folder / WEIGHTS_NAME).chmod(0o644)
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    package(Path(sys.argv[1]))
