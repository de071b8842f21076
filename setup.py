"""The one build step that pyproject.toml has no word for: recipes/, at the top, is installed inside the package."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

RECIPES = sorted(path.as_posix() for path in Path("recipes").glob("*.py"))


class BuildWithRecipes(build_py):
    """Copy recipes/*.py to ssmclip/recipes/ of what is built. An editable install reads them where they are."""

    def run(self) -> None:
        super().run()
        for source, target in [] if self.editable_mode else zip(RECIPES, self._targets(), strict=True):
            self.mkpath(str(Path(target).parent))
            self.copy_file(source, target)

    def get_source_files(self) -> list[str]:
        return [*super().get_source_files(), *RECIPES]  # which a source distribution takes, too

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        return [*super().get_outputs(include_bytecode), *self._targets()]

    def _targets(self) -> list[str]:
        return [str(Path(self.build_lib, "ssmclip", source)) for source in RECIPES]


setup(cmdclass={"build_py": BuildWithRecipes})
