"""The package as Python users meet it: its names are there, and cost nothing before they are used."""

import subprocess
import sys

import pytest

import critic_train

HEAVY = ("torch", "transformers", "pyarrow", "numpy", "safetensors", "matplotlib", "jinja2")
COMMANDS = ("fit", "evaluate", "predict", "report", "check", "split", "convert", "verify")
IN_FOLDERS = {
    "check": "critic_train.check.check",
    "convert": "critic_train.convert.conversion",
    "predict": "critic_train.predict.predict",
    "report": "critic_train.report.page",
    "verify": "critic_train.verify.verify",
}


def run_python(script: str) -> str:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.parametrize(
    "statement",
    [
        "import critic_train",
        "from critic_train import FitSettings, EvalSettings, StopRequest, CriticTrainError, RunEnded, run_to_end",
        "import critic_train; dir(critic_train); critic_train.__version__",
    ],
)
def test_nothing_heavy_is_imported(statement):
    script = f"import sys; {statement}; print([name for name in {HEAVY} if name in sys.modules])"
    assert run_python(script) == "[]"


@pytest.mark.parametrize("name", critic_train.__all__)
def test_every_public_name_is_there(name):
    assert getattr(critic_train, name).__doc__ or name == "Event"


def test_the_lists_of_names_agree():
    assert sorted(critic_train._MODULES) == sorted(critic_train.__all__)
    assert dir(critic_train) == sorted([*critic_train.__all__, "__version__"])


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'train'"):
        critic_train.train  # noqa: B018


def test_a_function_is_not_hidden_by_the_folder_of_its_name():
    """Python binds a folder to its parent's attribute when it is first imported, before or after the name is used."""
    first = next(iter(IN_FOLDERS))
    script = f"from critic_train import {first}; import critic_train, {', '.join(IN_FOLDERS.values())}\n"
    script += f"print([getattr(critic_train, name).__module__ for name in {list(IN_FOLDERS)}])"
    assert run_python(script) == str(list(IN_FOLDERS.values()))


def test_the_commands_are_functions_of_their_settings():
    assert all(callable(getattr(critic_train, name)) for name in COMMANDS)
