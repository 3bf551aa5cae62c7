"""Mean and variance of all advantages of a data set, batch by batch."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

EPSILON = 1e-8


@dataclass(slots=True)
class Whitening:
    """Shifts and scales to mean 0 and variance 1, as verl's masked_whiten does over a batch.

    Attributes:
        count: numbers taken in.
        mean: of them.
        squares: sum of squared distances from it (Chan, Golub & LeVeque's update).
    """

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def add(self, numbers: NDArray[np.float64]) -> None:
        """Take in numbers."""
        if not len(numbers):
            return
        mean, total = float(numbers.mean()), self.count + len(numbers)
        apart = mean - self.mean
        self.squares += float(np.square(numbers - mean).sum()) + apart * apart * self.count * len(numbers) / total
        self.mean += apart * len(numbers) / total
        self.count = total

    def apply(self, numbers: NDArray[np.float64]) -> NDArray[np.float64]:
        """The numbers, whitened; the variance is the sample's, over n - 1."""
        scale = (self.squares / max(1, self.count - 1) + EPSILON) ** -0.5
        return np.asarray((numbers - self.mean) * scale, dtype=np.float64)
