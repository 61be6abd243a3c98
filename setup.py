"""The part of the build that pyproject.toml can't say: the compiled library and its sources.

FUSEDRES_BUILD chooses what is built ahead of time:

    auto   (default) the compiled library if it can be built here and now, otherwise the pure Python package
    none   the pure Python package
    cpu    the CPU library, or an error
    cuda   the CPU and CUDA library, or an error

The pure Python package is complete: it carries the sources, and what wasn't built here is built at first use.
"""

import enum
import os
import shutil
from importlib.util import find_spec
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

CSRC = Path(__file__).parent / "csrc"


class Build(enum.Enum):
    AUTO = "auto"
    NONE = "none"
    CPU = "cpu"
    CUDA = "cuda"


def requested_build() -> Build:
    text = os.environ.get("FUSEDRES_BUILD", "auto")
    try:
        return Build(text)
    except ValueError:
        choices = ", ".join(build.value for build in Build)
        raise SystemExit(f"FUSEDRES_BUILD must be one of {choices}; got {text!r}") from None


def what_is_missing(build: Build) -> str:
    """Why the compiled library can't be built ahead of time."""
    suffix = ".cu" if build is Build.CUDA else ".cpp"
    if not any(CSRC.rglob(f"*{suffix}")):
        return f"this version of fusedres has no {suffix} sources in csrc/"
    if find_spec("torch") is None:
        return "torch is not in the build environment: install it first and pass --no-build-isolation"
    # The seam: with sources and torch at hand, ext_modules are to be made here, for `auto` as well.
    return "setup.py has no build step for csrc/ yet"


class BuildPy(build_py):
    """Carries csrc/ into the wheel as fusedres/csrc, so that an installed package can build at first use.

    csrc/ stands beside the package, not in it; an editable install leaves it there and finds it one level up.
    """

    def run(self) -> None:
        super().run()
        if CSRC.is_dir() and not self.editable_mode:
            shutil.copytree(CSRC, Path(self.build_lib) / "fusedres" / "csrc", dirs_exist_ok=True)


build = requested_build()
if build in (Build.CPU, Build.CUDA):
    raise SystemExit(f"FUSEDRES_BUILD={build.value}: {what_is_missing(build)} (auto installs without it)")

setup(cmdclass={"build_py": BuildPy})
