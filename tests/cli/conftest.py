"""The program as a user meets it: run in a process of its own, jobs scripted by fake_program.py."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

FAKE = Path(__file__).with_name("fake_program.py")
Program = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def clean_environment() -> dict[str, str]:
    """This environment without what would change how the program behaves."""
    strange = ("CRITIC_TRAIN_", "FAKE_", "NO_COLOR", "FORCE_COLOR", "COLUMNS", "GITHUB_ACTIONS", "PYTHONIOENCODING")
    return {name: value for name, value in os.environ.items() if not name.startswith(strange)}


@pytest.fixture
def fake_command() -> list[str]:
    """The command line that runs the program with scripted jobs."""
    return [sys.executable, str(FAKE)]


@pytest.fixture
def program(clean_environment: dict[str, str], fake_command: list[str], tmp_path: Path) -> Program:
    """Run the program to its end: `program("fit", "--data", "x", FAKE_JOB="finish")`."""

    def run(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [*fake_command, *arguments],
            env=clean_environment | environment,
            capture_output=True,
            encoding="utf-8",
            cwd=tmp_path,
            timeout=60,
        )

    return run
