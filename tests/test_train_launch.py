"""What Accelerate would take from the environment changes no number of a run: it is ignored aloud, or refused."""

import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import accelerate
import pytest
import torch
from accelerate import PartialState
from accelerate.utils import DynamoBackend

from ssmclip.config import TrainConfig, apply_overrides, load_recipe
from ssmclip.rows import read_rows
from ssmclip.train import launch, train
from ssmclip.train.build import build_accelerator
from ssmclip.train.checkpoint import checkpoints

ROOT = Path(__file__).parents[1]
SETTINGS = [
    "steps=2",
    "batch_size=8",
    "warmup_steps=1",
    "checkpoint.every=2",
    "logging.every=1",
    "progress=false",
    "tensorboard=false",
    "device=cpu",
]
IGNORED = {
    "ACCELERATE_MIXED_PRECISION": "bf16",
    "ACCELERATE_DYNAMO_BACKEND": "EAGER",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
}
# Accelerate reads these too; they choose devices, or change nothing a run computes.
HARMLESS = {
    "ACCELERATE_USE_CPU": "1",
    "ACCELERATE_USE_FSDP": "true",  # shards where there are several GPUs
    "ACCELERATE_DOWNCAST_BF16": "1",  # of TPUs
    "ACCELERATE_GRADIENT_CLIPPING": "0.001",  # of DeepSpeed, as is the next
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
    "ACCELERATE_DEBUG_MODE": "true",
    "ACCELERATE_LOG_LEVEL": "debug",
}


def tiny(*overrides):
    return apply_overrides(load_recipe(ROOT / "recipes" / "tiny.py"), [*SETTINGS, *overrides])


def numbers(out):
    rows = read_rows(out / "rows.jsonl")[1]
    return {(str(r.where), r.metric): r.value for r in rows if r.metric in ("loss", "grad_norm", "logit_scale")}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The numbers of a run without any of the variables: whole batches, and cached features."""
    folder = tmp_path_factory.mktemp("plain")
    return {micro: numbers(train(tiny(f"micro_batch={micro}"), folder / micro)) for micro in ("none", "3")}


@pytest.mark.parametrize("micro_batch", ["none", "3"])
def test_no_variable_changes_a_number(tmp_path, monkeypatch, caplog, plain, micro_batch):
    for name, value in (IGNORED | HARMLESS).items():
        monkeypatch.setenv(name, value)
    with caplog.at_level(logging.WARNING, "ssmclip"):
        assert numbers(train(tiny(f"micro_batch={micro_batch}"), tmp_path)) == plain[micro_batch]
    assert len(checkpoints(tmp_path)) == 1
    told = [record.getMessage() for record in caplog.records if record.name.startswith("ssmclip.train")]
    assert [message.partition("=")[0] for message in told] == list(IGNORED)
    for message, (setting, name) in zip(
        told,
        [("precision", "precision=bf16"), ("compile", "model.compile=true"), ("micro", "micro_batch=N")],
        strict=True,
    ):
        assert re.search(rf"has no effect: \S*{setting}\S* decides\. .*--set \S*{name}", message)


def test_accelerate_itself_would_take_them(monkeypatch):
    """That the variables are still read by those names: without it the test above would prove nothing."""
    for name, value in IGNORED.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(accelerate.state.AcceleratorState, "_shared_state", {})
    monkeypatch.setattr(accelerate.state.GradientState, "_shared_state", {})
    theirs = accelerate.Accelerator(cpu=True)
    assert theirs.mixed_precision == "bf16"
    assert theirs.state.dynamo_plugin.backend == DynamoBackend.EAGER
    assert theirs.gradient_accumulation_steps == 4
    ours = build_accelerator(tiny())
    assert ours.mixed_precision == "no"
    assert ours.state.dynamo_plugin.backend == DynamoBackend.NO
    assert ours.gradient_accumulation_steps == 1


@pytest.mark.parametrize(
    ("environment", "overrides"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "no"}, ["precision=bf16"]),  # what `accelerate launch` sets unasked
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, ["precision=bf16"]),
        ({"ACCELERATE_DYNAMO_BACKEND": "NO"}, ["compile=true"]),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, ["compile=true"]),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1"}, []),
        (HARMLESS, []),
    ],
)
def test_what_agrees_or_asks_for_nothing_is_not_told(environment, overrides):
    assert launch.ignored(tiny(*overrides), environment) == []


@pytest.mark.parametrize("variable", launch.REFUSED)
def test_other_ways_to_train_are_refused(tmp_path, monkeypatch, variable):
    monkeypatch.setenv(variable, value := "TE" if "FP8" in variable else "true")
    with pytest.raises(ValueError, match=rf"must be data-parallel or sharded by FSDP.*\(got {variable}={value}, which"):
        train(tiny(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_every_variable_accelerate_reads_has_been_looked_at():
    """Each ACCELERATE_ name in the modules that make an Accelerator is one of ours, refused, or known to do nothing."""
    seen = set()
    for module in ("accelerator", "state"):
        source = (Path(accelerate.__file__).parent / f"{module}.py").read_text(encoding="utf-8")
        seen |= set(re.findall(r"[\"'](ACCELERATE_\w+)[\"']", source))
    about_devices = {"ACCELERATE_TORCH_DEVICE", "ACCELERATE_BYPASS_DEVICE_MAP", "ACCELERATE_CPU_AFFINITY"}
    elsewhere = {"ACCELERATE_USE_SAGEMAKER", "ACCELERATE_SAGEMAKER_DISTRIBUTED_TYPE", "ACCELERATE_ALLOW_CP_STANDALONE"}
    known = {*IGNORED, *HARMLESS, *launch.REFUSED, *about_devices, *elsewhere}
    assert seen - known == set()


def test_a_device_other_than_the_cpu_that_was_set_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "meta")
    monkeypatch.setattr(PartialState, "_shared_state", {})
    monkeypatch.setattr(accelerate.state.AcceleratorState, "_shared_state", {})
    with pytest.raises(ValueError, match=r"must be the CPU.*got meta: ACCELERATE_TORCH_DEVICE=meta"):
        train(tiny(), tmp_path / "run")


def test_half_precision_on_a_cpu_that_the_launcher_chose_is_refused(monkeypatch):
    """Accelerate would train in float32 without a word."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match=r'"fp16" needs a GPU \(got the CPU\)'):
        build_accelerator(apply_overrides(TrainConfig(), ["precision=fp16"]))


def test_processes_that_would_each_train_alone_are_refused():
    """torchrun on a machine without a GPU, and device="auto": Accelerate makes single processes of them."""
    accelerator = build_accelerator(tiny())
    launched = {"LOCAL_RANK": "0", "WORLD_SIZE": "2"}
    with pytest.raises(ValueError, match="2 processes were launched without GPUs, so each would train alone"):
        launch.check_devices(accelerator, tiny("device=auto"), launched)
    launch.check_devices(accelerator, tiny(), {"WORLD_SIZE": "2"})  # of a batch system that launches nothing


def test_accelerate_launch_with_a_compiler_saves_a_checkpoint(tmp_path, plain):
    command = ["accelerate.commands.launch", "--cpu", "--num_processes", "1", "--dynamo_backend", "eager"]
    command += ["--mixed_precision", "bf16", "-m", "ssmclip", "train", str(ROOT / "recipes" / "tiny.py")]
    command += ["--set", *SETTINGS, "--out", str(tmp_path / "run")]
    environment = os.environ | {"HF_HOME": str(tmp_path), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", *command], capture_output=True, text=True, timeout=300, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert len(checkpoints(tmp_path / "run")) == 1
    assert numbers(tmp_path / "run") == pytest.approx(plain["none"], rel=1e-5)  # threads may be others
    assert "ACCELERATE_DYNAMO_BACKEND=EAGER has no effect" in done.stderr
