"""Long curves in few points, without losing a spike."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
POINTS = 240
"""Points a curve has at most: more than the pixels a line of its width can show apart."""


@dataclass(frozen=True, slots=True)
class Curve:
    """A curve in at most POINTS points.

    Attributes:
        x: float64 [p], the middle of each stretch.
        y: float64 [p], its mean.
        low, high: float64 [p], its least and greatest value; equal to `y` where nothing was thinned.
    """

    x: Floats
    y: Floats
    low: Floats
    high: Floats

    @property
    def is_thinned(self) -> bool:
        """Whether a point stands for several."""
        return bool(np.any(self.low != self.high))


def thinned(x: list[float], y: list[float | None], points: int = POINTS) -> Curve:
    """Cut a curve into equal stretches, each with its mean, least and greatest value.

    Args:
        x, y: the curve; a point without a finite y is left out.
        points: stretches at most.
    """
    along = np.array(x, dtype=np.float64)
    up = np.array([np.nan if value is None else value for value in y], dtype=np.float64)
    known = np.isfinite(up)
    along, up = along[known], up[known]
    if len(up) <= points:
        return Curve(along, up, up, up)
    edges = np.linspace(0, len(up), points + 1).round().astype(np.int64)
    starts, counts = edges[:-1], np.diff(edges)
    return Curve(
        np.add.reduceat(along, starts) / counts,
        np.add.reduceat(up, starts) / counts,
        np.minimum.reduceat(up, starts),
        np.maximum.reduceat(up, starts),
    )
