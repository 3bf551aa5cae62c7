"""Where a run stands, as its checkpoints record it (`trainer.json`), and a critic together with how it computes."""

from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from critic_train.events import Event, Notice
from critic_train.model.compute import Compute
from critic_train.model.critic import Critic
from critic_train.model.memory import set_keeping
from critic_train.model.microbatches import predict_with_progress
from critic_train.rollouts import Rollouts
from critic_train.stopping import StopRequest
from critic_train.training.against_start import Sums
from critic_train.training.divergence import diverged
from critic_train.training.weight_average import WeightAverage


@dataclass(slots=True, kw_only=True)
class Position:
    """How far a run has come.

    No random state is recorded because none is used: the order of the rollouts is a function of (seed, epoch), dropout
    is off, and initial weights are drawn once from the seed.

    Attributes:
        step: optimizer steps taken.
        evaluated_step: the step of the last evaluation, -1 before the first.
        best_step: the step with the best held-out figure (`--best-by`) so far, None while there is none.
        best_figure: that figure.
        evaluations_since_best: those after the last that got further than all before it; than step 0 only where that
            has no exact head, which an improvement need not have beaten by an interval yet.
        metrics_bytes: length of metrics.jsonl at the checkpoint.
        skips: steps skipped so far because their loss or gradient was not finite.
    """

    step: int = 0
    evaluated_step: int = -1
    best_step: int | None = None
    best_figure: float | None = None
    evaluations_since_best: int = 0
    metrics_bytes: int = 0
    skips: int = 0

    @classmethod
    def from_record(cls, record: dict[str, Any], total_steps: int) -> "Position":
        """The position that a checkpoint recorded.

        Raises:
            TypeError, ValueError: the record is not one, or lies beyond `total_steps`.
        """
        position = cls(**record)
        counts = (position.step, position.metrics_bytes, position.skips, position.evaluations_since_best)
        if not all(type(count) is int and count >= 0 for count in counts) or type(position.evaluated_step) is not int:
            raise ValueError("a count that is no whole number")
        if position.step > total_steps:
            raise ValueError(f"step {position.step} of a run of {total_steps}")
        if not isinstance(position.best_step, int | None) or not isinstance(position.best_figure, float | int | None):
            raise ValueError("a best step or figure that is no number")
        return position


@dataclass(slots=True, kw_only=True)
class TrainingState:
    """The position of a run, and the figures that its result reports.

    Attributes:
        position: how far the run has come.
        last_metrics: of the last optimizer step.
        last_evaluation: metrics of the last evaluation, None before the first.
        best_evaluation: metrics of the evaluation at `position.best_step`.
        exact_head: what `ExactHead.solve` gave before the first step; None where the head started otherwise.
        start: of the critic with that head, before training, which later ones have to beat: see `against_start`. None
            before it was evaluated, and on ranks other than 0.
        closest: {step, figure, difference, interval} of the best step after it; None while there is none.
    """

    position: Position = field(default_factory=Position)
    last_metrics: dict[str, Any] = field(default_factory=dict)
    last_evaluation: dict[str, Any] | None = None
    best_evaluation: dict[str, Any] | None = None
    exact_head: dict[str, Any] | None = None
    start: Sums | None = None
    closest: dict[str, Any] | None = None

    @property
    def has_learned(self) -> bool:
        """Whether the critic has taken a step or its head was solved: it is worth a checkpoint, and may be the best."""
        return self.position.step > 0 or self.exact_head is not None

    def as_record(self, *, epoch: int, mini_batch: int, seed: int, token_budget: dict[str, Any]) -> dict[str, Any]:
        """The content of `trainer.json`, JSON-able.

        Args:
            epoch: of the next step.
            mini_batch: of the next step, within the epoch.
            seed: of the run.
            token_budget: from `token_budget_record`.
        """
        return {
            "position": asdict(self.position),
            "epoch": epoch,
            "mini_batch": mini_batch,
            "seed": seed,
            "token_budget": token_budget,
            "last_metrics": self.last_metrics,
            "last_evaluation": self.last_evaluation,
            "best_evaluation": self.best_evaluation,
            **({"exact_head": self.exact_head} if self.exact_head else {}),
            **({"start": self.start, "closest": self.closest} if self.start else {}),
        }

    def restore(self, record: dict[str, Any], total_steps: int) -> None:
        """Take over what `as_record` gave.

        Raises:
            KeyError, TypeError, ValueError: the record is not one of `as_record`.
        """
        self.position = Position.from_record(record["position"], total_steps)
        self.last_evaluation = record["last_evaluation"]
        self.best_evaluation = record["best_evaluation"]
        self.last_metrics = dict(record["last_metrics"])
        self.exact_head = record.get("exact_head")
        self.start, self.closest = record.get("start"), record.get("closest")


def token_budget_record(max_tokens: int, compute: Compute) -> dict[str, Any]:
    """What a checkpoint remembers of the token budget, so that a resumed run starts with what memory had room for.

    Args:
        max_tokens: --max-tokens.
        compute: its `max_tokens` may be lower by now, on each of its `ranks`.
    """
    record = {"asked": max_tokens, "max_tokens": compute.max_tokens, "ranks": compute.ranks.size}
    return record | ({"keeping": list(compute.keeping)} if compute.kept_less else {})


def restore_keeping(record: dict[str, Any] | None, max_tokens: int, runtime: "CriticRuntime") -> None:
    """Keep as little for the backward pass as a checkpoint remembers, for the same --max-tokens on as many ranks.

    Raises:
        KeyError, TypeError, ValueError: see `restore_token_budget`.
    """
    compute = runtime.compute
    if record is None or "keeping" not in record:
        return
    keeping = next((each for each in compute.keep_less if list(each) == record["keeping"]), None)
    if keeping is None or (record["asked"], record["ranks"]) != (max_tokens, compute.ranks.size):
        return  # it is set by the command, or was chosen so
    set_keeping(runtime.critic, compute, keeping)
    compute.keep_less = compute.keep_less[compute.keep_less.index(keeping) + 1 :]
    compute.kept_less = True


def restore_token_budget(record: dict[str, Any] | None, max_tokens: int, compute: Compute) -> str:
    """Lower `compute.max_tokens` to what a checkpoint remembers.

    Where --max-tokens or the number of ranks is another than before, the record says nothing: each rank then holds
    another part of the weights.

    Args:
        record: of `token_budget_record`; None where the checkpoint has none.
        max_tokens: --max-tokens of this start.
        compute: its `max_tokens` is lowered.

    Returns:
        A notice for the user; empty where nothing was lowered.

    Raises:
        KeyError, TypeError, ValueError: it is no such record.
    """
    if record is None:
        return ""
    asked, lowered, size = (record[name] for name in ("asked", "max_tokens", "ranks"))
    if not all(type(number) is int and number > 0 for number in (asked, lowered, size)):
        raise ValueError("a token budget that is no whole number")
    if (asked, size) != (max_tokens, compute.ranks.size) or lowered >= compute.max_tokens:
        return ""
    compute.start_at(lowered)
    return (
        f"memory ran out with {asked:,} tokens at once before: starting with {lowered:,}; the result is the same. "
        f"Any other --max-tokens than {asked} is tried as it is"
    )


@dataclass(slots=True, kw_only=True)
class CriticRuntime:
    """A critic and how it computes.

    Attributes:
        critic: on its device, or sharded over the ranks.
        compute: device, precision, ranks and token budget; its token budget is lowered where memory runs out.
        forest: lay rollouts out as a forest of shared prefixes, or as padded rows.
        stop: checked before every micro-batch, by all ranks together.
        average: of its weights, by which it is judged; None where the weights themselves are.
    """

    critic: Critic
    compute: Compute
    forest: bool
    stop: StopRequest
    average: WeightAverage | None = None

    def averaged(self) -> AbstractContextManager[None]:
        """Inside, the critic has the weights by which it is judged."""
        return nullcontext() if self.average is None else self.average.in_place()

    def values(
        self, rollouts: Rollouts, *, step: int, stage: str, before: int, total: int
    ) -> Generator[Event, None, NDArray[np.float32]]:
        """The critic's values, without gradients. A head whose weight is 0 gives its bias whatever the trunk computes.

        Args:
            rollouts: any number of them, the same on all ranks.
            step: optimizer steps the critic has taken, for the message of an error.
            stage: what the values are for, as the progress names it.
            before: rollouts of the stage that were done before these.
            total: rollouts of the stage.

        Yields:
            Progress.

        Returns:
            float32 [T], 0 where response_mask is false.

        Raises:
            DivergedError: a value is not finite.
            Stopped: asked to stop.
        """
        constant = self.critic.head.constant()
        if constant is not None:
            self.stop.check_on_all_ranks()
            values = np.where(rollouts.response_mask, np.float32(constant), np.float32(0.0))
        else:
            values = yield from predict_with_progress(
                self.critic,
                rollouts,
                self.compute,
                forest=self.forest,
                stop=self.stop,
                stage=stage,
                before=before,
                total=total,
            )
        if not np.isfinite(values).all():
            when = f"after step {step}" if step else "before the first step"
            raise diverged(f"the critic predicts NaN or infinite values {when}", steps_taken=step)
        return values

    def memory_notices(self) -> Iterator[Event]:
        """A warning where memory ran out and the token budget was lowered since this was last called."""
        if sentence := self.compute.lowered():
            yield Notice(message=sentence, level="warning")
