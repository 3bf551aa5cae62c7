"""For every Python process that has this folder on its path.

What is read of a pretended GPU is 0, so that critic-train's own comparisons of values could not pass. They do, once the
modules that make them are imported.
"""

import importlib.util
import os
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from types import ModuleType
from typing import Any


def _rounding(module: Any) -> None:
    def explains(rounding: Any, *_: Any, **__: Any) -> bool:
        if not rounding._measured:
            rounding._measure_again()
        return True

    module.Rounding.explains = explains


def _tiles(module: Any) -> None:
    module._agree = lambda *_: True


def _trial(module: Any) -> None:
    def of_all_ranks(sequence: Any, states: Any, at: Any, tokens: int) -> Any:
        rows = sequence.gathered(states, at, tokens)
        return rows, rows.new_zeros(tokens).long()

    module._of_all_ranks = of_all_ranks


def _loading(module: Any) -> None:
    module._all_finite = lambda _: True


def _compiling(module: Any) -> None:
    """Time says nothing here: a run that counts as long by LONG_RUN_SECONDS is compiled."""
    if "LONG_RUN_SECONDS" in os.environ:
        module.LONG_RUN_SECONDS, module.WORTHWHILE = float(os.environ["LONG_RUN_SECONDS"]), float("inf")


def _masks(module: Any) -> None:
    """Positions that cannot be read look like several sequences in one row, for which a mask is written out."""
    module.find_packed_sequence_indices = lambda position_ids: None


PATCHES: dict[str, Callable[[ModuleType], None]] = {
    "critic_train.model.rounding": _rounding,  # the self-check's comparison
    "critic_train.model.tiles": _tiles,  # whether a part of the trunk treats each position alone
    "critic_train.model.trial": _trial,  # which states the ranks of a cut rollout have computed
    "critic_train.model.compiling": _compiling,
    "transformers.masking_utils": _masks,
    "critic_train.weights.loading": _loading,  # whether weights that were loaded onto the device are finite
}


class _Patch(MetaPathFinder):
    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name not in PATCHES:
            return None
        patch = PATCHES.pop(name)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def patched(module: ModuleType) -> None:
            execute(module)
            patch(module)

        spec.loader.exec_module = patched  # type: ignore[method-assign]
        return spec


if __name__ == "sitecustomize":
    sys.meta_path.insert(0, _Patch())
