"""The gradient through cached features is the large batch's."""

import copy

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from ssmclip.config import LossConfig
from ssmclip.train.gradient import backward
from ssmclip.train.objective import OBJECTIVES
from ssmclip.train.state import device_rng

BATCH, CONTEXT = 12, 77


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True)


def pairs(captions=1, views=1):
    generator = torch.Generator().manual_seed(3)
    texts = torch.zeros(BATCH * captions, CONTEXT, dtype=torch.long)
    texts[:, :5] = torch.randint(1, 49405, (BATCH * captions, 5), generator=generator)
    texts[:, 5] = 49407
    return torch.randn(BATCH * views, 3, 32, 32, generator=generator, dtype=torch.float64), texts


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.parametrize(("micro_batch", "captions", "views"), [(1, 1, 1), (4, 1, 1), (5, 1, 1), (5, 3, 2)])
def test_cached_gradient_is_the_large_batchs_in_float64(tiny_clip, accelerator, kind, micro_batch, captions, views):
    model = tiny_clip[0].double().train()
    if kind == "siglip":
        model.logit_bias = nn.Parameter(torch.tensor(-10.0, dtype=torch.float64))
    other, (images, texts) = copy.deepcopy(model), pairs(captions, views)
    loss = OBJECTIVES[kind](LossConfig(view_weight=0.5 if views > 1 else 0.0), captions=captions, views=views)

    whole = loss(**model(images, texts))
    whole.backward()
    cached = backward(accelerator, other, loss, images, texts, micro_batch)

    assert cached.item() == pytest.approx(whole.item(), rel=1e-12)
    expected, got = gradients(model), gradients(other)
    assert expected.keys() == got.keys()
    assert "logit_scale" in got
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-8, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_views_and_captions_give_the_mean_loss_and_two_views_that_between_them(kind):
    generator = torch.Generator().manual_seed(0)
    image = nn.functional.normalize(torch.randn(6, 2, 8, generator=generator, dtype=torch.float64), dim=-1)
    text = nn.functional.normalize(torch.randn(6, 3, 8, generator=generator, dtype=torch.float64), dim=-1)
    scale = {"logit_scale": torch.tensor(7.0, dtype=torch.float64)}
    if kind == "siglip":
        scale["logit_bias"] = torch.tensor(-3.0, dtype=torch.float64)

    def by_the_formula(a, b):
        logits = scale["logit_scale"] * a @ b.T
        if kind == "clip":
            return -(logits.softmax(1).diag().log() + logits.softmax(0).diag().log()).mean() / 2
        signs = 2 * torch.eye(6, dtype=torch.float64) - 1
        return -nn.functional.logsigmoid(signs * (logits + scale["logit_bias"])).sum() / 6

    expected = sum(by_the_formula(image[:, v], text[:, c]) for v in range(2) for c in range(3)) / 6
    expected += 0.3 * by_the_formula(image[:, 0], image[:, 1])
    loss = OBJECTIVES[kind](LossConfig(view_weight=0.3), views=2, captions=3)
    value = loss(image_features=image.reshape(12, 8), text_features=text.reshape(18, 8), **scale)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)


class Noisy(nn.Module):
    """Dropout before each of two linear encoders; no recomputation trick would repeat its draws by luck."""

    def __init__(self):
        super().__init__()
        self.image, self.text = nn.Linear(3 * 32 * 32, 8).double(), nn.Linear(CONTEXT, 8).double()
        self.logit_scale = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))

    def forward(self, images, texts):
        image = self.image(nn.functional.dropout(images.flatten(1), 0.5))
        text = self.text(nn.functional.dropout(texts.double() / 49408, 0.5))
        normalise = nn.functional.normalize
        return {
            "image_features": normalise(image, dim=-1),
            "text_features": normalise(text, dim=-1),
            "logit_scale": self.logit_scale.exp(),
        }


def test_random_layers_repeat_their_draws(accelerator):
    torch.manual_seed(0)
    model, (images, texts) = Noisy(), pairs()
    other = copy.deepcopy(model)

    torch.manual_seed(1)
    outputs = [model(i, t) for i, t in zip(images.split(4), texts.split(4), strict=True)]
    whole = {k: torch.cat([o[k] for o in outputs]) for k in ("image_features", "text_features")}
    OBJECTIVES["clip"]()(**whole, logit_scale=outputs[0]["logit_scale"]).backward()
    after = device_rng(images.device)

    torch.manual_seed(1)
    backward(accelerator, other, OBJECTIVES["clip"](), images, texts, 4)
    for name, value in gradients(model).items():
        torch.testing.assert_close(gradients(other)[name], value, rtol=1e-9, atol=1e-14)
    assert torch.equal(device_rng(images.device)[0], after[0])  # and the next step's draws are new ones


def test_memory_is_a_micro_batchs(accelerator):
    """What is kept for the backward pass at any time belongs to one micro-batch."""
    model, (images, texts) = Noisy(), pairs()

    def most_kept(micro_batch):
        kept, most = 0, 0

        def pack(tensor):
            nonlocal kept, most
            kept += tensor.numel()
            most = max(most, kept)
            return tensor

        def unpack(tensor):
            nonlocal kept
            kept -= tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            backward(accelerator, model, OBJECTIVES["clip"](), images, texts, micro_batch)
        return most

    assert most_kept(2) < 0.3 * most_kept(None)
