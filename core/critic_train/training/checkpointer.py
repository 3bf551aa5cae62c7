"""Writes the checkpoints of a run and loads the one it resumes from. All ranks take part; rank 0 owns the files."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from critic_train.errors import ModelError
from critic_train.events import CheckpointSaved, Event, Notice
from critic_train.run.checkpoint import CheckpointManager, checkpoint_name, checkpoint_step, read_state
from critic_train.run.run_directory import RunDirectory
from critic_train.run.storage import write_json
from critic_train.training.old_values import OldValues
from critic_train.training.optimizer import load_optimizer
from critic_train.training.plan import TrainingPlan
from critic_train.training.state import (
    CriticRuntime,
    TrainingState,
    restore_keeping,
    restore_token_budget,
    token_budget_record,
)
from critic_train.training.state_files import LastStepSaver, StateFiles
from critic_train.weights.loading import read_model
from critic_train.weights.saving import checkpoint_bytes


@dataclass(slots=True, kw_only=True)
class Checkpointer:
    """Saves and restores weights, moments and state of a run.

    Attributes:
        run: the run directory.
        manager: writes and prunes checkpoint directories.
        every: --checkpoint-every.
        runtime: the critic that is trained.
        optimizer: of the critic.
        state: of the run; saved, and restored.
        plan: of the run.
        seed: of the run, for the record.
        max_tokens: --max-tokens, for the record of the token budget.
        files: writes weights and moments.
        old_values: its columns are removed when no checkpoint needs them; None unless --old-values epoch.
        newest: the newest checkpoint that was written or loaded here.
    """

    run: RunDirectory
    manager: CheckpointManager
    every: int
    runtime: CriticRuntime
    optimizer: torch.optim.Optimizer
    state: TrainingState
    plan: TrainingPlan
    seed: int
    max_tokens: int
    files: StateFiles
    old_values: OldValues | None
    newest: Path | None = None
    _saved_step: int | None = None
    _loaded_back: bool = False

    @property
    def is_due(self) -> bool:
        """Whether the present step gets a checkpoint wherever the run ends; step 0 while it is the best."""
        position = self.state.position
        due = self.state.has_learned and position.step % self.every == 0
        return due or position.best_step == position.step

    def save_on_out_of_memory(self) -> None:
        """Have the last whole step saved where memory runs out on one of several ranks."""
        ranks = self.runtime.compute.ranks
        ranks.save_state_with(
            LastStepSaver(self.run, self.max_tokens, ranks, lambda: self.state.position.step, self.files, self._write)
        )

    def load(self, checkpoint: Path) -> Iterator[Event]:
        """Restore moments and state from a checkpoint; the critic was loaded from it already. All ranks call it.

        Yields:
            Notices.

        Raises:
            ModelError: the checkpoint is of another model, or its state is not as critic-train writes it.
        """
        self.newest = checkpoint
        self.manager.mark_complete(checkpoint)
        load_optimizer(self.optimizer, self.runtime.critic, checkpoint)
        if self.runtime.average is not None:
            self.runtime.average.load(checkpoint)
        record = read_state(checkpoint)
        try:
            self.state.restore(record, self.plan.total_steps)
            lowered = restore_token_budget(record.get("token_budget"), self.max_tokens, self.runtime.compute)
            restore_keeping(record.get("token_budget"), self.max_tokens, self.runtime)
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(f"{checkpoint / 'trainer.json'} is not as critic-train writes it: {error}") from error
        best_step = self.state.position.best_step  # None where nothing is held out: a run has no best then
        best = None if best_step is None else self.run.checkpoints / checkpoint_name(best_step)
        if self.run.best is None and best and best.is_dir():  # it was a link to a newer one, since found damaged
            self.run.point_best_at(best)
        yield Notice(message=f"resuming from {checkpoint.name}")
        if lowered:
            yield Notice(message=lowered)

    def save_checkpoint(self) -> Iterator[Event]:
        """Write the checkpoint of the present step; update `best` and remove old checkpoints. All ranks call it.

        A checkpoint of this step that is there already, whole, is left as it is: the same step has the same state.
        Step 0 has one only where the head was solved before it, or while it is the best.

        Raises:
            MachineError: the disk is full or not writable.
        """
        step, ranks = self.state.position.step, self.runtime.compute.ranks
        if step == self._saved_step or not (self.state.has_learned or self.is_due):
            return
        self._saved_step = step
        if not ranks.is_main:
            while ranks.broadcast(None):  # once for each try of rank 0 to write; a full disk makes it try again
                self.files.write(None)
            return

        def write_state(directory: Path) -> None:
            ranks.broadcast(True)
            self.files.write(directory)

        path = self._write(write_state)
        self._load_back(path)
        ranks.broadcast(False)
        remaining = self.manager.prune(self.run.best)
        if self.old_values is not None:
            self.old_values.drop_before(min((self._epoch_of(p) for p in remaining), default=0))
        size = sum(p.stat().st_size for p in path.iterdir() if p.is_file())
        for message in self.manager.warnings:
            yield Notice(message=message, level="warning")
        self.manager.warnings.clear()
        yield CheckpointSaved(step=step, path=str(path), size_bytes=size)

    def _load_back(self, checkpoint: Path) -> None:
        """Hold the first checkpoint of this start against its own config.json: later ones have the same form.

        Names, types and shapes of its tensors are read, not their numbers: those were just written.

        Raises:
            ModelError: it could not be loaded.
        """
        if self._loaded_back:
            return
        self._loaded_back = True
        try:
            head = read_model(checkpoint).head
        except ModelError as error:
            raise _not_loadable(checkpoint, error.message) from error
        if head is None:
            raise _not_loadable(checkpoint, "its value head is missing")

    def _epoch_of(self, checkpoint: Path) -> int:
        """The epoch in which a run would resume from a checkpoint."""
        return self.plan.locate(checkpoint_step(checkpoint) or 0)[0]

    def _write(self, write_state: Callable[[Path], None]) -> Path:
        """On rank 0: write the checkpoint of the present step, given what writes weights and moments; update `best`."""

        def fill(directory: Path) -> None:
            write_state(directory)
            self._write_record(directory)

        step = self.state.position.step
        needed = checkpoint_bytes(self.runtime.critic, averaged=self.runtime.average is not None)
        self.newest = self.manager.write(step, fill, bytes_needed=needed, best=self.run.best)
        if self.state.position.best_step == step:
            self.run.point_best_at(self.newest)
        return self.newest

    def _write_record(self, directory: Path) -> None:
        """Write `trainer.json`."""
        self.state.position.metrics_bytes = self.run.synced_metrics_bytes()
        epoch, mini_batch = self.plan.locate(self.state.position.step)
        token_budget = token_budget_record(self.max_tokens, self.runtime.compute)
        record = self.state.as_record(epoch=epoch, mini_batch=mini_batch, seed=self.seed, token_budget=token_budget)
        write_json(directory / "trainer.json", record)


def _not_loadable(checkpoint: Path, reason: str) -> ModelError:
    return ModelError(
        f"the first checkpoint cannot be loaded, so the run ends: {checkpoint.name}: {reason}",
        hint="this architecture is not written as it was read. Please report it, with config.json of the base model",
    )
