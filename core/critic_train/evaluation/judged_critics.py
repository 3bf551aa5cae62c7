"""The critics that `eval` judges: resolved, loaded, and asked for their values. It imports torch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from critic_train.data.row_checks import RowLimits
from critic_train.data.scanning import FirstPass
from critic_train.distributed.ranks import Ranks
from critic_train.events import Event, Notice
from critic_train.model.automatic import choose_tokens
from critic_train.model.compute import Compute, resolve_compute
from critic_train.model.critic import Critic
from critic_train.model.fsdp import cost_of
from critic_train.model.microbatches import predict_values
from critic_train.model.sequence_sharing import ChosenLayout, choose_layout, refuse_sequence_parallel
from critic_train.rollouts import Rollouts
from critic_train.settings import EvalComputeSettings
from critic_train.stopping import Stopped, StopRequest
from critic_train.weights.first_pass import critic_source, limits_of
from critic_train.weights.sharded_loading import load_critic_on_ranks


@dataclass(frozen=True, slots=True)
class _LoadedCritic:
    """A critic on its device, how it computes, and whether its rollouts are laid out as prefix trees."""

    critic: Critic
    compute: Compute
    forest: bool


class JudgedCritics:
    """Critics that are judged on the same rollouts.

    Attributes:
        sources: name -> the model directory.
    """

    def __init__(self, models: Sequence[str], settings: EvalComputeSettings, ranks: Ranks, stop: StopRequest) -> None:
        """Args:
        models: the values of --model; one that is named twice is judged once.
        settings: where and how to compute.
        ranks: of the job.
        stop: checked between micro-batches.

        Raises:
            ModelError: one of them cannot be read, or has no value head.
            ConfigError, MachineError: the device is unknown, or not there.
        """
        self._compute = resolve_compute(settings, ranks)
        refuse_sequence_parallel(settings, ranks.size)
        self.sources = {name: critic_source(Path(name)) for name in dict.fromkeys(models)}
        self._settings, self._stop = settings, stop
        self._loaded: dict[str, _LoadedCritic] = {}

    def limits(self) -> RowLimits:
        """Which rows all of them can read."""
        return limits_of(list(self.sources.values()))

    def load(self, checked: FirstPass) -> Iterator[Event]:
        """Load the critics and choose the packing of each, by the self-check on a few rollouts; yields notices."""
        for source in self.sources.values():
            yield from source.notices
        compute = self._compute
        critics = {
            name: load_critic_on_ranks(source, compute).to(compute.device).eval()
            for name, source in self.sources.items()
        }
        if compute.ranks.size > 1:
            compute.pair_cost = cost_of(next(iter(critics.values()))).pair
        assert checked.sample is not None, "the reader raises where no row is good"
        longest = int(checked.sample.lengths.max())
        choose = partial(choose_layout, settings=self._settings, longest=longest, tokens=checked.tokens)
        layouts: dict[str, ChosenLayout] = {}
        for name, critic in critics.items():
            own = replace(compute)  # critics of several architectures may need several kernels
            layouts[name] = choose(critic, checked.sample, compute=own)
            self._loaded[name] = _LoadedCritic(critic, own, layouts[name].packing.forest)
        if self._settings.max_tokens is None and compute.device.type == "cuda":
            # Of several critics the largest decides: they take turns with the same batches.
            for each in self._loaded.values():
                choose_tokens(each.critic, each.compute, forest=each.forest, largest=checked.sample)
            budget = min(each.compute.max_tokens for each in self._loaded.values())
            for name, each in list(self._loaded.items()):
                each.compute.start_at(budget)
                layouts[name] = choose(each.critic, checked.sample, compute=each.compute, before=layouts[name])
                self._loaded[name] = _LoadedCritic(each.critic, each.compute, layouts[name].packing.forest)
        for layout in layouts.values():
            yield from (Notice(message=choice.sentence()) for choice in layout.cuts)
            yield from layout.notices

    def values(self, batch: Rollouts) -> dict[str, NDArray[np.float32]]:
        """Critic -> its values of a batch, float32 [T].

        Raises:
            Stopped: asked to stop.
        """
        values: dict[str, NDArray[np.float32]] = {}
        for name, loaded in self._loaded.items():
            predicted = predict_values(loaded.critic, batch, loaded.compute, forest=loaded.forest, stop=self._stop)
            if predicted is None:
                raise Stopped
            values[name] = predicted
        self._stop.check()
        return values

    def lowered(self) -> list[str]:
        """A message for each critic whose token budget was lowered since this was last asked."""
        return [sentence for loaded in self._loaded.values() if (sentence := loaded.compute.lowered())]
