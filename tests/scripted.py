"""critic-train with scripted jobs: `python scripted.py fit --data x`. What they do is told by FAKE_JOB.

finish: a few events and the end. refuse: the same, and one gate of two failed. wait: says "running" and goes on
until asked to stop. deaf: the same, but never listens. start: the same, before the first step. Any other word: the
exception of that name is raised.
"""

import errno
import os
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "core"), str(ROOT / "cli")]

from critic_train import errors  # noqa: E402
from critic_train.events import (  # noqa: E402
    CheckpointSaved,
    EvaluationEnded,
    Event,
    Notice,
    Progress,
    RunEnded,
    RunStarted,
    StepEnded,
)

METRICS = {
    "explained_variance": 0.41,
    "explained_variance_interval": [0.37, 0.44],
    "explained_variance_within_group": 0.12,
    "mse": 0.0708,
    "pearson": None,
}
RESULT = {"status": "finished", "out": "runs/é", "steps": 2, "best": "runs/é/best", "value_loss": float("nan")}


class OutOfMemoryError(RuntimeError):
    """Named as torch names its own."""


def failure(word: str) -> BaseException:
    """The exception of that name."""
    if word.startswith("E"):
        return OSError(getattr(errno, word), os.strerror(getattr(errno, word)), "somewhere/file")
    if word == "OutOfMemoryError":
        return OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    if hasattr(errors, word):
        return getattr(errors, word)("what was found", hint="what to do")  # type: ignore[no-any-return]
    return {"MemoryError": MemoryError, "ZeroDivisionError": ZeroDivisionError}[word]("words")


def job(stop: Any) -> Iterator[Event]:
    """The scripted job."""
    word = os.environ.get("FAKE_JOB", "finish")
    out = os.environ.get("FAKE_OUT", "runs/é")
    yield Progress(stage="reading rollouts", done=0, total=10)
    yield Notice(message="a head was created")
    yield Notice(message="rows were left out", level="warning")
    yield RunStarted(out=out, total_steps=2, steps_per_epoch=[2], first_step=0, summary={"model": "tiny é"})
    if word in ("wait", "deaf", "start"):
        if word != "start":
            yield StepEnded(step=1, epoch=0, metrics={"value_loss": 0.1}, timing={})
        print("running", file=sys.stderr, flush=True)
        ends = time.monotonic() + 600
        while time.monotonic() < ends and (word != "wait" or not stop.requested):
            time.sleep(0.01)
        yield RunEnded(status="interrupted", result={"steps": 1}, signal_number=stop.signal_number)
        return
    for step in (1, 2):
        time.sleep(float(os.environ.get("FAKE_PACE", "0")))
        yield StepEnded(step=step, epoch=0, metrics={"value_loss": 0.1 / step}, timing={})
    if word not in ("finish", "refuse"):
        raise failure(word)
    yield EvaluationEnded(step=2, metrics=METRICS, best=True)
    yield CheckpointSaved(step=2, path=out + "/checkpoints/step-00000002", size_bytes=5_100_000)
    critics = {"runs/é/best": METRICS}
    result = {
        **RESULT,
        **METRICS,
        "words": ["It is good, oui, ça va."],
        "critics": critics,
        "baselines": {"constant": METRICS},
    }
    if word == "refuse":
        result["gates"] = [
            {"passed": True, "reason": None},
            {"passed": False, "reason": "mse is 0.0708, below 1", "flag": "--fail-under"},
        ]
    yield RunEnded(status="finished", result=result)


def install() -> None:
    """Put the scripted jobs in the place of the library's."""
    for name, function in (("training.fit", "fit"), ("evaluation.evaluate", "evaluate")):
        module = types.ModuleType(f"critic_train.{name}")
        setattr(module, function, lambda settings, stop: job(stop))
        sys.modules[module.__name__] = module


if __name__ == "__main__":
    install()
    from critic_train_cli.main import run

    run()
