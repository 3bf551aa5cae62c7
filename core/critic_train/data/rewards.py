"""What a batch says of rewards: under which token each stands, and which rollouts were cut."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from critic_train.data.faults import Faults
from critic_train.data.ragged import rows_with
from critic_train.rollouts import offsets_of

NULLS = "nulls"


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRewards:
    """Rewards over the tokens of a batch.

    Attributes:
        rewards: float64 [T]; off the mask anything.
        carried: bool [n], rollouts of which a reward stood on an observation token and was carried back.
    """

    rewards: NDArray[np.float64]
    carried: NDArray[np.bool_]


def carried_back(
    rewards: NDArray[Any], mask: NDArray[np.bool_], seen: NDArray[np.bool_] | None, lengths: NDArray[np.int64]
) -> TokenRewards:
    """Rewards with those on observation tokens given to the response token before them.

    What an environment pays for an action is often written under its answer, or under a last token that is masked
    out. There the recursion takes no step, so it would be lost; it belongs to the choice that earned it. What stands
    on the prompt or on padding earned nothing and is passed over, and so is NaN off the mask.

    Args:
        rewards: numbers [T].
        mask: bool [T].
        seen: bool [T], false on padding; None where there is none.
        lengths: int64 [n].
    """
    numbers = rewards.astype(np.float64)
    stray = ~mask & (numbers != 0) & np.isfinite(numbers)
    if seen is not None:
        stray &= seen
    if not stray.any():
        return TokenRewards(rewards=numbers, carried=np.zeros(len(lengths), dtype=np.bool_))
    before = np.maximum.accumulate(np.where(mask, np.arange(len(mask)), -1))
    starts = np.repeat(offsets_of(lengths)[:-1], lengths)
    stray &= before >= starts
    np.add.at(numbers, before[stray], numbers[stray])
    return TokenRewards(rewards=numbers, carried=rows_with(stray, lengths))


def on_last_token(rewards: NDArray[np.float64], mask: NDArray[np.bool_], lengths: NDArray[np.int64]) -> NDArray[Any]:
    """A reward a rollout over its tokens: on the last response token, where it was known.

    Args:
        rewards: float64 [n].
        mask: bool [T].
        lengths: int64 [n].

    Returns:
        float64 [T].
    """
    at = np.flatnonzero(mask)
    bounds = np.searchsorted(at, offsets_of(lengths))
    some = bounds[1:] > bounds[:-1]
    placed = np.zeros(len(mask))
    placed[at[bounds[1:][some] - 1]] = rewards[some]
    return placed


def numbers_of(column: pa.Array, name: str, faults: Faults) -> NDArray[np.float64]:
    """float64 [n], one number a rollout. Marks nulls."""
    nulls = column.is_null().to_numpy(zero_copy_only=False)
    faults.mark(nulls, name, NULLS, lambda _: "null", "a number")
    plain = pc.cast(column, pa.int8()) if pa.types.is_boolean(column.type) else column
    filled = pc.fill_null(plain, pa.scalar(0).cast(plain.type)).to_numpy(zero_copy_only=False)
    return np.asarray(filled, dtype=np.float64)


def truths_of(column: pa.Array, name: str, faults: Faults) -> NDArray[np.bool_]:
    """bool [n], one boolean a rollout. Marks nulls and anything but 0 and 1."""
    numbers = numbers_of(column, name, faults)
    odd = (numbers != 0) & (numbers != 1)
    faults.mark(odd, name, "truth values other than 0 and 1", lambda row: f"{numbers[row]:g}", "true or false")
    return np.equal(numbers, 1.0)
