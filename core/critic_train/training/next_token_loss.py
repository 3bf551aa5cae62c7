"""The next-token head of a run (--lm-loss-weight), over the ids of its training responses; saving and loading it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from critic_train.distributed.ranks import Ranks
from critic_train.errors import ModelError, first_line
from critic_train.events import Notice
from critic_train.model.compute import Compute
from critic_train.model.critic import Critic
from critic_train.model.fsdp import shard_alone
from critic_train.model.next_token_head import NextTokenHead
from critic_train.model_files.gather import Gather
from critic_train.model_files.model_directory import weight_files
from critic_train.model_files.tensor_file import part_here, read_headers, read_rows, rows_here, write_tensors
from critic_train.rollouts import Rollouts
from critic_train.run.storage import library_writes
from critic_train.settings import offloads
from critic_train.training.dataset import ROLLOUTS_PER_PASS, RolloutSet
from critic_train.weights.loading import ModelSource
from critic_train.weights.lora import name_without_adapter

HEAD_FILE = "next_token_head.safetensors"
"""In a checkpoint, beside the optimizer's state: `weight` [K, hidden_size] and `ids` [K]."""
VOCABULARY_HEADS = ("lm_head.weight", "embed_out.weight", "output.weight")
"""Names of a causal LM's own head."""
INITIAL_STD = 0.02
"""Of a head that is drawn, as transformers draws linear layers."""


def response_id_counts(train: RolloutSet, ranks: Ranks) -> NDArray[np.int64]:
    """int64 [largest id + 1]: how often each id is chosen in the responses. All ranks call it, and read a part each."""
    counts = torch.zeros(train.cache.max_token_id + 1, dtype=torch.int64)
    for number, start in enumerate(range(0, len(train), ROLLOUTS_PER_PASS)):
        if number % ranks.size == ranks.rank:
            rollouts = train.read(np.arange(start, min(start + ROLLOUTS_PER_PASS, len(train))))
            chosen = rollouts.input_ids[rollouts.response_mask]
            counts += torch.from_numpy(np.bincount(chosen, minlength=len(counts)))
    return ranks.all_reduce_sum(counts).numpy()


def tokens_ahead(
    rollouts: Rollouts, tokens: NDArray[np.int64], ahead: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """The response tokens that the state before each token predicts: that token, and those that follow it.

    One token of a distribution tells little of it, several of a slowly changing one tell more (n tokens ahead by a head
    each: Gloeckle et al. 2024, arXiv 2404.19737; here the same head predicts all, so that it costs nothing).

    Args:
        rollouts: with the tokens.
        tokens: int64 [M], response tokens among the T.
        ahead: the most that a state predicts; fewer are left where its rollout ends.

    Returns:
        (int64 [N] the place among the M of the token whose state it is, int64 [N] a token that it predicts among the T,
        float32 [N] one over how many it predicts).
    """
    responses, ends = np.flatnonzero(rollouts.response_mask), np.cumsum(rollouts.response_counts)
    first = np.searchsorted(responses, tokens)
    counts = np.minimum(ends[np.searchsorted(ends, first, side="right")] - first, ahead)
    origin = np.repeat(np.arange(len(tokens)), counts)
    further = np.arange(len(origin)) - (np.cumsum(counts) - counts)[origin]
    return origin, responses[first[origin] + further], (1.0 / counts[origin]).astype(np.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class NewHead:
    """A next-token head that a critic is yet to be given; see `add_next_token_head`."""

    ids: NDArray[np.int64]
    source: ModelSource | None
    checkpoint: Path | None
    seed: int

    def parameters(self, critic: Critic) -> int:
        """How many it will have."""
        return len(self.ids) * int(critic.trunk.config.hidden_size)

    def add_to(self, critic: Critic, compute: Compute) -> Notice:
        """Give it to the critic, on its device."""
        given: dict[str, Any] = {"source": self.source, "checkpoint": self.checkpoint, "seed": self.seed}
        return add_next_token_head(critic, self.ids, compute, **given)


def add_next_token_head(
    critic: Critic,
    ids: NDArray[np.int64],
    compute: Compute,
    *,
    source: ModelSource | None,
    checkpoint: Path | None,
    seed: int,
) -> Notice:
    """Give a critic its next-token head, on its device or sharded as the critic is. All ranks call it.

    Args:
        critic: from `prepare_critic`.
        ids: int64 [K], ascending: those of the training responses.
        compute: of the critic.
        source: what --model names; its own vocabulary head is taken where it is there.
        checkpoint: the one to resume from, if any; its head is read.
        seed: of a head that is drawn.

    Raises:
        ModelError: the checkpoint's head is not there, or is of other ids.
    """
    head = NextTokenHead(ids, int(critic.trunk.config.hidden_size))
    if compute.ranks.sharded:
        shard_alone(head, compute)
    head.to_empty(device="cpu" if offloads(compute.offload, "all") else compute.device)
    critic.next_token_head = head
    sentence = f"next-token loss over the {len(ids):,} ids of the training responses"
    if checkpoint is not None:
        _load(head, checkpoint / HEAD_FILE)
        return Notice(message=sentence)
    own = None if source is None else _vocabulary_head(critic, source)
    if own is None:
        _fill(head, lambda: torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(seed)) * INITIAL_STD)
        return Notice(message=f"{sentence}, by a new head")
    file, name, scale = own
    with safe_open(file, framework="pt") as tensors:
        stored = tensors.get_tensor(name)  # mapped from disk: only the rows that are taken are read
        _fill(head, lambda: stored[torch.from_numpy(ids)].float() * scale)
    return Notice(message=f"{sentence}, by a head that starts as {name} of {file.parent}")


def starts_as_vocabulary_head(critic: Critic, source: ModelSource | None) -> bool:
    """Whether a next-token head begins with what --model has learned."""
    return source is not None and _vocabulary_head(critic, source) is not None


def save_next_token_head(critic: Critic, directory: Path | None, gather: Gather | None = None) -> None:
    """Write the head's weights and ids; with `gather`, all ranks call it, with None but on rank 0."""
    head = critic.next_token_head
    if head is None:
        return
    tensors = {"weight": head.weight.detach(), "ids": torch.from_numpy(head.ids)}
    file = None if directory is None else directory / HEAD_FILE
    if gather is not None:
        write_tensors(file, tensors, lambda name: gather(tensors[name]))
        return
    assert file is not None
    with library_writes(file):
        save_file(tensors, file)


def _load(head: NextTokenHead, file: Path) -> None:
    try:
        with safe_open(file, framework="pt") as tensors:
            same = np.array_equal(tensors.get_tensor("ids").numpy(), head.ids)
        if same:
            read_rows(file, "weight", head.weight)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{file}: the next-token head cannot be read: {first_line(error)}") from error
    if not same:
        raise ModelError(f"{file}: its ids are not those of the training responses")


def _fill(head: NextTokenHead, full: Callable[[], Tensor]) -> None:
    """Fill this rank's rows; drawn in full on every rank, so that their number changes nothing."""
    first, last = rows_here(head.weight) if hasattr(head.weight, "to_local") else (0, len(head.weight))
    with torch.no_grad():
        part_here(head.weight).copy_(full()[first:last])


def _vocabulary_head(critic: Critic, source: ModelSource) -> tuple[Path, str, float] | None:
    """(file, name in it, what scores are multiplied by) of a model's own head, or of the embeddings it is tied to.

    A bias and a soft cap of the scores are left out: the head is only where training starts.
    """
    stored, width = read_headers(weight_files(source.path)), int(source.config.hidden_size)
    heads = [stored[name] for name in VOCABULARY_HEADS if name in stored]
    if source.architecture.endswith(
        ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
    ):  # without a head of its own, it is tied
        embeddings = critic.trunk.get_input_embeddings().weight
        name = next(name for name, parameter in critic.trunk.named_parameters() if parameter is embeddings)
        heads += source.placement.trunk.get(name_without_adapter(name), [])
    head = next((tensor for tensor in heads if tensor.shape[0] > 1 and tensor.shape[1:] == (width,)), None)
    scale = getattr(source.config, "logit_scale", None) or 1.0 / (getattr(source.config, "logits_scaling", None) or 1.0)
    return None if head is None else (head.file, head.name, float(scale))
