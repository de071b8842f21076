"""The model tests of timm and open_clip themselves, run on this package's models.

    python benchmarks/timm_tests.py --out results/timm_tests.jsonl    a quarter of an hour on two cores

The tests are in the source distributions of the installed versions: in build/, or else pip downloads them there from
its configured index. timm's run on images of 64 pixels, on every registered encoder; open_clip's on every
configuration, with inputs and outputs that its own generator makes first: they hold that a model built again from the
same seed gives the same. TorchScript is left out for networks with scans (see `ssmclip.models.networks.vmamba.VMamba`).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from importlib import import_module, metadata
from pathlib import Path
from types import ModuleType

import open_clip
import pytest
import timm

import ssmclip
from ssmclip.models.plugins import CONFIGS
from ssmclip.rows import Result, describe_run, write_rows

TASK = "timm_tests"
BUILD = Path(__file__).parents[1] / "build"
OUTCOMES = ("passed", "failed", "skipped")
SIZES = dict.fromkeys((f"TARGET_{name}_SIZE" for name in ("FWD", "BWD", "JIT", "FWD_FX", "BWD_FX")), 64)
MARKERS = "base forward backward cfg cfg_nonstd torchscript features fxforward fxbackward timeout regression_test"
NO_SCRIPT = "scans choose their implementation at every call, which torch.jit.script cannot say; torch.jit.trace works"
FAMILIES = ("vmamba", "simba", "mambaout", "vit", "climp")


def encoders() -> set[str]:
    """Return the names of the encoders that this package registers with timm."""
    return {name for name in timm.list_models() if timm.model_entrypoint(name).__module__.startswith(ssmclip.__name__)}


def clips() -> set[str]:
    """Return the names of the configurations that open_clip builds; others refuse it by a field that says so."""
    return {path.stem for path in CONFIGS.glob("*.json") if "not by open_clip" not in path.read_text(encoding="utf-8")}


def family(name: str) -> str:
    """Return the family of a model: the first of FAMILIES that its name has in it."""
    return next(family for family in FAMILIES if family in name.lower())


def sdist(package: str) -> Path | None:
    """Return the installed version's source distribution; print the reason and return None where it cannot be had."""
    version = metadata.version(package)
    path = BUILD / f"{package}-{version}.tar.gz"
    if not path.exists():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        done = subprocess.run([*command, "--dest", BUILD, f"{package}=={version}"], capture_output=True, text=True)
        if done.returncode or not path.exists():
            reason = (done.stderr.strip().splitlines() or ["pip left no such file"])[-1]
            print(f"{package}: skipped, the source distribution of {version} cannot be had ({reason})")
            return None
    return path


def unpack_tests(path: Path, folder: Path) -> Path:
    """Unpack the tests of a source distribution; return their folder."""
    with tarfile.open(path) as tar:
        top = tar.getnames()[0].split("/")[0]
        tar.extractall(folder, [m for m in tar if m.name.startswith(f"{top}/tests/")], filter="data")
    return folder / top / "tests"


class Suite:
    """A plugin of pytest: keeps the tests of some models, and counts how those of each family ended."""

    def __init__(self, names: set[str]):
        self.names = names
        self.counts: Counter[tuple[str, str]] = Counter()
        self.families: dict[str, str] = {}

    def pytest_configure(self, config: pytest.Config) -> None:
        for marker in MARKERS.split():
            config.addinivalue_line("markers", marker)

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [item for item in items if self._name(item) in self.names]
        for item in items:
            self.families[item.nodeid] = family(self._name(item))
            vars(item.module).update({name: size for name, size in SIZES.items() if hasattr(item.module, name)})
            if "torchscript" in item.name and self.families[item.nodeid] in ("vmamba", "simba"):
                item.add_marker(pytest.mark.skip(reason=NO_SCRIPT))

    @staticmethod
    def _name(item: pytest.Item) -> str:
        return str(item.callspec.params.get("model_name", "")).split(".")[0] if hasattr(item, "callspec") else ""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.counts[self.families[report.nodeid], report.outcome] += 1


def run(file: Path, names: set[str]) -> Suite:
    """Run the tests of a file that are about the models of these names."""
    suite = Suite(names)
    options = ["-q", "-rfs", "-n0", "--tb=line", "-c", os.devnull, "--rootdir", str(file.parent), "--strict-markers"]
    pytest.main([*options, "--import-mode=importlib", "-p", "no:cacheprovider", "-W", "ignore", str(file)], [suite])
    return suite


def run_timm(tests: Path) -> Suite:
    """Run timm's tests of models. A test for modules that are listed there is run on all our models."""
    names = encoders()
    everything = timm.list_models

    def list_models(*args, module: object = "", **kwargs) -> list[str]:
        return [name for name in everything(*args, **kwargs) if name.split(".")[0] in names]

    with replaced(timm, list_models):
        return run(tests / "test_models.py", names)


def run_open_clip(tests: Path) -> Suite:
    """Generate the inputs and outputs that open_clip's tests of inference compare with, and run those tests."""
    sys.path.insert(0, str(tests))
    names = clips()
    import_module("util_test").create_test_data(sorted(names))
    everything = open_clip.list_models

    def list_models() -> list[str]:
        return [name for name in everything() if name in names]

    with replaced(open_clip, list_models):
        return run(tests / "test_inference.py", names)


class replaced:
    """Replace `list_models` of a package for a while."""

    def __init__(self, package: ModuleType, by: Callable[..., list[str]]):
        self.package, self.before, self.by = package, package.list_models, by

    def __enter__(self) -> None:
        self.package.list_models = self.by

    def __exit__(self, *exception: object) -> None:
        self.package.list_models = self.before


def rows(package: str, counts: Counter[tuple[str, str]]) -> Iterable[Result]:
    """Make a row of each family and outcome. `n`: the tests there are of the family."""
    for name in sorted({name for name, _ in counts}):
        total = sum(counts[name, outcome] for outcome in OUTCOMES)
        for outcome in OUTCOMES:
            yield Result(name, TASK, outcome, counts[name, outcome], n=total, where={"case": package})


SUITES = {"timm": run_timm, "open_clip_torch": run_open_clip}


def main() -> int:
    """Run what can be had; return 1 if a test failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", choices=SUITES, help="one of the two packages")
    args = parser.parse_args()
    made: list[Result] = []
    with tempfile.TemporaryDirectory() as folder:
        for package in [args.only] if args.only else SUITES:
            if path := sdist(package):
                made += rows(package, SUITES[package](unpack_tests(path, Path(folder))).counts)
    if made:
        write_rows(args.out, made, describe_run())
    return int(any(row.metric == "failed" and row.value for row in made))


if __name__ == "__main__":
    sys.exit(main())
