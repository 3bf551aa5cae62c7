"""Processes that need not import torch: forked from a server that has done so once for all tests.

A process of the program costs a tenth of a second so, and not five. What such a test cannot see is how the
interpreter starts and what it imports; tests of that start one of their own.
"""

import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

PATIENCE_SECONDS = 600.0
PRELOADED = [
    "critic_train.training.fit",
    "critic_train.weights.sharded_checkpoint",
    "critic_train.evaluation.evaluate",
    "critic_train.report.page",
    "critic_train.verify.model_checks",
    "critic_train_cli.main",
    "rank_work",
    "sequence_work",
    "peft",
]
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(PRELOADED)


def program(
    *arguments: str, cwd: Path, environment: Mapping[str, str] = os.environ, before: Callable[[], None] = list
) -> "subprocess.CompletedProcess[str]":
    """`critic-train` with arguments, run to its end in a process, a folder and an environment of its own.

    `before` is called in that process, before the program is.
    """
    with tempfile.TemporaryDirectory() as kept:
        out, err = Path(kept) / "out", Path(kept) / "err"
        told = (list(arguments), str(cwd), dict(environment), before, str(out), str(err))
        process = context.Process(target=_program, args=told)
        process.start()
        process.join(PATIENCE_SECONDS)
        process.kill()
        process.join()
        assert process.exitcode is not None
        said = [path.read_text(encoding="utf-8") for path in (out, err)]
    return subprocess.CompletedProcess(["critic-train", *arguments], process.exitcode, *said)


def _program(
    arguments: list[str], cwd: str, environment: dict[str, str], before: Callable[[], None], *streams: str
) -> None:
    """In the forked process: take on what a process is given at its start, then be the program."""
    from critic_train_cli.main import run

    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    for number, path in enumerate(streams, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    sys.stdout, sys.stderr = (_text(number) for number in (1, 2))
    sys.argv = ["critic-train", *arguments]
    before()
    run()


def _text(number: int) -> Any:
    """A stream as Python opens it where nobody looks on."""
    errors, buffering = ("strict", -1) if number == 1 else ("backslashreplace", 1)
    return open(number, "w", encoding="utf-8", errors=errors, buffering=buffering)
