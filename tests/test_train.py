"""Training: schedules and groups against the original's, losses against its outputs, the loop on a handful of pairs."""

import errno
import json
import math
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from timm.utils import ModelEmaV3
from torch import nn

from ssmclip import models
from ssmclip.config import ScheduleConfig, apply_overrides, load_recipe
from ssmclip.models.files.weights import WEIGHTS_NAME
from ssmclip.registry import UnknownName
from ssmclip.rows import Result, append_rows, read_rows
from ssmclip.train import NonFinite, loop, train
from ssmclip.train.blueprint import blueprint
from ssmclip.train.build import build_accelerator, build_model
from ssmclip.train.checkpoint import checkpoints, load_training_state, save_checkpoint
from ssmclip.train.ema import Ema, ema_decay
from ssmclip.train.objective import OBJECTIVES, clamp_logit_scale
from ssmclip.train.optimiser import build_optimiser, decays, set_lr
from ssmclip.train.progress import Measured, Watch, truncate_rows
from ssmclip.train.schedule import lr_schedule
from ssmclip.train.state import same_rng_after, seed_everything

RECIPES = Path(__file__).parents[1] / "recipes"
QUIET = ["progress=false", "tensorboard=false", "logging.every=1", "warmup_steps=2", "batch_size=8", "device=cpu"]


def tiny(*overrides):
    return apply_overrides(load_recipe(RECIPES / "tiny.py"), [*QUIET, *overrides])


def series(out, metric):
    """step -> value of a training metric in a run's rows."""
    rows = read_rows(out / "rows.jsonl")[1]
    return {r.where["step"]: r.value for r in rows if r.task == "train" and r.metric == metric}


class EightPairs:
    """A stream of the same eight pairs: noise, each with its own word."""

    def __init__(self, config, plan, size, rank=0, world_size=1, cursor=None):
        self.images = torch.randn(8, 3, size, size, generator=torch.Generator().manual_seed(0))
        words = "cat dog red blue sun moon tree car".split()
        self.texts = plan.texts()(words)
        self.skipped, self.skipped_examples, self.count = Counter(), {}, (cursor or {"count": 0})["count"]

    def __next__(self):
        self.count += 1
        return SimpleNamespace(images=self.images, texts=self.texts, keys=[f"pair{i}" for i in range(8)])

    @property
    def cursor(self):
        return {"count": self.count}

    def close(self):
        pass


@pytest.fixture
def eight_pairs(monkeypatch):
    monkeypatch.setattr(loop, "open_stream", EightPairs)


# ---- schedules, groups, losses ------------------------------------------------------------------------------------


def test_lr_schedule_is_the_originals(shared):
    truth = torch.load(shared / "parity" / "train_eval_misc.pt", weights_only=False)
    given = truth["lr_args"]
    per_epoch = given["niter_per_ep"]
    schedule = ScheduleConfig(given["warmup_epochs"] * per_epoch, given["start"], given["final"])
    rates = lr_schedule(given["epochs"] * per_epoch, schedule, given["base"])
    np.testing.assert_allclose(rates, np.asarray(truth["lr_schedule"]), rtol=1e-14)


def test_lr_schedule_by_hand():
    rates = lr_schedule(7, ScheduleConfig(warmup_steps=3, start_lr=1.0, end_lr=0.0), peak=3.0)
    expected = [1, 2, 3, 3, 1.5 * (1 + math.cos(math.pi / 4)), 1.5, 1.5 * (1 - math.cos(math.pi / 4))]
    np.testing.assert_allclose(rates, expected)
    assert len(lr_schedule(5, ScheduleConfig(warmup_steps=0), 1e-3)) == 5


def test_ema_decay_is_the_originals(shared):
    truth = torch.load(shared / "parity" / "train_eval_misc.pt", weights_only=False)["ema_momentum"]
    ours = [ema_decay(step, len(truth), 0.996, "cosine") for step in range(len(truth))]
    np.testing.assert_allclose(ours, np.asarray(truth), rtol=1e-12)
    assert ema_decay(17, 100, 0.9, "constant") == 0.9


def test_ema_warmup_is_timms():
    """Ten steps of a changing layer; the first weights, that no step has made, leave no trace."""
    torch.manual_seed(0)
    model = nn.BatchNorm1d(3)
    ours, theirs = Ema(model), ModelEmaV3(model, decay=0.7, use_warmup=True)
    for step in range(10):
        with torch.no_grad():
            model.weight.normal_()
            model.running_mean.normal_()
        ours.update(model, ema_decay(step, 10, 0.7, "warmup"))
        theirs.update(model, step=step + 1)
        if step == 0:
            assert torch.equal(ours.model.weight, model.weight)
        torch.testing.assert_close(ours.model.weight, theirs.module.weight)
        torch.testing.assert_close(ours.model.running_mean, theirs.module.running_mean)
    decays = [ema_decay(step, 10, 0.7, "warmup") for step in range(10)]
    assert decays[:2] == [0, 1 - 2 ** (-2 / 3)]
    assert decays[5] < decays[6] == decays[9] == 0.7


def test_loss_and_gradients_are_the_originals(shared):
    truth = torch.load(shared / "parity" / "train_eval_misc.pt", weights_only=False)
    image, text, log_scale = (truth["loss_inputs"][k].clone().requires_grad_() for k in ("image", "text", "log_scale"))
    normalise = nn.functional.normalize
    loss = OBJECTIVES["clip"]()(normalise(image, dim=-1), normalise(text, dim=-1), log_scale.exp())
    loss.backward()
    expected = truth["loss_one_process"]
    assert loss.item() == pytest.approx(expected["loss"], rel=1e-9)
    torch.testing.assert_close(image.grad, expected["grad_image"], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(text.grad, expected["grad_text"], rtol=1e-9, atol=1e-12)
    assert log_scale.grad.item() == pytest.approx(expected["grad_log_scale"], rel=1e-9)


def test_siglip_loss_is_its_closed_form():
    generator = torch.Generator().manual_seed(0)
    image, text = (nn.functional.normalize(torch.randn(6, 4, generator=generator).double(), dim=-1) for _ in range(2))
    logits = 7.0 * image @ text.T - 3.0
    signs = 2 * torch.eye(6, dtype=torch.float64) - 1
    expected = torch.log1p(torch.exp(-signs * logits)).sum() / 6
    scale, bias = torch.tensor(7.0).double(), torch.tensor(-3.0).double()
    assert OBJECTIVES["siglip"]()(image, text, scale, bias).item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize(
    ("name", "shape", "ssm", "original"),
    [
        ("visual.trunk.layers.0.blocks.0.op.in_proj.weight", (8, 4), True, True),
        ("visual.trunk.layers.0.blocks.0.op.x_proj_weight", (4, 8, 8), True, True),
        ("visual.trunk.layers.0.blocks.0.op.dt_projs_weight", (4, 8, 1), True, True),
        ("visual.trunk.layers.0.blocks.0.op.conv2d.weight", (8, 1, 3, 3), True, True),
        ("visual.trunk.layers.0.blocks.0.op.A_logs", (32, 1), False, True),
        ("backbone.layers.0.mixer.A_log", (32, 16), False, True),
        ("visual.trunk.layers.0.blocks.0.op.Ds", (32,), False, False),
        ("backbone.layers.0.mixer.D", (32,), False, False),
        ("visual.trunk.layers.0.blocks.0.op.dt_projs_bias", (4, 8), False, False),
        ("visual.trunk.layers.0.blocks.0.norm.weight", (4,), False, False),
        ("transformer.resblocks.0.attn.in_proj_bias", (12,), False, False),
        ("transformer.resblocks.0.mlp.c_fc.weight", (16, 4), True, True),
        ("ln_final.weight", (4,), False, False),
        ("token_embedding.weight", (10, 4), True, True),
        ("positional_embedding", (7, 4), True, True),
        ("logit_scale", (), False, False),
        ("visual.bnet.proj.weight", (4, 4), True, False),  # the original looks for "bn" anywhere in the name
    ],
)
def test_what_decays(name, shape, ssm, original):
    assert decays("ssm", name, torch.zeros(shape)) is ssm
    assert decays("original", name, torch.zeros(shape)) is original


def test_every_parameter_is_in_one_group_and_undecayed_ones_do_not_shrink(tiny_clip):
    model = tiny_clip[0]
    config = tiny("weight_decay=0.5").optimiser
    optimiser = build_optimiser(model, config)
    grouped = [id(p) for group in optimiser.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimiser.step()
    for name, p in model.named_parameters():  # AdamW on a zero gradient: decay and nothing else
        factor = 1 - config.lr * 0.5 if decays("ssm", name, p) else 1.0
        torch.testing.assert_close(p.detach(), before[name] * factor, msg=name)


@pytest.mark.parametrize("name", ["CLIP-ViT-Nano", "CLIP-VMamba-Nano", "CLIMP-Nano"])
def test_text_tower_and_image_blocks_have_learning_rates_of_their_own(name):
    config = tiny(f"model.name={name}", "model.changes={}", "text_lr_scale=0.1", "block_lr_scale=0.5", "lr=0.01")
    model = models.create_clip(name)
    optimiser = build_optimiser(model, config.optimiser)
    set_lr(optimiser, 0.02)
    rates = {id(p): group["lr"] for group in optimiser.param_groups for p in group["params"]}
    decay = {id(p): group["weight_decay"] for group in optimiser.param_groups for p in group["params"]}
    of_text = model.text if name.startswith("CLIMP") else model
    outside = {id(p) for n, p in of_text.named_parameters() if n in ("proj.weight", "proj.bias", "text_projection")}
    outside |= {id(p) for p in (*model.visual.parameters(), model.logit_scale)}
    trunk = model.visual.trunk
    stages = trunk.layers if hasattr(trunk, "layers") else [trunk]
    blocks = {id(p) for stage in stages for p in stage.blocks.parameters()}
    assert len(rates) == sum(1 for _ in model.parameters())
    for full_name, p in model.named_parameters():
        expected = 0.01 if id(p) in blocks else 0.02 if id(p) in outside else 0.002
        assert rates[id(p)] == pytest.approx(expected), full_name
        assert (decay[id(p)] > 0) == decays("ssm", full_name, p), full_name


def test_logit_scale_is_clamped():
    model = nn.Module()
    for start, expected in ((-1.0, 0.0), (3.0, 3.0), (9.0, math.log(100))):
        model.logit_scale = nn.Parameter(torch.tensor(start))
        clamp_logit_scale(model, 100.0)
        assert model.logit_scale.item() == pytest.approx(expected)


def test_ema_averages_weights_and_buffers():
    model = nn.BatchNorm1d(1)
    ema = Ema(model)
    expected_weight, expected_mean = 1.0, 0.0
    for step in range(1, 4):
        with torch.no_grad():
            model.weight.fill_(10.0 * step)
            model.running_mean.fill_(step)
            model.num_batches_tracked.fill_(step)
        ema.update(model, 0.9)
        expected_weight = 0.9 * expected_weight + 0.1 * 10 * step
        expected_mean = 0.9 * expected_mean + 0.1 * step
    assert ema.model.weight.item() == pytest.approx(expected_weight)
    assert ema.model.running_mean.item() == pytest.approx(expected_mean)
    assert ema.model.num_batches_tracked.item() == 3


# ---- the loop ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides",
    [
        ["kind=clip", "steps=50", "optimiser.lr=1e-2"],
        ["kind=siglip", "steps=50", "optimiser.lr=3e-3", "micro_batch=5"],
    ],
)
def test_overfits_eight_pairs(tmp_path, eight_pairs, overrides):
    config = tiny("checkpoint.every=100", *overrides)
    train(config, tmp_path)
    losses = series(tmp_path, "loss")
    assert losses[config.steps] < 0.1 * losses[1]
    model = models.load(tmp_path).model
    stream = EightPairs(config, blueprint(config), 32)
    with torch.no_grad():
        out = model(stream.images, stream.texts)
    assert (out["image_features"] @ out["text_features"].T).argmax(1).tolist() == list(range(8))


def test_run_folder_and_rows(tmp_path, eight_pairs):
    config = tiny("steps=7", "checkpoint.every=2", "keep=2", "tensorboard=true", "logging.every=3")
    train(config, tmp_path)
    assert [p.name for p in checkpoints(tmp_path)] == ["step_00000006", "step_00000007"]
    assert (tmp_path / "checkpoints" / "last").read_text().strip() == "step_00000007"
    assert list((tmp_path / "tensorboard").iterdir())
    assert models.load_config(tmp_path) == blueprint(config).config
    names = {"loss", "grad_norm", "logit_scale", "lr", "images_per_s", "memory_mib", "image_size", "samples_skipped"}
    names |= {"samples_repeated", "step_s", "slowest_step_s", "data_wait_s", "slowest_data_wait_s"}
    rows = read_rows(tmp_path / "rows.jsonl")[1]
    assert {r.metric for r in rows} == names
    assert {r.model for r in rows} == {tmp_path.name}
    assert series(tmp_path, "lr") == {n: lr_schedule(7, config.schedule, config.optimiser.lr)[n - 1] for n in (3, 6, 7)}
    state = load_training_state(checkpoints(tmp_path)[-1])
    assert state["step"] == 7
    assert state["ranks"][0]["cursor"] == {"count": 7}


def test_best_checkpoint_is_kept_and_validation_leaves_no_trace(tmp_path, eight_pairs):
    values = iter([0.1, 0.9, 0.5, 0.2])
    steps = []

    def validate(model, step):
        assert not model.network.training
        torch.rand(5)
        steps.append(step)
        return [
            Result("tiny", "digits", "top1", next(values)),
            Result("tiny", "digits", "top1x", 0.0, where={"level": "2"}),
        ]

    overrides = ["steps=8", "checkpoint.every=100", "keep=1", "drop_path_rate=0.5"]
    train(tiny(*overrides), tmp_path / "plain")
    config = tiny(*overrides, "validation.every=2", "best=digits/top1", 'tasks=["digits"]')
    train(config, tmp_path / "validated", validate=validate)
    assert steps == [2, 4, 6, 8]
    assert series(tmp_path / "plain", "loss") == series(tmp_path / "validated", "loss")
    folder = tmp_path / "validated" / "checkpoints"
    assert (folder / "best").read_text().strip() == "step_00000004"
    assert [p.name for p in checkpoints(tmp_path / "validated")] == ["step_00000004", "step_00000008"]
    rows = [r for r in read_rows(tmp_path / "validated" / "rows.jsonl")[1] if r.task == "digits"]
    assert {r.model for r in rows} == {"validated"}
    assert [r.condition for r in rows][:2] == ["step=2", "step=2, level=2"]

    values = iter([0.1] * 4)
    config = tiny("steps=3", "validation.every=2", "best=digits/top5", 'tasks=["digits"]')
    with pytest.raises(
        ValueError, match=r"validation.best must be one of the metrics measured, .*digits/top1.*\(got 'digits/top5'\)"
    ):
        train(config, tmp_path / "misnamed", validate=validate)


def test_ema_is_what_is_saved_for_use(tmp_path, eight_pairs):
    train(tiny("steps=4", "ema.decay=0.5"), tmp_path)
    folder = checkpoints(tmp_path)[-1]
    saved = models.load_state(folder / "open_clip_model.safetensors")
    online = load_training_state(folder)["online"]
    assert saved.keys() == online.keys()
    assert not torch.equal(saved["text_projection"], online["text_projection"])


def test_clipping_limits_the_step_and_rows_tell_the_norm_before_it(tmp_path, eight_pairs):
    for limit in ("none", "1e6", "1e-3"):
        train(tiny("steps=1", "warmup_steps=0", f"clip_norm={limit}"), tmp_path / limit)
    norms = [series(tmp_path / limit, "grad_norm")[1] for limit in ("none", "1e6", "1e-3")]
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)
    assert norms[0] == pytest.approx(norms[2], rel=1e-6)
    moments = [
        load_training_state(checkpoints(tmp_path / x)[-1])["optimiser"]["state"][0]["exp_avg"] for x in ("none", "1e-3")
    ]
    torch.testing.assert_close(moments[1], moments[0] * (1e-3 / norms[0]), rtol=1e-4, atol=1e-12)


def test_image_size_grows(tmp_path, eight_pairs):
    train(tiny("steps=4", "image_sizes=[[0.0, 24], [0.5, 40]]"), tmp_path)
    assert series(tmp_path, "image_size") == {1: 24, 2: 24, 3: 40, 4: 40}
    assert models.load_config(tmp_path)["model_cfg"]["vision_cfg"]["image_size"] == 40


def test_model_with_fixed_positions_refuses_sizes():
    config = tiny("image_sizes=[[0, 32], [0.5, 64]]", "name=open_clip:ViT-B-32")
    config = apply_overrides(config, ['changes={"vision_cfg": {"layers": 1}, "text_cfg": {"layers": 1}}'])
    with pytest.raises(ValueError, match=r"open_clip:ViT-B-32 cannot take images of 32 pixels, one of data.image"):
        build_model(config, blueprint(config))


def test_batch_norm_refuses_a_lone_image_whose_last_map_is_one_pixel():
    overrides = ["batch_size=3", "micro_batch=2", 'changes={"vision_cfg": {"timm_model_name": "vmamba_nano"}}']
    config = tiny(*overrides, "image_sizes=[[0, 32]]")
    with pytest.raises(ValueError, match=r"images of 32 pixels.*several in each batch and micro-batch"):
        build_model(config, blueprint(config))
    for change in ("micro_batch=3", "image_sizes=[[0, 33]]"):
        config = tiny(*overrides, change)
        build_model(config, blueprint(config))


@pytest.mark.parametrize(("loss", "norm"), [(float("nan"), 1.0), (float("inf"), 1.0), (1.0, float("nan"))])
def test_watch_finds_the_first_step_that_is_not_finite(loss, norm):
    watch = Watch()
    for step, (x, y) in enumerate([(1.0, 2.0), (loss, norm), (loss, norm)], start=1):
        watch.add(Measured(step, torch.tensor(x), torch.tensor(y), [f"key{step}"], skipped=False))
    with pytest.raises(NonFinite, match=r"step 2: .*keys of the batch: key2$"):
        watch.look()


def test_watch_lets_a_skipped_step_pass():
    watch = Watch()
    watch.add(Measured(1, torch.tensor(1.5), torch.tensor(float("inf")), [], skipped=True))
    watch.add(Measured(2, torch.tensor(1.25), torch.tensor(0.5), [], skipped=False))
    assert watch.look() == (1.25, 0.5)
    assert watch.look() is None


def test_non_finite_loss_stops_the_run_and_names_what_is_left(tmp_path, monkeypatch):
    class Poisoned(EightPairs):
        def __next__(self):
            batch = super().__next__()
            if self.count == 5:
                batch.images = batch.images * float("nan")
            return batch

    monkeypatch.setattr(loop, "open_stream", Poisoned)
    with pytest.raises(NonFinite, match=r"step 5: loss nan.*pair0, pair1.*checkpoint: .*step_00000004"):
        train(tiny("steps=9", "checkpoint.every=2"), tmp_path)
    assert [p.name for p in checkpoints(tmp_path)] == ["step_00000002", "step_00000004"]
    assert all(torch.isfinite(v).all() for v in models.load_state(checkpoints(tmp_path)[-1] / WEIGHTS_NAME).values())


def test_grad_checkpointing_learns_the_same(tmp_path, eight_pairs):
    train(tiny("steps=3"), tmp_path / "plain")
    train(tiny("steps=3", "grad_checkpointing=true"), tmp_path / "checkpointed")
    for name in ("loss", "grad_norm"):
        plain, other = (series(tmp_path / x, name) for x in ("plain", "checkpointed"))
        assert list(plain.values()) == pytest.approx(list(other.values()), rel=1e-5)


def test_a_compiled_model_learns_the_same(tmp_path, eight_pairs, untyped, monkeypatch):
    """Through the compiler's graphs, and without its code generator, which needs a C++ compiler."""
    compile_with = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self: compile_with(self, backend="aot_eager", fullgraph=True))
    train(tiny("steps=3"), tmp_path / "plain")
    train(tiny("steps=3", "compile=true"), tmp_path / "compiled")
    for name in ("loss", "grad_norm"):
        plain, other = (list(series(tmp_path / x, name).values()) for x in ("plain", "compiled"))
        assert other == pytest.approx(plain, rel=1e-4)
    states = [models.load(tmp_path / x).model.state_dict() for x in ("plain", "compiled")]
    assert states[0].keys() == states[1].keys()


def test_bf16_runs_close_to_float32(tmp_path, eight_pairs):
    train(tiny("steps=3"), tmp_path / "plain")
    train(tiny("steps=3", "precision=bf16"), tmp_path / "bf16")
    plain, bf16 = (series(tmp_path / x, "loss") for x in ("plain", "bf16"))
    assert list(bf16.values()) == pytest.approx(list(plain.values()), rel=0.05)
    assert bf16 != plain


@pytest.fixture
def half_precision(monkeypatch):
    """fp16 with gradient scaling on a CPU, which takes it, though Accelerate doesn't. (scale) -> None."""

    def use(scale):
        def build(config):
            accelerator = build_accelerator(config)
            accelerator.native_amp, accelerator.state._mixed_precision = True, "fp16"
            accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
            return accelerator

        monkeypatch.setattr(loop, "build_accelerator", build)

    return use


@pytest.mark.parametrize("micro_batch", ["none", "5"])
def test_fp16_skips_what_overflows_and_runs_close_to_float32(tmp_path, eight_pairs, half_precision, micro_batch):
    settings = ["steps=8", "checkpoint.every=4", f"micro_batch={micro_batch}", "clip_norm=none"]
    train(tiny(*settings), tmp_path / "plain")
    half_precision(2.0**18)
    out = tmp_path / "fp16"
    train(tiny(*settings), out)
    skipped = [int(n) for n in series(out, "steps_skipped").values()]
    first = skipped[-1]  # the step whose gradient is the first that counts, from 0
    assert 0 < first < 6
    assert skipped == [*range(1, first + 1), *[first] * (8 - first)]
    losses, norms = (list(series(out, name).values()) for name in ("loss", "grad_norm"))
    assert len(set(losses[: first + 1])) == 1  # nothing is learnt in a skipped step
    assert np.isinf(norms[:first]).all() or np.isnan(norms[:first]).all()
    assert norms[first] == pytest.approx(series(tmp_path / "plain", "grad_norm")[1], rel=0.02)
    assert losses[first] == pytest.approx(series(tmp_path / "plain", "loss")[1], rel=0.01)
    assert losses[-1] < losses[0]

    shutil.copytree(out, tmp_path / "again")
    shutil.rmtree(checkpoints(tmp_path / "again")[-1])
    train(tiny(*settings), tmp_path / "again", resume=True)
    assert list(series(tmp_path / "again", "loss").values()) == losses


def test_fp16_that_always_overflows_stops_the_run(tmp_path, eight_pairs, half_precision, monkeypatch):
    half_precision(2.0**60)
    monkeypatch.setattr(loop, "_MOST_SKIPS", 2)
    with pytest.raises(NonFinite, match=r"step 3: gradients overflowed 2 times in a row; keys of the batch: pair0"):
        train(tiny("steps=8"), tmp_path)


# ---- refusals ------------------------------------------------------------------------------------------------------


def test_refuses_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(loop._Run, "start", lambda *_: pytest.fail("work was begun"))
    (tmp_path / "file").write_text("")
    unwritable = [tmp_path / "file" / "run", Path("/proc/ssmclip-run")]
    if os.geteuid() != 0:  # root writes anywhere
        (tmp_path / "locked").mkdir(mode=0o500)
        unwritable.append(tmp_path / "locked")
    for out in unwritable:
        with pytest.raises(PermissionError, match=r"cannot write to .*choose another --out"):
            train(tiny(), out)
    with pytest.raises(ValueError, match=r"validation.best='digits/top1' needs validation.every and validation.task"):
        train(tiny("best=digits/top1"), tmp_path / "unmeasured")
    with pytest.raises(FileNotFoundError, match="contains no run to resume"):
        train(tiny(), tmp_path / "new", resume=True)
    append_rows(tmp_path / "old" / "rows.jsonl", [Result("tiny", "train", "loss", 1.0, where={"step": 1})])
    with pytest.raises(FileExistsError, match="continue it with --resume"):
        train(tiny(), tmp_path / "old")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"fp16.*needs a GPU.*bf16"):
            build_accelerator(tiny("precision=fp16"))


def test_a_start_that_failed_takes_no_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.tar"):
        train(tiny("steps=3", "source=nowhere.tar"), tmp_path)
    train(tiny("steps=3", "source=synthetic:digits"), tmp_path)
    assert list(series(tmp_path, "loss")) == [1, 2, 3]
    with pytest.raises(FileExistsError, match="continue it with --resume"):
        train(tiny("steps=3", "source=synthetic:digits"), tmp_path)


HOLD = """
import fcntl, sys
file = open(sys.argv[1], "w")
fcntl.lockf(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


def test_one_process_at_a_time_trains_in_a_folder(tmp_path, eight_pairs):
    train(tiny("steps=4", "checkpoint.every=2"), tmp_path)
    partial = tmp_path / "checkpoints" / ".partial-step_00000006"  # as the other process would be writing it
    partial.mkdir()
    held = [sys.executable, "-c", HOLD, str(tmp_path / ".lock")]
    with subprocess.Popen(held, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(FileExistsError, match="another process is training in"):
            train(tiny("steps=4", "checkpoint.every=2"), tmp_path, resume=True)
        assert partial.exists()
        other.kill()
    train(tiny("steps=4", "checkpoint.every=2"), tmp_path, resume=True)
    assert not partial.exists()


def test_the_best_is_of_one_metric(tmp_path, eight_pairs):
    measured = {"big": iter([math.nan, 0.9, 0.8]), "small": iter([0.0, 0.02, 0.01, 0.03])}

    def validate(model, step):
        return [Result("tiny", "digits", name, next(values, 0.0)) for name, values in measured.items()]

    usual = ["validation.every=2", "checkpoint.every=2", "keep=9", 'tasks=["digits"]']
    train(tiny("steps=6", *usual, "best=digits/big"), tmp_path, validate=validate)
    named = tmp_path / "checkpoints" / "best"
    assert named.read_text().strip() == "step_00000004"  # not the NaN before it
    shutil.copytree(tmp_path, tmp_path.with_name("none"))
    shutil.rmtree(checkpoints(tmp_path)[-1])
    train(tiny("steps=6", *usual, "best=digits/small"), tmp_path, resume=True, validate=validate)
    assert named.read_text().strip() == "step_00000006"

    tmp_path = tmp_path.with_name("none")  # the best of a metric that is no longer asked for is kept
    shutil.rmtree(checkpoints(tmp_path)[-1])
    train(tiny("steps=6", "checkpoint.every=2", "keep=1"), tmp_path, resume=True)
    named = tmp_path / "checkpoints" / "best"
    assert named.read_text().strip() == "step_00000004"
    assert [path.name for path in checkpoints(tmp_path)] == ["step_00000004", "step_00000006"]


def test_the_rows_of_a_continued_run_have_one_name(tmp_path, eight_pairs):
    train(tiny("steps=4", "checkpoint.every=2"), tmp_path / "mine")
    rows = tmp_path / "mine" / "rows.jsonl"
    rows.write_text(rows.read_text().replace('"mine"', '"CLIP-VMamba-Nano"'))
    shutil.rmtree(checkpoints(tmp_path / "mine")[-1])
    train(tiny("steps=4", "checkpoint.every=2"), tmp_path / "mine", resume=True)
    assert {row.model for row in read_rows(rows)[1]} == {"mine"}
    assert list(series(tmp_path / "mine", "loss")) == [1, 2, 3, 4]


def test_a_file_system_without_locks_can_be_trained_on(tmp_path, eight_pairs, monkeypatch):
    import fcntl

    def lockf(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", lockf)
    train(tiny("steps=3"), tmp_path)
    assert list(series(tmp_path, "loss")) == [1, 2, 3]


def test_unknown_model_lists_the_known_ones(tmp_path):
    with pytest.raises(UnknownName, match="unknown model 'CLIP-VMamba-Nana'; did you mean 'CLIP-VMamba-Nano'"):
        train(tiny("name=CLIP-VMamba-Nana"), tmp_path)


FULL_DISK = """
import resource, sys
from pathlib import Path
import torch
from ssmclip.models import load_state, save_model
from ssmclip.train.checkpoint import CheckpointError, checkpoints, load_training_state, save_checkpoint

run = Path(sys.argv[1])
(run / "checkpoints").mkdir()

def save(step, weights, state):
    model = torch.nn.Linear(weights, 1, bias=False)
    torch.nn.init.constant_(model.weight, step)
    write = lambda folder: save_model(model, {"model_cfg": {}}, folder)
    rest = {"ranks": [{"rng": {}, "cursor": None}], "online": None, "scaler": None, "best": None, "skips": 0}
    save_checkpoint(run, step, write, {"step": step, "optimiser": {"m": torch.zeros(state)}, **rest}, 2, None)

save(1, 100_000, 100_000)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
for weights, state in ((100_000, 1), (1, 100_000)):
    try:
        save(2, weights, state)
    except CheckpointError as error:
        assert "step_00000001" in str(error) and "--resume" in str(error), error
    else:
        raise SystemExit(f"saving {weights, state} was not refused")
    assert [p.name for p in checkpoints(run)] == ["step_00000001"]
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["last", "step_00000001"]
    assert load_training_state(checkpoints(run)[0])["step"] == 1
    assert load_state(checkpoints(run)[0] / "open_clip_model.safetensors")["weight"].eq(1).all()
"""


def test_full_disk_leaves_the_checkpoint_before(tmp_path):
    """A real refusal of the operating system to write any further, in the weights' file and in the state's."""
    pytest.importorskip("resource", reason="only POSIX can limit a file's size")
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_killed_while_saving_leaves_the_checkpoint_before(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    save_checkpoint(tmp_path, 1, lambda folder: None, {"step": 1}, 2, None)

    def killed(folder):
        raise KeyboardInterrupt  # nothing catches it, like a kill

    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, 2, killed, {"step": 2}, 2, None)
    assert [p.name for p in checkpoints(tmp_path)] == ["step_00000001"]


def test_hostile_and_cut_states_are_refused(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    folder = save_checkpoint(tmp_path, 1, lambda f: None, {"step": 1, "w": torch.zeros(100)}, 2, None)
    whole = (folder / "state.pt").read_bytes()
    (folder / "state.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        models.CheckpointError, match=r"cannot read the training state .*state.pt .*from the previous checkpoint"
    ):
        load_training_state(folder)

    class Hostile:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "owned"),))

    torch.save({"step": Hostile()}, folder / "state.pt")
    with pytest.raises(models.CheckpointError, match="cannot read the training state"):
        load_training_state(folder)
    assert not (tmp_path / "owned").exists()


def test_truncate_rows_drops_later_steps_and_a_cut_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    lines = [{"run": {}}] + [
        {"model": "m", "task": "train", "condition": c, "metric": "loss", "value": 1.0}
        for c in ("step=9", "step=10", "step=10 level=2", "step=11", "step=100 level=1")
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"model": "m", "ta')
    truncate_rows(path, 10)
    assert [r.condition for r in read_rows(path)[1]] == ["step=9", "step=10", "step=10, level=2"]


def test_random_state_is_put_back():
    seed_everything(5)
    device = torch.device("cpu")
    with same_rng_after(device):
        torch.rand(3), np.random.rand(3)
        seed_everything(99)
    got = (torch.rand(2).tolist(), np.random.rand(2).tolist())
    seed_everything(5)
    assert got == (torch.rand(2).tolist(), np.random.rand(2).tolist())
