"""Build a CLIP with an image encoder of your own.

An image encoder is a timm model: a module with `num_features`, `forward_features`, `forward_head` and
`reset_classifier`, registered under a name. The name then works wherever a configuration names an image tower, so in a
recipe too:

    ModelConfig(name="CLIP-VMamba-Nano", changes={"vision_cfg": {"timm_model_name": "mean_of_patches"}})
"""

import open_clip
import timm
import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

import ssmclip


class MeanOfPatches(nn.Module):
    """Embed patches of 8 x 8 pixels by one convolution and average them: the smallest encoder there is."""

    def __init__(self, num_classes: int = 1000, width: int = 64, in_chans: int = 3):
        super().__init__()
        self.num_features = self.head_hidden_size = width
        self.patches = nn.Conv2d(in_chans, width, kernel_size=8, stride=8)
        self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None):
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def forward_features(self, images):  # (batch, 3, height, width) -> (batch, width, height / 8, width / 8)
        return nn.functional.gelu(self.patches(images))

    def forward_head(self, features, pre_logits: bool = False):
        pooled = features.mean((2, 3))
        return pooled if pre_logits else self.head(pooled)

    def forward(self, images):
        return self.forward_head(self.forward_features(images))


# timm reads this name in the module that defines the model.
default_cfgs = generate_default_cfgs(
    {"mean_of_patches": {"input_size": (3, 224, 224), "first_conv": "patches", "classifier": "head"}}
)


@register_model
def mean_of_patches(pretrained: bool = False, **kwargs) -> MeanOfPatches:
    return build_model_with_cfg(MeanOfPatches, "mean_of_patches", pretrained, **kwargs)


assert timm.create_model("mean_of_patches", num_classes=10)(torch.zeros(2, 3, 32, 48)).shape == (2, 10)

# A CLIP with it: the configuration of a CLIP of this package, with another image tower.
config = ssmclip.clip_config("CLIP-VMamba-Nano", image_size=32)
config["model_cfg"]["vision_cfg"]["timm_model_name"] = "mean_of_patches"
config["model_cfg"]["text_cfg"] |= {"layers": 1, "context_length": 8}
torch.manual_seed(0)
model = ssmclip.create_clip(config)

# Training it on two colours takes a few steps.
tokenizer = open_clip.get_tokenizer("ViT-B-32", context_length=8)
images = torch.stack([torch.full((3, 32, 32), value) for value in (-1.0, 1.0)])
texts = tokenizer(["a dark picture", "a bright picture"])
loss, optimiser = open_clip.ClipLoss(), torch.optim.AdamW(model.parameters(), lr=1e-3)
losses = []
for _ in range(10):
    out = model(images, texts)
    losses.append(loss(out["image_features"], out["text_features"], out["logit_scale"]))
    optimiser.zero_grad()
    losses[-1].backward()
    optimiser.step()
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
assert losses[-1] < losses[0] / 2
with torch.no_grad():
    similarity = model.encode_image(images, normalize=True) @ model.encode_text(texts, normalize=True).T
assert similarity.argmax(1).tolist() == [0, 1]

# Multiply-accumulates are counted without running it: here one convolution and a projection to 256 numbers.
counted = ssmclip.count_macs(model, image_size=32).image
print(f"{counted.total:,} multiply-accumulates for an image of 32 x 32 pixels")
assert counted.conv + counted.linear == 16 * (3 * 8 * 8) * 64 + 64 * 256
