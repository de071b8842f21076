"""Exported encoders compute what the encoders compute: torch.compile and torch.export on the kernels, ONNX on none."""

import jaxtyping
import pytest
import timm
import torch

from ssmclip.models.export import export_onnx, run_onnx

STAGE = dict(depths=(1,), dims=(8,))
FIELDS = {
    "vmamba": ("vmamba", STAGE),
    "vmamba, first version": (
        "vmamba",
        STAGE | dict(d_state=16, gated=True, conv_bias=True, mlp_ratio=0.0, patch_embed="v1", downsample="v1"),
    ),
    "vmamba, gated_conv": ("vmamba", STAGE | dict(mixer="gated_conv", conv_norm="batch")),
    "simba": ("simba", STAGE | dict(mlp_ratios=(2,), stem_dim=4, d_state=4)),
    "simba, einfft": ("simba", STAGE | dict(mlp_ratios=(2,), stem_dim=4, d_state=4, channel_mixer="einfft")),
    "mambaout": ("mambaout_femto_linear_head", dict(depths=(1, 1, 1, 1), dims=(8, 8, 8, 8))),
    "vit": ("vit_nano_patch16", dict(depth=1)),
}
SIZE = (48, 80)  # of maps: 12 x 20 positions, the ViT's 3 x 5


@pytest.fixture(autouse=True)
def untyped():
    """Shape checks exist in tests only, and cannot be traced."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def build(family: str) -> torch.nn.Module:
    torch.manual_seed(0)
    name, fields = FIELDS[family]
    model = timm.create_model(name, num_classes=0, **fields).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)  # no weight or bias at its neutral start
    return model


@pytest.mark.parametrize("family", ["vmamba, first version", "simba"])  # ONNX needs it of all, but without kernels
@torch.no_grad()
def test_torch_export_takes_any_batch(family):
    model = build(family)
    shapes = ({0: torch.export.Dim("batch")},)
    exported = torch.export.export(model, (torch.zeros(2, 3, *SIZE),), dynamic_shapes=shapes, strict=False).module()
    for batch in (1, 3):
        image = torch.randn(batch, 3, *SIZE)
        torch.testing.assert_close(exported(image), model(image))


@pytest.mark.parametrize("family", FIELDS)
@torch.no_grad()
def test_torch_compile_has_no_graph_break(family):
    model, image = build(family), torch.randn(2, 3, *SIZE)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(image), model(image))


@pytest.mark.parametrize("family", FIELDS)
@torch.no_grad()
def test_onnxruntime_gives_the_same_features(family, tmp_path):
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install 'ssmclip[export]'")
    model = build(family)
    assert export_onnx(model, tmp_path / "encoder.onnx", SIZE) < 1e-4
    for batch in (1, 3):
        image = torch.randn(batch, 3, *SIZE)
        features = torch.from_numpy(run_onnx(tmp_path / "encoder.onnx", image.numpy()))
        torch.testing.assert_close(features, model(image), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_as_many_nodes_at_every_image_size(tmp_path):
    onnx = pytest.importorskip("onnx", reason="onnx is not installed: pip install 'ssmclip[export]'")
    counts = []
    for size in (40, 200):
        export_onnx(build("vmamba"), tmp_path / "encoder.onnx", size)
        counts.append(count_nodes(onnx.load(tmp_path / "encoder.onnx").graph))
    assert counts[0] == counts[1]


def count_nodes(graph) -> int:
    """With those of the bodies that repeat."""
    bodies = [attribute.g for node in graph.node for attribute in node.attribute if attribute.HasField("g")]
    return len(graph.node) + sum(map(count_nodes, bodies))
