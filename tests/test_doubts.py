"""Second opinions: what a wrong order of classes or captions shared by images looks like."""

import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from ssmclip.evaluate import Model, Settings, Task
from ssmclip.report import words

NAMES = ("zero", "one", "two", "three", "four")
SIZE = 40


class Reader(nn.Module):
    """A CLIP that is always right: an image's grey level is its class, a text's is the class it names."""

    def __init__(self):
        super().__init__()
        self.anything = nn.Parameter(torch.zeros(1))

    def encode_image(self, images, normalize=False):
        return nn.functional.one_hot(images[:, 0, 0, 0].long(), SIZE).float()

    def encode_text(self, tokens, normalize=False):
        return nn.functional.one_hot(tokens[:, 0], SIZE).float()


def model():
    def see(image):
        return torch.full((3, 2, 2), float(np.asarray(image)[0, 0, 0]))

    def read(texts):
        return torch.tensor([[int(text.split()[-1])] for text in texts])

    return Model(Reader(), see, read, "reader")


class Set:
    def __init__(self, kind, metric, **more):
        self.card = SimpleNamespace(name="greys", title="Greys", kind=kind, metric=metric, test_size=SIZE)
        self.keys, self.files = [str(i) for i in range(SIZE)], ()
        for name, value in more.items():
            setattr(self, name, value)

    def __len__(self):
        return SIZE

    def __getitem__(self, i):
        image = Image.new("RGB", (4, 4), (self.levels[i],) * 3)
        return (image, self.labels[i]) if self.card.kind == "classification" else image


def classes(order):
    labels = [i % 5 for i in range(SIZE)]
    return Set(
        "classification", "top1", labels=labels, levels=labels, classnames=[str(i) for i in order], templates=["the {}"]
    )


@pytest.mark.parametrize(("order", "right"), [([0, 1, 2, 3, 4], True), ([1, 2, 3, 4, 0], False)])
def test_accuracy_far_below_guessing_is_a_warning(order, right, caplog):
    with caplog.at_level(logging.INFO, "ssmclip"):
        row, *_ = Task(classes(order)).rows(model(), Settings(examples=0))
    assert "reader on greys: 40 of 40 images" in caplog.text
    assert row.value == (1.0 if right else 0.0)
    warned = "top1 of 0.0 % is far below guessing (20.0 %): check that class names are in the order of the labels"
    assert (warned in caplog.text) is not right
    assert (warned in words.caveats(row)) is not right


@pytest.mark.parametrize("shared", [0, 2])
def test_captions_of_several_images_are_a_warning(shared, caplog):
    captions = [[f"number {i}"] for i in range(SIZE)]
    for i in range(shared):
        captions[i + 1] = ["number 0"]
    test_set = Set("retrieval", "mean_recall", levels=list(range(SIZE)), captions=captions)
    row, *_ = Task(test_set).rows(model(), Settings(examples=0))
    assert ("1 captions belong to several images (3 images)" in caplog.text) is bool(shared)
    assert bool(words.caveats(row)) is bool(shared)
