"""What several test files share: two small CLIPs, and where the shared real data is."""

import shutil
import sys
from pathlib import Path
from types import ModuleType

import jaxtyping
import numpy as np
import pytest
import torch

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(autouse=True, scope="session")
def _memory_is_given_back():
    """Commands keep freed memory for good (`keep_freed_memory`): in this process, tests that measure it come later."""
    from ssmclip.ops import memory

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "_mallopt", None)
        yield


@pytest.fixture(scope="module")
def browser():
    """A Chromium; the test is skipped where neither Playwright nor a browser for it is installed."""
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as started:
        installed = next(filter(None, map(shutil.which, BROWSERS)), started.chromium.executable_path)
        if not Path(installed).exists():
            pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed, and Playwright has none of its own")
        with started.chromium.launch(executable_path=installed) as launched:
            yield launched


@pytest.fixture
def shared() -> Path:
    """The folder of real data and original outputs beside the checkout; the test is skipped where it is absent."""
    if not SHARED.is_dir():
        pytest.skip("the shared data folder is not beside this checkout")
    return SHARED


@pytest.fixture
def tiny_config() -> dict:
    """A CLIP of a few thousand parameters besides its token table: VMamba image tower, one-layer text tower, 32 px."""
    return {
        "model_cfg": {
            "embed_dim": 16,
            "vision_cfg": {"timm_model_name": "test_vmamba", "timm_pool": "", "timm_proj": "linear", "image_size": 32},
            "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
        },
        "preprocess_cfg": {
            "mean": [0.5, 0.5, 0.5],
            "std": [0.5, 0.5, 0.5],
            "interpolation": "bilinear",
            "resize_mode": "shortest",
        },
    }


@pytest.fixture
def tiny_clip(tiny_config):
    """(model, preprocess, tokenizer) of `tiny_config`, random weights from seed 0."""
    from ssmclip.models import build_preprocess, build_tokenizer, create_clip

    torch.manual_seed(0)
    return create_clip(tiny_config).eval(), build_preprocess(tiny_config), build_tokenizer(tiny_config)


@pytest.fixture(scope="module")
def vit():
    """An open_clip model with nothing of ours in it, as a `Model`."""
    import open_clip

    from ssmclip.models.names import Model

    torch.manual_seed(0)
    vision = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16}
    text = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    model = open_clip.CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text, output_dict=True).eval()
    return Model(model, open_clip.image_transform(32, is_train=False), open_clip.SimpleTokenizer(), "vit")


@pytest.fixture
def corruptions(monkeypatch) -> None:
    """A package in place of `imagecorruptions`, whose every corruption adds the severity and a random number."""

    def corrupt(image, severity):
        return image + np.uint8(severity) + np.uint8(np.random.randint(100))

    stand_in = ModuleType("imagecorruptions")
    stand_in.corrupt = lambda image, severity, name: stand_in.corruption_dict[name](image, severity)
    stand_in.corruption_dict = dict.fromkeys(("fog", "snow"), corrupt)
    monkeypatch.setitem(sys.modules, "imagecorruptions", stand_in)


@pytest.fixture
def untyped():
    """No shape checks: they exist in tests only, and cannot be traced."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
