"""Checks of printed source with ruff."""

import subprocess
import sys


def ruff_accepts(text: str) -> bool:
    return _ruff("format", "--check", text=text)


def ruff_finds_nothing(text: str) -> bool:
    """Returns whether lint finds nothing, with jaxensemble as a third-party package, as in users' code."""
    first_party = "--config=lint.isort.known-third-party=['jaxensemble']"
    return _ruff("check", "--select=F,E,I,UP,B,C4", first_party, text=text)


def _ruff(*arguments: str, text: str) -> bool:
    command = [sys.executable, "-m", "ruff", *arguments, "--isolated", "--line-length=120", "-"]
    return subprocess.run(command, input=text, text=True, capture_output=True, check=False).returncode == 0
