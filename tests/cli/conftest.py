"""The program as a user meets it: run in a process of its own, jobs scripted by scripted.py."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import scripted
import warm

FAKE = Path(scripted.__file__)
Program = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def clean_environment() -> dict[str, str]:
    """This environment without what would change how the program behaves."""
    strange = ("CRITIC_TRAIN_", "FAKE_", "NO_COLOR", "FORCE_COLOR", "COLUMNS", "GITHUB_ACTIONS", "PYTHONIOENCODING")
    return {name: value for name, value in os.environ.items() if not name.startswith(strange)}


@pytest.fixture
def fake_command() -> list[str]:
    """The command line that runs the program with scripted jobs, from the start of the interpreter."""
    return [sys.executable, str(FAKE)]


@pytest.fixture
def program(clean_environment: dict[str, str], tmp_path: Path) -> Program:
    """Run the program to its end: `program("fit", "--data", "x", FAKE_JOB="finish")`."""

    def run(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
        told = clean_environment | environment
        return warm.program(*arguments, cwd=tmp_path, environment=told, before=scripted.install)

    return run


@pytest.fixture
def fresh_program(clean_environment: dict[str, str], fake_command: list[str], tmp_path: Path) -> Program:
    """The same from the start of an interpreter, which itself looks at some variables."""

    def run(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [*fake_command, *arguments],
            env=clean_environment | environment,
            capture_output=True,
            encoding="utf-8",
            cwd=tmp_path,
            timeout=300,
        )

    return run
