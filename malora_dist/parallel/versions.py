"""The versions this package runs with, checked before they are imported."""

from __future__ import annotations

import platform
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

from packaging.specifiers import SpecifierSet

from malora_dist.errors import BackendUnavailableError

#: The ranges of setup.py for what a run depends on most; a test compares the two.
SUPPORTED = {"torch": ">=2.10", "megatron-core": ">=0.16,<0.20"}
SUPPORTED_PYTHON = ">=3.11,<3.13"


def check_versions(installed: Callable[[str], str] = version, python: str | None = None) -> None:
    """Refuse a Python, torch or megatron-core that is missing or out of range. Imports none of them.

    Args:
        installed: gives the version of an installed package.
        python: the running Python's version by default.

    Raises:
        BackendUnavailableError: names the version found, the supported range and the command that mends it.
    """
    python = python or platform.python_version()
    if not SpecifierSet(SUPPORTED_PYTHON).contains(python, prereleases=True):
        raise BackendUnavailableError(
            f"Python {python}: must be {SUPPORTED_PYTHON}; make an environment with a supported one"
        )
    for package, supported in SUPPORTED.items():
        cure = f"pip install '{package}{supported}'"
        try:
            found = installed(package)
        except PackageNotFoundError as error:
            raise BackendUnavailableError(f"{package} is not installed: must be {supported}; {cure}") from error
        if not SpecifierSet(supported).contains(found, prereleases=True):
            raise BackendUnavailableError(f"{package} {found}: must be {supported}; {cure}")
