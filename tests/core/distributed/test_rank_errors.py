"""An error of one rank as another raises it: the same class, the same words, and whose it was."""

import errno
import json

import pytest
import torch
import torch.distributed as dist

from critic_train.distributed.rank_errors import RankError, as_error, as_record, looks_lost
from critic_train.errors import ConfigError, DataError, DivergedError, MachineError, ModelError


def sent(error: BaseException, rank: int = 2) -> BaseException:
    """The error as another rank raises it."""
    return as_error(json.loads(json.dumps(as_record(error, rank))))


@pytest.mark.parametrize("kind", [ConfigError, DataError, DivergedError, MachineError, ModelError])
def test_a_typed_error_keeps_its_class_and_hint(kind):
    error = sent(kind("row 7 has no tokens", hint="leave it out"))
    assert type(error) is kind
    assert (error.message, error.hint) == ("rank 2: row 7 has no tokens", "leave it out")


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "/somewhere"),
            OSError,
            "[Errno 28] No space left on device (on rank 2): '/somewhere'",
        ),
        (
            FileNotFoundError(errno.ENOENT, "No such file or directory", b"/somewhere"),
            FileNotFoundError,
            """[Errno 2] No such file or directory (on rank 2): "b'/somewhere'\"""",
        ),
        (OSError(errno.EIO, "Input/output error"), OSError, "[Errno 5] Input/output error (on rank 2)"),
    ],
)
def test_an_error_of_the_system_keeps_its_number_and_file(error, kind, message):
    error = sent(error)
    assert type(error) is kind
    assert str(error) == message


@pytest.mark.parametrize("error", [KeyboardInterrupt(), GeneratorExit()])
def test_a_rank_that_is_ended_from_outside_reports_so(error):
    ended = sent(error)
    assert isinstance(ended, MachineError)
    assert ended.message == "rank 2: was stopped before the run's end"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore of it"), "CUDA out of memory. Tri"),
        (RuntimeError("CUDA error: out of memory"), "CUDA error: out of memory"),
        (MemoryError(), "no details were given"),
    ],
)
def test_memory_that_ran_out_is_an_error_of_the_machine_in_one_line(error, words):
    error = sent(error)
    assert isinstance(error, MachineError)
    assert error.message.startswith(f"rank 2: out of memory: {words}")
    assert "\n" not in error.message
    assert "--max-tokens" in error.hint


def test_a_bug_comes_with_its_traceback():
    def of_another_rank():
        raise ValueError("nobody foresaw this")

    with pytest.raises(ValueError, match="nobody") as caught:
        of_another_rank()
    error = sent(caught.value)
    assert isinstance(error, RankError)
    assert str(error) == "rank 2: ValueError: nobody foresaw this"
    assert "in of_another_rank" in error.__notes__[0]


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:4242"), True),
        (RuntimeError("Broken pipe"), True),
        (RuntimeError("Timed out waiting 1800000ms for recv operation to complete"), True),
        (dist.DistNetworkError("whatever it says"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ConnectionResetError("connection reset"), False),  # of a tracker or a file system, not of another rank
        (DataError("the connection was closed"), False),
    ],
)
def test_only_collectives_and_the_store_lose_a_rank(error, lost):
    assert looks_lost(error) == lost
