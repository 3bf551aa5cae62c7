"""What commands do before a model is loaded: resolve what --model names, and say which rows it can read."""

from collections.abc import Sequence
from pathlib import Path

from critic_train.data.row_checks import RowLimits
from critic_train.distributed.ranks import Ranks
from critic_train.errors import ConfigError, ModelError
from critic_train.run.checkpoint import resolve_model
from critic_train.settings import ModelSettings
from critic_train.weights.loading import ModelSource, read_model


def limits_of(sources: Sequence[ModelSource]) -> RowLimits:
    """Which rows all of some models can read."""
    lengths = [source.max_length for source in sources if source.max_length is not None]
    return RowLimits(
        vocab_size=min((source.vocab_size for source in sources), default=None),
        max_length=min(lengths, default=None),
        placeholder_ids=tuple({placeholder for source in sources for placeholder in source.placeholder_ids}),
    )


def critic_source(path: Path) -> ModelSource:
    """A run, a checkpoint or a directory as a critic that can be loaded.

    Raises:
        ModelError: it cannot be read, or it has no value head.
    """
    source = read_model(resolve_model(path))
    if source.head is None:
        raise ModelError(
            f"{path} has no value head: it predicts no values",
            hint=f"critic-train fit --model {path} --data ... makes a critic of it",
        )
    return source


def read_base_model(model: ModelSettings, out: Path, ranks: Ranks) -> ModelSource | None:
    """What --model names, None without it; rank 0 resolves a run to its best checkpoint. All ranks call it."""
    if model.model is None:
        return None
    path = ""
    if ranks.is_main:
        if Path(model.model).resolve() == out.resolve():
            raise ConfigError(f"--model and --out are both {model.model}", hint="give the new run an --out of its own")
        path = str(resolve_model(Path(model.model)))
    source = read_model(Path(ranks.broadcast(path)), new_head=model.head_init is not None)
    keeps_head = model.head_init is None and source.stored_head is not None
    if keeps_head and model.head_inputs not in (None, source.head_inputs):
        raise ConfigError(
            f"{path}: its value head reads {source.head_inputs}, and --head-inputs is {model.head_inputs}",
            hint="--head-init exact solves a new one in its stead",
        )
    return source
