"""The loop of a run: evaluate, checkpoint, step, until the plan is done or somebody asks to stop."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from critic_train.data.addresses import addresses
from critic_train.errors import ModelError
from critic_train.evaluation.advantages import AdvantageRecipe
from critic_train.evaluation.examples import Examples
from critic_train.evaluation.judge import Judge
from critic_train.evaluation.metrics import is_better
from critic_train.events import CheckpointSaved, EvaluationEnded, Event, Notice, StepEnded
from critic_train.model.compute import Compute
from critic_train.model.critic import Critic
from critic_train.model.saving import checkpoint_bytes
from critic_train.prefetch import ReadAhead
from critic_train.rollouts import Rollouts
from critic_train.run.checkpoint import CheckpointManager, checkpoint_name, checkpoint_step, read_state
from critic_train.run.run_directory import RunDirectory
from critic_train.run.storage import write_json
from critic_train.settings import FitSettings, column_renames
from critic_train.stopping import StopRequest
from critic_train.training.dataset import RunData
from critic_train.training.divergence import diverged, find_diverged_rollouts, save_diverged_rollouts
from critic_train.training.frozen_cache import CachedStates, cache_states
from critic_train.training.optimizer import load_optimizer, schedule_factor, set_learning_rates
from critic_train.training.passes import Pass, judge_held_out, take_old_values
from critic_train.training.plan import Position, TrainingPlan, budget_record, restore_token_budget
from critic_train.training.state_files import LastStepSaver, StateFiles
from critic_train.training.targets import Targets
from critic_train.training.train_step import LossRecipe, NonFiniteError, StepResult, accumulate_gradient, apply_gradient

SATURATION_WORTH_A_WARNING = 0.2


@dataclass(slots=True, kw_only=True)
class Trainer:
    """A critic, its optimizer and everything they need, at some position of a run.

    `checkpoint` is the newest one that this process has written or read whole. `keeps_states` says that what a frozen
    part of the trunk computes is kept on disk. `judging` is how held-out rollouts are computed: as those of training
    are, with kept states of their own.
    """

    settings: FitSettings
    run: RunDirectory
    data: RunData
    plan: TrainingPlan
    critic: Critic
    optimizer: torch.optim.Optimizer
    compute: Compute
    recipe: LossRecipe
    targets: Targets
    forest: bool
    tokenizer_from: Path | None
    stop: StopRequest
    position: Position = field(default_factory=Position)
    checkpoint: Path | None = None
    last_evaluation: dict[str, Any] | None = None
    best_evaluation: dict[str, Any] | None = None
    last_metrics: dict[str, Any] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)
    warned_of_saturation: bool = False
    keeps_states: bool = False
    judging: Compute = field(init=False)
    keeper: CheckpointManager = field(init=False)
    files: StateFiles = field(init=False)
    reading: ReadAhead[tuple[int, int, str | None], Rollouts] = field(init=False)

    def __post_init__(self) -> None:
        self.keeper = CheckpointManager(self.run.checkpoints, self.settings.run.keep)
        self.judging = self.compute
        self.reading = ReadAhead(self._read)

    def resume(self, checkpoint: Path) -> Iterator[Event]:
        """Put weights' companions back: moments and position. The critic was loaded from the same checkpoint."""
        self.checkpoint = checkpoint
        self.keeper.mark_complete(checkpoint)
        load_optimizer(self.optimizer, self.critic, checkpoint)
        state = read_state(checkpoint)
        try:
            self.position = Position.of(state["position"], self.plan.total_steps)
            self.last_evaluation = state["last_evaluation"]
            self.best_evaluation = state["best_evaluation"]
            self.last_metrics = dict(state["last_metrics"])
            lowered = restore_token_budget(state.get("token_budget"), self.settings, self.compute)
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(f"{checkpoint / 'trainer.json'} is not as critic-train writes it: {error}") from error
        best = self.run.checkpoints / checkpoint_name(self.position.best_step or 0)
        if self.run.best is None and best.is_dir():  # `best` led to a newer checkpoint, since found damaged
            self.run.point_best_at(best)
        yield Notice(message=f"resuming from {checkpoint.name}")
        if lowered:
            yield Notice(message=lowered)

    def train(self) -> Iterator[Event]:
        """Run to the end of the plan, or until asked to stop; a checkpoint stands at either."""
        ranks = self.compute.ranks
        self.files = StateFiles(self.critic, self.optimizer, self.tokenizer_from, ranks)
        ranks.save_state_with(
            LastStepSaver(
                self.run, self.settings, ranks, lambda: self.position.step, self.files, self._write_checkpoint
            )
        )
        try:
            yield from self._train()
        finally:
            self.reading.close()

    def _train(self) -> Iterator[Event]:
        if self.keeps_states and not self._is_done():
            yield from self._keep_states()
        while True:
            if self._evaluation_is_due():
                yield from self._evaluate()
            if self.stop.look() or self._checkpoint_is_due():
                yield from self._checkpoint()
            if self.stop.look() or self._is_done():
                return
            yield from self._step()

    @property
    def out_of_patience(self) -> bool:
        """Whether --patience ends the run before its plan does."""
        patience = self.settings.run.patience
        return patience is not None and self.position.evaluations_since_best >= patience

    def _is_done(self) -> bool:
        return self.position.step == self.plan.total_steps or self.out_of_patience

    def _evaluation_is_due(self) -> bool:
        step = self.position.step
        at_a_mark = step % self.plan.eval_every == 0 or step == self.plan.total_steps
        return self.data.held_out is not None and at_a_mark and self.position.evaluated_step != step

    def _checkpoint_is_due(self) -> bool:
        step = self.position.step
        at_a_mark = step % self.settings.run.checkpoint_every == 0 or self._is_done()
        return step > 0 and (at_a_mark or self.position.best_step == step)

    def _step(self) -> Iterator[Event]:
        """Take the next optimizer step; when asked to stop in the middle of it, take none."""
        began = time.monotonic()
        epoch, number = self.plan.locate(self.position.step)
        column: str | None = None
        clipped = self.recipe.cliprange_value is not None
        if self.settings.loss.old_values == "epoch" and (clipped or self.targets.moving):
            column = f"old_values-epoch-{epoch}"
            yield from self._old_values(column, begun=number > 0)
            if self.stop.requested:
                return
        kept = self.reading.get((epoch, number, column), self._following(epoch, column))
        rollouts = self.targets.in_epoch(kept)
        factor = schedule_factor(
            self.settings.optimizer.lr_schedule,
            self.position.step,
            total_steps=self.plan.total_steps,
            warmup_steps=self.plan.warmup_steps,
        )
        lr = set_learning_rates(self.optimizer, factor)
        result = accumulate_gradient(
            self.critic, rollouts, self.recipe, self.compute, forest=self.forest, stop=self.stop
        )
        yield from self._memory_notice()
        if result is None:
            self.optimizer.zero_grad(set_to_none=True)
            return
        try:
            norm = apply_gradient(self.critic, self.optimizer, self.settings.optimizer.grad_clip, result.value_loss)
        except NonFiniteError as fault:
            yield from self._not_finite(str(fault), epoch, rollouts)
            return
        self.position.step += 1
        yield self._log_step(epoch, result, {"grad_norm": norm, "lr": lr, "rollouts": len(rollouts)}, began)
        yield from self._saturation_notice(result)

    def _following(self, epoch: int, column: str | None) -> tuple[int, int, str | None] | None:
        """The mini-batch after this one, where it can be read already: old values of another epoch do not stand yet."""
        following, number = self.plan.locate(self.position.step + 1)
        waits = column is not None and following != epoch
        last = self.position.step + 1 >= self.plan.total_steps
        return None if last or waits else (following, number, column)

    def _read(self, what: tuple[int, int, str | None]) -> Rollouts:
        epoch, number, column = what
        return self.data.train.read(self.plan.mini_batch(epoch, number), values_from=column)

    def _not_finite(self, fault: str, epoch: int, rollouts: Rollouts) -> Iterator[Event]:
        """No step was taken: keep the rollouts behind it, then end the run or go on as --on-non-finite says."""
        step, settings, train = self.position.step + 1, self.settings, self.data.train
        suspects = find_diverged_rollouts(self.critic, rollouts, self.recipe, self.compute, forest=self.forest)
        told = ""
        if self.compute.ranks.is_main:
            found_at = addresses(rollouts.row[suspects.places], train.files, column_renames(settings.reading.column))
            path = self.run.path / f"diverged-step-{step:08d}.parquet"
            told = f"at step {step} {fault}; {save_diverged_rollouts(path, rollouts, suspects, found_at, step)}"
        told = self.compute.ranks.broadcast(told)
        if settings.optimizer.on_non_finite == "stop":
            raise diverged(told)
        if self.position.skips == settings.optimizer.max_skips:
            raise diverged(f"{settings.optimizer.max_skips} steps were skipped, as many as --max-skips allows; {told}")
        self.position.skips += 1
        self.position.step = step
        record = {"rollouts": len(rollouts), "skips": self.position.skips}
        self.run.log_metrics({"event": "skip", "step": step, "epoch": epoch, **record})
        yield Notice(message=f"no step is taken {told}", level="warning")

    def _log_step(self, epoch: int, result: StepResult, more: dict[str, Any], began: float) -> StepEnded:
        seconds = time.monotonic() - began
        metrics = asdict(result) | more
        timing = {
            "step_seconds": seconds,
            "rollout_tokens_per_second": result.rollout_tokens / seconds,
            "computed_tokens_per_second": result.computed_tokens / seconds,
            "memory_bytes": self.compute.peak_memory_bytes(),
            "elapsed_seconds": time.monotonic() - self.started,
        }
        step = self.position.step
        self.run.log_metrics({"event": "step", "step": step, "epoch": epoch, **metrics})
        self.run.log_timing({"step": step, **timing})
        self.last_metrics = metrics
        return StepEnded(step=step, epoch=epoch, metrics=metrics, timing=timing)

    def _memory_notice(self) -> Iterator[Event]:
        for compute in (self.compute, self.judging):
            if sentence := compute.lowered():
                yield Notice(message=sentence, level="warning")

    def _saturation_notice(self, result: StepResult) -> Iterator[Event]:
        if result.saturation > SATURATION_WORTH_A_WARNING and not self.warned_of_saturation:
            self.warned_of_saturation = True
            yield Notice(
                message=f"the clip holds back {result.saturation:.0%} of the tokens: against fixed old values a critic "
                "can move at most --cliprange-value from them; a wider one, --old-values epoch or --no-clip lets it go",
                level="warning",
            )

    def _keep_states(self) -> Iterator[Event]:
        """Compute once what the frozen part of the trunk gives, for all rollouts of the run."""
        kept: dict[Path, CachedStates] = {}
        for rollouts in self.data.by_spool():
            states = yield from cache_states(self.critic, rollouts, self.compute, forest=self.forest, stop=self.stop)
            yield from self._memory_notice()
            if states is None:
                return
            kept[rollouts.spool.directory] = states
        if self.data.held_out is not None:
            self.judging = replace(self.compute, states=kept[self.data.held_out.spool.directory])
        self.compute = replace(self.compute, states=kept[self.data.train.spool.directory])

    def _old_values(self, column: str, *, begun: bool) -> Iterator[Event]:
        """Take this critic's own values as V_old at the start of an epoch, as PPO does each iteration."""
        yield from take_old_values(self._pass(), self.data.train, self.compute, column, begun=begun)

    def _evaluate(self) -> Iterator[Event]:
        """Judge the critic on the held-out rollouts; nothing is recorded when asked to stop before the end."""
        judge = Judge(
            ["critic"],
            cliprange_value=self.recipe.cliprange_value,
            seed=self.settings.optimizer.seed,
            uids=self.data.uids,
            advantage=AdvantageRecipe.of(self.targets.recipe),
        )
        examples = Examples(seed=self.settings.optimizer.seed, uids=self.data.uids)
        found = yield from judge_held_out(self._pass(), self.data, self.judging, judge, examples)
        yield from self._memory_notice()
        if found is None:
            return
        metrics, verdict = found
        position = self.position
        epoch, _ = self.plan.locate(position.step)
        self.run.log_metrics({"event": "evaluation", "step": position.step, "epoch": epoch, **metrics})
        self.last_evaluation = metrics
        position.evaluated_step = position.step
        best = self._is_best(metrics[self.settings.run.best_by])
        if best:
            position.best_step, position.best_figure = position.step, metrics[self.settings.run.best_by]
            position.evaluations_since_best = 0
            self.best_evaluation = metrics
        elif position.step > 0:
            position.evaluations_since_best += 1
        yield EvaluationEnded(step=position.step, metrics=metrics, best=best, verdict=verdict)
        if self.out_of_patience and position.step < self.plan.total_steps:
            yield Notice(
                message=f"held-out {self.settings.run.best_by} has not improved in {position.evaluations_since_best} "
                f"evaluations: stopping at step {position.step} of {self.plan.total_steps}"
            )

    def _is_best(self, figure: float | None) -> bool:
        """Whether a figure of --best-by beats all before; the step-0 critic has no checkpoint and is never chosen."""
        before = self.position.best_figure
        if self.position.step == 0 or figure is None or not math.isfinite(figure):
            return False
        if before is None:
            return True
        return is_better(self.settings.run.best_by, figure, before)

    def _pass(self) -> Pass:
        return Pass(critic=self.critic, step=self.position.step, forest=self.forest, stop=self.stop)

    def _checkpoint(self) -> Iterator[Event]:
        """Write the checkpoint of this step, unless it stands; then point `best` and remove what is too old."""
        if self.position.step == 0:
            return
        ranks = self.compute.ranks
        if not ranks.is_main:
            while ranks.broadcast(None):  # rank 0 writes; where the disk is full, it may try again
                self.files.write(None)
            return

        def write_state(directory: Path) -> None:
            ranks.broadcast(True)
            self.files.write(directory)

        path = self._write_checkpoint(write_state)
        ranks.broadcast(False)
        remaining = self.keeper.prune(self.run.best)
        self._drop_old_values({self.plan.locate(checkpoint_step(p) or 0)[0] for p in remaining})
        size = sum(p.stat().st_size for p in path.iterdir() if p.is_file())
        for message in self.keeper.warnings:
            yield Notice(message=message, level="warning")
        self.keeper.warnings.clear()
        yield CheckpointSaved(step=self.position.step, path=str(path), size_bytes=size)

    def _write_checkpoint(self, write_state: Callable[[Path], None]) -> Path:
        """On rank 0: write the checkpoint of this step, given what writes weights and moments, and point `best`."""

        def fill(directory: Path) -> None:
            write_state(directory)
            self._write_record(directory)

        needed = checkpoint_bytes(self.critic)
        path = self.keeper.write(self.position.step, fill, bytes_needed=needed, best=self.run.best)
        self.checkpoint = path
        if self.position.best_step == self.position.step:
            self.run.point_best_at(path)
        return path

    def _write_record(self, directory: Path) -> None:
        self.position.metrics_bytes = self.run.synced_metrics_bytes()
        epoch, number = self.plan.locate(self.position.step)
        write_json(
            directory / "trainer.json",
            {
                "position": asdict(self.position),
                "epoch": epoch,
                "mini_batch": number,
                "seed": self.settings.optimizer.seed,
                "token_budget": budget_record(self.settings, self.compute),
                "last_metrics": self.last_metrics,
                "last_evaluation": self.last_evaluation,
                "best_evaluation": self.best_evaluation,
            },
        )

    def _drop_old_values(self, epochs: set[int]) -> None:
        """Remove old values of epochs before any that a standing checkpoint could resume in."""
        if self.settings.loss.old_values == "epoch":
            for epoch in range(min(epochs, default=0)):
                self.data.train.spool.drop_column(f"old_values-epoch-{epoch}")
