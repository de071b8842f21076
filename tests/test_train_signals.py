"""A signal stops a run after a whole step, which is saved; the run that continues it ends like one undisturbed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ssmclip.config import apply_overrides, load_recipe
from ssmclip.models import CheckpointError
from ssmclip.models.files.weights import WEIGHTS_NAME
from ssmclip.rows import Result, read_rows
from ssmclip.train import Stopped, loop, train
from ssmclip.train.checkpoint import last_checkpoint, load_training_state

RECIPE = Path(__file__).parents[1] / "recipes" / "tiny.py"
SETTINGS = [
    "source=synthetic:digits",
    "progress=false",
    "tensorboard=false",
    "logging.every=1",
    "warmup_steps=1",
    "batch_size=8",
    "device=cpu",
]
NUMBERS = ("loss", "grad_norm", "lr")


def tiny(*overrides):
    return apply_overrides(load_recipe(RECIPE), [*SETTINGS, *overrides])


def series(out):
    rows = read_rows(out / "rows.jsonl")[1]
    return [(r.task, r.metric, r.where["step"], r.value) for r in rows if r.metric in NUMBERS or r.task == "none"]


def weights(out):
    return load_file(last_checkpoint(out) / WEIGHTS_NAME)


def wait_for(path, process):
    for _ in range(600):
        if path.exists() and '"loss"' in path.read_text():
            return
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    raise TimeoutError(path)


def children(process):
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process)], capture_output=True, text=True, check=False)
    return [int(number) for number in listed.stdout.split()]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)], ids=["TERM", "INT"])
def test_a_signal_saves_the_last_step_and_ends_with_its_code(tmp_path, number, code):
    out = tmp_path / "run"
    settings = [*SETTINGS, "steps=100000", "checkpoint.every=100000", "data.workers=1"]
    command = [sys.executable, "-m", "ssmclip", "train", str(RECIPE), "--set", *settings, "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True)
    try:
        wait_for(out / "rows.jsonl", process)
        workers = children(process.pid)
        os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
        error = process.communicate(timeout=120)[1]
    finally:
        if process.poll() is None:
            process.kill()
    saved = last_checkpoint(out)
    assert process.returncode == code, error
    assert "Traceback" not in error
    assert str(saved) in error
    assert "--resume" in error
    assert load_training_state(saved)["step"] == series(out)[-1][2] == int(saved.name[5:])
    assert workers
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)


def test_a_signal_to_one_of_two_processes_stops_both_at_the_same_step(tmp_path):
    out = tmp_path / "run"
    settings = [*SETTINGS, "steps=100000", "checkpoint.every=100000"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launch, "-m", "ssmclip", "train", str(RECIPE), "--set", *settings, "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with (tmp_path / "stderr").open("w") as file:
        process = subprocess.Popen(command, stderr=file, env=environment)
    try:
        for _ in range(600):
            if (out / "rows.jsonl").exists() and series(out):
                break
            time.sleep(0.1)
        os.kill(children(process.pid)[-1], signal.SIGUSR1)
        process.wait(60)
    finally:
        process.terminate()
    error = (tmp_path / "stderr").read_text()
    assert error.count("exitcode  : 75") == 2, error[-3000:]
    state = load_training_state(last_checkpoint(out))
    assert state["step"] == series(out)[-1][2]
    assert len(state["ranks"]) == 2


def test_a_stopped_run_continues_like_one_undisturbed(tmp_path):
    def validate(model, step):
        return [Result(model="tiny", task="none", metric="one", value=float(step))]

    def no_time(model, step):
        raise AssertionError("a stopped run has no time to validate")

    config = tiny("steps=4", "checkpoint.every=4", "validation.every=2", 'tasks=["none"]')
    train(config, tmp_path / "whole", validate=validate)

    one_step = loop._Run._one_step

    def with_signal(run, batch, lr):
        measured = one_step(run, batch, lr)
        if run.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return measured

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop._Run, "_one_step", with_signal)
        with pytest.raises(Stopped) as stopped:
            train(config, tmp_path / "stopped", validate=no_time)
    assert (stopped.value.signal, stopped.value.step) == (signal.SIGTERM, 2)
    assert stopped.value.checkpoint == last_checkpoint(tmp_path / "stopped")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    train(config, tmp_path / "stopped", resume=True, validate=validate)
    assert series(tmp_path / "stopped") == series(tmp_path / "whole")
    ours, theirs = weights(tmp_path / "stopped"), weights(tmp_path / "whole")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def _without(name):
    return lambda state: {k: v for k, v in state.items() if k != name}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda state: {}, "step, ranks"),
        (lambda state: [], "step, ranks"),
        (lambda state: None, "step, ranks"),
        (_without("optimiser"), "optimiser"),
        (lambda state: state | {"ranks": []}, "ranks"),
        (lambda state: state | {"step": "2"}, "step"),
        (lambda state: state | {"step": -1}, "step"),
    ],
    ids=["empty", "list", "none", "no-optimiser", "no-ranks", "text", "negative"],
)
def test_a_malformed_training_state_is_refused(tmp_path, short_run, change, named):
    folder = tmp_path / "step_00000002"
    folder.mkdir()
    torch.save(change(load_training_state(last_checkpoint(short_run))), folder / "state.pt")
    with pytest.raises(CheckpointError, match=f"state.pt is not a training state .*{named}.*previous checkpoint"):
        load_training_state(folder)


def test_a_run_with_an_empty_training_state_does_not_start_again(tmp_path):
    config = tiny("steps=2", "checkpoint.every=2")
    train(config, tmp_path)
    torch.save({}, last_checkpoint(tmp_path) / "state.pt")
    with pytest.raises(CheckpointError, match="is not a training state"):
        train(config, tmp_path, resume=True)


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    return train(tiny("steps=2", "checkpoint.every=2"), tmp_path_factory.mktemp("short"))
