"""Whether two computations of the same hidden states differ by rounding alone.

How far rounding carries depends on the model: on its depth, its norms, the size of its activations. So it is measured:
one computation is repeated with every part's output changed by up to one unit in its last place. Where a model chooses
(the experts of a token), rounding may turn a choice, and then some states differ by much.

Shapes: N states, each [hidden_size].
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

QUANTILES = (0.5, 0.9, 0.99, 1.0)
"""Of the states' differences. Where a model chooses, the last one tells nothing."""

ROUNDINGS = 10.0
"""States may differ by so many times what a unit in the last place of every part makes of them. Over 80 architectures,
computations that are equal on paper differed by less than once that, and others by a hundred times."""

SMALLEST_ROUNDING = 2.0**-22
"""Of the largest state: a smaller measured rounding counts as this."""

REPETITIONS = 5
"""Of the measurement at most, where the model chooses: a choice that is close to turning turns in some of them."""

CHOICES = {"topk", "argmax", "sort", "argsort"}


@dataclass(slots=True)
class Rounding:
    """What rounding makes of the hidden states of some rollouts.

    Args:
        trunk: the model.
        compute: computes the states, [N, hidden_size], without gradients.

    Attributes:
        expected: what `compute` gives.
        scale: its largest absolute value.
        chooses: whether the model makes choices.
    """

    trunk: nn.Module
    compute: Callable[[], Tensor]
    expected: Tensor
    scale: float
    chooses: bool
    _errors: Tensor
    _measured: int

    def __init__(self, trunk: nn.Module, compute: Callable[[], Tensor]) -> None:
        self.trunk, self.compute = trunk, compute
        with _ChoicesSeen() as seen:
            self.expected = compute()
        self.scale = float(self.expected.abs().max())
        self.chooses = seen.any
        self._errors = torch.zeros(len(QUANTILES))
        self._measured = 0

    def difference(self, actual: Tensor, at: Tensor | None = None) -> float:
        """The largest difference of a state from what is expected, relative to the largest state."""
        return float(self._differences(actual, at).max())

    def explains(self, actual: Tensor, at: Tensor | None = None) -> bool:
        """Whether states differ from what is expected by rounding alone.

        Args:
            actual: the states, another computation of them.
            at: which of the N they are; None for all.
        """
        differences = self._differences(actual, at)
        if not bool(torch.isfinite(differences).all()):
            return False
        quantiles = _quantiles(differences)
        for repetition in range(REPETITIONS if self.chooses else 1):
            if repetition == self._measured:
                self._measure_again()
            within = quantiles <= ROUNDINGS * self._errors.clamp_min(SMALLEST_ROUNDING)
            if bool((within[:-1] if self.chooses else within).all()):
                return True
        return False

    def rounding(self) -> float:
        """The largest difference of a state that was measured, relative to the largest state."""
        return float(self._errors[-1])

    def _differences(self, actual: Tensor, at: Tensor | None) -> Tensor:
        expected = self.expected if at is None else self.expected[at]
        return (actual - expected).abs().amax(-1) / self.scale

    def _measure_again(self) -> None:
        generator = torch.Generator(self.expected.device).manual_seed(self._measured)

        def change(module: nn.Module, inputs: Any, output: Any) -> Any:
            if isinstance(output, Tensor) and output.is_floating_point():
                drawn = torch.rand(output.shape, generator=generator, device=output.device, dtype=torch.float32)
                # In place: an MLP's states of a long rollout take much of a device.
                drawn.mul_(2).sub_(1).mul_(torch.finfo(output.dtype).eps).add_(1)
                return output * drawn.to(output.dtype)
            return None

        with ExitStack() as hooks:
            for module in self.trunk.modules():
                if not any(True for _ in module.children()):
                    hooks.callback(module.register_forward_hook(change).remove)
            measured = _quantiles(self._differences(self.compute(), None))
        self._errors = torch.maximum(self._errors, measured)
        self._measured += 1


def _quantiles(numbers: Tensor) -> Tensor:
    """float32 [4] on the CPU: the QUANTILES of some numbers [N]."""
    ordered = numbers.float().sort().values
    return ordered[[round(q * (len(ordered) - 1)) for q in QUANTILES]].cpu()


class _ChoicesSeen(TorchFunctionMode):
    """Notes whether anything is chosen by its size."""

    any = False

    def __torch_function__(
        self, function: Any, types: Sequence[type], args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.any = self.any or getattr(function, "__name__", "") in CHOICES
        return function(*args, **(kwargs or {}))
