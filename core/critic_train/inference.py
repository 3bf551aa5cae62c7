"""Values of a trained critic for token ids in memory, as in a notebook."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from transformers import PreTrainedConfig

from critic_train.data.scanning import SAMPLED_ROLLOUTS
from critic_train.errors import ConfigError, DataError, ModelError
from critic_train.model.automatic import choose_tokens
from critic_train.model.compute import resolve_compute
from critic_train.model.microbatches import predict_values
from critic_train.model.selfcheck import select_packing
from critic_train.rollouts import Rollouts, rollouts_of_tokens
from critic_train.settings import ComputeSettings, Precision, type_errors
from critic_train.weights import loading
from critic_train.weights.first_pass import critic_source

ERRORS_SHOWN = 10


class LoadedCritic:
    """A critic in memory. `load_critic` makes it.

    Args:
        source: a model directory with a value head.
        settings: where and how to compute.

    Attributes:
        path: the directory of the weights: of a run, that of its checkpoint.
        config: the model's configuration, as transformers reads it.
    """

    def __init__(self, source: loading.ModelSource, settings: ComputeSettings) -> None:
        self.path: Path = source.path
        self.config: PreTrainedConfig = source.config
        self._source = source
        self._settings = settings
        self._compute = resolve_compute(settings)
        self._critic = loading.load_critic(source).to(self._compute.device).eval()
        self._forest = False
        self._longest_tried = self._tokens_tried = 0

    def values(self, token_ids: Sequence[ArrayLike], prompt_lengths: Sequence[int]) -> list[NDArray[np.float32]]:
        """The value of each state in which a response token is chosen.

        Every token after the prompt is a response token. Prefixes that rollouts share are computed once, so hand over
        the rollouts of a prompt together. The values are those that `predict` writes: to the bit where both compute
        the same rollouts in one block (up to 262,144 tokens) on a CPU, else to rounding.

        Args:
            token_ids: n rollouts, each its prompt and response: a list of ints or an integer array [tokens].
            prompt_lengths: [n], tokens of each that are prompt; at least 1, and fewer than all.

        Returns:
            n arrays, float32 [response tokens]. Entry t is V(s_t), read off the hidden state before response token t.

        Raises:
            ConfigError: the two arguments have different lengths.
            DataError: rollouts that the critic cannot read; all are counted, the first ten are named.
            ModelError: the critic predicts NaN or infinite values.
            MachineError: memory does not suffice for a single rollout.
        """
        rollouts = _as_rollouts(token_ids, prompt_lengths, self._source)
        if not len(rollouts):
            return []
        self._select_packing(rollouts)
        values = predict_values(self._critic, rollouts, self._compute, forest=self._forest)
        assert values is not None, "nothing asks this pass to stop"
        if sentence := self._compute.lowered():
            warnings.warn(sentence, stacklevel=2)
        if not np.isfinite(values).all():
            raise ModelError(f"{self.path} predicts NaN or infinite values", hint='precision="fp32" may help')
        responses = values[rollouts.response_mask]
        return np.split(responses, np.cumsum(rollouts.response_counts)[:-1])

    def _select_packing(self, rollouts: Rollouts) -> None:
        """Try on the first rollouts and the longest whether prefixes can be shared; again for longer or more."""
        longest, tokens = int(rollouts.lengths.argmax()), min(len(rollouts.input_ids), self._compute.max_tokens)
        if rollouts.lengths[longest] <= self._longest_tried and tokens <= self._tokens_tried:
            return
        tokens *= 2  # so that calls of slowly growing size are not each tried
        sample = rollouts.take(np.append(np.arange(min(SAMPLED_ROLLOUTS, len(rollouts))), longest))
        choice, messages = select_packing(self._critic, sample, self._settings, self._compute, tokens=tokens)
        for message in messages:
            warnings.warn(message, stacklevel=3)
        self._forest, self._tokens_tried = choice.forest, tokens
        self._longest_tried = max(self._longest_tried, int(rollouts.lengths[longest]))
        if self._settings.max_tokens is None:
            choose_tokens(self._critic, self._compute, forest=self._forest, largest=sample)


def load_critic(
    path: str | Path, *, device: str = "auto", precision: Precision = "auto", max_tokens: int | None = None
) -> LoadedCritic:
    """Load a critic to compute values with.

    Args:
        path: a run (its best checkpoint is taken, else its newest), a checkpoint, or a Hugging Face directory.
        device: "auto", "cpu", "cuda", "cuda:1", ...
        precision: "fp32", or "bf16" for the matrix products of the transformer; "auto" is bf16 on a GPU that has it.
        max_tokens: tokens through the model at once; bounds memory, never changes the result. None takes 4,096 on a
            CPU, and what its memory holds on a GPU.

    Raises:
        ConfigError: an argument is wrong.
        ModelError: the directory cannot be read, or its model has no value head.
        MachineError: this machine has no such device.
    """
    settings = ComputeSettings(device=device, precision=precision, max_tokens=max_tokens)
    if errors := type_errors(settings) or settings.validate():
        raise ConfigError("\n".join(errors))
    return LoadedCritic(critic_source(Path(path)), settings)


def _as_rollouts(
    token_ids: Sequence[ArrayLike], prompt_lengths: Sequence[int], source: loading.ModelSource
) -> Rollouts:
    """The arguments of `values` as rollouts, checked.

    Raises:
        ConfigError, DataError: see `LoadedCritic.values`.
    """
    if len(token_ids) != len(prompt_lengths):
        raise ConfigError(f"token_ids has {len(token_ids)} rollouts, prompt_lengths {len(prompt_lengths)}")
    sequences = [np.asarray(ids) for ids in token_ids]
    errors = [
        f"rollout {number}: {error}"
        for number, (ids, prompt) in enumerate(zip(sequences, prompt_lengths, strict=True))
        if (error := _error_of(ids, prompt, source))
    ]
    if errors:
        more = [f"and {len(errors) - ERRORS_SHOWN} more"] if len(errors) > ERRORS_SHOWN else []
        raise DataError("\n".join(errors[:ERRORS_SHOWN] + more))
    return rollouts_of_tokens(sequences, prompt_lengths)


def _error_of(ids: NDArray[Any], prompt: int, source: loading.ModelSource) -> str:
    """Why the critic cannot read a rollout, or an empty string."""
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        return f"token ids must be a list of ints, not {ids.dtype} with shape {ids.shape}"
    if not 1 <= prompt < len(ids):
        return f"the prompt length must be from 1 to {len(ids) - 1}, one below its {len(ids)} tokens, not {prompt}"
    if source.max_length is not None and len(ids) > source.max_length:
        return f"{len(ids)} tokens are more than the {source.max_length} that the model has positions for"
    outside = np.flatnonzero((ids < 0) | (ids >= source.vocab_size))
    if len(outside):
        return f"token id {ids[outside[0]]} at position {outside[0]} is not from 0 to {source.vocab_size - 1}"
    if placeholders := set(source.placeholder_ids).intersection(ids.tolist()):
        return f"token id {min(placeholders)} is a placeholder of an image, a video or a sound: a critic reads text"
    return ""
