"""Image encoders as ONNX files, which run where there is no PyTorch."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ssmclip import ops

__all__ = ["export_onnx"]


class ImageEncoder(nn.Module):
    """A CLIP's `encode_image` as a forward."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d"]:
        return self.model.encode_image(image)


def export_onnx(model: nn.Module, path: str | Path, image_size: int | tuple[int, int] = 224) -> Path:
    """Write an image encoder as an ONNX file, with weights inside: input "image", output "features".

    model: a timm encoder, or a CLIP, of which `encode_image` is written (features not normalised); image_size: pixels,
    height and width or both at once. That size is fixed in the file, the batch is not.

    A scan is written in its chunked form, with a node that repeats: as many nodes at every image size. onnxruntime
    runs the file on any CPU. Needs `pip install ssmclip[export]`. Raises ImportError, saying so, without it.
    """
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"export needs {' and '.join(missing)}: pip install 'ssmclip[export]'")
    if hasattr(model, "encode_image"):
        model = ImageEncoder(model)
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    like = next(p for p in model.parameters() if p.is_floating_point())
    weight = next(p for p in model.parameters() if p.ndim == 4)  # of the first convolution
    image = torch.zeros(2, weight.shape[1], height, width, dtype=like.dtype, device=like.device)
    training = model.training
    try:
        with ops.using("chunked"), torch.no_grad():
            torch.onnx.export(
                model.eval(),
                (image,),
                str(path),
                dynamo=True,
                verbose=False,
                external_data=False,
                input_names=["image"],
                output_names=["features"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
            )
    finally:
        model.train(training)
    return Path(path)
