"""The value head that a directory holds, under whatever name, and what no value head here can hold."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from critic_train.errors import ModelError
from critic_train.model.critic import HEAD_OUTPUTS, ValueHead
from critic_train.model_files.config import quantized
from critic_train.model_files.placement import Placement
from critic_train.model_files.tensor_file import FLOATING, StoredTensor
from critic_train.settings import HeadInputs

# Names by which frameworks store value heads. A tensor of one row that nothing else takes is a value head under any
# name; under one of these, one of another shape is refused as a value head, not as something unknown.
HEAD_NAMES = (
    "score",  # Hugging Face, OpenRLHF, verl
    "value_head",  # xtuner
    "v_head.summary",  # TRL, LLaMA-Factory
    "v_head",  # DeepSpeed-Chat
    "classifier",  # Hugging Face's class for GPT-2
)
HEAD_CLASSES = ("ForTokenClassification", "ForSequenceClassification", "CriticModel")
INPUTS_KEY = "value_head_inputs"
"""In config.json, where the head reads more than the last state: its weight has a row for each input."""
NEW_HEAD = "critic-train fit --head-init exact makes a new value head in its stead"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredHead:
    """A linear value head in a directory's files.

    Attributes:
        name: the prefix of its tensors, as in "score".
        weight: [1, hidden_size]; [2, hidden_size] where it reads last+mean.
        bias: [1] or [2]; None where it has none.
        inputs: what it reads.
        mean, std: OpenRLHF's normalisation of rewards: the value is (w x + b - mean) / std.
    """

    name: str
    weight: StoredTensor
    bias: StoredTensor | None
    inputs: HeadInputs = "last"
    mean: float = 0.0
    std: float = 1.0

    @property
    def tensors(self) -> set[str]:
        """Names of its tensors."""
        return {self.weight.name} | ({self.bias.name} if self.bias else set())

    def fill(self, head: ValueHead) -> None:
        """Copy it into a head, the normalisation folded into weight and bias."""
        with torch.no_grad():
            head.weight.copy_(self.weight.load().reshape(head.weight.shape))
            head.bias.zero_()
            if self.bias is not None:
                head.bias.copy_(self.bias.load().reshape(head.bias.shape))
            if (self.mean, self.std) != (0.0, 1.0):
                head.weight.div_(self.std)
                head.bias[:1].sub_(self.mean)
                head.bias.div_(self.std)


def find_head(
    path: Path, raw: Mapping[str, Any], placement: Placement, hidden_size: int, architecture: str
) -> StoredHead | None:
    """The value head among the tensors that the model does not take.

    Args:
        path: the directory, for messages.
        raw: its config.json.
        placement: of its tensors.
        hidden_size: of the trunk.
        architecture: the class that config.json names.

    Raises:
        ModelError: a head has another shape, or there are several.
    """
    left, inputs = placement.left_over, _inputs(path, raw)
    shape = (HEAD_OUTPUTS[inputs], hidden_size)
    prefix = raw.get("value_head_prefix")
    names = (prefix, *HEAD_NAMES) if isinstance(prefix, str) else HEAD_NAMES
    for name in names:
        tensor = left.get(f"{name}.weight")
        if tensor is not None and tensor.shape != shape:
            raise ModelError(
                f"{path}: {name}.weight has shape {list(tensor.shape)}; a value head that reads {inputs} has "
                f"[{shape[0]}, hidden_size], here {list(shape)}",
                hint=f"a classifier with several labels is no critic. {NEW_HEAD}",
            )
    rows = [name for name, tensor in left.items() if tensor.shape == shape and name not in placement.of_trunk]
    if isinstance(prefix, str) and f"{prefix}.weight" in rows:
        rows = [f"{prefix}.weight"]
    if len(rows) > 1:
        raise ModelError(
            f"{path} has {len(rows)} value heads: {', '.join(sorted(rows))}",
            hint='say which in config.json, as in "value_head_prefix": "score", and remove the others from the '
            f"files. {NEW_HEAD}",
        )
    if not rows:
        if architecture.endswith(HEAD_CLASSES) and not left:
            raise ModelError(
                f"{path}: a {architecture} has a value head, but its weights hold none "
                f"(looked for {', '.join(f'{name}.weight' for name in names)}, and for any other of one row)",
                hint=f"point --model at the directory that holds the head. {NEW_HEAD}",
            )
        return None
    weight = left[rows[0]]
    name = weight.name.removesuffix(".weight")
    bias = left.get(f"{name}.bias") if name != weight.name else None
    if bias is not None and math.prod(bias.shape) != shape[0]:
        raise ModelError(f"{path}: {bias.name} has shape {list(bias.shape)}, expected [{shape[0]}]", hint=NEW_HEAD)
    for tensor in (weight, bias):
        if tensor is not None and tensor.dtype not in FLOATING:
            raise quantized(path, tensor)
    mean, std = _normalisation(path, raw)
    return StoredHead(name=name, weight=weight, bias=bias, inputs=inputs, mean=mean, std=std)


def _inputs(path: Path, raw: Mapping[str, Any]) -> HeadInputs:
    """What config.json says that the value head reads."""
    inputs = raw.get(INPUTS_KEY, "last")
    if inputs not in HEAD_OUTPUTS:
        raise ModelError(
            f"{path}/config.json: {INPUTS_KEY} is {inputs!r}; known are {', '.join(HEAD_OUTPUTS)}",
            hint=f"a newer critic-train wrote it, which reads it. {NEW_HEAD}",
        )
    return inputs  # type: ignore[no-any-return]


def _normalisation(path: Path, raw: Mapping[str, Any]) -> tuple[float, float]:
    """OpenRLHF's `mean` and `std` in config.json; (0, 1) without them, or where `normalize_reward` is false."""
    if raw.get("normalize_reward") is False or not {"mean", "std"} <= raw.keys():
        return 0.0, 1.0
    mean, std = raw["mean"], raw["std"]
    numbers = all(isinstance(number, int | float) and math.isfinite(number) for number in (mean, std))
    if not numbers or std <= 0:
        raise ModelError(
            f"{path}/config.json: mean {mean!r} and std {std!r} do not normalise rewards",
            hint="they are OpenRLHF's: a finite mean, and a std above 0",
        )
    return float(mean), float(std)
