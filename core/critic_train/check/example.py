"""One rollout read back, as text or token ids, cut at what the policy wrote: whether the mask is where it should be."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from critic_train.convert.chat import Retokenizer
from critic_train.rollouts import Rollouts

MOST_CHARACTERS, MOST_IDS, MOST_PARTS = 400, 24, 12
"""What is shown of a part, and how many parts are."""


class Example:
    """The first rollout of a data set.

    Args:
        tokenizer: a Hugging Face folder; None shows token ids.

    Raises:
        ModelError: it holds no tokenizer.
    """

    def __init__(self, tokenizer: str | None) -> None:
        self._tokenizer = None if tokenizer is None else Retokenizer(Path(tokenizer))
        self._rollout: Rollouts | None = None

    def add(self, rollouts: Rollouts) -> None:
        """Take in some rollouts; the first of all is kept."""
        if self._rollout is None and len(rollouts):
            self._rollout = rollouts.take(np.arange(1))

    def parts(self) -> list[dict[str, Any]]:
        """The rollout in parts: `policy` (whether the policy wrote it), `tokens` (how many), `text` or `ids`."""
        if self._rollout is None:
            return []
        ids, mask = self._rollout.input_ids, self._rollout.response_mask
        bounds = [0, *(np.flatnonzero(np.diff(mask)) + 1).tolist(), len(ids)]
        return [
            {"policy": bool(mask[start]), "tokens": stop - start, **self._shown(ids[start:stop].tolist())}
            for start, stop in list(pairwise(bounds))[:MOST_PARTS]
        ]

    def _shown(self, ids: list[int]) -> dict[str, Any]:
        if self._tokenizer is None:
            return {"ids": _cut(ids, MOST_IDS)}
        return {"text": _cut(self._tokenizer.shown(ids), MOST_CHARACTERS)}


def _cut(content: Any, most: int) -> Any:
    """A text or a list of ids, its middle left out.

    Args:
        content: what is shown.
        most: characters or ids of it that are shown.
    """
    if len(content) <= most:
        return content
    left, right = content[: most // 2], content[-most // 2 :]
    return f"{left} ... {right}" if isinstance(content, str) else [*left, "...", *right]
