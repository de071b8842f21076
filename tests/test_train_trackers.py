"""Trackers show what rows.jsonl has, and cannot stop a run; the times of steps."""

import sys
import threading
from pathlib import Path

import pytest
import torch
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ssmclip.config import apply_overrides, load_recipe
from ssmclip.registry import UnknownName
from ssmclip.rows import Result, read_rows
from ssmclip.train import loop, trackers, train
from ssmclip.train.timing import StepTimes
from ssmclip.train.trackers import tag

RECIPE = Path(__file__).parents[1] / "recipes" / "tiny.py"
SETTINGS = ["source=synthetic:digits", "progress=false", "logging.every=1", "warmup_steps=1", "batch_size=4"]
TIMED = ("images_per_s", "memory_mib", "step_s", "slowest_step_s", "data_wait_s", "slowest_data_wait_s")


def tiny(*overrides):
    return apply_overrides(load_recipe(RECIPE), [*SETTINGS, "device=cpu", *overrides])


def rows_of(out):
    return read_rows(out / "rows.jsonl")[1]


def learnt(out):
    return [(row.metric, row.where["step"], row.value) for row in rows_of(out) if row.metric not in TIMED]


def none(model, step):
    return [Result("tiny", "none", "one", float(step)), Result("tiny", "none", "one", 0.5, where={"level": "a=2"})]


def test_tensorboard_shows_the_rows_of_a_resumed_run(tmp_path):
    config = tiny("steps=3", "validation.every=2", 'tasks=["none"]', "checkpoint.every=2")
    train(config, tmp_path, validate=none)
    (tmp_path / "checkpoints" / "step_00000003").rename(tmp_path / "taken away")
    train(config, tmp_path, resume=True, validate=none)  # the third step again
    shown = EventAccumulator(str(tmp_path / "tensorboard"))
    shown.Reload()
    events = [(name, event) for name in shown.Tags()["scalars"] for event in shown.Scalars(name)]
    scalars = {(name, event.step): event.value for name, event in events}
    assert len(events) == len(scalars)
    rows = {(tag(row), row.where["step"]): row.value for row in rows_of(tmp_path)}
    assert {"train/loss", "none/one", "none/one/a_2"} <= {name for name, _ in rows}
    assert scalars == pytest.approx(rows, rel=1e-6)  # float32 there


class Recorder(GeneralTracker):
    name = "recorder"
    requires_logging_directory = False
    seen: list

    def __init__(self, project):
        super().__init__()
        self.seen.append(("project", project))

    @property
    def tracker(self):
        return self

    def store_init_configuration(self, values):
        self.seen.append(("settings", values))

    def log(self, values, step=None, **_):
        self.seen.append((step, values))

    def finish(self):
        self.seen.append("finished")


@pytest.fixture
def recorder(monkeypatch):
    """A tracker that is known as "recorder"; a subclass may replace it."""
    kind = type("OwnRecorder", (Recorder,), {"seen": []})
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "recorder", kind)
    return kind


TRACKED = ["tensorboard=false", 'trackers=["recorder"]', "steps=2"]


def test_a_tracker_gets_the_settings_and_every_row(tmp_path, recorder):
    train(tiny(*TRACKED, "logging.project=mine"), tmp_path)
    project, (_, settings), *logged, finished = recorder.seen
    assert (project, finished) == (("project", "mine"), "finished")
    assert settings["steps"] == 2
    assert settings["data.source"] == "synthetic:digits"
    assert all(isinstance(value, int | float | str) for value in settings.values())
    rows = {(row.where["step"], f"{row.task}/{row.metric}"): row.value for row in rows_of(tmp_path)}
    assert {(step, name): value for step, values in logged for name, value in values.items()} == rows


def unreachable(*_, **__):
    raise ConnectionError("connection to tracker.invalid refused\nmore lines")


@pytest.mark.parametrize("method", ["__init__", "start", "log", "finish"])
def test_a_tracker_that_fails_is_left_out_with_a_warning(tmp_path, recorder, capsys, method):
    setattr(recorder, method, unreachable)
    train(tiny(*TRACKED), tmp_path / "tracked")
    error = capsys.readouterr().err
    assert error.count("warning: the tracker recorder is left out (connection to tracker.invalid refused)") == 1
    assert "Traceback" not in error
    if method == "start":
        train(tiny("tensorboard=false", "steps=2"), tmp_path / "alone")
        assert learnt(tmp_path / "tracked") == learnt(tmp_path / "alone")


@pytest.mark.parametrize("method", ["start", "log"])
def test_a_tracker_that_hangs_does_not_hold_training(tmp_path, recorder, capsys, monkeypatch, method):
    answered = threading.Event()
    setattr(recorder, method, lambda *_, **__: answered.wait(60))
    monkeypatch.setattr(trackers, "_START_S", 0.05)
    monkeypatch.setattr(trackers, "_END_S", 0.05)
    try:
        train(tiny(*TRACKED), tmp_path)
    finally:
        answered.set()
    assert "the tracker recorder did not take all numbers in time" in capsys.readouterr().err
    assert max(step for _, step, _ in learnt(tmp_path)) == 2


def test_tensorboard_without_its_folder_is_left_out(tmp_path, capsys):
    (tmp_path / "tensorboard").write_text("a file in its place")
    train(tiny("steps=1", "warmup_steps=0"), tmp_path)
    assert "warning: the tracker tensorboard is left out (" in capsys.readouterr().err
    assert learnt(tmp_path)


def test_a_tracker_that_is_not_installed_or_unknown_is_an_error_before_there_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="the tracker wandb is not installed: pip install wandb"):
        train(tiny('trackers=["wandb"]'), tmp_path / "run")
    with pytest.raises(UnknownName, match="unknown tracker 'wandbb'; did you mean 'wandb'"):
        train(tiny('trackers=["wandbb"]'), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_mlflow_shows_the_rows(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")  # the slim mlflow is without its data base
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    train(tiny("tensorboard=false", 'trackers=["mlflow"]', "steps=2"), tmp_path / "run")
    (run,) = mlflow.search_runs(experiment_names=["ssmclip"], output_format="list")
    assert (run.info.run_name, run.info.status) == ("run", "FINISHED")
    assert run.data.params["batch_size"] == "4"
    rows = {tag(row): row.value for row in rows_of(tmp_path / "run")}  # the last of each
    assert run.data.metrics == pytest.approx(rows)


def test_times_of_steps_over_processes():
    seconds = iter([0, 0, 0, 2, 5, 100, 100, 101, 109])  # made; (begin, waits, goes on, ends) twice
    times = StepTimes(lambda: next(seconds))
    for _ in range(2):
        times.begin()
        with times.waiting():
            pass
        times.ended()
    other = torch.tensor([[6.0, 5.0, 30.0]])  # another process's mean step, mean wait and longest step
    numbers = times.read(lambda own: torch.cat([own, other]), torch.device("cpu"))
    assert numbers == {
        "step_s": (7 + 6) / 2,
        "slowest_step_s": 30,
        "data_wait_s": (1.5 + 5) / 2,
        "slowest_data_wait_s": 5,
    }
    with pytest.raises(ValueError, match="end a step first"):
        times.read(lambda own: own, torch.device("cpu"))


def test_a_runs_times_have_the_wait_for_data_and_leave_out_validation(tmp_path, monkeypatch):
    now = [0.0]

    def slow(function, seconds):
        def wrapper(*arguments):
            now[0] += seconds
            return function(*arguments)

        return wrapper

    def start(*given):
        run = started(*given)
        run.times = StepTimes(lambda: now[0])
        return run

    started = loop._Run.start
    monkeypatch.setattr(loop, "next", slow(next, 2), raising=False)
    monkeypatch.setattr(loop._Run, "_one_step", slow(loop._Run._one_step, 3))
    monkeypatch.setattr(loop._Run, "start", start)
    changes = ["steps=4", "logging.every=2", "validation.every=1", 'tasks=["none"]', "tensorboard=false"]
    train(tiny(*changes), tmp_path, validate=slow(none, 100))
    times = [(row.metric, row.value) for row in rows_of(tmp_path) if row.metric.endswith("_s")]
    wrong = {name: value for name, value in times if name != "images_per_s" and value != (2 if "wait" in name else 5)}
    assert not wrong
    assert len(times) == 2 * 5
