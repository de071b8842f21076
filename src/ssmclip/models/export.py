"""Export image encoders as ONNX files, which run without PyTorch."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from ssmclip import ops

__all__ = ["export_onnx", "run_onnx"]

NEEDED = ("onnx", "onnxscript", "onnxruntime")


class ImageEncoder(nn.Module):
    """A CLIP's `encode_image` as a forward."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d"]:
        return self.model.encode_image(image)


def export_onnx(
    model: nn.Module, path: str | Path, image_size: int | tuple[int, int] = 224, *, tolerance: float = 1e-4
) -> float:
    """Write an image encoder as an ONNX file, with weights inside: input "image", output "features".

    model: a timm encoder, or a CLIP, of which `encode_image` is written (features not normalised); image_size: pixels,
    or (height, width). That size is fixed in the file, the batch is not. A file holds at most 2 GB.

    A scan is written in its chunked form, with a node that repeats: as many nodes at every image size.

    Returns the largest difference of onnxruntime's features from PyTorch's, on noise, over the largest feature.
    Raises ImportError without `pip install 'ssmclip[export]'`, ValueError where that difference exceeds `tolerance`.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"export needs {', '.join(missing)}: pip install 'ssmclip[export]'")
    encoder = ImageEncoder(model) if hasattr(model, "encode_image") else model
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    first = next(p for p in model.parameters() if p.ndim == 4)  # the first convolution's
    image = torch.randn(
        2, first.shape[1], height, width, dtype=first.dtype, generator=torch.Generator().manual_seed(0)
    ).to(first.device)
    training = {module: module.training for module in encoder.modules()}
    encoder.eval()
    try:
        with torch.no_grad():
            with ops.using("chunked"):
                batch = torch.export.Dim("batch")
                program = torch.export.export(encoder, (image,), dynamic_shapes=({0: batch},), strict=False)
            torch.onnx.export(
                program,
                f=str(path),
                dynamo=True,
                verbose=False,
                external_data=False,
                input_names=["image"],
                output_names=["features"],
            )
            truth = encoder(image[:1]).float().cpu().numpy()
    finally:
        for module, was in training.items():
            module.training = was
    difference = float(np.abs(run_onnx(path, image[:1].cpu().numpy()) - truth).max() / np.abs(truth).max())
    if not difference <= tolerance:
        raise ValueError(
            f"{path}: onnxruntime's features differ from PyTorch's by {difference:.1e}, more than {tolerance}"
        )
    return difference


def run_onnx(path: str | Path, images: Float[np.ndarray, "b c h w"]) -> Float[np.ndarray, "b ..."]:
    """Return the features that onnxruntime computes on the CPU with a file of `export_onnx`, at its image size."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(["features"], {"image": images})[0]
