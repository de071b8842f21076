"""Runs on file systems that can flush no folder, or nothing, as on Windows; a disk that lost data is told."""

import errno
import fcntl
import os
import stat
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ssmclip import files
from ssmclip.config import apply_overrides, load_recipe
from ssmclip.files import flush, whole
from ssmclip.models import CheckpointError
from ssmclip.train import train
from ssmclip.train.checkpoint import checkpoints, load_training_state, save_checkpoint

TINY = Path(__file__).parents[1] / "recipes" / "tiny.py"
SETTINGS = ["steps=3", "warmup_steps=1", "batch_size=4", "device=cpu", "checkpoint.every=1", "keep=1"]
SETTINGS += ["tensorboard=false", "progress=false", "logging.every=1"]


def is_folder(handle):
    return stat.S_ISDIR(os.fstat(handle).st_mode)


def refuse(number):
    raise OSError(number, os.strerror(number))


def no_folders(handle):
    return refuse(errno.EINVAL) if is_folder(handle) else os.fsync(handle)


def nothing(handle):
    refuse(errno.ENOTSUP)


def windows_open(path, flags):
    return refuse(errno.EACCES) if Path(path).is_dir() else os.open(path, flags)


def windows_fsync(handle):
    """_commit takes handles that are open for writing."""
    readable_only = fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
    return refuse(errno.EBADF) if readable_only else os.fsync(handle)


def system(name="posix", fsync=os.fsync, opens=os.open, flushed=None):
    """What files.py knows of the operating system; `flushed` collects the names that were flushed."""

    def flush_and_tell(handle):
        fsync(handle)
        if flushed is not None:
            flushed.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)

    known = {key: getattr(os, key) for key in ("O_RDONLY", "O_RDWR", "close", "fstat", "getpid", "path")}
    return SimpleNamespace(name=name, open=opens, fsync=flush_and_tell, **known)


SYSTEMS = {
    "folders cannot be flushed": system(fsync=no_folders),
    "nothing can be flushed": system(fsync=nothing),
    "windows": system("nt", windows_fsync, windows_open),
}


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_run_starts_saves_and_goes_on(tmp_path, monkeypatch, name):
    monkeypatch.setattr(files, "os", SYSTEMS[name])
    if name == "windows":
        monkeypatch.setitem(sys.modules, "fcntl", None)  # importing it raises ImportError
    config = apply_overrides(load_recipe(TINY), SETTINGS)
    train(config, tmp_path)
    (tmp_path / "config.json.12-34.partial").write_text("left by a kill")
    train(config, tmp_path, resume=True)
    (last,) = checkpoints(tmp_path)
    assert load_training_state(last)["step"] == 3
    assert (tmp_path / "checkpoints" / "last").read_text() == "step_00000003\n"
    assert [path for path in tmp_path.rglob("*") if ".partial" in path.name or path.name.startswith(".old")] == []


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="names of open files are read from /proc")
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("posix", {"state.pt", "weights", ".partial-step_00000001", "checkpoints"}),
        ("nt", {"state.pt", "weights"}),  # Windows has no way to flush folders
    ],
)
def test_everything_that_can_be_flushed_is(tmp_path, monkeypatch, name, expected):
    flushed = []
    windows = {"fsync": windows_fsync, "opens": windows_open} if name == "nt" else {}
    monkeypatch.setattr(files, "os", system(name, flushed=flushed, **windows))
    (tmp_path / "checkpoints").mkdir()
    save_checkpoint(tmp_path, 1, lambda folder: (folder / "weights").write_text("w"), {"step": 1}, 2, None)
    named = {entry for entry in flushed if entry.startswith("last.")}
    assert len(named) == 1  # the file that names the last checkpoint, before it is renamed
    assert set(flushed) - named == expected


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_lost_data_stops_the_checkpoint(tmp_path, monkeypatch, number):
    (tmp_path / "checkpoints").mkdir()
    save_checkpoint(tmp_path, 1, lambda folder: None, {"step": 1}, 2, None)
    monkeypatch.setattr(files, "os", system(fsync=lambda handle: is_folder(handle) or refuse(number)))
    with pytest.raises(CheckpointError, match=r"could not save .*step_00000002.*step_00000001; free some space"):
        save_checkpoint(tmp_path, 2, lambda folder: None, {"step": 2, "w": torch.zeros(9)}, 2, None)
    assert [path.name for path in checkpoints(tmp_path)] == ["step_00000001"]
    (tmp_path / "settings").write_text("old")
    with pytest.raises(OSError, match=os.strerror(number)), whole(tmp_path / "settings", durable=True) as part:
        part.write_text("new")
    assert (tmp_path / "settings").read_text() == "old"
    assert list(tmp_path.glob("*.partial")) == []


def test_flushing_what_is_not_there_is_no_error(tmp_path):
    flush(tmp_path / "gone")


def test_an_old_checkpoint_in_use_does_not_stop_a_run(tmp_path, monkeypatch):
    """Windows renames no folder that has an open file."""
    (tmp_path / "checkpoints").mkdir()
    save_checkpoint(tmp_path, 1, lambda folder: None, {"step": 1}, 1, None)
    rename = Path.rename

    def in_use(self, target):
        if self.name == "step_00000001":
            raise PermissionError(errno.EACCES, "The process cannot access the file")
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", in_use)
        save_checkpoint(tmp_path, 2, lambda folder: None, {"step": 2}, 1, None)
    assert [path.name for path in checkpoints(tmp_path)] == ["step_00000001", "step_00000002"]
    save_checkpoint(tmp_path, 3, lambda folder: None, {"step": 3}, 1, None)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir() if path.is_dir()] == ["step_00000003"]
