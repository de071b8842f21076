"""CLIPs of a few thousand parameters besides their token table, with random weights, and folders of them."""

import copy

import torch

import ssmclip
from ssmclip.models import create_clip

VIT = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 3, "head_width": 16}  # open_clip's own
TEXT = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 3}
TIMM = {"timm_model_name": "test_vmamba", "timm_pool": "", "timm_proj": "linear", "image_size": 32}
SMALL = {"embed_dim": 16, "vision_cfg": TIMM, "text_cfg": TEXT}


def with_vision(**vision):
    return {**SMALL, "vision_cfg": {**TIMM, **vision}}


def with_text(**text):
    return {**SMALL, "text_cfg": {**TEXT, **text}}


def a_clip(changes=SMALL, seed=1):
    torch.manual_seed(seed)
    return create_clip({"model_cfg": copy.deepcopy(changes), "preprocess_cfg": {}}).eval()


def saved(folder, changes=SMALL, seed=1, preprocess=None):
    """A CLIP of these settings, and a folder with it."""
    model = a_clip(changes, seed)
    preprocess = preprocess or ssmclip.clip_config("CLIP-VMamba-Nano")["preprocess_cfg"]
    ssmclip.save_model(model, {"model_cfg": changes, "preprocess_cfg": preprocess}, folder)
    return model, folder
