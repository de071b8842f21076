"""Gradient-weighted class activation maps (Selvaraju et al. 2017, arXiv:1610.02391), by the grad-cam library."""

from __future__ import annotations

import torch
from jaxtyping import Float
from open_clip.modified_resnet import ModifiedResNet
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from ssmclip.analyze.saliency.positions import evaluating, to_map
from ssmclip.analyze.saliency.target import Target
from ssmclip.models.towers import image_tower
from ssmclip.registry import UnknownName

__all__ = ["gradcam", "layer_named", "usual_layer"]


def gradcam(target: Target, images: Float[Tensor, "n 3 h w"], layer: str) -> Float[Tensor, "n h w"]:
    """Return the maps of a layer for the target's score, scaled to the images and to [0, 1].

    layer: its name in the network. The network's modes and gradients stay as they were.
    Raises ValueError without the library, for a layer that is not used, or whose output is no map; UnknownName for a
    layer that is not there.
    """
    try:
        from pytorch_grad_cam import GradCAM
    except ImportError as error:
        raise ValueError(f"gradcam needs the grad-cam library: pip install 'ssmclip[explain]' ({error})") from error
    module, tower = layer_named(target.network, layer), image_tower(target.network)
    scored = _Scored(target, images)
    with evaluating(target.network):
        library = GradCAM(scored, [module], lambda x: to_map(x, tower, images.shape[-2:], module))
        try:
            # A copy that requires gradients: the parameters do not, so that none are left in them.
            maps = library(images.detach().clone().requires_grad_(), [lambda output: output[0]] * len(images))
        except (IndexError, AttributeError, UnboundLocalError) as error:
            raise ValueError(f"the layer {layer} gives no map that the score depends on: choose another") from error
        finally:
            library.activations_and_grads.release()
    return torch.from_numpy(maps)


class _Scored(nn.Module):
    """images -> (n, 1), the target's score. The network is no child: the library changes the modes of children."""

    def __init__(self, target: Target, like: Tensor):
        super().__init__()
        self.score = target.score
        self.device_of = nn.Parameter(torch.empty(0, device=like.device), requires_grad=False)

    def forward(self, images: Tensor) -> Tensor:
        return self.score(images)[:, None]


def layer_named(network: nn.Module, name: str) -> nn.Module:
    """Return a layer by its name in the network. Raises UnknownName."""
    layers = dict(network.named_modules())
    if not name or name not in layers:
        raise UnknownName("layer", name, [known for known in layers if known.count(".") <= 3 and known])
    return layers[name]


def usual_layer(network: nn.Module) -> str:
    """Return the name of the layer that Grad-CAM usually looks at.

    It is the last stage, or, of a transformer, the norm with which its last block begins: what follows that block's
    attention reaches a class token, which is pooled alone, from no other position.
    Raises ValueError for a tower whose stages have no names.
    """
    tower = image_tower(network)
    prefix = next(name for name, module in network.named_modules() if module is tower)
    if isinstance(tower, VisionTransformer):
        return f"{prefix}.transformer.resblocks.{len(tower.transformer.resblocks) - 1}.ln_1"
    if isinstance(tower, ModifiedResNet):
        return f"{prefix}.layer4"
    stages = [stage.get("module", "") for stage in getattr(tower, "feature_info", None) or [] if hasattr(stage, "get")]
    if not stages or not stages[-1]:
        raise ValueError(f"{type(tower).__name__} does not name its stages: name a layer")
    name, module = stages[-1], tower.get_submodule(stages[-1])
    if isinstance(module, nn.ModuleList):
        name, module = f"{name}.{len(module) - 1}", module[-1]
    if hasattr(tower, "num_prefix_tokens") and hasattr(module, "norm1"):
        name = f"{name}.norm1"
    return f"{prefix}.{name}" if prefix else name
