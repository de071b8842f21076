"""Two processes on a CPU learn what one does with the doubled batch. torchrun starts this file itself."""

import copy
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import nn

from ssmclip import models
from ssmclip.__main__ import main as cli
from ssmclip.config import LossConfig, MaskConfig, ModelConfig, SslConfig, apply_overrides, load_recipe
from ssmclip.evaluate.tasks import training_validation
from ssmclip.models.files.weights import WEIGHTS_NAME
from ssmclip.rows import Result, read_rows
from ssmclip.train import loop, train
from ssmclip.train.blueprint import blueprint
from ssmclip.train.build import build_accelerator, build_trainee, is_sharded
from ssmclip.train.checkpoint import checkpoints, last_checkpoint, load_training_state
from ssmclip.train.gradient import backward
from ssmclip.train.layers import freeze, training_mode
from ssmclip.train.objective import OBJECTIVES

ROOT = Path(__file__).parents[1]
PARITY = ROOT.parent / "shared" / "parity"
NOT_FROZEN = ModelConfig()
SETTINGS = [
    "steps=4",
    "source=synthetic:digits",
    "batch_size=8",
    "warmup_steps=1",
    "checkpoint.every=2",
    "logging.every=1",
    "progress=false",
    "tensorboard=false",
    "device=cpu",
    "drop_path_rate=0.5",
    "micro_batch=3",
    "validation.every=2",
    'tasks=["none"]',
    "best=none/one",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def said(folder):
    """What two processes printed while doing everything below: started once, which takes longer than what they do."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, *command, str(folder)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    "what",
    [f"{kind} {how}" for kind in ("clip", "siglip") for how in ("whole", "cached", "several")]
    + [f"clip without gathered gradients {how}" for how in ("whole", "cached", "several")]
    + [f"frozen {how}" for how in ("whole", "cached")]
    + [f"{kind} whole" for kind in ("distill", "slip", "a-clip")],
)
def test_two_processes_have_the_doubled_batchs_gradient(said, what):
    assert f"{what}: same" in said


def test_two_processes_have_the_originals_loss_and_gradients(shared, said):
    assert "original: same" in said


def test_two_processes_resume_exactly(said):
    assert "\nresumed: same" in said


def test_another_number_of_processes_is_refused(folder, said):
    with pytest.raises(models.CheckpointError, match=r"was written by 2 processes \(got 1\)"):
        train(_config(), folder / "whole", resume=True)


def test_two_processes_with_sharded_weights_learn_the_same(folder, said):
    """FSDP's losses, gradient norms and saved weights beside data-parallel training's, and again after a resume."""
    assert "sharded, resumed: same" in said
    plain, sharded = (_numbers(folder / name / "whole") for name in (".", "fsdp"))
    assert len(plain) == 4 * 2
    assert sharded == pytest.approx(plain, rel=1e-5)
    files = [checkpoints(folder / name / "whole")[0] / WEIGHTS_NAME for name in (".", "fsdp")]
    plain, sharded = map(models.load_state, files)
    assert plain.keys() == sharded.keys()
    for name, value in plain.items():
        torch.testing.assert_close(sharded[name], value, rtol=1e-5, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")


def test_what_every_process_skipped_is_told(folder, said):
    rows = read_rows(folder / "skips" / "rows.jsonl")[1]
    assert {r.value for r in rows if r.metric == "samples_skipped"} == {5.0}
    for told in ("3 samples: broken, such as ['image of 0']", "1 samples: only 0,", "1 samples: only 1,"):
        assert said.count(f"skipped {told}") == 1


def test_real_validation_is_the_main_process_alone(folder, said):
    """All pictures, once a step: the other process waits and takes none."""
    rows = [r for r in read_rows(folder / "validated" / "rows.jsonl")[1] if (r.task, r.metric) == ("digits", "top1")]
    assert [(r.condition, r.n) for r in rows] == [("step=2", 360), ("step=4", 360)]


def test_a_signal_to_one_of_two_processes_stops_both_at_the_same_step(folder, said):
    """The command left the process group, or the processes would have been aborted at their end."""
    assert all(f"process {rank}: status 75, out of the group" in said for rank in range(2))
    assert said.count("stopped by SIGUSR1 after step 2; saved ") == 1
    state = load_training_state(last_checkpoint(folder / "stopped"))
    assert (state["step"], len(state["ranks"])) == (2, 2)
    assert max(step for step, _ in _numbers(folder / "stopped")) == "step=2"


def main(out: Path) -> None:
    accelerator = build_accelerator(_config())
    _compare(accelerator)
    _resume(out)
    accelerator.print("resumed: same")
    _skip(out / "skips")
    digits = training_validation(["digits"], "")
    train(_config('tasks=["digits"]', "best=digits/top1"), out / "validated", validate=digits)
    loop.build_accelerator = _sharded
    _resume(out / "fsdp", "validation.every=0", "tasks=[]", "best=")
    accelerator.print("sharded, resumed: same")
    _stop(out / "stopped", accelerator.process_index)


def _compare(accelerator) -> None:
    assert accelerator.num_processes == 2
    without = LossConfig(gather_with_grad=False)
    for told, kind, loss in (
        ("clip", "clip", LossConfig()),
        ("siglip", "siglip", LossConfig()),
        ("clip without gathered gradients", "clip", without),
    ):
        for name, micro_batch, captions in (("whole", None, 1), ("cached", 3, 1), ("several", 3, 2)):
            _compare_gradients(accelerator, kind, micro_batch, captions, loss)
            accelerator.print(f"{told} {name}: same")
    frozen = ModelConfig(freeze_image=True, freeze_text=True)
    for name, micro_batch in (("whole", None), ("cached", 3)):
        _compare_gradients(accelerator, "clip", micro_batch, 1, LossConfig(), frozen)
        accelerator.print(f"frozen {name}: same")
    for kind in ("distill", "slip", "a-clip"):
        _compare_with_more(accelerator, kind)
        accelerator.print(f"{kind} whole: same")
    if PARITY.is_dir():
        _compare_with_original(accelerator.process_index)
        accelerator.print("original: same")


def _config(*overrides):
    return apply_overrides(load_recipe(ROOT / "recipes" / "tiny.py"), [*SETTINGS, *overrides])


def _compare_gradients(accelerator, kind, micro_batch, captions, loss, frozen=NOT_FROZEN) -> None:
    torch.manual_seed(0)
    model = blueprint(_config(f"loss.kind={kind}", "drop_path_rate=0")).create().double()
    freeze(model, frozen)
    training_mode(model, frozen)
    images, texts = torch.randn(16, 3, 32, 32).double(), torch.randint(1, 49000, (16 * captions, 32))
    texts[:, 9] = 49407
    alone = copy.deepcopy(model)
    features = alone(images, texts[::captions])
    whole = OBJECTIVES[kind](loss)(**features)
    for i in range(1, captions):  # the mean over captions, one at a time
        whole = whole + OBJECTIVES[kind](loss)(**alone(images, texts[i::captions]))
    whole = whole / captions
    whole.backward()

    rank = accelerator.process_index
    mine = slice(8 * rank, 8 * rank + 8)
    spread = nn.parallel.DistributedDataParallel(model)
    words = texts.unflatten(0, (16, captions))[mine].flatten(0, 1)
    objective = OBJECTIVES[kind](loss, rank=rank, world_size=2, captions=captions)
    value = backward(accelerator, spread, objective, images[mine], words, micro_batch)
    torch.testing.assert_close(accelerator.reduce(value, "mean"), whole.detach(), rtol=1e-10, atol=0)
    for (name, p), q in zip(model.named_parameters(), alone.parameters(), strict=True):
        if not p.requires_grad:
            assert p.grad is None
            continue
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-8, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def _compare_with_more(accelerator, kind) -> None:
    """Objectives with heads, further views, and what else a batch has. Heads' batch norm is over both processes."""
    torch.manual_seed(0)
    loss = LossConfig(ssl=SslConfig(head_width=8, head_features=6), mask=MaskConfig(block=8))
    views = 2 if kind == "a-clip" else 1
    one, spread_out = (
        OBJECTIVES[kind](loss, rank=r, world_size=w, views=views) for r, w in ((0, 1), (accelerator.process_index, 2))
    )
    model = blueprint(_config("drop_path_rate=0")).create().double().train()
    alone = build_trainee(model, one).double()
    trainee = build_trainee(copy.deepcopy(model), spread_out).double()
    trainee.load_state_dict(alone.state_dict())
    for objective, trained in ((one, alone), (spread_out, trainee)):
        objective.follow(copy.deepcopy(trained).eval())
    given = {"images": torch.randn(16 * one.shown, 3, 32, 32).double(), "targets": torch.randint(1, 49000, (16, 32))}
    if kind == "distill":
        given |= {name: torch.randn(16, 5).double() for name in ("teacher_images", "teacher_texts")}
    if kind == "a-clip":
        given["boxes"] = torch.tensor([0.0, 0.0, 1.0, 1.0, 0.0]).double().repeat(32, 1)
    whole = one.of_batch(alone, *one.inputs(**given))
    whole.backward()

    mine = {name: value.chunk(2)[accelerator.process_index] for name, value in given.items()}
    images, texts = mine.pop("images"), mine.pop("targets")
    value = backward(accelerator, nn.parallel.DistributedDataParallel(trainee), spread_out, images, texts, None, mine)
    torch.testing.assert_close(accelerator.reduce(value, "mean"), whole.detach(), rtol=1e-10, atol=0)
    for name, part in one.numbers(model).items():
        torch.testing.assert_close(spread_out.numbers(model)[name], part, rtol=1e-10, atol=0)
    for (name, p), q in zip(trainee.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-8, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def _compare_with_original(rank: int) -> None:
    """Before data-parallel training takes the mean over processes."""
    truth = torch.load(PARITY / "train_eval_misc.pt", weights_only=False)
    expected = truth["loss_two_processes"]
    n = len(truth["loss_inputs"]["image"]) // 2
    mine = slice(n * rank, n * rank + n)
    image, text = (truth["loss_inputs"][key][mine].clone().requires_grad_() for key in ("image", "text"))
    log_scale = truth["loss_inputs"]["log_scale"].clone().requires_grad_()
    normalise = nn.functional.normalize
    objective = OBJECTIVES["clip"](rank=rank, world_size=2)
    loss = objective(normalise(image, dim=-1), normalise(text, dim=-1), log_scale.exp())
    loss.backward()
    for value, key in (
        (loss.detach(), "loss"),
        (image.grad, "grad_image"),
        (text.grad, "grad_text"),
        (log_scale.grad, "grad_log_scale"),
    ):
        torch.testing.assert_close(
            value, torch.as_tensor(expected[f"{key}_per_rank"][rank], dtype=value.dtype), rtol=1e-9, atol=1e-12
        )


def _sharded(config):
    """Accelerate shards on GPUs only, of itself; its FSDP plugin works on a CPU all the same."""
    processes = PartialState._shared_state  # from which Accelerate takes the type anew each time it is asked
    if processes:
        processes["distributed_type"] = DistributedType.MULTI_CPU
    accelerator = build_accelerator(config)
    accelerator.state.distributed_type = processes["distributed_type"] = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2, reshard_after_forward=True)
    assert is_sharded(accelerator)
    return accelerator


def _skip(out: Path) -> None:
    """A run whose first process skips two samples, and the second three."""
    whole = loop.open_stream

    def open_stream(config, plan, size, rank, *more):
        stream = whole(config, plan, size, rank, *more)
        stream.skipped.update({"broken": 1 + rank, f"only {rank}": 1})
        stream.skipped_examples.update({"broken": [f"image of {rank}"]})
        return stream

    loop.open_stream = open_stream
    train(_config("validation.every=0", "tasks=[]", "best="), out)
    loop.open_stream = whole


def _stop(out: Path, rank: int) -> None:
    """Send a signal to the second process in its second step."""
    one_step = loop._Run._one_step

    def with_signal(run, batch, lr):
        measured = one_step(run, batch, lr)
        if (rank, run.step) == (1, 2):
            os.kill(os.getpid(), signal.SIGUSR1)
        return measured

    loop._Run._one_step = with_signal
    recipe, changes = str(ROOT / "recipes" / "tiny.py"), ["validation.every=0", "tasks=[]", "best="]
    status = cli(["train", recipe, "--set", *SETTINGS, *changes, "--out", str(out)])
    left = "in" if torch.distributed.is_initialized() else "out of"
    sys.stdout.write(f"process {rank}: status {status}, {left} the group\n")  # in one piece, as both write


def _numbers(folder: Path) -> dict:
    rows = read_rows(folder / "rows.jsonl")[1]
    return {(r.condition, r.metric): r.value for r in rows if r.metric in ("loss", "grad_norm")}


def _resume(out: Path, *overrides: str) -> None:
    def validate(model, step):
        return [Result("tiny", "none", "one", 1.0)]

    whole, resumed = out / "whole", out / "resumed"
    train(_config(*overrides), whole, validate=validate)
    main = os.environ["RANK"] == "0"
    if main:
        shutil.copytree(whole, resumed)
        shutil.rmtree(checkpoints(resumed)[-1])
    torch.distributed.barrier()
    train(_config(*overrides), resumed, resume=True, validate=validate)
    if main:
        runs = [_numbers(folder) for folder in (whole, resumed)]
        assert len(runs[0]) == 4 * 2
        assert runs[0] == runs[1], runs
        validated = [sum(r.metric == "one" for r in read_rows(f / "rows.jsonl")[1]) for f in (whole, resumed)]
        assert validated == ([0, 0] if overrides else [2, 2])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
