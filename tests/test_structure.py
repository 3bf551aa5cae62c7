"""The structure of the code is held: each rule of tools/check_structure.py and the layers of the import contract."""

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
Write = Callable[[str, str], None]


@pytest.fixture(scope="module")
def check_structure() -> ModuleType:
    path = ROOT / "tools" / "check_structure.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a file of a checkout of three modules, each imported twice, that is within all bounds."""

    def write_file(path: str, text: str) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    for name in ("one", "two", "three"):
        others = [other for other in ("one", "two", "three") if other != name]
        lines = [f"from critic_train.data.{other} import number as {other}\n" for other in others]
        write_file(f"core/critic_train/data/{name}.py", "".join(lines) + "\n\nnumber = 1\n")
        write_file(f"tests/core/data/test_{name}.py", "")
    write_file("core/critic_train/data/__init__.py", "")
    write_file("tests/core/data/test_one_aspect.py", "")
    return write_file


@pytest.mark.parametrize(
    ("path", "text", "line"),
    [
        (
            "core/critic_train/data/one.py",
            "import critic_train.data.two\nimport critic_train.data.three\n" + "x = 1\n" * 399,
            "core/critic_train/data/one.py: 401 lines, at most 400: split it",
        ),
        (
            "core/critic_train/data/one.py",
            "import critic_train.data.two\nimport critic_train.data.three\n\ndef f():\n" + "    x = 1\n" * 60,
            "core/critic_train/data/one.py:4: f has 61 lines, at most 60: split it",
        ),
        (
            "core/critic_train/data/one.py",
            "import critic_train.data.two\nimport critic_train.data.three\n\n_found = 1\n",
            "core/critic_train/data/one.py:4: the name '_found' says nothing: name it after what it holds",
        ),
        (
            "core/critic_train/data/one.py",
            "import critic_train.data.two\nimport critic_train.data.three\n\ndef f(told): ...\n",
            "core/critic_train/data/one.py:4: the name 'told' says nothing: name it after what it holds",
        ),
        (
            "core/critic_train/run/__init__.py",
            "def place(): ...\n",
            "core/critic_train/run/__init__.py:1: the name 'place' says nothing: name it after what it holds",
        ),
        (
            "core/critic_train/data/three.py",
            "import critic_train.data.one\n",
            "core/critic_train/data/two.py: 5 lines and imported by critic_train.data.one: "
            "merge it into another module",
        ),
        (
            "cli/critic_train_cli/one.py",
            "",
            "core/critic_train/data/one.py and cli/critic_train_cli/one.py: 2 files are called one.py: "
            "rename all but one",
        ),
        (
            "core/critic_train/data/four.py",
            "",
            "core/critic_train/data/four.py: no test file is named after it: write tests/core/data/test_four.py",
        ),
        (
            "tests/core/data/test_four.py",
            "",
            "tests/core/data/test_four.py: named after no module: "
            "call it tests/.../test_<module>.py or test_<module>_<aspect>.py",
        ),
    ],
)
def test_what_is_out_of_bounds_is_named(check_structure, write, tmp_path, path, text, line):
    assert check_structure.violations(tmp_path) == []
    write(path, text)
    assert line in check_structure.violations(tmp_path)


def test_a_small_module_that_declares_an_entry_of_a_list_stands_alone(check_structure, write, tmp_path):
    write("tests/core/data/test_four.py", "")
    write("core/critic_train/data/four.py", "FORMAT = 1\n")
    assert check_structure.violations(tmp_path) == []


def test_figures_are_those_of_the_files(check_structure, write, tmp_path):
    write(
        "cli/critic_train_cli/one.py", '"""A docstring\n\nof three lines."""\n\n# a comment\nfound = 1  # no comment\n'
    )
    figures = list(check_structure.report(tmp_path))
    assert figures[0] == "files in core/ and cli/: 5"
    assert figures[2] == "largest file: 6 lines, cli/critic_train_cli/one.py"
    counts = "6, of which code 1 (16.7%), docstring 3 (50.0%), comment 1 (16.7%), blank 1 (16.7%)"
    assert f"lines of cli: {counts}" in figures
    assert "file names that repeat: 1 (one)" in figures
    assert figures[-1] == "modules with a test file named after them: 3 of 4"
    assert any("found 476.2, place 0.0" in line for line in figures)


@pytest.mark.parametrize(
    ("path", "text", "broken"),
    [
        ("core/critic_train/settings/upward.py", "import critic_train.run\n", "settings is not allowed to import"),
        ("core/critic_train/nowhere.py", "", "nowhere"),
    ],
    ids=["a circle between two folders", "a module without a layer"],
)
def test_an_import_up_the_layers_turns_the_contract_red(tmp_path, path, text, broken):
    for name in ("core", "cli"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / path).write_text(text)
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as lint; lint(['--no-cache'])"]
    environment = os.environ | {"PYTHONPATH": f"{tmp_path / 'core'}{os.pathsep}{tmp_path / 'cli'}"}
    shown = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert shown.returncode == 1, shown.stdout + shown.stderr
    assert broken in shown.stdout
    assert "imports go down the layers" in shown.stdout
