"""Open a Hugging Face directory as a critic: first its configuration, later its weights.

Weights are read from safetensors only, no remote code is run, nothing is downloaded. A value head in the directory is
loaded as it is and never replaced; where there is none, a new one starts at 0, and `fit` reports it.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModel, PreTrainedConfig
from transformers.utils import logging as transformers_logging

from critic_train.errors import ModelError, first_line
from critic_train.jsonio import read_json_object
from critic_train.layers.attention import TREE_ATTENTION
from critic_train.layers.recurrence import share_states
from critic_train.model.config import check_config_against_weights, parse_config, prepare_config, read_raw_config
from critic_train.model.critic import Critic, ValueHead

# The only list of names of value heads, in the order in which they are looked for. A new framework's goes here.
HEAD_NAMES = (
    "score",  # Hugging Face, OpenRLHF, verl
    "value_head",  # xtuner
    "v_head.summary",  # TRL
    "v_head",  # DeepSpeed-Chat
    "classifier",  # Hugging Face's class for GPT-2
)

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """A model directory whose configuration has been read and checked.

    Attributes:
        path: the directory.
        config: its configuration, dropouts 0, one label.
        architecture: the class it was saved from, as in "LlamaForCausalLM".
        head: the prefix of its value head's tensors, as in HEAD_NAMES; None where it has none.
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
        ModelError: a critic cannot be made of the directory.
    """
    if not path.is_dir():
        raise ModelError(
            f"no model directory at {path}",
            hint="--model takes a run, a checkpoint or a Hugging Face directory",
        )
    raw = read_raw_config(path)
    files = weight_files(path)
    config = prepare_config(parse_config(path, raw))
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
    problems = [f"{name}: missing" for name in sorted(report["missing_keys"])]
    problems += [
        f"{name}: its shape differs from the configuration's" for name in sorted(map(str, report["mismatched_keys"]))
    ]
    if problems:
        shown = "\n".join(f"  {line}" for line in problems[:10])
        raise ModelError(
            f"{source.path}: {len(problems)} weights do not fit the configuration\n{shown}",
            hint="the directory is incomplete, or its config.json belongs to another model",
        )
    head = ValueHead(int(source.config.hidden_size))
    if source.head is not None:
        _fill_head(head, source)
    critic = use_tree_attention(Critic(trunk, head))
    if adapt is not None:
        adapt(critic)
    return critic


def build_critic(config: PreTrainedConfig, seed: int) -> Critic:
    """A critic with random weights and a head at 0, which the caller sets to the mean return.

    Args:
        config: of the trunk; changed by `prepare_config`.
        seed: of the weights; the global generator is left alone.
    """
    config = prepare_config(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        trunk = AutoModel.from_config(config, dtype=torch.float32)
    return use_tree_attention(Critic(trunk, ValueHead(int(config.hidden_size))))


def use_tree_attention(critic: Critic) -> Critic:
    """Set the trunk's attention to `tree_attention`; returns the critic.

    A trunk that supports no attention but its own keeps that, and the self-check gives it padded rows.
    """
    share_states(critic.trunk)
    with contextlib.suppress(ValueError):
        critic.trunk.set_attn_implementation(TREE_ATTENTION)
    return critic


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a directory, by its index where there is one.

    Raises:
        ModelError: a file is missing, or the index cannot be read or names a file outside the directory.
    """
    index = path / "model.safetensors.index.json"
    # Where there are both, transformers takes the single file.
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
    """The prefix of the value head's tensors; `prefix` is what config.json says it is, and is looked for first."""
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
    """Copy the weight, and the bias where there is one, from the files of the directory."""
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
