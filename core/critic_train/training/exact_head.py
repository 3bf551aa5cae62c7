"""The value head that least squares gives on a trunk's hidden states: ridge regression, solved exactly.

    minimise over (w, b):  sum_t a_t (G_t - w . h_t - b)^2 / sum_t a_t  +  strength * m * |w|^2

h_t is the state that the value of token t is read from (with --head-inputs last+mean, that state and the mean of the
response's states so far, one after the other), a_t the token's weight by --loss-agg-mode, and m the mean eigenvalue of
the states' covariance. The states are not written anywhere: the solution needs their second moments, which are summed
in float64 while the rollouts go through the trunk once. They are summed for each fold of prompts, so that the error of
a fold under the head that the other folds give follows from sums alone (cross-validation without a second pass), and
the strength is the one with the smallest error. The bias is not penalised.

Training then starts from what the states know already: linear probing, then fine-tuning (Kumar et al. 2022, arXiv
2202.10054). A head that starts at 0 and is trained with the trunk moves the trunk before it reads it.
"""

from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from critic_train.evaluation.advantages import AdvantageRecipe
from critic_train.events import SOLVING_HEAD, Event, Notice, Progress
from critic_train.layers.to_device import to_device
from critic_train.model.compute import Compute
from critic_train.model.critic import Critic
from critic_train.model.fsdp import reshard
from critic_train.model.head_inputs import states_and_means
from critic_train.model.microbatches import micro_batches
from critic_train.model.model_input import ModelInput
from critic_train.model.oom import attempts
from critic_train.rollouts import Rollouts
from critic_train.settings import FitSettings
from critic_train.stopping import StopRequest
from critic_train.training import cross_validated
from critic_train.training.cross_validated import CrossValidated, TokenStates, prompt_folds, shuffled_prompts
from critic_train.training.dataset import ROLLOUTS_PER_PASS, RolloutSet
from critic_train.training.divergence import diverged
from critic_train.training.loss import token_weights
from critic_train.training.state import CriticRuntime
from critic_train.training.targets import Targets
from critic_train.training.train_step import LossRecipe

STRENGTHS = [10.0 ** (exponent / 2) for exponent in range(-12, 7)]
"""Of the penalty, as shares of the covariance's mean eigenvalue; besides these, the mean return alone is tried."""
ROWS_AT_ONCE = 4096
"""States that are held in float64 at the same time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RidgeHead:
    """A solved head.

    Attributes:
        weight: float64 [hidden_size], or of each input one after the other.
        bias: of the head.
        strength: the penalty, as a share of the mean eigenvalue; infinite where the mean return alone does best.
        explained_variance: cross-validated, each token weighed as in the loss; None with fewer than two folds.
        of_folds: float64 [folds, width], with its bias last, the head that the other folds give at this strength; None
            with fewer than two folds.
    """

    weight: Tensor
    bias: float
    strength: float
    explained_variance: float | None
    of_folds: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ExactHead:
    """Solves the head of a run before its first step.

    Attributes:
        runtime: the critic; cached states are read where there are any.
        train: the rollouts to solve it on.
        loss: says how much each token counts. Its clip has no part in this.
        advantage: how advantages are estimated, for the figures.
        seed: of the folds.
    """

    runtime: CriticRuntime
    train: RolloutSet
    loss: LossRecipe
    advantage: AdvantageRecipe
    seed: int

    @classmethod
    def of(cls, settings: FitSettings, runtime: CriticRuntime, train: RolloutSet) -> "ExactHead | None":
        """The head of a run; None where the settings, resolved, have it start otherwise.

        Where the targets contain the critic's own predictions, it is solved on the rollouts that are complete.
        """
        if settings.model.head_init != "exact":
            return None
        targets = Targets.of(settings.returns, settings.loss)
        if targets.moving and targets.recipe.bootstraps:
            complete = train.index[~train.cache.truncated[train.index]]
            train = replace(train, index=complete) if len(complete) else train
        advantage = AdvantageRecipe.of(targets.recipe)
        seed = settings.optimizer.seed
        return cls(runtime=runtime, train=train, loss=LossRecipe.of(settings.loss), advantage=advantage, seed=seed)

    def solve(self) -> Generator[Event, None, dict[str, Any]]:
        """Put the solved head into the critic. All ranks call it.

        Yields:
            Progress, and a notice with the cross-validated explained variance.

        Returns:
            What was solved, JSON-able.

        Raises:
            Stopped: asked to stop; the head is as it was.
            DivergedError: a state or return is not finite.
        """
        runtime, ranks = self.runtime, self.runtime.compute.ranks
        order, what = shuffled_prompts(self.train.groups, self.train.prompts, self.seed)
        folds = prompt_folds(order)
        validation = CrossValidated(self.train, order, int(runtime.critic.head.weight.numel()))
        moments = []
        for fold in range(int(folds.max()) + 1):
            moments.append((yield from self._moments(folds, fold, validation)))
            yield from runtime.memory_notices()
        if any(bool((~torch.isfinite(fold)).any()) for fold in moments):
            raise diverged(
                "the hidden states or returns from which the value head is solved are not finite", steps_taken=0
            )
        answer: dict[str, Any] = {}
        if ranks.is_main:
            head = solve_ridge(moments, runtime.compute.device)
            answer = {
                "weight": head.weight.tolist(),
                "bias": head.bias,
                "strength": head.strength if np.isfinite(head.strength) else None,
                "explained_variance": head.explained_variance,
                "of_folds": None if head.of_folds is None else head.of_folds.tolist(),
            }
            if runtime.critic.head.inputs != "last":
                alone = solve_ridge([of_last_state(fold) for fold in moments], runtime.compute.device)
                answer["explained_variance_last"] = alone.explained_variance
        answer = ranks.broadcast(answer)
        runtime.critic.head.set_linear(torch.tensor(answer.pop("weight"), dtype=torch.float64), answer.pop("bias"))
        yield Progress(stage=SOLVING_HEAD, done=len(self.train), total=len(self.train))
        of_folds, judged = answer.pop("of_folds"), {}
        if of_folds is not None:
            judged = validation.judged(torch.tensor(of_folds, dtype=torch.float64), self.advantage, ranks)
        judged = ranks.broadcast(judged)
        record = {**answer, "folds": len(moments), "folds_of": what, "rollouts": len(self.train)}
        yield Notice(message=sentence(record))
        if figures := cross_validated.sentence(judged):
            yield Notice(message=figures)
        return record | ({"cross_validated": judged} if judged else {})

    def _moments(
        self, folds: NDArray[np.int64], number: int, validation: CrossValidated
    ) -> Generator[Event, None, Tensor]:
        """float64 [width, width] on the CPU: the second moments of a fold, of all ranks."""
        runtime, loss = self.runtime, self.loss
        index, done = np.flatnonzero(folds == number), int((folds < number).sum())
        per_rollout = token_weights(self.train.cache.response_counts[self.train.index], loss.mode, loss.scale_factor)
        fold = replace(self.train, index=self.train.index[index])
        width = moments_width(runtime.critic)
        total = torch.zeros(width, width, dtype=torch.float64, device=runtime.compute.device)
        for part, rollouts in fold.by_group(ROLLOUTS_PER_PASS):
            yield Progress(stage=SOLVING_HEAD, done=done, total=len(self.train))
            weights = np.repeat(per_rollout[index[part]], rollouts.lengths)
            total += second_moments(
                runtime.critic,
                rollouts,
                weights,
                runtime.compute,
                forest=runtime.forest,
                stop=runtime.stop,
                memory=validation.batch(number, index[part]),
            )
            done += len(part)
        return runtime.compute.ranks.all_reduce_sum(total.cpu())


def sentence(record: dict[str, Any]) -> str:
    """What was solved, for a person; `record` is that of `ExactHead.solve`."""
    figure, strength = record["explained_variance"], record["strength"]
    what = f"the value head is solved by ridge regression on the states of {record['rollouts']:,} rollouts"
    if figure is None:
        return f"{what}: one rollout is too few for cross-validation, so it predicts the mean return"
    validated = f"{record['folds']}-fold cross-validation over {record['folds_of']}"
    if strength is None:
        return f"{what}: in {validated} no strength beats the mean return, which it predicts"
    alone = record.get("explained_variance_last")
    beside = "" if alone is None else f"; {alone:.3f} with the last state alone"
    of_strength = f"strength {strength:.2g} of the mean eigenvalue"
    return f"{what}: explained variance {figure:.3f} in {validated} ({of_strength}){beside}"


def moments_width(critic: Critic) -> int:
    """Rows of the second moments: what the head reads, 1 and the return."""
    return int(critic.head.weight.numel()) + 2


def of_last_state(moments: Tensor) -> Tensor:
    """The moments of the last state alone, given those of a head with two inputs."""
    width = len(moments) - 2
    rows = torch.cat([torch.arange(width // 2), torch.arange(width, width + 2)]).to(moments.device)
    return moments[rows][:, rows]


@torch.no_grad()
def second_moments(
    critic: Critic,
    rollouts: Rollouts,
    weights: NDArray[np.float64],
    compute: Compute,
    *,
    forest: bool,
    stop: StopRequest,
    memory: TokenStates | None = None,
) -> Tensor:
    """Weighted sums of z z^T over this rank's share of the response tokens, z = (what the head reads, 1, return).

    Args:
        critic: on its device.
        rollouts: the same on all ranks, which all call this.
        weights: float64 [T], of each token.
        compute: device, precision and token budget, which is lowered where memory runs out.
        forest: lay rollouts out as a forest, or as padded rows.
        stop: checked before every micro-batch.
        memory: is given what the head reads, where some of it stays in memory.

    Returns:
        float64 [width, width] on the device, width as in `moments_width`.

    Raises:
        Stopped: asked to stop.
    """
    width = moments_width(critic)
    for attempt in attempts(critic, rollouts, compute):
        with attempt:
            total = torch.zeros(width, width, dtype=torch.float64, device=compute.device)
            if memory is not None:
                memory.parts.clear()
            try:
                for batch in micro_batches(rollouts, compute, forest=forest):
                    stop.check_on_all_ranks()
                    with compute.autocast():
                        states = critic.hidden(batch)
                    for read, index, tokens in _what_the_head_reads(critic, states, batch):
                        _add_moments(total, read, index, weights[tokens], rollouts.returns[tokens])
                        if memory is not None:
                            memory.add(read, index, tokens)
            finally:
                reshard((critic.trunk, critic.head))
            compute.ranks.all_reduce_sum(torch.zeros(1))  # no rank ends an attempt alone
            return total
    raise AssertionError("attempts end by an error")


def _what_the_head_reads(
    critic: Critic, states: Tensor, batch: ModelInput
) -> Iterator[tuple[Tensor, Tensor, NDArray[np.int64]]]:
    """(rows, the row of each of some response tokens, int64 [m] those tokens), which together are all of a batch."""
    if critic.head.inputs == "last":
        yield states, batch.value_index, batch.response_tokens
        return
    first, value_index, token_index = 0, batch.value_index, batch.token_index
    here = torch.arange(len(value_index), device=value_index.device)
    if (all_ranks := batch.of_all_ranks) is not None:
        states = all_ranks.sequence.gathered(states, all_ranks.reads_here, all_ranks.read_positions)
        value_index, token_index, here = all_ranks.value_index, all_ranks.token_index, all_ranks.here
    # A row for each token: rollouts that share a state may differ in what they have chosen before it.
    for rows in states_and_means(states, value_index, token_index, ROWS_AT_ONCE):
        bounds = torch.tensor([first, first + len(rows)], device=here.device)
        begin, end = torch.searchsorted(here, bounds).tolist()
        rows, first = rows[here[begin:end] - first], first + len(rows)
        yield rows, torch.arange(len(rows), device=rows.device), batch.response_tokens[begin:end]


def _add_moments(
    total: Tensor,
    states: Tensor,
    value_index: Tensor,
    weights: NDArray[np.float64],
    returns: NDArray[np.float32],
) -> None:
    """Add one micro-batch to `total`; a state that several rollouts read is multiplied once.

    Args:
        total: float64 [width, width], added to in place.
        states: [R, hidden_size].
        value_index: int64 [M], the state of each token.
        weights: float64 [M].
        returns: float32 [M].
    """
    device = states.device
    weight, value = to_device(weights, device), to_device(returns, device).double()
    # Per state: the sums of weight and of weight times return over the tokens that read it.
    sums = torch.zeros(len(states), 2, dtype=torch.float64, device=device)
    sums.index_add_(0, value_index, torch.stack([weight, weight * value], dim=1))
    for start in range(0, len(states), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        with_one = torch.nn.functional.pad(states[rows].double(), (0, 1), value=1.0)
        total[:-1, :-1] += (with_one * sums[rows, :1]).T @ with_one
        cross = with_one.T @ sums[rows, 1]
        total[:-1, -1] += cross
        total[-1, :-1] += cross
    total[-1, -1] += (weight * value.square()).sum()


def solve_ridge(moments: list[Tensor], device: torch.device | None = None) -> RidgeHead:
    """The head with the smallest cross-validated squared error.

    Args:
        moments: float64 [width, width] of each fold, as `second_moments` sums them.
        device: where to compute; the CPU by default.

    Returns:
        The head that all folds together give, at the strength that was chosen.
    """
    strengths = [*STRENGTHS, float("inf")]
    folds = [fold.to(device or "cpu") for fold in moments if fold[-2, -2] > 0]
    if not folds:  # no token weighs anything
        return RidgeHead(
            weight=moments[0].new_zeros(len(moments[0]) - 2).cpu(),
            bias=0.0,
            strength=float("inf"),
            explained_variance=None,
        )
    total = torch.stack(folds).sum(0)
    explained: float | None = None
    chosen = len(strengths) - 1
    if len(folds) > 1:
        sums = torch.stack([_errors(_heads(total - fold, strengths), fold) for fold in folds]).sum(0)  # [strengths, 2]
        chosen = int(sums[:, 0].argmin())
        error, squared = float(sums[chosen, 1] / total[-2, -2]), float(sums[chosen, 0] / total[-2, -2])
        mean = float(total[-1, -2] / total[-2, -2])
        variance = float(total[-1, -1] / total[-2, -2]) - mean**2
        explained = 1.0 - (squared - error**2) / variance if variance > 0 else None
        if explained is None:
            chosen = len(strengths) - 1
    head = _heads(total, strengths[chosen : chosen + 1])[0]
    return RidgeHead(
        weight=head[:-1].cpu(),
        bias=float(head[-1]),
        strength=strengths[chosen],
        explained_variance=explained,
        of_folds=None if explained is None else _heads_of_others(moments, total, strengths[chosen]),
    )


def _heads_of_others(moments: list[Tensor], total: Tensor, strength: float) -> Tensor:
    """float64 [folds, hidden_size + 1] on the CPU: what all folds but each give."""
    return torch.stack([_heads(total - fold.to(total.device), [strength])[0] for fold in moments]).cpu()


def _heads(moments: Tensor, strengths: list[float]) -> Tensor:
    """float64 [strengths, hidden_size + 1]: weight and bias for each strength, from one eigendecomposition."""
    weight, mean_return = moments[-2, -2], moments[-1, -2] / moments[-2, -2]
    mean = moments[:-2, -2] / weight
    covariance = moments[:-2, :-2] / weight - torch.outer(mean, mean)
    cross = moments[:-2, -1] / weight - mean * mean_return
    values, vectors = torch.linalg.eigh(covariance)
    values = values.clamp(min=0.0)  # rounding
    penalties = values.mean() * torch.tensor(strengths, dtype=torch.float64, device=moments.device)
    divided = vectors.T @ cross / (values + penalties[:, None])  # 0 for an infinite penalty
    weights = torch.nan_to_num(divided, nan=0.0, posinf=0.0, neginf=0.0) @ vectors.T
    return torch.cat([weights, (mean_return - weights @ mean)[:, None]], dim=1)


def _errors(heads: Tensor, fold: Tensor) -> Tensor:
    """float64 [strengths, 2]: the weighted sums of squared errors and of errors of each head on a fold."""
    # An error is z . (weight, bias, -1), z as in `second_moments`.
    signed = torch.cat([heads, heads.new_full((len(heads), 1), -1.0)], dim=1)
    products = signed @ fold
    return torch.stack([(products * signed).sum(1), products[:, -2]], dim=1)
