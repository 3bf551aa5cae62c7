"""Weights and moments as the files of a checkpoint, also where memory ran out on one of several ranks.

On several ranks memory that runs out ends the run (see `distributed.process_group`). Every rank writes its part of the
last whole step to a file, without a collective; rank 0 makes a checkpoint of these files and remembers the smaller
token budget, with which the same command goes on.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

from critic_train.distributed.ranks import OutOfMemory, Ranks
from critic_train.errors import CriticTrainError, first_line
from critic_train.events import Event, Notice
from critic_train.model.compute import Compute
from critic_train.model.critic import Critic
from critic_train.model_files.gather import Gather, PartReader, PartWriter, full_tensor
from critic_train.run.checkpoint import checkpoint_name, newest_checkpoint
from critic_train.run.run_directory import RunDirectory
from critic_train.run.storage import File, make_directory, remove_tree
from critic_train.training.next_token_loss import save_next_token_head
from critic_train.training.optimizer import save_optimizer
from critic_train.training.weight_average import WeightAverage
from critic_train.weights.saving import save_critic
from critic_train.weights.sharded_checkpoint import ShardedCritic

BUDGET_FILE = "token_budget.json"
"""In the run directory: what the same command begins with after memory ran out on one of several ranks."""


class StateFiles:
    """Weights and moments of a run, to be written as files of a checkpoint; made between passes.

    Args:
        critic: sharded or not.
        optimizer: of the critic.
        tokenizer_from: the model directory whose tokenizer files are copied, if any.
        ranks: of the run.
        average: of the weights, which is saved as the critic's own, the others beside it; None where there is none.
    """

    def __init__(
        self,
        critic: Critic,
        optimizer: torch.optim.Optimizer,
        tokenizer_from: Path | None,
        ranks: Ranks,
        average: WeightAverage | None = None,
    ) -> None:
        self._critic, self._optimizer, self._tokenizer_from = critic, optimizer, tokenizer_from
        self._average = average
        self._named = dict(critic.named_parameters())
        self._sharded = ShardedCritic(critic) if ranks.sharded else None

    def write(self, directory: Path | None, gather: Gather = full_tensor) -> None:
        """Write all files. All ranks call it, so that full tensors can be gathered.

        Args:
            directory: an existing, empty directory; None on ranks other than 0.
            gather: how full tensors are made.

        Raises:
            OSError: the disk is full or not writable.
        """
        if self._sharded is None:
            assert directory is not None
            with self._averaged():
                save_critic(self._critic, directory, self._tokenizer_from)
            save_optimizer(self._optimizer, self._named, directory)
            save_next_token_head(self._critic, directory)
            if self._average is not None:
                self._average.save_weights(directory)
            return
        try:
            with self._averaged():
                self._sharded.save_to(directory, self._tokenizer_from, gather)
        except OSError:
            self._save_beside(None, gather)  # the other ranks wait for this one there
            raise
        self._save_beside(directory, gather)

    def _save_beside(self, directory: Path | None, gather: Gather) -> None:
        """On several ranks: the files of moments, of the next-token head and of weights that are not averaged.

        Where one cannot be written, the others are gathered all the same: the other ranks wait for this one there.
        """
        fault: OSError | None = None
        writes: list[Callable[[Path | None, Gather], None]] = [
            partial(save_optimizer, self._optimizer, self._named),
            partial(save_next_token_head, self._critic),
            *([] if self._average is None else [self._average.save_weights]),
        ]
        for write in writes:
            try:
                write(None if fault else directory, gather)
            except OSError as error:
                fault = fault or error
        if fault:
            raise fault

    def _averaged(self) -> AbstractContextManager[None]:
        return nullcontext() if self._average is None else self._average.in_place()


class LastStepSaver:
    """Saves the last whole step when memory runs out on one of several ranks; see StateSaver.

    Args:
        run: the run directory, which all ranks see.
        max_tokens: --max-tokens.
        ranks: of the run.
        step: gives the number of optimizer steps taken; 0 while there is nothing to save.
        files: weights and moments; None while there is nothing to save.
        write_checkpoint: on rank 0, writes the checkpoint of the present step, given what writes weights and moments
            into its directory.
    """

    def __init__(
        self,
        run: RunDirectory,
        max_tokens: int,
        ranks: Ranks,
        step: Callable[[], int] = lambda: 0,
        files: StateFiles | None = None,
        write_checkpoint: Callable[[Callable[[Path], None]], Path] | None = None,
    ) -> None:
        self._run, self._max_tokens, self._ranks = run, max_tokens, ranks
        self._step, self._files, self._write_checkpoint = step, files, write_checkpoint

    def write_part(self, report_progress: Callable[[], None]) -> None:
        """On ranks other than 0: write this rank's part to a file."""
        if self._files is None or self._step() == 0:
            return
        make_directory(self._parts, exist_ok=True)
        with torch.no_grad(), File(self._part(self._ranks.rank), "create") as file:
            self._files.write(None, PartWriter(file, report_progress))

    def finish(self, report: OutOfMemory, wait_for_parts: Callable[[], None]) -> tuple[str, str]:
        """On rank 0: remember the smaller budget, make a checkpoint of the parts, and say how the run ends."""
        if report.next_start:
            remember_budget(self._run, self._max_tokens, self._ranks, report.next_start)
        saved = self._save(wait_for_parts)
        if not report.next_start:
            return report.what, report.hint
        again = "with fewer rollouts in the self-check"
        if "max_tokens" in report.next_start:
            again = f"with {report.next_start['max_tokens']:,} tokens at once, and the result is the same"
        return f"{report.what}; {saved}", f"run the same command again: it goes on from there {again}"

    def _save(self, wait_for_parts: Callable[[], None]) -> str:
        """Save the present step; says what stands now."""
        step = self._step()
        if self._files is None or self._write_checkpoint is None or step == 0:
            return self._newest()
        files = self._files
        try:
            wait_for_parts()

            def write_state(directory: Path) -> None:
                others = [self._part(rank) for rank in range(1, self._ranks.size)]
                with torch.no_grad(), PartReader(others) as gather:
                    files.write(directory, gather)

            path = self._write_checkpoint(write_state)
        except (CriticTrainError, OSError) as error:
            return f"step {step} could not be saved ({first_line(error)}); {self._newest()}"
        finally:
            remove_tree(self._parts)
        return f"step {step} is saved as {path}"

    def _newest(self) -> str:
        newest, _ = newest_checkpoint(self._run.checkpoints)
        return "the run has no checkpoint yet" if newest is None else f"the newest checkpoint is {newest}"

    @property
    def _parts(self) -> Path:
        """Where the ranks write their parts; what is left there goes at the next start."""
        return self._run.checkpoints / f".{checkpoint_name(self._step())}.tmp-parts"

    def _part(self, rank: int) -> Path:
        return self._parts / f"rank-{rank:05d}"


def remember_budget(run: RunDirectory, max_tokens: int, ranks: Ranks, next_start: dict[str, int]) -> None:
    """Write `token_budget.json`: what the same command begins with after memory ran out."""
    record = {"asked": max_tokens, "ranks": ranks.size}
    before = run.read_json(BUDGET_FILE) or {}
    comparable = all(before.get(name) == value for name, value in record.items())
    run.write_json(BUDGET_FILE, (before if comparable else {}) | record | next_start)


def begin_with_remembered_budget(run: RunDirectory, max_tokens: int, compute: Compute) -> Iterator[Event]:
    """Lower the budgets of `compute` to what the run remembers for the same --max-tokens on as many ranks.

    From here on the run remembers it, too, where memory runs out on one of several ranks.

    Yields:
        A notice where something was lowered.
    """
    compute.ranks.save_state_with(LastStepSaver(run, max_tokens, compute.ranks))
    record: dict[str, Any] = run.read_json(BUDGET_FILE) or {}
    if (record.get("asked"), record.get("ranks")) != (max_tokens, compute.ranks.size):
        return
    lowered, checked = record.get("max_tokens"), record.get("checked_rollouts")
    if type(lowered) is int and 0 < lowered < compute.max_tokens:
        compute.start_at(lowered)
        yield Notice(
            message=f"memory ran out with {max_tokens:,} tokens at once before: starting with {lowered:,}; the result "
            f"is the same. Any other --max-tokens than {max_tokens} is tried as it is"
        )
    if type(checked) is int and checked > 0:
        compute.checked_rollouts = checked
        yield Notice(message=f"memory ran out in the self-check before: it takes {checked} rollouts at most")
