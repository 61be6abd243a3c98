"""Packages that fusedres works without, and without which these tests are skipped."""

from types import ModuleType

import pytest


def package(name: str) -> ModuleType:
    """The package, or a module of it."""
    return pytest.importorskip(name, reason=f"needs {name.partition('.')[0]}, which is not installed")
