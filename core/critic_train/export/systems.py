"""The systems that a critic is handed over to: the class and key names that each loads, and where its bias goes.

What each reads was taken from its source, in the version that `source` names. `reloading` loads the written directory
again, by the system's own code where that is installed.
"""

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from critic_train.export.written_form import edit_config, rename_tensors, tensor_names
from critic_train.jsonio import read_json_object
from critic_train.model.critic import Critic
from critic_train.run.storage import make_directory, rename, write_file
from critic_train.settings import ExportTo
from critic_train.weights.saving import TOKENIZER_FILES, exported_class

NEMO_WEIGHTS = Path("value", "weights", "model")


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What an export wrote.

    Attributes:
        model_class: as its config.json names it.
        weights: the directory with the model's files, relative to that of the export.
        head: the names of the value head's weight and bias; the bias is None where the system's head has none.
        bias: where the bias is, in words.
    """

    model_class: str
    weights: Path = Path()
    head: tuple[str, str | None] = ("score.weight", "score.bias")
    bias: str = "score.bias"


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """A system that loads critics.

    Attributes:
        title: its name.
        source: what its code was read in.
        needs_token_classifier: whether it loads `AutoModelForTokenClassification`, which some architectures lack.
        has_bias: whether its head has a bias.
        model_types: the model types that it converts; empty where it loads whatever transformers loads.
        adapt: changes a directory that `save_critic` wrote into the system's form.
        usage: how the directory is named to the system, given its path: lines to copy.
    """

    title: str
    source: str
    needs_token_classifier: bool
    adapt: Callable[[Path, Critic], Written]
    usage: Callable[[str], list[str]]
    has_bias: bool = True
    model_types: tuple[str, ...] = ()


def causal_class(critic: Critic) -> str:
    """The class of the trunk's causal LM, as in "LlamaForCausalLM"."""
    return str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[critic.trunk.config.model_type])


def with_trunk_prefix(directory: Path, critic: Critic, head: dict[str, str | None]) -> None:
    """Rename the head's tensors, and those of a trunk that was written by itself to those of its causal LM.

    Args:
        directory: as `save_critic` wrote it.
        critic: that it holds.
        head: "weight" and "bias" -> the new name, None to leave it out.
    """
    written = str(read_json_object(directory / "config.json")["value_head_prefix"])
    names = {f"{written}.{part}": name for part, name in head.items()}
    prefix = MODEL_FOR_CAUSAL_LM_MAPPING[type(critic.trunk.config)].base_model_prefix + "."
    is_bare = not any(name.startswith(prefix) for name in tensor_names(directory))
    rename_tensors(directory, lambda name: names[name] if name in names else (prefix + name if is_bare else name))


def as_written(directory: Path, critic: Critic) -> Written:
    """Nothing is changed: a token classifier of transformers."""
    head = str(read_json_object(directory / "config.json")["value_head_prefix"])
    return Written(model_class=exported_class(critic), head=(f"{head}.weight", f"{head}.bias"), bias=f"{head}.bias")


def as_openrlhf(directory: Path, critic: Critic) -> Written:
    """OpenRLHF's CriticModel: a head without bias, and its outputs less `mean`, over `std`, of config.json."""
    with_trunk_prefix(directory, critic, {"weight": "score.weight", "bias": None})
    bias = critic.head.bias.item()
    entries = {"mean": -bias, "std": 1.0} if bias else {}
    edit_config(directory, architectures=["CriticModel"], value_head_prefix="score", **entries)
    where = f"mean {-bias:.6g} and std 1 in config.json" if bias else "the head has none"
    return Written(model_class="CriticModel", head=("score.weight", None), bias=where)


def as_trl(directory: Path, critic: Critic) -> Written:
    """TRL's AutoModelForCausalLMWithValueHead: a causal LM, here with its embeddings as vocabulary head."""
    with_trunk_prefix(directory, critic, {"weight": "v_head.summary.weight", "bias": "v_head.summary.bias"})
    edit_config(directory, architectures=[causal_class(critic)], tie_word_embeddings=True, value_head_prefix=None)
    return Written(
        model_class=causal_class(critic),
        head=("v_head.summary.weight", "v_head.summary.bias"),
        bias="v_head.summary.bias",
    )


def as_nemo_rl(directory: Path, critic: Critic) -> Written:
    """The value part of a NeMo-RL checkpoint, as its DTensor worker writes it: the token classifier's weights."""
    written = as_written(directory, critic)
    make_directory(directory / NEMO_WEIGHTS)
    make_directory(directory / "value" / "tokenizer")
    for file in sorted(path for path in directory.iterdir() if path.is_file()):
        folder = directory / "value" / "tokenizer" if file.name in TOKENIZER_FILES else directory / NEMO_WEIGHTS
        rename(file, folder / file.name)
    return Written(model_class=written.model_class, weights=NEMO_WEIGHTS, head=written.head, bias=written.bias)


def as_slime(directory: Path, critic: Critic) -> Written:
    """A Hugging Face directory, and a script that has slime's own code make a Megatron checkpoint of it."""
    with_trunk_prefix(directory, critic, {"weight": "score.weight", "bias": "score.bias"})
    edit_config(directory, architectures=[causal_class(critic)], value_head_prefix="score")
    write_file(directory / SLIME_SCRIPT_NAME, SLIME_SCRIPT.encode())
    return Written(model_class=causal_class(critic))


def as_vllm(directory: Path, critic: Critic) -> Written:
    """A sequence classifier, whose head vLLM applies to every token; of a regression no activation is taken."""
    name = causal_class(critic).removesuffix("ForCausalLM").removesuffix("LMHeadModel") + "ForSequenceClassification"
    with_trunk_prefix(directory, critic, {"weight": "score.weight", "bias": "score.bias"})
    edit_config(directory, architectures=[name], problem_type="regression", value_head_prefix="score")
    return Written(model_class=name)


SLIME_SCRIPT_NAME = "to_torch_dist.py"

# slime loads critics from Megatron checkpoints and draws a new head where `output_layer.weight` or `output_layer.bias`
# is missing or has another shape; its own converter builds an actor, and reads `lm_head.weight`. The script needs
# Megatron and a GPU: it was written by slime's source and was not run.
SLIME_SCRIPT = '''"""Make a Megatron checkpoint of the critic in this directory, with slime's own code, for slime.

Run it where slime runs, with the arguments of slime's tools/convert_hf_to_torch_dist.py:

    PYTHONPATH=$SLIME:$SLIME/tools python to_torch_dist.py ${MODEL_ARGS[@]} \\\\
        --untie-embeddings-and-output-weights --hf-checkpoint THIS_DIRECTORY --save OUT
"""

from functools import partial

import torch
from transformers import AutoConfig


def load_critic_weights(args, model, path):
    """Copy the trunk as slime does, and score.weight and score.bias into output_layer."""
    from slime.backends.megatron_utils.hf_to_megatron import _LOADERS
    from slime.backends.megatron_utils.hf_to_megatron import common
    from slime.backends.megatron_utils.update_weight.common import named_params_and_buffers

    config = AutoConfig.from_pretrained(path)
    trunk_tensor, reader = _LOADERS[config.model_type], common.SafetensorReader(path)
    with torch.no_grad():
        for name, parameter in named_params_and_buffers(args, model):
            part = common.strip_mcore_wrappers(name)
            if part in ("output_layer.weight", "output_layer.bias"):
                tensor = reader.get_tensor("score." + part.removeprefix("output_layer."))
            else:
                tensor = common._pad_vocab(args, name, trunk_tensor(name, reader, config))
                tensor = common.shard_mcore_tensor(name, tensor, parameter)
            if tensor.shape != parameter.shape:
                raise ValueError(f"{name}: {tuple(tensor.shape)} is stored, {tuple(parameter.shape)} is needed")
            parameter.copy_(tensor.to(device=parameter.device, dtype=parameter.dtype))


if __name__ == "__main__":
    import convert_hf_to_torch_dist as converter

    converter.get_model_provider_func = partial(converter.get_model_provider_func, role="critic")
    converter.load_hf_weights = load_critic_weights
    converter.main()
'''

SLIME_MODEL_TYPES = (
    "deepseek_v3",
    "deepseek_v32",
    "glm4",
    "glm4_moe",
    "glm4_moe_lite",
    "glm_moe_dsa",
    "kimi_k2",
    "llama",
    "mimo",
    "minimax_m2",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen3_moe",
    "qwen3_next",
)
"""Those whose weights slime converts from a Hugging Face directory."""

SYSTEMS: dict[ExportTo, System] = {
    "transformers": System(
        title="transformers",
        source="transformers 5.23.0",
        needs_token_classifier=True,
        adapt=as_written,
        usage=lambda path: [f"AutoModelForTokenClassification.from_pretrained({path!r})"],
    ),
    "verl": System(
        title="verl",
        source="verl 0.9.1",
        needs_token_classifier=True,
        adapt=as_written,
        usage=lambda path: [f"critic.model.path={shlex.quote(path)}"],
    ),
    "openrlhf": System(
        title="OpenRLHF",
        source="OpenRLHF 0.11.2",
        needs_token_classifier=False,
        adapt=as_openrlhf,
        usage=lambda path: [f"--critic.model_name_or_path {shlex.quote(path)} --ds.value_head_prefix score"],
        has_bias=False,
    ),
    "trl": System(
        title="TRL",
        source="TRL 0.11.4",
        needs_token_classifier=False,
        adapt=as_trl,
        usage=lambda path: [f"AutoModelForCausalLMWithValueHead.from_pretrained({path!r})"],
    ),
    "nemo-rl": System(
        title="NeMo-RL",
        source="NeMo-RL 7ea279a and its pull request 3821",
        needs_token_classifier=True,
        adapt=as_nemo_rl,
        usage=lambda path: [
            f"ppo.warm_start_value_checkpoint={shlex.quote(path)}",
            f"value.model_name={shlex.quote(f'{path}/{NEMO_WEIGHTS}')}",
            "(a DTensor critic; Megatron's reads its own checkpoints alone)",
        ],
    ),
    "slime": System(
        title="slime",
        source="slime 624b824",
        needs_token_classifier=False,
        adapt=as_slime,
        usage=lambda path: [
            f"PYTHONPATH=$SLIME:$SLIME/tools python {path}/{SLIME_SCRIPT_NAME} ${{MODEL_ARGS[@]}} "
            f"--untie-embeddings-and-output-weights --hf-checkpoint {path} --save {path}_torch_dist",
            f"then load: {path}_torch_dist for role critic in --megatron-config-path",
        ],
        model_types=SLIME_MODEL_TYPES,
    ),
    "vllm": System(
        title="vLLM",
        source="vLLM 0.33.0",
        needs_token_classifier=False,
        adapt=as_vllm,
        usage=lambda path: [f"vllm serve {shlex.quote(path)} --runner pooling   (task token_classify)"],
    ),
}
