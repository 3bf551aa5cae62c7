"""Every exception has its exit code and its words."""

import errno
import os
from pathlib import Path

import pytest

from critic_train.errors import ConfigError, CriticTrainError, DataError, DivergedError, MachineError, ModelError
from critic_train_cli.exit_codes import explain, write_crash_log

DOCUMENTED = {ConfigError: 2, DataError: 3, ModelError: 4, DivergedError: 5, MachineError: 6}


def test_every_error_of_the_library_has_its_documented_code():
    assert set(CriticTrainError.__subclasses__()) == set(DOCUMENTED)
    assert {kind: explain(kind("m", hint="h")).exit_code for kind in DOCUMENTED} == DOCUMENTED


def test_a_kind_of_a_known_error_has_its_code():
    class BadRowsError(DataError):
        pass

    assert explain(BadRowsError("m")).exit_code == 3


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EIO, errno.EMFILE])
def test_the_machine_in_the_way(number):
    fault = explain(OSError(number, os.strerror(number), "some/file"))
    assert (fault.exit_code, fault.is_bug) == (6, False)
    assert "some/file" in fault.message
    assert fault.hint


class OutOfMemoryError(RuntimeError):
    """Named as torch names its own."""


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: 8 bytes"),
    ],
)
def test_out_of_memory(error):
    fault = explain(error)
    assert fault.exit_code == 6
    assert "--max-tokens" in fault.hint
    assert "\n" not in fault.message


def test_memory_that_torch_does_not_share_out_is_not_laid_to_the_tokens():
    hint = explain(RuntimeError("CUDA error: out of memory\nmore")).hint
    assert "page-lock" in hint
    assert "nvidia-smi" in hint


@pytest.mark.parametrize("error", [RuntimeError("words"), FileNotFoundError(2, "none", "x"), KeyError("x")])
def test_all_else_is_a_bug(error):
    fault = explain(error)
    assert (fault.exit_code, fault.is_bug) == (70, True)
    assert "this is a bug in critic-train" in fault.message


def test_interrupted_at_the_keyboard():
    assert explain(KeyboardInterrupt()).exit_code == 130


@pytest.mark.parametrize(
    ("job", "code"),
    [
        ("ConfigError", 2),
        ("DataError", 3),
        ("ModelError", 4),
        ("DivergedError", 5),
        ("MachineError", 6),
        ("ENOSPC", 6),
        ("OutOfMemoryError", 6),
        ("MemoryError", 6),
        ("ZeroDivisionError", 70),
        ("finish", 0),
    ],
)
def test_exit_codes_of_the_program(program, job, code):
    shown = program("fit", "--data", "x", FAKE_JOB=job)
    assert shown.returncode == code
    assert "Traceback" not in shown.stderr
    assert shown.stdout == "" or code == 0


def test_an_error_is_two_lines(program):
    shown = program("eval", "--data", "x", "-q", FAKE_JOB="DataError")
    assert shown.stderr.splitlines()[-2:] == ["error: what was found", "hint: what to do"]


def test_debug_shows_the_traceback_and_the_words(program):
    shown = program("fit", "--data", "x", "--debug", FAKE_JOB="DataError")
    assert shown.returncode == 3
    assert "Traceback (most recent call last)" in shown.stderr
    assert "error: what was found" in shown.stderr
    assert "Traceback" in program("fit", "--data", "x", CRITIC_TRAIN_DEBUG="1", FAKE_JOB="DataError").stderr


def test_a_bug_leaves_its_traceback_in_the_run_directory(program, tmp_path):
    (tmp_path / "run").mkdir()
    shown = program("fit", "--data", "x", FAKE_JOB="ZeroDivisionError", FAKE_OUT="run")
    assert "error: this is a bug in critic-train (ZeroDivisionError: words)" in shown.stderr
    assert "hint: the traceback is in run/crash.log; please report it" in shown.stderr
    assert "ZeroDivisionError: words" in (tmp_path / "run" / "crash.log").read_text()


def test_a_bug_without_a_run_directory_leaves_it_in_a_temporary_file(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    path = write_crash_log(ValueError("\udc80 words"), str(tmp_path / "none"))
    assert path is not None
    assert path.startswith(str(tmp_path))
    assert "words" in Path(path).read_text()


def test_a_crash_log_that_cannot_be_written_is_no_second_crash(monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", "/nowhere/at/all")
    assert write_crash_log(ValueError("words"), None) is None
