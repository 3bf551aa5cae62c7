"""Open a Hugging Face directory as a critic: configuration first, weights when the data has been understood.

Safetensors only, no remote code, no network. A value head that exists is loaded as it is and never made anew; one
that does not exist is made by `fit` alone, and said aloud.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModel, PreTrainedConfig
from transformers.utils import logging as transformers_logging

from critic_train.errors import ModelError, first_line
from critic_train.jsonio import read_json_object
from critic_train.model.attention import NAME
from critic_train.model.config import check_config_against_weights, refuse_unsafe_config, without_kernels
from critic_train.model.critic import Critic, ValueHead

HEAD_NAMES = ("score", "value_head", "v_head.summary", "v_head", "classifier")
"""Where frameworks keep a value head: Hugging Face, OpenRLHF, verl; xtuner; TRL; DeepSpeed-Chat; GPT-2's class."""

DROPOUTS = (
    "activation_dropout",
    "attention_dropout",
    "attn_pdrop",
    "classifier_dropout",
    "classifier_dropout_prob",
    "dropout",
    "embd_pdrop",
    "embedding_dropout",
    "hidden_dropout",
    "layerdrop",
    "resid_dropout",
    "resid_pdrop",
    "summary_dropout_prob",
)

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """A model directory whose configuration has been read and found usable.

    Attributes:
        path: the directory.
        config: its configuration, dropouts 0, one label.
        architecture: the class it was saved from, as in "LlamaForCausalLM".
        head: the prefix of its value head's tensors, or None where it has none.
    """

    path: Path
    config: PreTrainedConfig
    architecture: str
    head: str | None

    @property
    def vocab_size(self) -> int:
        """Token ids run from 0 to one below this."""
        return int(self.config.vocab_size)

    @property
    def max_length(self) -> int | None:
        """The longest rollout the model has positions for, in tokens."""
        return getattr(self.config, "max_position_embeddings", None)


def read_model(path: Path) -> ModelSource:
    """Read a model directory's configuration and find its value head. No weights are loaded.

    Raises:
        ModelError: it is no usable directory, names the reason and what to do.
    """
    if not path.is_dir():
        raise ModelError(
            f"no model directory at {path}",
            hint="--model takes a run, a checkpoint or a Hugging Face directory",
        )
    raw = _raw_config(path)
    files = weight_files(path)
    config = prepare_config(_parsed_config(path, raw))
    shapes = _shapes(files)
    check_config_against_weights(path, config, shapes)
    named = raw.get("architectures")
    architecture = str(named[0]) if isinstance(named, list) and named else ""
    source = ModelSource(
        path=path,
        config=config,
        architecture=architecture,
        head=_find_head(path, shapes, raw.get("value_head_prefix")),
    )
    claims_head = architecture.endswith(("ForTokenClassification", "ForSequenceClassification", "CriticModel"))
    if source.head is None and claims_head:
        raise ModelError(
            f"{path}: a {architecture} has a value head, but its weights hold none "
            f"(looked for {', '.join(f'{name}.weight' for name in HEAD_NAMES)})",
            hint="point --model at the directory that holds the head, or at the causal LM it was made from",
        )
    return source


def load_critic(source: ModelSource, adapt: Callable[[Critic], None] | None = None) -> Critic:
    """The critic of a directory, weights in float32, on the CPU, all in this process.

    A missing head is made at 0; the caller sets where it starts and says so.

    Args:
        source: from `read_model`.
        adapt: puts adapters into the critic.

    Raises:
        ModelError: weights are missing, damaged or of another shape than the configuration says.
    """
    try:
        trunk, report = AutoModel.from_pretrained(
            source.path,
            config=source.config,
            dtype=torch.float32,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as error:  # transformers raises many kinds for weights it cannot place
        raise ModelError(f"{source.path}: the weights cannot be loaded: {first_line(error)}") from error
    wrong = [f"{name}: missing" for name in sorted(report["missing_keys"])]
    wrong += [
        f"{name}: its shape differs from the configuration's" for name in sorted(map(str, report["mismatched_keys"]))
    ]
    if wrong:
        shown = "\n".join(f"  {line}" for line in wrong[:10])
        raise ModelError(
            f"{source.path}: {len(wrong)} weights do not fit the configuration\n{shown}",
            hint="the directory is incomplete, or its config.json belongs to another model",
        )
    head = ValueHead(int(source.config.hidden_size))
    if source.head is not None:
        _fill_head(head, source)
    critic = with_forest_attention(Critic(trunk, head))
    if adapt is not None:
        adapt(critic)
    return critic


def build_critic(config: PreTrainedConfig, seed: int) -> Critic:
    """A critic with fresh weights, drawn from `seed` without touching the global generator.

    The head starts at 0; the caller sets where it starts.
    """
    config = prepare_config(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        trunk = AutoModel.from_config(config, dtype=torch.float32)
    return with_forest_attention(Critic(trunk, ValueHead(int(config.hidden_size))))


def with_forest_attention(critic: Critic) -> Critic:
    """Ask the trunk for our attention; one that takes no name but its own keeps its own, and is given rows later."""
    with contextlib.suppress(ValueError):
        critic.trunk.set_attn_implementation(NAME)
    return critic


def prepare_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Set what a critic needs: one label, no dropout, no tied embeddings. Changes and returns `config`."""
    config.num_labels = 1
    for name in DROPOUTS:
        if name in ("classifier_dropout", "hidden_dropout", "summary_dropout_prob") or hasattr(config, name):
            setattr(config, name, 0.0)
    config.tie_word_embeddings = False
    config.use_cache = False
    return config


def _raw_config(path: Path) -> dict[str, Any]:
    file = path / "config.json"
    try:
        return read_json_object(file)
    except FileNotFoundError:
        raise ModelError(
            f"{path} has no config.json",
            hint="--model takes a run, a checkpoint or a Hugging Face directory with safetensors weights",
        ) from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be read: {first_line(error)}") from error


def _parsed_config(path: Path, raw: dict[str, Any]) -> PreTrainedConfig:
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        without_kernels(config)
    except Exception as error:  # transformers raises many kinds for a configuration it does not know
        reason = "it asks for code of its own, which is never run" if raw.get("auto_map") else first_line(error)
        raise ModelError(f"{path}/config.json (model_type {raw.get('model_type')!r}): {reason}") from error
    if config.is_encoder_decoder or config.get_text_config() is not config:
        raise ModelError(
            f"{path}: model_type {config.model_type!r} is not a text-only decoder",
            hint="a critic reads token ids from left to right; take the language model out of a multimodal one first",
        )
    if getattr(config, "word_embed_proj_dim", config.hidden_size) != config.hidden_size:
        raise ModelError(f"{path}: its hidden states are not hidden_size wide (word_embed_proj_dim)")
    refuse_unsafe_config(path, raw, config)
    return config


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a directory, by its index where there is one. No path leaves the directory."""
    index = path / "model.safetensors.index.json"
    # Where both stand, transformers takes the single file.
    if index.exists() and not (path / "model.safetensors").exists():
        try:
            named = set(read_json_object(index)["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise ModelError(f"{index} cannot be read: {first_line(error)}") from error
        escaping = [name for name in named if not isinstance(name, str) or Path(name).name != name]
        if escaping or not named:
            raise ModelError(f"{index} names a file outside its directory: {(escaping or [''])[0]!r}")
        names = sorted(named)
    else:
        names = ["model.safetensors"]
    missing = [name for name in names if not (path / name).is_file()]
    if missing:
        pickled = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in path.glob(pattern))
        raise ModelError(
            f"{path} has no {missing[0]}" + (f" (found {', '.join(pickled[:3])})" if pickled else ""),
            hint="weights are read from safetensors only: pickled files can run code. "
            "Load the model in transformers and save it again with save_pretrained",
        )
    return [path / name for name in names]


def _shapes(files: list[Path]) -> dict[str, list[int]]:
    """The shape of every tensor, by the headers of the files."""
    shapes: dict[str, list[int]] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                shapes |= {name: list(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{file} is damaged or no safetensors file: {first_line(error)}") from error
    return shapes


def _find_head(path: Path, shapes: dict[str, list[int]], prefix: object) -> str | None:
    names = (prefix, *HEAD_NAMES) if isinstance(prefix, str) else HEAD_NAMES
    for name in names:
        shape = shapes.get(f"{name}.weight")
        if shape is not None:
            if len(shape) != 2 or shape[0] != 1:
                raise ModelError(
                    f"{path}: {name}.weight has shape {shape}; a value head has [1, hidden_size]",
                    hint="a classifier with several labels is no critic; start from its causal LM instead",
                )
            return name
    return None


def _fill_head(head: ValueHead, source: ModelSource) -> None:
    with torch.no_grad():
        for file in weight_files(source.path):
            with safe_open(file, framework="pt") as tensors:
                present = set(tensors.keys())
                for part, target in (("weight", head.weight), ("bias", head.bias)):
                    name = f"{source.head}.{part}"
                    if name not in present:
                        continue
                    stored = tensors.get_tensor(name)
                    if stored.numel() != target.numel():
                        raise ModelError(
                            f"{source.path}: {name} has shape {list(stored.shape)}, expected {list(target.shape)}"
                        )
                    target.copy_(stored.reshape(target.shape))
