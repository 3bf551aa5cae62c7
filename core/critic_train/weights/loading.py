"""Open a Hugging Face directory as a critic: first its configuration, later its weights.

Weights are read from safetensors only, no remote code is run, nothing is downloaded. A value head in the directory is
loaded as it is and never replaced unless that is asked for; where there is none, a new one starts at 0, and `fit`
reports it. Nothing of a directory is passed over in silence: what the critic has no use for is refused, or told.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from critic_train.errors import ModelError, first_line
from critic_train.events import Notice
from critic_train.layers.attention import TREE_ATTENTION
from critic_train.layers.recurrence import share_states
from critic_train.model.critic import Critic, ValueHead
from critic_train.model_files.config import outline_model, parse_config, prepare_config, read_raw_config, text_config_of
from critic_train.model_files.model_directory import head_files, require_directory, unread_files, weight_files
from critic_train.model_files.multimodal import Multimodal, multimodal_of
from critic_train.model_files.placement import Placement, place_tensors, refuse_left_over, trunk_prefix
from critic_train.model_files.tensor_file import StoredTensor, part_here, read_headers
from critic_train.settings import HeadInputs
from critic_train.weights.value_heads import StoredHead, find_head

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """A model directory whose configuration has been read, and whose files' headers agree with it.

    Attributes:
        path: the directory.
        config: the configuration of its text trunk, dropouts 0, one label.
        architecture: the class it was saved from, as in "LlamaForCausalLM".
        model_class: the class through which its weights are loaded; of a multimodal directory the trunk is a part.
        placement: where its tensors belong.
        stored_head: its value head; None where it has none, or where a new one is to be made in its stead.
        new_head_inputs: what a new one reads.
        multimodal: what a multimodal directory has besides the text trunk; None of a text-only one.
        notices: what is left out or changed.
    """

    path: Path
    config: PreTrainedConfig
    architecture: str
    model_class: type[PreTrainedModel]
    placement: Placement
    stored_head: StoredHead | None
    new_head_inputs: HeadInputs = "last"
    multimodal: Multimodal | None = None
    notices: tuple[Notice, ...] = ()

    @property
    def head(self) -> str | None:
        """The prefix of its value head's tensors, as in "score"; None where there is none."""
        return None if self.stored_head is None else self.stored_head.name

    @property
    def head_inputs(self) -> HeadInputs:
        """What its value head reads, or a new one."""
        return self.new_head_inputs if self.stored_head is None else self.stored_head.inputs

    def empty_head(self) -> ValueHead:
        """A head at 0 of the form of its own, or of the new one."""
        return ValueHead(self.hidden_size, self.head_inputs)

    @property
    def hidden_size(self) -> int:
        """Numbers of a hidden state."""
        return int(self.config.hidden_size)

    @property
    def trunk_parameters(self) -> int:
        """Numbers in the files that belong to its trunk."""
        stored = {id(part): part for parts in self.placement.trunk.values() for part in parts}
        return sum(math.prod(part.shape) for part in stored.values())

    @property
    def vocab_size(self) -> int:
        """Token ids run from 0 to one below this."""
        return int(self.config.vocab_size)

    @property
    def max_length(self) -> int | None:
        """The longest rollout the model has positions for, in tokens."""
        return getattr(self.config, "max_position_embeddings", None)

    @property
    def placeholder_ids(self) -> tuple[int, ...]:
        """Token ids in whose place a multimodal model puts features of images, videos or sounds."""
        return tuple(getattr(self.config, "placeholder_token_ids", None) or ())


def read_model(path: Path, *, new_head: bool = False) -> ModelSource:
    """Read a model directory's configuration and headers, and find its value head. No weights are loaded.

    Args:
        path: the directory.
        new_head: whether one is made in its value head's stead, which may then be anything.

    Raises:
        ModelError: a critic cannot be made of the directory.
    """
    require_directory(path)
    raw = read_raw_config(path)
    files = weight_files(path)
    root = parse_config(path, raw)
    refusals = [ModelError] * new_head  # a head that is not used may be anything
    with contextlib.suppress(*refusals):
        files += head_files(path, files)
    stored = read_headers(files)
    config = prepare_config(text_config_of(root))
    model = outline_model(path, root, stored)
    prefix = trunk_prefix(model, config)
    if prefix is None:
        raise ModelError(
            f"{path}: transformers has no class for the text trunk of model_type {root.model_type!r} by itself",
            hint="a critic reads token ids alone: take a model whose text trunk transformers knows",
        )
    placement = place_tensors(path, model, prefix, config, stored)
    named = raw.get("architectures")
    architecture = str(named[0]) if isinstance(named, list) and named else ""
    head = None
    with contextlib.suppress(*refusals):
        head = find_head(path, raw, placement, int(config.hidden_size), architecture)
    unused = placement.left_over.keys() - (head.tensors if head else set())
    if unused:  # a row beside other tensors may be the last layer of a deeper head, so all of them are named
        head, unused = None, set(placement.left_over)
    refuse_left_over(path, placement, unused & placement.of_trunk if new_head else unused, root.model_type)
    notices = [*_notices(path, files, unused, None if new_head else head)]
    for key in {"mean", "std", "normalize_reward"} & vars(root).keys():
        delattr(root, key)
    multimodal = None
    if root is not config:
        multimodal = multimodal_of(root, config, placement, model)
        notices.append(Notice(message=multimodal.sentence(path)))
    return ModelSource(
        path=path,
        config=config,
        architecture=architecture,
        model_class=type(model),
        placement=placement,
        stored_head=head,
        multimodal=multimodal,
        notices=tuple(notices),
    )


def _notices(path: Path, files: list[Path], unused: set[str], head: StoredHead | None) -> Iterator[Notice]:
    """What of a directory is not read, not used, or changed."""
    for sentence in unread_files(path, files):
        yield Notice(message=sentence, level="warning")
    if unused:
        yield Notice(message=f"{path}: left out for a new value head: {', '.join(sorted(unused))}")
    if head is not None and (head.mean, head.std) != (0.0, 1.0):
        yield Notice(
            message=f"{path}: config.json normalises values by mean {head.mean:g} and std {head.std:g} (OpenRLHF): "
            "both are folded into the value head, and are not in the checkpoints' config.json"
        )


def load_critic(source: ModelSource, adapt: Callable[[Critic], None] | None = None) -> Critic:
    """The critic of a directory, weights in float32, on the CPU, all in this process.

    A missing head is made at 0; the caller sets where it starts and says so.

    Args:
        source: from `read_model`.
        adapt: puts adapters into the critic.

    Raises:
        ModelError: weights are missing, damaged, not finite or of another shape than the configuration says.
    """
    root = source.config if source.multimodal is None else source.multimodal.config
    placed = {part.name: part for part in source.placement.loaded}
    try:
        with ExitStack() as opened:
            # Given by name and not by directory, so that transformers reads nothing else that lies there.
            model, report = source.model_class.from_pretrained(
                None, config=root, state_dict=_slices(placed, opened), dtype=torch.float32, output_loading_info=True
            )
    except Exception as error:  # transformers raises many kinds for weights it cannot place
        raise ModelError(f"{source.path}: the weights cannot be loaded: {first_line(error)}") from error
    prefix = source.placement.prefix
    problems = [f"{name}: missing" for name in sorted(report["missing_keys"]) if name.startswith(prefix)]
    problems += [
        f"{name}: its shape differs from the configuration's" for name in sorted(map(str, report["mismatched_keys"]))
    ]
    if problems:
        shown = "\n".join(f"  {line}" for line in problems[:10])
        raise ModelError(
            f"{source.path}: {len(problems)} weights do not fit the configuration\n{shown}",
            hint="the directory is incomplete, or its config.json belongs to another model",
        )
    trunk = model.get_submodule(prefix.removesuffix("."))
    head = source.empty_head()
    if source.stored_head is not None:
        source.stored_head.fill(head)
    critic = use_tree_attention(Critic(trunk, head, source.multimodal))
    refuse_not_finite(critic, source.path)
    if adapt is not None:
        adapt(critic)
    return critic


def _slices(placed: dict[str, StoredTensor], opened: ExitStack) -> dict[str, Any]:
    """Name -> a slice of a safetensors file, which transformers reads when it needs it."""
    files: dict[Path, Any] = {}
    for part in placed.values():
        if part.file not in files:
            files[part.file] = opened.enter_context(safe_open(part.file, framework="pt"))
    return {name: files[part.file].get_slice(name) for name, part in placed.items()}


def refuse_not_finite(critic: Critic, path: Path) -> None:
    """Refuse weights that hold NaN or infinite numbers, of this rank's part of a critic.

    Raises:
        ModelError: some do; they are named.
    """
    named = [name for name, part in critic.named_parameters() if not _all_finite(part.detach())]
    if named:
        first = ", ".join(name.removeprefix("trunk.") for name in named[:3])
        raise ModelError(
            f"{path}: {len(named)} tensors hold NaN or infinite numbers: {first}" + (", ..." if named[3:] else ""),
            hint="they were damaged before critic-train read them: take the model from where it was sound",
        )


def _all_finite(tensor: Tensor) -> bool:
    local = part_here(tensor)
    # The sum is finite for all but absurd numbers, and needs no memory.
    return bool(local.sum().isfinite()) or bool(local.isfinite().all())


def build_critic(config: PreTrainedConfig, seed: int, head_inputs: HeadInputs = "last") -> Critic:
    """A critic with random weights and a head at 0, which the caller sets to the mean return.

    Args:
        config: of the trunk; changed by `prepare_config`.
        seed: of the weights; the global generator is left alone.
        head_inputs: what the head reads.
    """
    config = prepare_config(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        trunk = AutoModel.from_config(config, dtype=torch.float32)
    return use_tree_attention(Critic(trunk, ValueHead(int(config.hidden_size), head_inputs)))


def use_tree_attention(critic: Critic) -> Critic:
    """Set the trunk's attention to `tree_attention`; returns the critic.

    A trunk that supports no attention but its own keeps that, and the self-check gives it padded rows.
    """
    share_states(critic.trunk)
    with contextlib.suppress(ValueError):
        critic.trunk.set_attn_implementation(TREE_ATTENTION)
    return critic
