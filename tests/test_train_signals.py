"""A signal stops a run after a whole step, which is saved; the run that continues it ends like one undisturbed."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ssmclip.__main__ import main
from ssmclip.config import apply_overrides, load_recipe
from ssmclip.models import CheckpointError
from ssmclip.models.files.weights import WEIGHTS_NAME
from ssmclip.rows import Result, read_rows
from ssmclip.train import Stopped, loop, signals, train
from ssmclip.train.checkpoint import last_checkpoint, load_training_state
from ssmclip.train.signals import Signals

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


@pytest.fixture(autouse=True)
def heeds_ctrl_c():
    """In the background a shell has its commands ignore Ctrl-C, which the processes they start inherit."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


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


def test_ctrl_c_in_a_terminal_saves_the_last_step_and_ends_every_process(tmp_path, record_property):
    out = tmp_path / "run"
    settings = [*SETTINGS, "steps=100000", "checkpoint.every=100000", "data.workers=1"]
    command = [sys.executable, "-m", "ssmclip", "train", str(RECIPE), "--set", *settings, "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True)
    try:
        wait_for(out / "rows.jsonl", process)
        workers = children(process.pid)
        os.killpg(process.pid, signal.SIGINT)
        error = process.communicate(timeout=120)[1]
    finally:
        if process.poll() is None:
            process.kill()
    saved = last_checkpoint(out)
    assert process.returncode == 130, error
    assert "Traceback" not in error
    seconds = re.search(rf"saved {re.escape(str(saved))}, ([0-9.]+) s after the signal\. Continue with:\n", error)
    record_property("seconds_from_signal_to_checkpoint", float(seconds[1]))  # some 0.5 on an idle machine
    assert load_training_state(saved)["step"] == series(out)[-1][2] == int(saved.name[5:])
    assert workers
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)


@pytest.fixture
def after_step(monkeypatch):
    """Return a function that has something happen within a step of any run."""

    def at(step, happen):
        def one_step(run, batch, lr):
            measured = unchanged(run, batch, lr)
            if run.step == step:
                happen()
            return measured

        unchanged = loop._Run._one_step
        monkeypatch.setattr(loop._Run, "_one_step", one_step)

    return at


def send(number):
    return lambda: os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)], ids=["TERM", "USR1", "INT"]
)
def test_the_command_ends_with_a_signals_code_and_says_how_to_go_on(tmp_path, after_step, capfd, number, code):
    after_step(1, send(number))
    changes = [*SETTINGS, "steps=3"]
    assert main(["train", str(RECIPE), "--set", *changes, "--out", str(tmp_path)]) == code
    error = capfd.readouterr().err
    name = signal.Signals(number).name
    assert f"\n{name}: saving after this step" in error
    assert ("Ctrl-C again ends at once" in error) == (number == signal.SIGINT)
    assert f"stopped by {name} after step 1; saved {last_checkpoint(tmp_path)}, " in error
    assert load_training_state(last_checkpoint(tmp_path))["step"] == 1
    again = shlex.split(error.splitlines()[-1])
    assert again == ["ssmclip", "train", str(RECIPE), "--set", *changes, "--out", str(tmp_path), "--resume"]


def test_the_same_command_starts_a_run_and_continues_it(tmp_path, after_step):
    command = ["train", str(RECIPE), "--set", *SETTINGS, "steps=3", "--out", str(tmp_path), "--resume-or-start"]
    after_step(2, send(signal.SIGTERM))
    assert main(command) == 75
    assert {step for _, _, step, _ in series(tmp_path)} == {1, 2}
    assert main(command) == 0
    assert [step for _, name, step, _ in series(tmp_path) if name == "loss"] == [1, 2, 3]


@pytest.fixture
def clock(monkeypatch):
    """The time in seconds that signals see, as a list of one number."""
    now = [100.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    return now


def test_a_second_ctrl_c_ends_at_once_but_not_the_terminals_and_the_launchers_copy_of_the_first(clock, capfd):
    with Signals() as noted:
        send(signal.SIGINT)()
        clock[0] += 0.4
        send(signal.SIGINT)()
        assert noted.number == signal.SIGINT
        clock[0] += 0.2
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)()
    assert capfd.readouterr().err.count("saving after this step") == 1
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_after_a_schedulers_warning_is_the_first_one(clock):
    with Signals() as noted:
        send(signal.SIGUSR1)()
        clock[0] += 5
        send(signal.SIGINT)()
        assert noted.number == signal.SIGUSR1


def test_a_second_ctrl_c_within_a_step_saves_nothing(tmp_path, clock, after_step):
    def twice():
        send(signal.SIGINT)()
        clock[0] += 1
        send(signal.SIGINT)()

    after_step(2, twice)
    assert main(["train", str(RECIPE), "--set", *SETTINGS, "steps=3", "--out", str(tmp_path)]) == 130
    assert last_checkpoint(tmp_path) is None
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_stop_reports_the_seconds_from_the_first_signal_to_the_checkpoint(tmp_path, clock, after_step, monkeypatch):
    """The limit is two seconds where a step and a checkpoint take less; it is reported, as machines differ."""

    def save(run):
        clock[0] += 1.25
        saved(run)

    def signalled():
        send(signal.SIGTERM)()
        clock[0] += 0.5  # the rest of the step
        send(signal.SIGUSR1)()

    saved = loop._Run._save
    monkeypatch.setattr(loop._Run, "_save", save)
    after_step(1, signalled)
    with pytest.raises(Stopped) as stopped:
        train(tiny("steps=2"), tmp_path)
    assert (stopped.value.signal, stopped.value.seconds) == (signal.SIGTERM, 1.75)


def test_a_stopped_run_continues_like_one_undisturbed(tmp_path, after_step):
    def validate(model, step):
        return [Result(model="tiny", task="none", metric="one", value=float(step))]

    def no_time(model, step):
        raise AssertionError("a stopped run has no time to validate")

    config = tiny("steps=4", "checkpoint.every=4", "validation.every=2", 'tasks=["none"]')
    train(config, tmp_path / "whole", validate=validate)

    after_step(2, send(signal.SIGTERM))
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
        (_without("skips"), "skips"),
        (_without("scaler"), "scaler"),
        (lambda state: state | {"ranks": [{"cursor": None}]}, r"ranks\[0\].rng"),
        (lambda state: state | {"ranks": [5]}, r"ranks\[0\].rng, ranks\[0\].cursor"),
        (lambda state: state | {"best": {"value": 0.5}}, "best.step"),
    ],
    ids="empty list none no-optimiser no-ranks text negative no-skips no-scaler no-rng number-rank no-best".split(),
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


def test_a_training_state_of_another_step_is_refused(tmp_path, short_run):
    """One of step 10^9 would otherwise pass for a finished run."""
    state = load_training_state(last_checkpoint(short_run))
    folder = tmp_path / "step_00000002"
    folder.mkdir()
    torch.save(state | {"step": 10**9}, folder / "state.pt")
    with pytest.raises(CheckpointError, match=r"state.pt must be of the step in its folder's name, 2 \(got 10{9}\)"):
        load_training_state(folder)


def _short_generator(state):
    state["ranks"][0]["rng"]["torch"] = [torch.zeros(3, dtype=torch.uint8)]


def _no_groups(state):
    state["optimiser"].pop("param_groups")


def _other_groups(state):
    state["optimiser"]["param_groups"].pop()


@pytest.mark.parametrize("change", [_short_generator, _no_groups, _other_groups])
def test_a_training_state_that_does_not_fit_is_named(tmp_path, short_run, change):
    run = tmp_path / "run"
    shutil.copytree(short_run, run)
    file = last_checkpoint(run) / "state.pt"
    state = load_training_state(file.parent)
    change(state)
    torch.save(state, file)
    with pytest.raises(CheckpointError, match=r"state.pt does not fit this run .*previous checkpoint"):
        train(tiny("steps=2", "checkpoint.every=2"), run, resume=True)


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    return train(tiny("steps=2", "checkpoint.every=2"), tmp_path_factory.mktemp("short"))
