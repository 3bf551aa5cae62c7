"""Load an exported directory again: by the system's own code where it is installed, else by the names of its source.

All of it is computed on the CPU in float32, one sequence at a time.
"""

import importlib
import importlib.metadata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForTokenClassification

from critic_train.errors import ModelError, first_line
from critic_train.export.systems import Written
from critic_train.export.written_form import read_tensors
from critic_train.jsonio import read_json_object
from critic_train.settings import ExportTo

Values = Callable[[Tensor], Tensor]
"""From token ids, int64 [1, T], to the value read off each state but the last, float32 [T - 1]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reloaded:
    """A critic as it was loaded again.

    Attributes:
        values: computes its values.
        by: whose code loaded it.
    """

    values: Values
    by: str


def reload(to: ExportTo, directory: Path, written: Written) -> Reloaded:
    """Load an exported directory.

    Raises:
        ModelError: tensors are missing in it, or are not expected.
    """
    weights = directory / written.weights
    if to in ("transformers", "verl", "nemo-rl"):
        return _token_classifier(weights)
    own = {"openrlhf": ("openrlhf", _openrlhf), "trl": ("trl", _trl)}.get(to)
    reason = ""
    if own is not None:
        package, load = own
        try:
            version = importlib.metadata.version(package)
            return Reloaded(values=load(weights), by=f"{package} {version}")
        except importlib.metadata.PackageNotFoundError:
            reason = f" ({package} is not installed here)"
        except ImportError as error:
            reason = f" ({package} {version} cannot be imported here: {first_line(error)})"
    return Reloaded(values=_by_names(weights, written), by=f"the names of its source{reason}")


def largest_difference(reloaded: Reloaded, sequences: Sequence[Tensor], values: Sequence[Tensor]) -> float:
    """The largest difference of a value, relative to the largest value where that is above 1.

    Args:
        reloaded: the critic as it was loaded again.
        sequences: token ids, int64 [T] each.
        values: float32 [T - 1] each, of the critic that was exported.
    """
    scale = max(1.0, *(float(each.abs().max()) for each in values))
    with torch.no_grad():
        computed = [reloaded.values(ids[None]) for ids in sequences]
    return max(float((a - b).abs().max()) for a, b in zip(computed, values, strict=True)) / scale


def _token_classifier(weights: Path) -> Reloaded:
    model, report = AutoModelForTokenClassification.from_pretrained(
        weights, dtype=torch.float32, local_files_only=True, output_loading_info=True
    )
    problems = [
        f"{kind.partition('_')[0]}: {', '.join(sorted(map(str, names)))}" for kind, names in report.items() if names
    ]
    if problems:
        raise ModelError(f"AutoModelForTokenClassification does not load all of it: {'; '.join(problems)}")
    version = importlib.metadata.version("transformers")

    def values(ids: Tensor) -> Tensor:
        computed: Tensor = model.eval()(input_ids=ids).logits[0, :-1, 0]
        return computed

    return Reloaded(values=values, by=f"AutoModelForTokenClassification of transformers {version}")


def _by_names(weights: Path, written: Written) -> Values:
    """The trunk by transformers, the head by its names in the files, the bias as the system adds it."""
    trunk = AutoModel.from_pretrained(weights, dtype=torch.float32, local_files_only=True).eval()
    weight, bias = written.head
    head = read_tensors(weights, {weight} | ({bias} if bias else set()))
    mean, std = _mean_and_std(weights)
    offset = head[bias].float() if bias else torch.zeros(1)

    def values(ids: Tensor) -> Tensor:
        states: Tensor = trunk(input_ids=ids, use_cache=False).last_hidden_state[0, :-1]
        return ((states @ head[weight].float().T + offset)[:, 0] - mean) / std

    return values


def _mean_and_std(weights: Path) -> tuple[float, float]:
    """OpenRLHF's normalisation of values, where config.json has one."""
    config = read_json_object(weights / "config.json")
    return float(config.get("mean", 0.0)), float(config.get("std", 1.0))


def _openrlhf(weights: Path) -> Values:
    """OpenRLHF's CriticModel, as it loads it; `mean` and `std` are taken as its source means them.

    They are buffers that no file holds. transformers 5, which OpenRLHF 0.11.2 requires, leaves such buffers of another
    program's class uninitialised (findings/buffers-after-from-pretrained.sh), so that --reward.normalize_enable gives
    any number.
    """
    module: Any = importlib.import_module("openrlhf.models.model")
    utilities: Any = importlib.import_module("openrlhf.utils.utils")
    # It knows bfloat16 and float16 alone, in which nothing could be compared to 1e-5.
    with mock.patch.object(utilities, "convert_to_torch_dtype", return_value=torch.float32):
        model = module.get_llm_for_sequence_regression(
            str(weights), "critic", normalize_reward=False, attn_implementation="sdpa"
        ).eval()

    mean, std = _mean_and_std(weights)

    def values(ids: Tensor) -> Tensor:
        everywhere = torch.ones_like(ids)
        computed: Tensor = model(ids, action_mask=everywhere[:, 1:], attention_mask=everywhere)[0]
        return computed.sub(mean).div(std)

    return values


def _trl(weights: Path) -> Values:
    try:
        module: Any = importlib.import_module("trl.experimental.ppo")
        kind = module.AutoModelForCausalLMWithValueHead
    except (ImportError, AttributeError):
        try:
            kind = importlib.import_module("trl").AutoModelForCausalLMWithValueHead
        except AttributeError as error:
            raise ImportError("it has no AutoModelForCausalLMWithValueHead any more") from error
    model = kind.from_pretrained(str(weights)).float().eval()

    def values(ids: Tensor) -> Tensor:
        computed: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids))[2][0, :-1]
        return computed

    return values
