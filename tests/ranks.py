"""Run a function on several ranks, as torchrun would: processes that find RANK, WORLD_SIZE and a port around them."""

import json
import math
import os
import queue
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from warm import context

from critic_train.errors import CriticTrainError
from critic_train.events import Event, RunEnded, StepEnded
from critic_train.settings import EvalSettings, FitSettings
from critic_train.stopping import StopRequest

PATIENCE_SECONDS = 600.0
SIGTERM = 15


def on_ranks(
    size: int, work: Callable[..., Any], *arguments: Any, rank_0_is_enough: bool = False, **named: Any
) -> list[Any]:
    """What `work(*arguments, **named)` gives on each of the ranks; a typed fault as {"fault", "message"}.

    With `rank_0_is_enough`, ranks that hang when rank 0 has ended are killed, and have no answer.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    answers = context.Queue()
    processes = [
        context.Process(target=_rank, args=(answers, rank, size, port, work, arguments, named), daemon=True)
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    try:
        found: dict[int, Any] = {}
        while len(found) < size and not (rank_0_is_enough and 0 in found):
            rank, answer = _answer(answers, processes)
            found[rank] = answer
    finally:
        for process in processes:
            process.join(5.0)
            process.kill()
    return [found.get(rank) for rank in range(size)]


def _answer(answers: Any, processes: list[Any]) -> tuple[int, Any]:
    """(rank, answer) of the next to answer; a rank that was killed answers with how."""
    until = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < until:
        try:
            rank, answer = answers.get(timeout=0.5)
        except queue.Empty:
            for rank, process in enumerate(processes):
                if process.exitcode not in (None, 0):
                    processes[rank] = _Gone
                    return rank, {"fault": "gone", "message": str(process.exitcode)}
        else:
            return rank, answer
    raise AssertionError("a rank hangs")


class _Gone:
    """A process whose end has been told."""

    exitcode = 0

    @staticmethod
    def join(_: float) -> None:
        """It has ended."""

    @staticmethod
    def kill() -> None:
        """It has ended."""


def _rank(
    answers: Any,
    rank: int,
    size: int,
    port: int,
    work: Callable[..., Any],
    arguments: tuple[Any, ...],
    named: dict[str, Any],
) -> None:
    os.environ |= {
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    try:
        answer = work(*arguments, **named)
    except CriticTrainError as error:
        answer = {"fault": type(error).__name__, "message": error.message}
    except BaseException as error:
        answer = {"fault": type(error).__name__, "message": str(error), "notes": getattr(error, "__notes__", [])}
    answers.put((rank, answer))


def records(out: str, event: str = "step") -> list[dict[str, float]]:
    """The lines of a run's metrics.jsonl about one kind of event."""
    lines = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


def furthest(out: str, alone: str, name: str, event: str = "step", least: float = 0.0) -> float:
    """The largest difference of a figure to that of the run alone, relative to it, or to `least` where that is more."""
    pairs = zip(records(out, event), records(alone, event), strict=True)
    units = ((abs(ours[name] - theirs[name]), max(abs(theirs[name]), least)) for ours, theirs in pairs)
    return max(difference / unit for difference, unit in units if unit)


def fit_run(settings: FitSettings, stop_at: tuple[int, int] | None = None) -> dict[str, Any]:
    """A run; `stop_at` (rank, step) sends that rank a SIGTERM after that step. Says how it ended and where."""
    from critic_train.training.fit import fit

    stop = StopRequest()
    steps = 0
    last: Event | None = None
    for event in fit(settings, stop):
        last = event
        if isinstance(event, StepEnded):
            steps = event.step
            if stop_at == (int(os.environ["RANK"]), event.step):
                stop.signal_number = SIGTERM
    assert isinstance(last, RunEnded)
    return {"status": last.status, "signal": last.signal_number, "step": steps}


def told_run(settings: FitSettings) -> dict[str, Any]:
    """A run; says how it ended and what it told."""
    from critic_train.events import Notice
    from critic_train.training.fit import fit

    events = list(fit(settings, StopRequest()))
    told = [event.message for event in events if isinstance(event, Notice)]
    assert isinstance(events[-1], RunEnded)
    return {"status": events[-1].status, "told": told}


def huge_run(settings: FitSettings) -> dict[str, Any]:
    """A run on returns that reading would not let through."""
    from critic_train.data import row_checks as checking

    checking.LARGEST = math.inf
    return fit_run(settings)


def eval_run(settings: EvalSettings, stop_at: int | None = None) -> dict[str, Any]:
    """A judgement, on rank 0 with its verdict; `stop_at` sends rank 1 a SIGTERM at that event."""
    from critic_train.evaluation.evaluate import evaluate

    stop = StopRequest()
    last: Event | None = None
    for number, event in enumerate(evaluate(settings, stop)):
        last = event
        if number == stop_at and os.environ["RANK"] == "1":
            stop.signal_number = SIGTERM
    assert isinstance(last, RunEnded)
    return {"status": last.status, "signal": last.signal_number, "result": last.result}


def failing_run(settings: FitSettings, rank: int, step: int, kind: str) -> dict[str, Any]:
    """A run in which one rank fails within a step."""
    from critic_train import errors
    from critic_train.training import trainer

    faults: dict[str, BaseException] = {
        "DataError": errors.DataError("no such thing", hint="mend it"),
        "OSError": OSError(28, "No space left on device", "/somewhere"),
        "ValueError": ValueError("nobody foresaw this"),
    }
    if kind == "hang":
        from critic_train.distributed import process_group as group

        group.TIMEOUT = timedelta(seconds=4)
    real = trainer.clip_gradient
    taken = 0

    def clip_gradient(*arguments: Any) -> float:
        nonlocal taken
        taken += 1
        if taken == step and int(os.environ["RANK"]) == rank:
            if kind == "SIGKILL":
                os.kill(os.getpid(), 9)
            if kind == "hang":
                time.sleep(60)
            raise faults[kind]
        return real(*arguments)

    trainer.clip_gradient = clip_gradient
    return fit_run(settings)


def short_run(
    settings: FitSettings,
    shortages: list[tuple[int, str, int]],
    *,
    always: bool = False,
    huge: bool = False,
    stop_at: tuple[int, int] | None = None,
    disk: tuple[str, int, str] | None = None,
) -> dict[str, Any]:
    """A run in which memory runs out in the middle of the trunk; says what was told of it, beside how it ended.

    Args:
        settings: of the run.
        shortages: (rank, "check" | "forward" | "backward" | "values", which pass of that kind on that rank, from 0).
            "check" are all passes before the run has started.
        always: whether memory runs out again in every pass after that.
        huge: whether reading lets all returns through.
        stop_at: (rank, step) sends that rank a SIGTERM after that step.
        disk: (kind, rank, file) what happens at that rank's first write to a file of that name after memory ran out.
    """
    from critic_train.data import row_checks as checking
    from critic_train.events import Notice, RunStarted
    from critic_train.run import storage
    from critic_train.training.fit import fit

    checking.LARGEST = math.inf if huge else checking.LARGEST
    rank = int(os.environ["RANK"])
    shortage = Shortage([(kind, number) for r, kind, number in shortages if r == rank], always)
    told = []
    stop = StopRequest()
    with shortage.in_the_trunk(), storage.watched(_refusal(*disk, rank) if disk else lambda _: None):
        for event in fit(settings, stop):
            shortage.checking = shortage.checking and not isinstance(event, RunStarted)
            if isinstance(event, StepEnded) and stop_at == (rank, event.step):
                stop.signal_number = SIGTERM
            if isinstance(event, Notice) and "memory ran out" in event.message:
                told.append(event.message)
    assert isinstance(event, RunEnded)
    return {"status": event.status, "told": told, "seen": shortage.seen}


def short_eval(settings: EvalSettings, rank: int) -> dict[str, Any]:
    """A judgement in which memory runs out on one rank, in the first pass after the self-check."""
    from critic_train.evaluation.evaluate import evaluate

    shortage = Shortage([("values", 0)] if rank == int(os.environ["RANK"]) else [], always=False)
    shortage.checking = False
    with shortage.in_the_trunk(after_checks=True):
        events = list(evaluate(settings, StopRequest()))
    return {"status": events[-1].status}


class Shortage:
    """Memory that runs out in the middle of a trunk.

    Args:
        due: (kind, number) of the passes in which it does.
        always: whether it does in all passes of that kind after them, too.

    Attributes:
        checking: whether passes are those of the self-check.
        seen: how many passes there were of each kind.
    """

    def __init__(self, due: list[tuple[str, int]], always: bool) -> None:
        self._due, self._always = due, always
        self.checking = True
        self.seen = {"check": 0, "forward": 0, "backward": 0, "values": 0}

    @contextmanager
    def in_the_trunk(self, after_checks: bool = False) -> Iterator[None]:
        """Have it happen in the passes of any critic."""
        from critic_train.model import selfcheck
        from critic_train.model.critic import Critic

        whole, shortage = Critic.hidden, self

        def hidden(critic: Critic, batch: Any) -> torch.Tensor:
            kinds = ["check"] if shortage.checking else ["values"]
            if not shortage.checking and torch.is_grad_enabled():
                kinds = ["forward", "backward"]
            due = [kind for kind in kinds if shortage._is_due(kind)]
            for kind in kinds:
                shortage.seen[kind] += 1
            if not due:
                return whole(critic, batch)

            def enter(_: Any, arguments: tuple[torch.Tensor, ...]) -> None:
                arguments[0].register_hook(_run_out) if due == ["backward"] else _run_out()

            handle = critic.trunk.layers[1].register_forward_pre_hook(enter)
            try:
                return whole(critic, batch)
            finally:
                handle.remove()

        choose = selfcheck.choose_packing
        if after_checks:

            def choosing(*arguments: Any, **named: Any) -> Any:
                shortage.checking = True
                try:
                    return choose(*arguments, **named)
                finally:
                    shortage.checking = False

            selfcheck.choose_packing = choosing
        Critic.hidden = hidden  # type: ignore[method-assign]
        try:
            yield
        finally:
            Critic.hidden, selfcheck.choose_packing = whole, choose  # type: ignore[method-assign]

    def _is_due(self, kind: str) -> bool:
        seen = self.seen[kind]
        return any(kind == k and (seen == n or (self._always and seen > n)) for k, n in self._due)


def _run_out(*_: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def _refusal(kind: str, refused: int, file: str, rank: int) -> Callable[[Any], None]:
    """What happens at a rank's writes to a file in a folder that begins with a dot and a step."""

    def refuse(operation: Any) -> None:
        saving = ".step-00000005." in str(operation.path)
        if rank == refused and saving and operation.kind == "write" and file in operation.path.name:
            if kind == "SIGKILL":
                os.kill(os.getpid(), 9)
            raise OSError(28, "No space left on device", str(operation.path))

    return refuse


def kept_run(settings: FitSettings, stop_at: tuple[int, int] | None = None) -> dict[str, Any]:
    """A run; also says how many micro-batches the whole trunk went through, and how many took kept states.

    `gathered` are those of the latter after which embeddings or frozen layers were whole on this rank.
    """
    from critic_train.model.critic import Critic

    passes = {"whole": 0, "kept": 0, "gathered": 0}
    hidden = Critic.hidden

    def counted(self: Critic, batch: Any) -> Any:
        states = hidden(self, batch)
        passes["whole" if batch.cached_states is None else "kept"] += 1
        if batch.cached_states is not None:
            frozen = [self.trunk.get_input_embeddings(), self.trunk.layers[0]]
            whole = [p for part in frozen for p in part.parameters() if not hasattr(p, "full_tensor")]
            passes["gathered"] += bool(whole)
        return states

    Critic.hidden = counted  # type: ignore[method-assign]
    return fit_run(settings, stop_at) | passes


def full_disk_run(settings: FitSettings, file: str, kind: str = "ENOSPC") -> dict[str, Any]:
    """A run whose disk is full, or whose process is killed, at the first write to a file of that name."""
    from critic_train.run import storage

    def refuse(operation: storage.Operation) -> None:
        if operation.kind == "write" and file in operation.path.name:
            if kind == "SIGKILL":
                os.kill(os.getpid(), 9)
            raise OSError(28, "No space left on device", str(operation.path))

    with storage.watched(refuse):
        return fit_run(settings)
