"""A text tower without layers is the mean of its words' embeddings."""

import pytest
import torch
from torch import nn

import ssmclip
from ssmclip.models import build_tokenizer, clip_config, create_clip, save_model

TEXTS = ["a brown dog runs", "the sea", "", "runs dog brown a"]


def bag_config(width):
    config = clip_config("CLIP-VMamba-Nano", image_size=32)
    config["model_cfg"]["text_cfg"] |= {"layers": 0, "width": width, "context_length": 12}
    return config


@pytest.mark.parametrize("width", [256, 24])
def test_it_is_the_mean_of_the_words_embeddings(width):
    config = bag_config(width)
    model = create_clip(config).eval().double()
    tokens = build_tokenizer(config)(TEXTS)
    bags = [[t for t in row if 0 < t < 49406] for row in tokens.tolist()]
    offsets = torch.tensor([sum(map(len, bags[:i])) for i in range(len(bags))])
    mean = nn.EmbeddingBag.from_pretrained(model.text.token_embedding.weight.detach(), mode="mean")
    expected = mean(torch.tensor([t for bag in bags for t in bag]), offsets)  # torch's mean of an empty bag is zero
    if width != 256:
        expected = expected @ model.text.proj.weight.T
    with torch.no_grad():
        torch.testing.assert_close(model.encode_text(tokens), expected, rtol=1e-12, atol=1e-15)
        order = model.encode_text(tokens, normalize=True)
    torch.testing.assert_close(order[0], order[3], rtol=1e-12, atol=1e-15)
    assert not order[2].any()


def test_a_saved_one_loads(tmp_path):
    torch.manual_seed(0)
    config = bag_config(24)
    model = create_clip(config).eval()
    save_model(model, config, tmp_path)
    loaded, _, tokenizer = ssmclip.load(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded.encode_text(tokenizer(TEXTS)), model.encode_text(tokenizer(TEXTS)))


def test_every_word_of_a_batch_learns_and_padding_does_not():
    config = bag_config(256)
    model = create_clip(config)
    tokens = build_tokenizer(config)(TEXTS[:2])
    model.encode_text(tokens).sum().backward()
    learns = model.text.token_embedding.weight.grad.abs().sum(1).nonzero().flatten().tolist()
    assert learns == sorted({t for t in tokens.flatten().tolist() if 0 < t < 49406})
