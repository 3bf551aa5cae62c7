"""Attention rollout by rollout through torch's scaled-dot-product attention: on any device, windows and all.

The queries are neighbouring positions of one rollout, the keys are their path from the root. The last query sees the
whole path, so the causal mask is aligned at the lower right.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from critic_train.model.kernels.queries import Queries


class Segments:
    """A kernel (see `queries.Kernel`).

    Keys and values are split into pieces at every point where a path is cut; a run's keys are the pieces of its path,
    concatenated. Splitting once and concatenating keeps the backward pass free of scatter-adds into the full tensor.

    Args:
        queries: who asks.
        device: where the masks are made.
    """

    def __init__(self, queries: Queries, device: torch.device) -> None:
        cuts = {0, len(queries.forest)}
        for run in queries.runs:
            for start, stop in run.path:
                cuts.update((start, stop))
        bounds = sorted(cuts)
        piece_of = {start: piece for piece, start in enumerate(bounds)}
        self._piece_sizes = [stop - start for start, stop in pairwise(bounds)]
        self._query_sizes = [run.queries[1] - run.queries[0] for run in queries.runs]
        self._paths = [
            [piece for start, stop in run.path for piece in range(piece_of[start], piece_of[stop])]
            for run in queries.runs
        ]
        self._path_lengths = [sum(stop - start for start, stop in run.path) for run in queries.runs]
        self._device = device
        self._masks: dict[tuple[int, int, int], Tensor] = {}

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, window: int | None, scale: float | None) -> Tensor:
        """See `queries.Kernel`."""
        keys = key.split(self._piece_sizes, dim=2)
        values = value.split(self._piece_sizes, dim=2)
        outputs = []
        for own, path, length in zip(
            query.split(self._query_sizes, dim=2), self._paths, self._path_lengths, strict=True
        ):
            width = length if window is None else min(window, length)
            alone = own.shape[2] == length and width == length
            outputs.append(
                F.scaled_dot_product_attention(
                    own,
                    _joined(keys, path),
                    _joined(values, path),
                    attn_mask=None if alone else self.mask(own.shape[2], length, width),
                    is_causal=alone,
                    scale=scale,
                    enable_gqa=query.shape[1] != key.shape[1],
                )
            )
        return torch.cat(outputs, dim=2).transpose(1, 2).contiguous()

    def mask(self, queries: int, keys: int, window: int) -> Tensor:
        """bool [queries, keys]: causal, aligned at the lower right, at most `window` keys back."""
        size = (queries, keys, window)
        if size not in self._masks:
            ones = torch.ones(queries, keys, dtype=torch.bool, device=self._device)
            self._masks[size] = ones.tril_(keys - queries).triu_(keys - queries - window + 1)
        return self._masks[size]


def _joined(pieces: tuple[Tensor, ...], path: list[int]) -> Tensor:
    return pieces[path[0]] if len(path) == 1 else torch.cat([pieces[piece] for piece in path], dim=2)
