"""A run that was killed and resumed is the run that wasn't, bit for bit."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ssmclip import models
from ssmclip.config import apply_overrides, load_recipe
from ssmclip.models.files.weights import WEIGHTS_NAME
from ssmclip.rows import read_rows
from ssmclip.train import train
from ssmclip.train.checkpoint import checkpoints, load_training_state

ROOT = Path(__file__).parents[1]
# Everything random is on: drop-path, augmentation, captions drawn, cached features; and everything with a state: EMA.
SETTINGS = [
    "steps=12",
    "batch_size=8",
    "warmup_steps=3",
    "checkpoint.every=4",
    "logging.every=1",
    "progress=false",
    "device=cpu",
    "drop_path_rate=0.5",
    "color_jitter=0.4",
    "ema.decay=0.9",
    "micro_batch=5",
    "image_sizes=[[0, 24], [0.8, 32]]",
    "shuffle_buffer=50",
]
RUN = """
import sys
from ssmclip.config import apply_overrides, load_recipe
from ssmclip.train import train
train(apply_overrides(load_recipe(sys.argv[1]), sys.argv[3:]), sys.argv[2])
"""


def config(*overrides):
    return apply_overrides(load_recipe(ROOT / "recipes" / "tiny.py"), [*SETTINGS, *overrides])


def learnt(out):
    """Every training number that must repeat: (step, metric) -> value."""
    rows = read_rows(out / "rows.jsonl")[1]
    numbers = [(r.place, r.metric, r.value) for r in rows if r.metric in ("loss", "grad_norm", "logit_scale", "lr")]
    made = {(place, metric): value for place, metric, value in numbers}
    assert len(made) == len(numbers), "a step was written twice"
    return made


def weights(out):
    return models.load_state(checkpoints(out)[-1] / WEIGHTS_NAME)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    train(config("keep=9"), out)
    return out


def kill_at(out, step, overrides=()):
    """Start the run in another process and kill it, as `kill -9` does, once it has written the row of `step`."""
    recipe = str(ROOT / "recipes" / "tiny.py")
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen([sys.executable, "-c", RUN, recipe, str(out), *SETTINGS, *overrides], env=environment)
    rows = out / "rows.jsonl"
    deadline = time.monotonic() + 120
    while not (rows.exists() and f'"step": {step}}}' in rows.read_text()):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline, "the run is too slow to be killed"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def test_killed_and_resumed_equals_uninterrupted(tmp_path, uninterrupted):
    out = tmp_path / "run"
    kill_at(out, step=6)
    assert load_training_state(checkpoints(out)[-1])["step"] < 12
    # What a kill at a worse moment would leave besides: a checkpoint half written, a row half written.
    (out / "checkpoints" / ".partial-step_00000099").mkdir()
    with (out / "rows.jsonl").open("a") as file:
        file.write('{"model": "CLIP-VM')

    train(config(), out, resume=True)
    assert learnt(out) == learnt(uninterrupted)
    mine, whole = weights(out), weights(uninterrupted)
    assert all(torch.equal(mine[name], whole[name]) for name in whole)
    assert not list((out / "checkpoints").glob(".*"))


@pytest.mark.parametrize("at", [4, 8])
def test_resumed_from_each_checkpoint_equals_uninterrupted(tmp_path, uninterrupted, at):
    out = tmp_path / "run"
    shutil.copytree(uninterrupted, out)
    for folder in checkpoints(out):
        if int(folder.name[5:]) > at:
            shutil.rmtree(folder)
    train(config(), out, resume=True)
    assert learnt(out) == learnt(uninterrupted)


def test_killed_before_the_first_checkpoint_starts_again(tmp_path, uninterrupted):
    out = tmp_path / "run"
    shutil.copytree(uninterrupted, out)
    for folder in checkpoints(out):
        shutil.rmtree(folder)
    train(config(), out, resume=True)
    assert learnt(out) == learnt(uninterrupted)


def test_every_piece_of_state_matters(tmp_path, uninterrupted):
    """Each of them, when lost, shows in the losses: so the equality above is not an accident."""
    for name in ("rng", "cursor", "optimiser", "online"):
        out = tmp_path / name
        shutil.copytree(uninterrupted, out)
        shutil.rmtree(checkpoints(out)[-1])
        path = checkpoints(out)[-1] / "state.pt"
        state = load_training_state(checkpoints(out)[-1])
        if name == "rng":
            torch.manual_seed(12345)
            state["ranks"][0]["rng"]["torch"] = [torch.get_rng_state()]
        elif name == "cursor":
            state["ranks"][0]["cursor"] = None
        elif name == "optimiser":
            for moments in state["optimiser"]["state"].values():
                moments["exp_avg"].zero_()
        else:
            state["online"] = None
        torch.save(state, path)
        train(config(), out, resume=True)
        assert learnt(out) != learnt(uninterrupted), name


def test_changed_settings_are_named_and_harmless_ones_pass(tmp_path, uninterrupted):
    out = tmp_path / "run"
    shutil.copytree(uninterrupted, out)
    with pytest.raises(ValueError, match=r"optimiser.lr was 0.003, now 0.1; optimiser.weight_decay was 0.1, now 0.2"):
        train(config("optimiser.lr=0.1", "weight_decay=0.2"), out, resume=True)
    with pytest.raises(ValueError, match=r"steps was 12, now 24"):
        train(config("steps=24"), out, resume=True)
    train(config("logging.every=5", "keep=1"), out, resume=True)
    assert json.loads((out / "config.json").read_text())["logging"]["every"] == 5


def test_checkpoint_of_another_model_is_refused(tmp_path, uninterrupted):
    out = tmp_path / "run"
    shutil.copytree(uninterrupted, out)
    file = checkpoints(out)[-1] / WEIGHTS_NAME
    state = models.load_state(file)
    del state["text_projection"]
    import safetensors.torch

    safetensors.torch.save_file(state, file)
    with pytest.raises(models.CheckpointError, match=r"another model.*missing: text_projection.*delete .*/run or"):
        train(config(), out, resume=True)


def test_checkpoint_cut_in_half_is_refused(tmp_path, uninterrupted):
    out = tmp_path / "run"
    shutil.copytree(uninterrupted, out)
    file = checkpoints(out)[-1] / WEIGHTS_NAME
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(models.CheckpointError, match="truncated"):
        train(config(), out, resume=True)
