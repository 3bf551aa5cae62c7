"""The training loop of a run: evaluate, save, take an optimizer step, until the plan is done or the run is stopped."""

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from critic_train.events import Event, Notice, StepEnded
from critic_train.rollouts import Rollouts
from critic_train.run.run_directory import RunDirectory
from critic_train.settings import OptimizerSettings
from critic_train.stopping import Stopped
from critic_train.training.checkpointer import Checkpointer
from critic_train.training.dataset import RunData
from critic_train.training.divergence import diverged, find_diverged_rollouts, save_diverged_rollouts
from critic_train.training.evaluator import Evaluator
from critic_train.training.exact_head import ExactHead
from critic_train.training.frozen_cache import CachedStates, cache_states
from critic_train.training.old_values import OldValues
from critic_train.training.optimizer import schedule_factor, set_learning_rates
from critic_train.training.plan import MiniBatches, TrainingPlan
from critic_train.training.state import CriticRuntime, TrainingState
from critic_train.training.train_step import LossRecipe, StepResult, accumulate_gradient, clip_gradient

SATURATION_WARNING = 0.2
"""Share of tokens whose gradient the clip zeroes, above which the user is warned once."""


@dataclass(slots=True, kw_only=True)
class Trainer:
    """The loop of a run, and its optimizer step.

    Attributes:
        settings: learning-rate schedule, gradient clip, and what to do about a step that is not finite.
        run: where metrics are logged.
        data: the rollouts of the run.
        plan: the steps of the run.
        batches: the mini-batch of each step.
        runtime: the critic that is trained, and how it computes.
        optimizer: of the critic.
        loss: how the loss is made.
        old_values: takes V_old of each epoch; None unless --old-values epoch needs it.
        evaluator: evaluates on held-out rollouts; None where there are none.
        checkpointer: saves, and has restored where the run resumes.
        state: where the run stands; shared with evaluator and checkpointer.
        caches_states: whether the hidden states of a frozen trunk are computed once and cached.
        exact_head: solves the value head before the first step of a run that is not resumed; None where it starts
            otherwise.
    """

    settings: OptimizerSettings
    run: RunDirectory
    data: RunData
    plan: TrainingPlan
    batches: MiniBatches
    runtime: CriticRuntime
    optimizer: torch.optim.Optimizer
    loss: LossRecipe
    old_values: OldValues | None
    evaluator: Evaluator | None
    checkpointer: Checkpointer
    state: TrainingState
    caches_states: bool
    exact_head: ExactHead | None = None
    _started: float = field(default_factory=time.monotonic)
    _warned_of_saturation: bool = False

    def train(self) -> Iterator[Event]:
        """Run to the end of the plan, or until asked to stop; either way the last step has a checkpoint."""
        self.checkpointer.save_on_out_of_memory()
        try:
            yield from self._loop()
        except Stopped:  # before an optimizer step, so that weights are those after the last one
            self.optimizer.zero_grad(set_to_none=True)
            yield from self._memory_notices()
            yield from self.checkpointer.save_checkpoint()
        finally:
            self.batches.close()

    def _loop(self) -> Iterator[Event]:
        # The last evaluation may still be due after the last step: like those before, it reads cached states.
        evaluates = self.evaluator is not None and self.evaluator.is_due
        solves = self.exact_head is not None and self.checkpointer.newest is None
        if self.caches_states and (not self.is_done or solves or evaluates):
            yield from self._cache_states()
        if self.exact_head is not None and solves:
            self.state.exact_head = yield from self.exact_head.solve()
            self.run.log_metrics({"event": "exact_head", "step": 0, "epoch": 0, **self.state.exact_head})
        while True:
            if self.evaluator is not None and self.evaluator.is_due:
                yield from self.evaluator.evaluate()
            self.runtime.stop.check_on_all_ranks()
            if self.checkpointer.is_due or (self.is_done and self.state.has_learned):
                yield from self.checkpointer.save_checkpoint()
            self.runtime.stop.check_on_all_ranks()
            if self.is_done:
                return
            yield from self._step()

    @property
    def is_done(self) -> bool:
        """Whether no step is left, or --patience ends the run."""
        return self.state.position.step == self.plan.total_steps or self.stopped_early

    @property
    def stopped_early(self) -> bool:
        """Whether --patience ends the run."""
        return self.evaluator is not None and self.evaluator.out_of_patience

    def _step(self) -> Iterator[Event]:
        """Take the next optimizer step.

        Raises:
            DivergedError: its loss or gradient is not finite, and it may not be skipped.
            Stopped: asked to stop in the middle of it; no step is taken.
        """
        began, step = time.monotonic(), self.state.position.step
        epoch, number = self.plan.locate(step)
        if self.old_values is not None:
            yield from self.old_values.take(epoch, begun=number > 0, step=step)
        rollouts = self.batches.load(step)

        factor = schedule_factor(
            self.settings.lr_schedule, step, total_steps=self.plan.total_steps, warmup_steps=self.plan.warmup_steps
        )
        lr = set_learning_rates(self.optimizer, factor)
        runtime = self.runtime
        result = accumulate_gradient(
            runtime.critic, rollouts, self.loss, runtime.compute, forest=runtime.forest, stop=runtime.stop
        )
        yield from runtime.memory_notices()

        norm = clip_gradient(runtime.critic, self.settings.grad_clip)
        if not math.isfinite(norm) or not math.isfinite(result.value_loss + (result.lm_loss or 0.0)):
            error = f"the loss is {result.value_loss:g} and the gradient norm {norm:g}"
            yield from self._skip_step(error, epoch, rollouts)
            return
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if runtime.average is not None:
            runtime.average.update(step + 1 - self.state.position.skips)

        self.state.position.step += 1
        figures = {name: value for name, value in asdict(result).items() if value is not None}
        metrics = figures | {"grad_norm": norm, "lr": lr, "rollouts": len(rollouts)}
        yield self._log_step(epoch, metrics, self._timing(result, time.monotonic() - began))
        yield from self._saturation_notice(result.saturation)

    def _log_step(self, epoch: int, metrics: dict[str, Any], timing: dict[str, Any]) -> StepEnded:
        position = self.state.position
        self.run.log_metrics({"event": "step", "step": position.step, "epoch": epoch, **metrics})
        self.run.log_timing({"step": position.step, **timing})
        self.state.last_metrics = metrics
        skipped = position.skips if self.settings.on_non_finite == "skip" else None
        return StepEnded(step=position.step, epoch=epoch, metrics=metrics, timing=timing, skipped_steps=skipped)

    def _timing(self, result: StepResult, seconds: float) -> dict[str, Any]:
        return {
            "step_seconds": seconds,
            "rollout_tokens_per_second": result.rollout_tokens / seconds,
            "computed_tokens_per_second": result.computed_tokens / seconds,
            "memory_bytes": self.runtime.compute.peak_memory_bytes(),
            "elapsed_seconds": time.monotonic() - self._started,
        }

    def _skip_step(self, error: str, epoch: int, rollouts: Rollouts) -> Iterator[Event]:
        """Save the rollouts of a step that is not finite; then end the run, or go on as --on-non-finite says."""
        runtime, position, max_skips = self.runtime, self.state.position, self.settings.max_skips
        step = position.step + 1
        taken = position.step - position.skips
        suspects = find_diverged_rollouts(
            runtime.critic, rollouts, self.loss, runtime.compute, forest=runtime.forest, steps_taken=taken
        )
        message = ""
        if runtime.compute.ranks.is_main:
            sources = self.data.train.addresses(rollouts.row[suspects.index])
            path = self.run.path / f"diverged-step-{step:08d}.parquet"
            message = f"at step {step} {error}; {save_diverged_rollouts(path, rollouts, suspects, sources, step)}"
        message = runtime.compute.ranks.broadcast(message)
        if self.settings.on_non_finite == "stop":
            raise diverged(message, steps_taken=taken)
        if position.skips == max_skips:
            raise diverged(
                f"{max_skips} steps were skipped, as many as --max-skips allows; {message}", steps_taken=taken
            )
        position.skips += 1
        position.step = step
        record = {"rollouts": len(rollouts), "skips": position.skips}
        self.run.log_metrics({"event": "skip", "step": step, "epoch": epoch, **record})
        yield Notice(message=f"this step is skipped: {message}", level="warning")

    def _cache_states(self) -> Iterator[Event]:
        """Compute the hidden states of the frozen trunk once, for all rollouts of the run."""
        runtime, states = self.runtime, dict[Path, CachedStates]()
        for rollouts in self.data.by_cache():
            states[rollouts.cache.directory] = yield from cache_states(
                runtime.critic, rollouts, runtime.compute, forest=runtime.forest, stop=runtime.stop
            )
            yield from runtime.memory_notices()
        compute = runtime.compute
        if self.evaluator is not None:
            held_out = states[self.evaluator.held_out.cache.directory]
            self.evaluator.runtime = replace(runtime, compute=replace(compute, states=held_out))
        runtime.compute = replace(compute, states=states[self.data.train.cache.directory])

    def _memory_notices(self) -> Iterator[Event]:
        yield from self.runtime.memory_notices()
        if self.evaluator is not None:
            yield from self.evaluator.runtime.memory_notices()

    def _saturation_notice(self, saturation: float) -> Iterator[Event]:
        if saturation > SATURATION_WARNING and not self._warned_of_saturation:
            self._warned_of_saturation = True
            yield Notice(
                message=f"the clip zeroes the gradient of {saturation:.0%} of the tokens: with fixed old values a "
                "critic can move at most --cliprange-value from them; a wider one, --old-values epoch or --no-clip "
                "lets it go on",
                level="warning",
            )
