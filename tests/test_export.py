"""Exported encoders compute what the encoders compute: torch.compile and torch.export on the kernels, ONNX on none."""

import pytest
import timm
import torch

from ssmclip import ops
from ssmclip.models import create_clip
from ssmclip.models.export import export_onnx, run_onnx

STAGE = dict(depths=(1,), dims=(8,))
FIELDS = {
    "vmamba": ("vmamba", STAGE),
    "vmamba, first version": (
        "vmamba",
        STAGE | dict(d_state=16, gated=True, conv_bias=True, mlp_ratio=0.0, patch_embed="v1", downsample="v1"),
    ),
    "vmamba, gated_conv": ("vmamba", STAGE | dict(mixer="gated_conv", conv_norm="batch")),
    "vmamba, two directions": ("vmamba", STAGE | dict(directions=2)),
    "simba": ("simba", STAGE | dict(mlp_ratios=(2,), stem_dim=4, d_state=4)),
    "simba, einfft": ("simba", STAGE | dict(mlp_ratios=(2,), stem_dim=4, d_state=4, channel_mixer="einfft")),
    "mambaout": ("mambaout_femto_linear_head", dict(depths=(1, 1, 1, 1), dims=(8, 8, 8, 8))),
    "vit": ("vit_nano_patch16", dict(depth=1)),
    "vit, causal": ("vit_nano_patch16", dict(depth=2, embed_dim=48, mixing="causal", readout="last")),
}
SIZE = (48, 80)  # of maps: 12 x 20 positions, the ViT's 3 x 5

pytestmark = pytest.mark.usefixtures("untyped")


def build(family: str) -> torch.nn.Module:
    torch.manual_seed(0)
    name, fields = FIELDS[family]
    return perturb(timm.create_model(name, num_classes=0, **fields))


def perturb(model: torch.nn.Module) -> torch.nn.Module:
    """In evaluation mode, no weight or bias at its neutral start."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model.eval()


@pytest.mark.parametrize("family", FIELDS)
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


CAUSAL = dict(vocab_size=50, hidden_size=16, num_hidden_layers=1, state_size=4)
TEXTS = {
    "mamba": dict(mamba=dict(model_type="mamba", **CAUSAL)),
    "mamba2": dict(mamba=dict(model_type="mamba2", num_heads=4, head_dim=8, n_groups=2, **CAUSAL)),
    "bag of words": dict(vocab_size=50, width=16, context_length=40, layers=0),
    "transformer": dict(vocab_size=50, width=16, context_length=40, layers=1, heads=2),
}


class TextEncoder(torch.nn.Module):
    """A CLIP's `encode_text` as a forward."""

    def __init__(self, config, family):
        super().__init__()
        torch.manual_seed(0)
        config["model_cfg"] |= dict(text_cfg=TEXTS[family], custom_text=True)
        self.text = perturb(create_clip(config).text)

    def forward(self, tokens):
        return self.text(tokens)


def some_texts(batch, length=40):
    """Tokens of texts of several lengths, one with padding before it."""
    tokens = torch.randint(1, 50, (batch, length))
    tokens[0, :7] = 0
    for row in range(1, batch):
        tokens[row, 5 * row :] = 0
    return tokens


@pytest.mark.parametrize("family", TEXTS)
@torch.no_grad()
def test_text_towers_compile_and_export(tiny_config, family):
    model = TextEncoder(tiny_config, family)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    shapes = ({0: torch.export.Dim("batch")},)
    exported = torch.export.export(model, (some_texts(2),), dynamic_shapes=shapes, strict=False).module()
    for batch in (2, 3):
        tokens = some_texts(batch)
        for traced in (compiled, exported):
            torch.testing.assert_close(traced(tokens), model(tokens))


@pytest.mark.parametrize("backend", ["chunked", "auto"])
@pytest.mark.parametrize("family", ["mamba", "mamba2"])
@torch.no_grad()
def test_as_many_nodes_at_every_text_length(tiny_config, family, backend):
    model, counts = TextEncoder(tiny_config, family), []
    with ops.using(backend):
        for length in (140, 400):
            tokens = some_texts(2, length)
            program = torch.export.export(model, (tokens,), strict=False)
            counts.append(count_all(program))
            torch.testing.assert_close(program.module()(tokens), model(tokens), rtol=1e-4, atol=1e-4)
    assert counts[0] == counts[1]


@torch.no_grad()
def test_simba_has_as_many_nodes_at_every_image_size():
    """Where the scan is not one operator but its chunked form."""
    model = build("simba")
    with ops.using("chunked"):
        programs = [torch.export.export(model, (torch.zeros(2, 3, n, n),), strict=False) for n in (40, 120)]
    assert count_all(programs[0]) == count_all(programs[1])


def count_all(program) -> int:
    """Nodes of an exported program, with those of the bodies that repeat."""
    return sum(len(module.graph.nodes) for module in program.graph_module.modules() if hasattr(module, "graph"))


def count_nodes(graph) -> int:
    """With those of the bodies that repeat."""
    bodies = [attribute.g for node in graph.node for attribute in node.attribute if attribute.HasField("g")]
    return len(graph.node) + sum(map(count_nodes, bodies))
