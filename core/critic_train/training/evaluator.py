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
from critic_train.training.dataset import ROLLOUTS_PER_PASS, RolloutSet
from critic_train.training.plan import TrainingPlan
from critic_train.training.state import CriticRuntime, TrainingState

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
        patience: evaluations without a better one after which the run ends; None for no such end.
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
        """Evaluate the critic as it is. All ranks call it.

        Raises:
            Stopped: asked to stop; nothing is recorded.
        """
        metrics, verdict = yield from self._judge()
        yield from self.runtime.memory_notices()
        position = self.state.position
        epoch, _ = self.plan.locate(position.step)
        self.run.log_metrics({"event": "evaluation", "step": position.step, "epoch": epoch, **metrics})
        self.state.last_evaluation = metrics
        position.evaluated_step = position.step
        best = self._is_best(metrics[self.best_by])
        if best:
            position.best_step, position.best_figure = position.step, metrics[self.best_by]
            position.evaluations_since_best = 0
            self.state.best_evaluation = metrics
        elif position.step > 0:
            position.evaluations_since_best += 1
        yield EvaluationEnded(step=position.step, metrics=metrics, best=best, verdict=verdict)
        if self.out_of_patience and position.step < self.plan.total_steps:
            yield Notice(
                message=f"held-out {self.best_by} has not improved in {position.evaluations_since_best} "
                f"evaluations: stopping at step {position.step} of {self.plan.total_steps}"
            )

    def _is_best(self, figure: float | None) -> bool:
        """Whether a value of --best-by is better than all before, the one of step 0 included."""
        before = self.state.position.best_figure
        if figure is None or not math.isfinite(figure):
            return False
        if before is None:
            return True
        return is_better(self.best_by, figure, before)

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
        done, total = 0, len(self.held_out)
        yield Progress(stage=EVALUATING, done=0, total=total)
        for _, rollouts in self.held_out.by_group(ROLLOUTS_PER_PASS):
            predicted = yield from self.runtime.values(rollouts, step=step, stage=EVALUATING, before=done, total=total)
            values = {"critic": predicted}
            if ranks.is_main:
                judge.add(rollouts, values)
                examples.add(rollouts, values)
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
        }
        return ranks.broadcast(metrics), verdict | {"words": summary_text(verdict), "examples": examples.records()}
