"""Parity on any clone: numbers in `golden/` that were not computed with this package (golden/README.md says how)."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

import seeded
from ssmclip import ops
from ssmclip.config import OptimiserConfig, ScheduleConfig
from ssmclip.evaluate.statistics.metrics import METRICS, first_relevant_ranks, recall_at_k
from ssmclip.models import build_tokenizer, clip_config, create_clip, list_clips
from ssmclip.models.networks import mamba, mamba_text, simba, vmamba
from ssmclip.ops.dispatch import KNOWN
from ssmclip.registry import Registry
from ssmclip.train.ema import ema_decay
from ssmclip.train.objective import OBJECTIVES
from ssmclip.train.optimiser import build_optimiser
from ssmclip.train.schedule import lr_schedule

FOLDER = Path(__file__).parent / "golden"
GOLDENS = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(FOLDER.glob("*.json"))}
TOLERANCE = 1e-11  # of every number, relative to the root mean square of its tensor
MODULES = {c.__name__: c for c in (vmamba.SS2D, vmamba.GatedConv, mamba.Mamba, mamba.Mamba2, simba.EinFFT)}

# kind of golden: what computes its outputs with this package
KINDS: Registry[Callable[[dict], dict[str, Tensor]]] = Registry("kind of golden")


def build_encoder(golden: dict) -> nn.Module:
    build = golden["build"]
    return timm.create_model(build["name"], num_classes=golden["num_classes"], **build["fields"])


def build_clip(golden: dict) -> nn.Module:
    build = golden["build"]
    config = clip_config(build["name"])
    config["model_cfg"]["embed_dim"] = build["embed_dim"]
    config["model_cfg"]["vision_cfg"] |= build["vision_cfg"]
    config["model_cfg"]["text_cfg"] |= build["text_cfg"]
    return create_clip(config)


def images(golden: dict) -> dict[str, Tensor]:
    return {name: seeded.draw(name, shape) for name, shape in golden["inputs"].items()}


def texts(golden: dict) -> Tensor:
    """Return the token ids, padded with zeros on the right to the length the golden was made with."""
    length = golden.get("padded_to") or golden["build"]["text_cfg"]["context_length"]
    return torch.tensor([ids + [0] * (length - len(ids)) for ids in golden["texts"]])


@KINDS.register("encoder")
def encode(golden):
    model = seeded.fill(build_encoder(golden))
    inputs = images(golden)
    outputs = {name: model(image) for name, image in inputs.items()}
    maps = model.forward_intermediates(inputs["image"], intermediates_only=True)
    stages = {f"stage {i}": y.movedim(1, -1) for i, y in enumerate(maps)}
    return outputs | {name: y for name, y in stages.items() if name in golden["outputs"]}


@KINDS.register("text")
def encode_text(golden):
    return {"text": seeded.fill(build_clip(golden)).encode_text(texts(golden))}


@KINDS.register("clip")
def compare(golden):
    model = seeded.fill(build_clip(golden))
    image, text = images(golden)["image"], texts(golden)
    whole = model(image, text)
    logits = whole["logit_scale"] * whole["image_features"] @ whole["text_features"].T
    return {"image": model.encode_image(image), "text": model.encode_text(text), "logits": logits}


@KINDS.register("module")
def apply_module(golden):
    build = golden["build"]
    return {"y": seeded.fill(MODULES[build["name"]](**build["fields"]))(images(golden)["x"])}


@KINDS.register("op")
def apply_operator(golden):
    build = golden["build"]
    inputs = {name: seeded.draw(f"{build['name']} {name}", *how) for name, how in golden["inputs"].items()}
    return {"y": getattr(ops, build["name"])(**inputs, **build["settings"])}


@KINDS.register("loss")
def learn(golden):
    image, text = (seeded.draw(f"loss {name}", shape).requires_grad_() for name, shape in golden["inputs"].items())
    log_scale = torch.tensor(golden["build"]["log_scale"], dtype=torch.float64, requires_grad=True)
    with torch.enable_grad():
        features = [nn.functional.normalize(x, dim=-1) for x in (image, text)]
        loss = OBJECTIVES[golden["build"]["name"]]()(*features, log_scale.exp())
    loss.backward()
    gradients = {"image": image.grad, "text": text.grad, "log scale": log_scale.grad[None]}
    return {"loss": loss.detach()[None]} | {f"gradient of {name}": value for name, value in gradients.items()}


@KINDS.register("schedules")
def follow_schedules(golden):
    build = golden["build"]
    schedule = ScheduleConfig(build["warmup_steps"], build["start_lr"], build["end_lr"])
    averages = [ema_decay(step, build["steps"], build["ema_start"], "cosine") for step in range(build["steps"])]
    rates = lr_schedule(build["steps"], schedule, build["peak"])
    return {"learning rates": torch.from_numpy(rates), "moving average": torch.tensor(averages, dtype=torch.float64)}


@KINDS.register("metrics")
def measure(golden):
    target, binary_target = (
        seeded.draw(name, [n], 0.5, 0.5).mul(classes).long()
        for name, n, classes in (("target", 200, 7), ("binary target", 100, 2))
    )
    scores = images(golden)
    logits = scores["logits"] + 0.5 * nn.functional.one_hot(target, 7)
    binary = scores["binary logits"] + 0.5 * nn.functional.one_hot(binary_target, 2)
    outputs = {name: METRICS[name].function(logits, target) for name in ("top1", "top5", "mean_per_class")}
    outputs["roc_auc"] = METRICS["roc_auc"].function(binary, binary_target)
    image, image_of_text, texts_alone = torch.arange(20), torch.arange(100) // 5, torch.eye(100, dtype=torch.float64)
    similar = scores["retrieval scores"] + 0.5 * (image_of_text == image[:, None])
    ranks = {
        "image to text": first_relevant_ranks(similar, texts_alone, image, image_of_text),
        "text to image": first_relevant_ranks(texts_alone, similar, image_of_text, image),
    }
    outputs |= {f"{side} recall@{k}": recall_at_k(rank, k) for side, rank in ranks.items() for k in (1, 5, 10)}
    return {name: value.double()[None] for name, value in outputs.items()}


@KINDS.register("groups")
def group(golden):
    """Compare the names here: they are no numbers."""
    model = build_clip(GOLDENS[golden["build"]["golden"]])
    undecayed = golden["undecayed"]
    for rule, wanted in (
        ("original", undecayed["original"]),
        ("ssm", undecayed["original"] + undecayed["only ssm"]),
    ):
        groups = build_optimiser(model, OptimiserConfig(decay_rule=rule, weight_decay=0.5)).param_groups
        ids = {id(p) for one in groups if one["weight_decay"] == 0 for p in one["params"]}
        assert sorted(name for name, p in model.named_parameters() if id(p) in ids) == sorted(wanted), rule
    return {}


@KINDS.register("tokenizer")
def tokenize(golden):
    """Compare the ids here: they are no floating-point numbers."""
    ids = build_tokenizer(clip_config(golden["build"]["name"]))(golden["texts"])
    for text, row, wanted in zip(golden["texts"], ids.tolist(), golden["ids"], strict=True):
        assert row == wanted + [0] * (77 - len(wanted)), text
    return {}


def backends(golden: dict) -> list[str]:
    """Return the back ends on which all of a golden's operators run on the CPU; "auto" where it has none."""
    tables = [ops.BACKENDS[op] for op in golden["ops"]]
    running = [[name for name, backend in table.items() if not backend.why_not("cpu")] for table in tables]
    return [name for name in KNOWN if all(name in names for names in running)] if tables else ["auto"]


CASES = [(name, backend) for name, golden in GOLDENS.items() for backend in backends(golden)]


@pytest.mark.parametrize(("name", "backend"), CASES)
@torch.no_grad()
def test_outputs_are_the_goldens(name, backend):
    golden = GOLDENS[name]
    with ops.using(backend):
        outputs = KINDS[golden["kind"]](golden)
    assert outputs.keys() == golden["outputs"].keys()
    for part, wanted in golden["outputs"].items():
        value = outputs[part]
        assert list(value.shape) == wanted["shape"], part
        tolerance = TOLERANCE * wanted["norm"] / value.numel() ** 0.5
        entries = value.flatten()[:: wanted["every"]]
        worst = (entries - torch.tensor(wanted["entries"], dtype=torch.float64)).abs().max()
        assert worst <= tolerance, f"{part}: {worst / tolerance * TOLERANCE:.1e} off"
        assert value.norm().item() == pytest.approx(wanted["norm"], rel=TOLERANCE), part


# ---- a new family has a golden


# Fields that make a model larger or smaller and nothing else.
SIZES = {"depths", "dims", "mlp_ratios", "stem_dim", "d_state", "num_classes"}


def kind_of_variant(fields: dict) -> frozenset:
    return frozenset((key, value) for key, value in fields.items() if key not in SIZES)


@pytest.mark.parametrize("family", [vmamba, simba], ids=["vmamba", "simba"])
def test_every_variant_has_a_golden(family):
    built = [g["build"] for g in GOLDENS.values() if g["kind"] == "encoder"]
    own = [kind_of_variant(b["fields"]) for b in built if b["name"] in family.VARIANTS]
    missing = [name for name, fields in family.VARIANTS.items() if kind_of_variant(fields) not in own]
    assert not missing


def encoders_of_this_package() -> dict[str, str]:
    """Return timm's name -> the module that registered it, for everything this package registers."""
    modules = {name: timm.model_entrypoint(name).__module__ for name in timm.list_models()}
    return {name: module for name, module in modules.items() if module.startswith("ssmclip.")}


def test_every_encoder_module_has_a_golden():
    modules = encoders_of_this_package()
    covered = {modules[g["build"]["name"]] for g in GOLDENS.values() if g["kind"] == "encoder"}
    assert set(modules.values()) == covered


def text_tower(model: nn.Module) -> str:
    """Return what reads the texts; of a language model, which."""
    tower = getattr(model, "text", None) or model.transformer
    return type(getattr(getattr(tower, "transformer", None), "config", tower)).__name__


def test_every_clip_has_a_golden_of_its_towers():
    with torch.device("meta"):
        built = [build_clip(golden) for golden in GOLDENS.values() if golden["kind"] in ("clip", "text")]
        models = {name: create_clip(name) for name in list_clips()}
    covered = {type(model.visual.trunk) for model in built}
    # Our ViT is timm's with two more fields.
    assert all(any(issubclass(one, type(model.visual.trunk)) for one in covered) for model in models.values())
    towers = {text_tower(model) for model in built}
    assert {text_tower(model) for model in models.values()} <= towers
    assert {config.__name__ for config in mamba_text.CONFIGS.values()} <= towers


def test_every_operator_has_a_golden():
    assert {op for golden in GOLDENS.values() if golden["kind"] == "op" for op in golden["ops"]} == set(ops.BACKENDS)
    assert {golden["kind"] for golden in GOLDENS.values()} == set(KINDS)


def test_every_golden_is_small_and_in_the_list():
    sizes = {path.name: path.stat().st_size for path in FOLDER.iterdir()}
    assert set(sizes) == {f"{name}.json" for name in GOLDENS} | {"README.md"}
    assert max(sizes.values()) < 10_000
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert [name for name in GOLDENS if f"`{name}`" not in readme] == []
