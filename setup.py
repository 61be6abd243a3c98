"""The part of the build that pyproject.toml can't say: the compiled library and its sources.

FUSEDRES_BUILD chooses what is built ahead of time:

    auto   (default) the compiled library if it can be built here and now, otherwise the pure Python package
    none   the pure Python package
    cpu    the CPU library, or an error
    cuda   the CPU and the CUDA library, or an error; for all GPUs unless FUSEDRES_CUDA_ARCHITECTURES says which

The pure Python package is complete: it carries the sources, and what wasn't built here is built at first use. An
editable install is always pure: its library is built at first use, from the sources as they are then.
"""

import enum
import os
import shutil
import sys
import types
from importlib.util import find_spec
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent

# The builder needs the standard library only; this lets it be imported without the package, which needs torch.
package = types.ModuleType("fusedres")
package.__path__ = [str(ROOT / "fusedres")]
sys.modules["fusedres"] = package

from fusedres.build import BuildError, build  # noqa: E402
from fusedres.native_sources import CUDA, NATIVE  # noqa: E402


class Choice(enum.Enum):
    AUTO = "auto"
    NONE = "none"
    CPU = "cpu"
    CUDA = "cuda"


def requested() -> Choice:
    text = os.environ.get("FUSEDRES_BUILD", "auto")
    try:
        return Choice(text)
    except ValueError:
        choices = ", ".join(choice.value for choice in Choice)
        raise SystemExit(f"FUSEDRES_BUILD must be one of {choices}; got {text!r}") from None


def builds_ahead(choice: Choice) -> bool:
    """Whether the library goes into this wheel; an explicit choice that can't be met ends the build."""
    if choice is Choice.NONE:
        return False
    if find_spec("torch") is not None:
        return True
    if choice is not Choice.AUTO:
        raise SystemExit(
            f"FUSEDRES_BUILD={choice.value}: torch is not in the build environment; "
            "install it first and pass --no-build-isolation"
        )
    return False


CHOICE = requested()
AHEAD = builds_ahead(CHOICE)


class BuildPy(build_py):
    """Carries csrc/ into the wheel as fusedres/csrc, so that an installed package can build at first use.

    csrc/ stands beside the package, not in it; an editable install leaves it there and finds it one level up.
    """

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        into = Path(self.build_lib) / "fusedres"
        shutil.copytree(ROOT / "csrc", into / "csrc", dirs_exist_ok=True)
        if not AHEAD:
            return
        # A wheel is for other machines' GPUs too.
        os.environ.setdefault("FUSEDRES_CUDA_ARCHITECTURES", "all")
        try:
            for library in (NATIVE, CUDA) if CHOICE is Choice.CUDA else (NATIVE,):
                build(library, into / "prebuilt")
        except BuildError as error:
            if CHOICE is not Choice.AUTO:
                raise SystemExit(f"FUSEDRES_BUILD={CHOICE.value}: {error}") from error
            print(f"fusedres: {error}; the package installs without the compiled library", file=sys.stderr)


class BdistWheel(bdist_wheel):
    """A wheel with the library is for one platform, and for any Python: the stable ABI knows of none."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = not AHEAD

    def get_tag(self) -> tuple[str, str, str]:
        platform = super().get_tag()[2]
        return "py3", "none", platform if AHEAD else "any"


setup(cmdclass={"build_py": BuildPy, "bdist_wheel": BdistWheel})
