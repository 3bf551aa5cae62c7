"""Errors that users see: a message, a hint, and one line of any other."""

import pickle

import pytest

from critic_train.errors import ConfigError, CriticTrainError, DataError, DivergedError, MachineError, ModelError
from critic_train.errors import first_line as line_of


@pytest.mark.parametrize("kind", [ConfigError, DataError, DivergedError, MachineError, ModelError])
def test_an_error_is_its_message_and_a_hint(kind):
    error = kind("no such file", hint="mend it")
    assert isinstance(error, CriticTrainError)
    assert (str(error), error.message, error.hint) == ("no such file", "no such file", "mend it")
    assert kind("no such file").hint == ""


def test_an_error_can_be_sent_to_another_process():
    error = pickle.loads(pickle.dumps(DataError("no such file", hint="mend it")))
    assert (type(error), error.message, error.hint) == (DataError, "no such file", "mend it")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("one\ntwo"), "one"),
        (ValueError("\n  one\ntwo"), "one"),
        (ValueError(""), "ValueError"),
        (ValueError(" \n "), "ValueError"),
        (MemoryError(), "MemoryError"),
        (KeyError("name"), "'name'"),
    ],
)
def test_the_first_line_of_any_error_says_something(error, line):
    assert line_of(error) == line
