"""Multimodal directories: a critic is made of their text trunk, and what else they hold is written out where needed.

transformers publishes most multimodal models as one class around a text trunk and, say, a vision tower. A critic reads
token ids alone, with the positions that text has, so a rollout in which features of an image would stand is no input.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING

from critic_train.model_files.config import prepare_config
from critic_train.model_files.placement import Placement
from critic_train.model_files.tensor_file import StoredTensor

PLACEHOLDER = re.compile(
    r"(image|img|video|audio|speech|media|vision)(_context|_placeholder|_pad|_patch|_soft)?(_token)?_(id|index)"
)
"""Names under which configurations keep the ids in whose place features are put."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Multimodal:
    """A multimodal model around a text trunk.

    Attributes:
        config: of all of it, dropouts 0, one label.
        prefix: of the trunk's names in it, as in "language_model.".
        rest: name in it -> tensor in the directory's files, of its other parts.
        passes_through: whether checkpoints hold all of it: transformers has a token classifier for its type and none
            for its text trunk's, as for Qwen3.5.
    """

    config: PreTrainedConfig
    prefix: str
    rest: dict[str, StoredTensor]
    passes_through: bool

    def sentence(self, path: Path) -> str:
        """What becomes of its parts."""
        own = self.prefix.split(".")[0]
        parts = sorted({name.split(".")[0] for name in self.rest} - {own})
        sentence = f"{path} is multimodal ({self.config.model_type}): the critic is its text trunk"
        if parts:
            fate = "pass unchanged into every checkpoint" if self.passes_through else "are in no checkpoint"
            sentence += f"; {', '.join(parts)} {fate}"
        ids = ", ".join(map(str, placeholder_ids(self.config)))
        if ids:
            sentence += f". Rollouts with placeholders of images, videos or sounds (token id {ids}) are bad rows"
        return sentence


def multimodal_of(
    root: PreTrainedConfig, config: PreTrainedConfig, placement: Placement, model: PreTrainedModel
) -> Multimodal:
    """The multimodal model of a directory; its placeholders are noted in the text trunk's configuration.

    Args:
        root: the configuration of all of it; changed by `prepare_config`.
        config: of its text trunk.
        placement: of its tensors.
        model: on "meta".
    """
    prepare_config(root)
    root.dtype = torch.float32  # of what is trained: transformers loads a directory in the type that this names
    config.placeholder_token_ids = placeholder_ids(root)
    others = [name for name, _ in model.named_parameters() if not name.startswith(placement.prefix)]
    can_be_copied = placement.rest.keys() <= placement.direct and placement.rest.keys() >= set(others)
    classifier = MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING
    return Multimodal(
        config=root,
        prefix=placement.prefix,
        rest={name: parts[0] for name, parts in placement.rest.items()},
        passes_through=can_be_copied and type(root) in classifier and type(config) not in classifier,
    )


def placeholder_ids(root: PreTrainedConfig) -> list[int]:
    """The token ids in whose place a multimodal model puts features, in ascending order."""
    named = {name: value for name, value in root.to_dict().items() if PLACEHOLDER.fullmatch(name)}
    return sorted({value for value in named.values() if isinstance(value, int) and value >= 0})
