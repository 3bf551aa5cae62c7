"""Evaluation on held-out rollouts during a run: the critic's metrics, which step is the best, and --patience."""

import math
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any

from critic_train.data.addresses import UidLookup
from critic_train.evaluation.advantages import AdvantageRecipe
from critic_train.evaluation.examples import Examples
from critic_train.evaluation.judge import Judge
from critic_train.evaluation.metrics import is_better
from critic_train.evaluation.summary_text import summary_text
from critic_train.events import EVALUATING, EvaluationEnded, Event, Notice, Progress
from critic_train.run.run_directory import RunDirectory
from critic_train.training.against_start import HeldOutErrors, beats_start, difference_to_start
from critic_train.training.dataset import ROLLOUTS_PER_PASS, RolloutSet
from critic_train.training.plan import TrainingPlan
from critic_train.training.state import CriticRuntime, TrainingState

MINUS_START = "minus_step_0"
"""Among the metrics of an evaluation: the figure of --best-by less that of the exact head, {difference, interval}."""
OF_THE_DATA = ("rollouts", "prompt_groups", "between_prompt_share", "between_prompt_share_interval")
"""What a verdict says of the rollouts themselves and metrics.jsonl keeps."""


@dataclass(slots=True, kw_only=True)
class Evaluator:
    """Evaluates the critic of a run, and remembers in the run's state which step was the best.

    Attributes:
        runtime: the critic; with cached states of its own where the trunk is frozen.
        held_out: the rollouts to evaluate on.
        uids: finds the uids of held-out rollouts; asked on rank 0 alone.
        cliprange_value: eps of the clip; None for no clip.
        advantage: how advantages are estimated.
        seed: of the bootstrap and of the examples.
        plan: of the run.
        best_by: the metric that chooses the best step.
        patience: evaluations in a row that get no further, after which the run ends; None for no such end.
        state: of the run.
        run: where metrics are logged.
    """

    runtime: CriticRuntime
    held_out: RolloutSet
    uids: UidLookup
    cliprange_value: float | None
    advantage: AdvantageRecipe
    seed: int
    plan: TrainingPlan
    best_by: str
    patience: int | None
    state: TrainingState
    run: RunDirectory

    @property
    def is_due(self) -> bool:
        """Whether the present step is to be evaluated and has not been."""
        step = self.state.position.step
        scheduled = step % self.plan.eval_every == 0 or step == self.plan.total_steps
        return scheduled and self.state.position.evaluated_step != step

    @property
    def out_of_patience(self) -> bool:
        """Whether --patience ends the run before its plan does."""
        return self.patience is not None and self.state.position.evaluations_since_best >= self.patience

    def evaluate(self) -> Iterator[Event]:
        """Evaluate the critic as it would be saved. All ranks call it.

        Raises:
            Stopped: asked to stop; nothing is recorded.
        """
        with self.runtime.averaged():
            metrics, verdict = yield from self._judge()
        yield from self.runtime.memory_notices()
        position, minus_start = self.state.position, metrics.get(MINUS_START)
        epoch, _ = self.plan.locate(position.step)
        self.run.log_metrics({"event": "evaluation", "step": position.step, "epoch": epoch, **metrics})
        self.state.last_evaluation = metrics
        position.evaluated_step = position.step
        figure = metrics[self.best_by]
        best = self._is_best(figure, minus_start)
        further = minus_start is not None and self._is_closest(figure)
        if minus_start is not None and further:
            self.state.closest = {"step": position.step, "figure": figure, **minus_start}
        if best:
            position.best_step, position.best_figure = position.step, figure
            self.state.best_evaluation = metrics
        if best or further:  # what still gets further may yet beat an exact head by an interval
            position.evaluations_since_best = 0
        elif position.step > 0:
            position.evaluations_since_best += 1
        yield EvaluationEnded(step=position.step, metrics=metrics, best=best, verdict=verdict)
        if self.out_of_patience and position.step < self.plan.total_steps:
            yield Notice(
                message=f"held-out {self.best_by} has not improved in {position.evaluations_since_best} evaluations: "
                f"stopping at step {position.step} of {self.plan.total_steps}"
            )

    def closing_notice(self) -> Iterator[Notice]:
        """What training was worth, where the run ends with the critic it began with or began with an exact head."""
        position, shown = self.state.position, self.state.closest
        proven, best = bool(position.best_step), self.state.best_evaluation or {}
        if proven and shown is not None:
            shown = {"step": position.best_step, "figure": position.best_figure, **best[MINUS_START]}
        if shown is not None and shown["interval"] is not None:
            low, high = shown["interval"]
            worth = "training has beaten it"
            if not proven:
                worth = "training has not beaten it by an interval, and `best` is step 0, the exact head"
            yield Notice(
                message=f"held-out {self.best_by} {shown['figure']:.4g} at step {shown['step']}: the difference to the "
                f"exact value head is {shown['difference']:.2g} [{low:.2g}, {high:.2g}]: {worth}"
            )
        elif position.step > 0 and position.best_step == 0:
            yield Notice(
                message=f"no step is better on the held-out rollouts than the critic at step 0, before training "
                f"({self.best_by} {position.best_figure:.4g}): `best` is step 0",
                level="warning",
            )

    def _is_best(self, figure: float | None, minus_start: dict[str, Any] | None) -> bool:
        """Whether a value of --best-by is better than all before, the one of step 0 included.

        An exact head gives way only where the interval of the difference to it says so.
        """
        before = self.state.position.best_figure
        if figure is None or not math.isfinite(figure):
            return False
        if before is None:
            return True
        if minus_start is not None and self.state.position.best_step == 0:
            return beats_start(self.best_by, minus_start)
        return is_better(self.best_by, figure, before)

    def _is_closest(self, figure: float | None) -> bool:
        """Whether a value of --best-by is better than all before but that of step 0."""
        if figure is None or not math.isfinite(figure):
            return False
        return self.state.closest is None or is_better(self.best_by, figure, self.state.closest["figure"])

    def _judge(self) -> Generator[Event, None, tuple[dict[str, Any], dict[str, Any]]]:
        """(metrics, the same on all ranks; the verdict with examples, on rank 0 alone)."""
        ranks, step = self.runtime.compute.ranks, self.state.position.step
        judge = Judge(
            ["critic"],
            cliprange_value=self.cliprange_value,
            seed=self.seed,
            uids=self.uids,
            advantage=self.advantage,
        )
        examples = Examples(seed=self.seed, uids=self.uids)
        errors = HeldOutErrors(self.held_out.groups, self.held_out.mean_return)
        done, total = 0, len(self.held_out)
        yield Progress(stage=EVALUATING, done=0, total=total)
        for _, rollouts in self.held_out.by_group(ROLLOUTS_PER_PASS):
            predicted = yield from self.runtime.values(rollouts, step=step, stage=EVALUATING, before=done, total=total)
            values = {"critic": predicted}
            if ranks.is_main:
                judge.add(rollouts, values)
                examples.add(rollouts, values)
                errors.add(rollouts, predicted)
            done += len(rollouts)
            yield Progress(stage=EVALUATING, done=done, total=total)
        if not ranks.is_main:
            return ranks.broadcast(None), {}
        verdict = judge.verdict()
        metrics = {
            **verdict["critics"]["critic"],
            "return_histogram": verdict["return_histogram"],
            **{name: verdict[name] for name in OF_THE_DATA},
            "baselines": verdict["baselines"],
            **self._minus_start(errors),
        }
        return ranks.broadcast(metrics), verdict | {"words": summary_text(verdict), "examples": examples.records()}

    def _minus_start(self, errors: HeldOutErrors) -> dict[str, Any]:
        """{MINUS_START: the difference to the exact head}; at step 0 its errors are kept instead. On rank 0 alone."""
        if self.state.exact_head is None:
            return {}
        returns, now = errors.blocks()
        if self.state.position.step == 0:
            self.state.start = now.tolist()
            return {}
        if self.state.start is None:  # the run was begun by a critic-train that kept none
            return {}
        return {MINUS_START: difference_to_start(self.best_by, returns, now, self.state.start)}
