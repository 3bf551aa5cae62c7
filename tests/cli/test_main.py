"""The program as a whole: pages, wrong command lines, what it imports, what it costs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main

from critic_train import __version__
from critic_train_cli.main import app

ROOT = Path(__file__).parents[2]
LIGHT = {"annotated_doc", "click", "shellingham", "typer", "typing_extensions"}
"""What may be imported for a page or for an unknown flag; `python -m bench startup` measures what that takes."""
HEAVY = {"torch", "transformers", "pyarrow", "numpy", "safetensors", "matplotlib", "jinja2", "scipy", "peft", "fsspec"}
"""What may not be imported before a job starts. To read the value of a flag typer brings in pydantic."""


NAMES = ["fit", "eval", "predict", "report", "check", "split", "convert", "verify", "export", "show"]


def test_commands_are_these():
    assert list(typer.main.get_command(app).commands) == NAMES


def test_version(program):
    shown = program("--version")
    assert (shown.returncode, shown.stdout) == (0, f"critic-train {__version__}\n")


def test_no_command_shows_the_page_and_is_wrong(program):
    shown = program()
    assert (shown.returncode, shown.stdout) == (2, "")
    assert "Usage: critic-train COMMAND" in shown.stderr


@pytest.mark.parametrize(
    ("arguments", "error", "hint"),
    [
        (["fti"], "no such command 'fti'", "did you mean 'fit'?"),
        (["fit", "--epoch", "3"], "no such option: --epoch", "did you mean --epochs?"),
        (["fit", "--batch_size", "3"], "no such option: --batch_size", "did you mean --batch-size?"),
        (["fit", "--no-no-clip"], "no such option: --no-no-clip", "did you mean --no-clip?"),
        (["fit", "-x"], "no such option: -x", "critic-train fit --help lists every flag"),
        (["fit", "rollouts/"], "unexpected argument: rollouts/", "as in --data rollouts/"),
        (["fit", "--data"], "option '--data' requires an argument", "--help"),
        (["fit"], "--data is needed", "critic-train fit --help lists every flag"),
        (["eval", "--resamples", "0", "--data", "x"], "--resamples must be at least 1, not 0", "eval --help"),
        (["fit", "--data", "x", "--epochs", "two"], "--epochs must be a whole number, not 'two'", None),
        (["fit", "--data", "x", "--lr", ""], "--lr must be a number, not ''", None),
        (["fit", "--data", "x", "--preset", "smal"], "not 'smal'; did you mean small?", None),
    ],
)
def test_wrong_command_lines(program, arguments, error, hint):
    shown = program(*arguments)
    assert (shown.returncode, shown.stdout) == (2, "")
    assert shown.stderr.startswith("error: ")
    assert error in shown.stderr.splitlines()[0]
    assert hint is None or hint in shown.stderr.splitlines()[1]
    assert "Traceback" not in shown.stderr


def test_of_several_ranks_only_rank_0_speaks(program):
    """torchrun starts every rank with the same command line; a mistake in it is told once."""
    for rank, spoken in (("0", True), ("1", False)):
        shown = program("fit", "--epochs", "-1", "--data", "x", WORLD_SIZE="2", RANK=rank)
        assert (shown.returncode, shown.stdout, bool(shown.stderr)) == (2, "", spoken)
        done = program("fit", "--data", "x", WORLD_SIZE="2", RANK=rank, FAKE_JOB="finish")
        assert (done.returncode, bool(done.stdout), bool(done.stderr)) == (0, spoken, spoken)


@pytest.mark.parametrize(
    "arguments",
    [
        *(["--help"], ["--version"], [], ["fti"]),
        *([command, "--help"] for command in NAMES),
        *(["fit"], ["fit", "--epoch"], ["fit", "--no-no-clip"]),
    ],
    ids=" ".join,
)
def test_pages_and_unknown_flags_import_next_to_nothing(clean_environment, arguments):
    """So that they answer at once."""
    names = imported(clean_environment, arguments)
    assert "typer" in names
    assert names <= LIGHT | {"critic_train", "critic_train_cli"}


@pytest.mark.parametrize(
    "arguments",
    [
        *(["fit", "--epochs", "two"], ["fit", "--data", "x", "--preset", "smal"], ["fit", "rollouts/"]),
        *(["fit", "--data", "x", "--print-config"], ["fit", "--data", "x", "--config", "none.toml"]),
    ],
    ids=" ".join,
)
def test_nothing_heavy_is_imported_before_a_job_starts(clean_environment, arguments):
    names = imported(clean_environment, arguments)
    assert "typer" in names
    assert not names & HEAVY


def imported(environment, arguments):
    """Third-party packages and our own that the program has imported when it ends."""
    script = (
        "import atexit, sys\n"
        "before = set(sys.modules)\n"  # what this interpreter brings in at its start, such as an editable install
        "def show():\n"
        "    names = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "    print('IMPORTED', *sorted(names - set(sys.stdlib_module_names)), file=sys.stderr)\n"
        "atexit.register(show)\n"
        f"sys.path[:0] = ['core', 'cli']; sys.argv = ['critic-train', *{arguments}]\n"
        "from critic_train_cli.main import run; run()\n"
    )
    command = [sys.executable, "-c", script]
    shown = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    marker, *names = shown.stderr.splitlines()[-1].split(" ")
    assert marker == "IMPORTED"
    return set(names)


def test_the_module_is_the_program(clean_environment):
    environment = clean_environment | {"PYTHONPATH": f"{ROOT / 'core'}:{ROOT / 'cli'}"}
    command = [sys.executable, "-m", "critic_train_cli", "--version"]
    assert subprocess.run(command, env=environment, capture_output=True, text=True).stdout.startswith("critic-train ")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "expandable_segments:True"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:512"}, "max_split_size_mb:512"),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:512"}, "None"),
    ],
)
def test_cuda_memory_is_in_expandable_segments_unless_the_user_says_otherwise(given, expected):
    code = (
        "import atexit, os\n"
        "atexit.register(lambda: print(os.environ.get('PYTORCH_CUDA_ALLOC_CONF')))\n"
        "from critic_train_cli.main import run; run()\n"
    )
    names = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
    environment = {name: value for name, value in os.environ.items() if name not in names} | given
    ended = subprocess.run(
        [sys.executable, "-c", code, "--version"], env=environment, capture_output=True, text=True, check=True
    )
    assert ended.stdout.splitlines()[-1] == expected
