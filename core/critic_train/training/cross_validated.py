"""What an exact head is worth on prompts that it has not seen, told from the pass in which it is solved.

Second moments give the cross-validated explained variance, but neither its interval nor how the critic compares with
the mean of the prompt's other rollouts, and with both fused: these take a value for every token. So the states of some
prompts, all of them where they are few, stay in memory until the heads are solved. Each prompt is then judged by the
head of the folds it is not in.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from critic_train.data.order import connected_groups, mixed
from critic_train.distributed.ranks import Ranks
from critic_train.evaluation.advantages import AdvantageRecipe
from critic_train.evaluation.judge import Judge
from critic_train.evaluation.verdict import GROUP_MEAN
from critic_train.training.dataset import RolloutSet

FOLDS = 5
KEPT_BYTES = 2**31
"""Of host memory, over all ranks."""
INTERVALS = ("explained_variance", "explained_variance_within_group")


def shuffled_prompts(groups: NDArray[np.int64], prompts: NDArray[np.int64], seed: int) -> tuple[NDArray[np.int64], str]:
    """The place of every rollout's prompt in a random order; of the rollout itself where all are of one prompt.

    Args:
        groups: int64 [n], the prompt group of every rollout.
        prompts: int64 [n], a key of its prompt's tokens.
        seed: of the order.

    Returns:
        (int64 [n] from 0, none left out; what is put in order, as in "166 prompts").
    """
    together = connected_groups(groups, prompts)
    what = "prompts"
    if len(np.unique(together)) == 1:
        together, what = np.arange(len(groups), dtype=np.int64), "rollouts of the only prompt"
    keys, inverse = np.unique(together, return_inverse=True)
    rank = np.empty(len(keys), dtype=np.int64)
    rank[np.argsort(mixed(keys, seed), kind="stable")] = np.arange(len(keys))
    return rank[inverse], f"{len(keys):,} {what}"


def prompt_folds(order: NDArray[np.int64]) -> NDArray[np.int64]:
    """The fold of every rollout, int64 [n] from 0, none left out, given the places of `shuffled_prompts`."""
    return order % min(FOLDS, int(order.max()) + 1)


@dataclass(slots=True, kw_only=True)
class TokenStates:
    """What the head reads for some tokens of some rollouts, of those that this rank computes.

    Attributes:
        wanted: bool [T], of which tokens it is kept.
        parts: (float32 [m, inputs * hidden_size], int64 [m] the tokens), by micro-batch.
    """

    wanted: NDArray[np.bool_]
    parts: list[tuple[Tensor, NDArray[np.int64]]] = field(default_factory=list)

    def add(self, read: Tensor, index: Tensor, tokens: NDArray[np.int64]) -> None:
        """Keep what is wanted of a micro-batch: the row `index` of `read` is what the head reads for each token."""
        wanted = self.wanted[tokens]
        if wanted.any():
            rows = read[index[torch.from_numpy(wanted).to(index.device)]]
            self.parts.append((rows.float().cpu(), tokens[wanted]))

    def values(self, head: Tensor, ranks: Ranks) -> NDArray[np.float32]:
        """float32 [T]: what a head, float64 [inputs * hidden_size + 1] with its bias last, predicts for them."""
        values = torch.zeros(len(self.wanted), dtype=torch.float64)
        for rows, tokens in self.parts:
            values[torch.from_numpy(tokens)] = rows.double() @ head[:-1] + head[-1]
        return ranks.all_reduce_sum(values).float().numpy()


class CrossValidated:
    """States of the rollouts of some prompts, and the figures of critics that have not seen them.

    Args:
        train: all rollouts that the head is solved on.
        order: int64 [n], the place of each one's prompt in a random order of the prompts.
        width: numbers that the head reads for a token.
    """

    def __init__(self, train: RolloutSet, order: NDArray[np.int64], width: int) -> None:
        tokens = np.bincount(order, weights=train.cache.response_counts[train.index])
        prompts = int(np.searchsorted(4.0 * width * np.cumsum(tokens), KEPT_BYTES, side="right"))
        self._train = train
        self._chosen = order < prompts
        self._batches: list[tuple[int, NDArray[np.int64], TokenStates]] = []

    def batch(self, fold: int, index: NDArray[np.int64]) -> TokenStates:
        """To be filled with the states of some rollouts of a fold, int64 [m] indices in the training set."""
        lengths = self._train.cache.lengths[self._train.index[index]]
        states = TokenStates(wanted=np.repeat(self._chosen[index], lengths))
        self._batches.append((fold, index, states))
        return states

    def judged(self, heads: Tensor, advantage: AdvantageRecipe, ranks: Ranks) -> dict[str, Any]:
        """The figures. All ranks call it; those but 0 are given nothing.

        Args:
            heads: float64 [folds, inputs * hidden_size + 1], of each fold the one that the others give.
            advantage: how advantages are estimated.
            ranks: of the run.

        Returns:
            JSON-able: rollouts and prompt_groups judged; explained variance, overall and within prompts, with
            intervals; that of the group mean and of both fused (`data.mixture`), and what these differ by.
        """
        judge = Judge(["critic"], cliprange_value=None, advantage=advantage)
        for fold, index, states in self._batches:
            values = states.values(heads[fold], ranks)[states.wanted]
            if ranks.is_main and len(values):
                judge.add(self._train.read(index[self._chosen[index]]), {"critic": values})
        if not ranks.is_main or not self._chosen.any():
            return {}
        verdict = judge.verdict()
        critic = verdict["critics"]["critic"]
        fused, mean = critic["fused"], verdict["baselines"][GROUP_MEAN]
        return {
            "rollouts": verdict["rollouts"],
            "prompt_groups": verdict["prompt_groups"],
            **_figures(critic),
            "explained_variance_minus": critic["explained_variance_minus"],
            GROUP_MEAN: _figures(mean),
            "fused": _figures(fused) | {"explained_variance_minus": fused["explained_variance_minus"]},
        }


def _figures(metrics: dict[str, Any]) -> dict[str, Any]:
    return {name: metrics[name] for each in INTERVALS for name in (each, f"{each}_interval") if name in metrics}


def sentence(judged: dict[str, Any]) -> str:
    """The figures of `CrossValidated.judged`, for a person; empty where there is no interval."""
    if not judged or judged["explained_variance_interval"] is None:
        return ""
    alone = f"explained variance {_with_interval(judged, 'explained_variance')}"
    within = judged["explained_variance_within_group"]
    if within is not None:
        alone += f", within prompts {_with_interval(judged, 'explained_variance_within_group')}"
    of = f"by heads that have not seen them, the {judged['prompt_groups']:,} prompt groups whose states were kept have"
    mean, fused = judged[GROUP_MEAN]["explained_variance"], judged["fused"]
    both, apart = fused["explained_variance"], fused["explained_variance_minus"][GROUP_MEAN]
    if mean is None or both is None or apart["interval"] is None:
        return f"{of} {alone}"
    low, high = apart["interval"]
    return (
        f"{of} {alone}; the mean of the prompt's other rollouts has {mean:.3f}, both fused {both:.3f}, which is "
        f"{apart['difference']:.3f} [{low:.3f}, {high:.3f}] more"
    )


def _with_interval(figures: dict[str, Any], name: str) -> str:
    interval = figures[f"{name}_interval"]
    return f"{figures[name]:.3f}" + ("" if interval is None else f" [{interval[0]:.3f}, {interval[1]:.3f}]")
