"""Build what would be released, check it, install it and use it: `make release-check`.

    sdist -> wheel built from it -> twine check --strict -> an environment with that wheel -> ssmclip quickstart

The environment is new except for third-party packages, which are those of the environment that runs this: a copy of
PyTorch alone takes minutes and gigabytes. The editable install of ssmclip is not seen from there, and `pip check` says
whether what the wheel requires is there, in the right versions. `--fresh` installs all of it instead.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
TINY = "steps=8 warmup_steps=2 batch_size=16 progress=false tensorboard=false validation.every=0 checkpoint.every=8"
WHERE = "import ssmclip, sys; print(ssmclip.__file__)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--fresh", action="store_true", help="install all requirements anew: minutes and gigabytes")
    fresh = parser.parse_args().fresh
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wheel = step("build", build, folder / "dist")
        step("twine check", check, folder / "dist")
        python = step("install", install, folder / "environment", wheel, fresh)
        step("quickstart", use, python, folder / "elsewhere")


def step(name: str, function, *arguments):
    start = time.perf_counter()
    result = function(*arguments)
    print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
    return result


def run(*command: str | Path, cwd: Path = ROOT, **environment: str) -> str:
    """Run a command; return its output. Exits with both outputs where it fails."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | environment
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}")
    return done.stdout


def build(out: Path) -> Path:
    """Build the source distribution, and the wheel from it; return the wheel."""
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT)
    (wheel,) = out.glob("*.whl")
    (source,) = out.glob("*.tar.gz")
    for file in (wheel, source):  # the demo's model is 1.5 MB of both
        assert file.stat().st_size < 4e6, f"{file.name} is above 4 MB: what is in it?"
    return wheel


def check(dist: Path) -> None:
    run(sys.executable, "-m", "twine", "check", "--strict", *sorted(dist.iterdir()))


def install(folder: Path, wheel: Path, fresh: bool) -> Path:
    """Return the Python of a new environment that has the wheel, and the packages it asks for."""
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    pip = (sys.executable, "-m", "pip", "--python", python)
    if fresh:
        run(*pip, "install", "--quiet", wheel, "--constraint", ROOT / "constraints.txt")
    else:
        run(*pip, "install", "--quiet", "--no-deps", "--no-index", wheel)
        inside = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
        # A folder that a .pth file names is searched, but the .pth files in it, the editable install's, are not read.
        paths = dict.fromkeys(sysconfig.get_path(kind) for kind in ("purelib", "platlib"))
        (inside / "third_party.pth").write_text("\n".join(paths) + "\n", encoding="utf-8")
    run(*pip, "check")
    return python


def use(python: Path, folder: Path) -> None:
    """Train, evaluate and report with what is installed, from a folder that is no checkout."""
    folder.mkdir()
    installed = Path(run(python, "-c", WHERE, cwd=folder).strip())
    assert installed.is_relative_to(python.parents[1]), f"not the wheel's: {installed}"
    command = python.with_name("ssmclip")
    cache = {"XDG_CACHE_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    said = run(command, "quickstart", "--recipe", "recipes/tiny.py", "--set", *TINY.split(), cwd=folder, **cache)
    assert "CLIP-VMamba-Nano" in said, said
    assert (folder / "runs/quickstart/report.html").stat().st_size > 10_000


if __name__ == "__main__":
    main()
