"""The command `export`: write a critic as another system loads it, load it again, compare its values, and keep it."""

import os
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from critic_train.data.bad_input import BadFiles
from critic_train.data.reading import Needs, RolloutReader, RowLimits
from critic_train.data.scanning import SAMPLED_ROLLOUTS
from critic_train.data.shards import find_shards
from critic_train.errors import ConfigError, MachineError, ModelError
from critic_train.events import Event, Progress, RunEnded
from critic_train.export.bias_refit import Refit, StateSums
from critic_train.export.reloading import largest_difference, reload
from critic_train.export.systems import SYSTEMS, System, Written
from critic_train.model.compute import resolve_compute
from critic_train.model.critic import Critic
from critic_train.model.microbatches import micro_batches
from critic_train.model.selfcheck import select_packing
from critic_train.model.trial import use_stock_attention
from critic_train.rollouts import Rollouts
from critic_train.run.storage import (
    make_directory,
    remove_tree,
    rename_durably,
    require_room,
    sync_directory,
    sync_file,
)
from critic_train.settings import ExportSettings, column_renames
from critic_train.stopping import Stopped, StopRequest
from critic_train.weights.first_pass import critic_source
from critic_train.weights.loading import ModelSource, load_critic
from critic_train.weights.saving import checkpoint_bytes, loads_for_token_classification, save_critic

TOLERANCE = 1e-5
COMPARED_ROLLOUTS, COMPARED_TOKENS = 8, 256
MADE_TOKENS = 48


def export(settings: ExportSettings, stop: StopRequest | None = None) -> Iterator[Event]:
    """Write a critic in the class and key names of another system, load it again and compare its values.

    The directory appears under its name only when the values agree to 1e-5.

    Args:
        settings: which critic, for which system, where to.
        stop: checked between batches.

    Yields:
        Progress; RunEnded last, whose result says what was written, where the bias is, and what was compared.

    Raises:
        CriticTrainError: an error that the user can mend.
    """
    stop = stop or StopRequest()
    system, target = SYSTEMS[settings.target.system], Path(settings.target.directory)
    _refuse_target(target)
    source = critic_source(Path(settings.target.model))
    yield Progress(stage="loading the model", done=0, total=0)
    critic = load_critic(source).eval()
    _refuse_architecture(system, critic)
    try:
        refit = None
        if _refits(settings, system, critic):
            refit = yield from _refit(critic, source, settings, stop)
        sequences = _sequences(settings, source, stop)
        values = _values(critic, sequences)
        stop.check()
    except Stopped:
        yield RunEnded(status="interrupted", signal_number=stop.signal_number)
        return
    require_room(target.parent, checkpoint_bytes(critic) // 3, f"{target}", hint="make room, or give another DIR")
    temporary = target.with_name(f".{target.name}.tmp-{os.getpid()}")
    remove_tree(temporary)
    try:
        yield Progress(stage="writing", done=0, total=0)
        written = _write(critic, source, system, temporary)
        yield Progress(stage="loading it again", done=0, total=0)
        reloaded = reload(settings.target.system, temporary, written)
        difference = largest_difference(reloaded, sequences, values)
        if not difference <= TOLERANCE:
            raise ModelError(
                f"loaded again by {reloaded.by}, values differ by {difference:.2g} from this critic's; at most "
                f"{TOLERANCE:g} is rounding. Nothing was written to {target}",
                hint="please report it, with the model's config.json",
            )
        rename_durably(temporary, target)
    except OSError as error:
        raise MachineError(f"{target} cannot be written: {error.strerror or error}", hint="see to it") from error
    finally:
        remove_tree(temporary)
    result = _result(settings, source, critic, system, written, refit)
    result["compared"] = {
        "by": reloaded.by,
        "largest_difference": difference,
        "sequences": len(sequences),
        "values": sum(len(each) for each in values),
    }
    yield RunEnded(status="finished", result=result)


def _refuse_target(target: Path) -> None:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target} exists already", hint="give a directory that is new or empty")


def _refuse_architecture(system: System, critic: Critic) -> None:
    if critic.head.inputs != "last":
        raise ModelError(
            f"the value head reads {critic.head.inputs}: the mean of the states so far beside the last one, which "
            f"{system.source} does not compute, and which no weights of a head that reads the last alone can replace",
            hint="critic-train fit --model DIR --train head --head-init exact --head-inputs last solves a head that "
            "reads the last state alone, on the same trunk",
        )
    model_type = critic.trunk.config.model_type
    if system.needs_token_classifier and not loads_for_token_classification(critic):
        raise ModelError(
            f"{system.title} loads AutoModelForTokenClassification, which transformers lacks for {model_type}",
            hint="--to openrlhf, trl and vllm need no such class",
        )
    if system.model_types and model_type not in system.model_types:
        raise ModelError(f"{system.source} converts no {model_type}", hint=f"it does {', '.join(system.model_types)}")


def _refits(settings: ExportSettings, system: System, critic: Critic) -> bool:
    """Whether the head is replaced by one without a bias."""
    bias = critic.head.bias.item()
    if settings.target.bias != "auto" or system.has_bias or not bias:
        return settings.target.bias == "refit"
    if not settings.reading.data:
        raise ConfigError(
            f"{system.title}'s value head has no bias, and this critic's is {bias:.4g}: without it every value is off "
            "by so much",
            hint="--data ROLLOUTS fits the head without a bias to their states, and says what that changes;\n"
            f"--bias keep writes mean {-bias:.4g} and std 1 into config.json, which {system.source} does not load",
        )
    return True


def _write(critic: Critic, source: ModelSource, system: System, temporary: Path) -> Written:
    """Write the system's form of a critic into a new directory."""
    make_directory(temporary)
    save_critic(critic, temporary, source.path)
    written = system.adapt(temporary, critic)
    for path in sorted(temporary.rglob("*"), reverse=True):
        (sync_directory if path.is_dir() else sync_file)(path)
    return written


def _refit(
    critic: Critic, source: ModelSource, settings: ExportSettings, stop: StopRequest
) -> Generator[Event, None, Refit]:
    """Replace the head by one without a bias, fitted to the states of --data."""
    compute = resolve_compute(settings.compute)
    critic.to(compute.device)
    sums = StateSums(int(source.config.hidden_size))
    forest: bool | None = None
    for batch in _reader(settings, source, stop):
        if forest is None:
            sample = batch.take(np.append(np.arange(min(SAMPLED_ROLLOUTS, len(batch))), int(batch.lengths.argmax())))
            choice, _ = select_packing(critic, sample, settings.compute, compute)
            forest = choice.forest
        for part in micro_batches(batch, compute, forest=forest):
            stop.check()
            with torch.no_grad(), compute.autocast():
                sums.add(critic.hidden(part)[part.value_index])
            yield Progress(stage="states", done=sums.tokens, total=0, unit="response tokens")
    critic.cpu()
    return sums.refit(critic)


def _reader(settings: ExportSettings, source: ModelSource, stop: StopRequest) -> Iterator[Rollouts]:
    reading = settings.reading
    bad_files = BadFiles()
    limits = RowLimits(vocab_size=source.vocab_size, max_length=source.max_length).at_most(reading.max_length)
    return iter(
        RolloutReader(
            find_shards(reading.data, bad_files),
            renames=column_renames(reading.column),
            on_bad_rows=reading.on_bad_rows,
            on_bad_file=reading.on_bad_file,
            bad_files=bad_files,
            limits=limits,
            needs=Needs(returns=False, values=False),
            stop=stop,
        )
    )


def _sequences(settings: ExportSettings, source: ModelSource, stop: StopRequest) -> list[Tensor]:
    """Token ids to compare values on, int64 [T] each: the first rollouts of --data, or made ones."""
    if not settings.reading.data:
        draw = np.random.default_rng(0)
        length = min(MADE_TOKENS, source.max_length or MADE_TOKENS)
        made = draw.integers(0, source.vocab_size, (COMPARED_ROLLOUTS, length))
        return list(torch.from_numpy(made))
    sequences: list[Tensor] = []
    for batch in _reader(settings, source, stop):
        for start, end in zip(batch.offsets[:-1].tolist(), batch.offsets[1:].tolist(), strict=True):
            ids = batch.input_ids[start : min(end, start + COMPARED_TOKENS)]
            sequences.append(torch.from_numpy(ids.astype(np.int64)))
            if len(sequences) == COMPARED_ROLLOUTS:
                return sequences
    return sequences


@torch.no_grad()
def _values(critic: Critic, sequences: list[Tensor]) -> list[Tensor]:
    """The value read off each state but the last, float32 [T - 1] each, with transformers' own attention."""
    use_stock_attention(critic)
    return [
        critic.head(critic.trunk(input_ids=ids[None], use_cache=False).last_hidden_state[0, :-1]) for ids in sequences
    ]


def _result(
    settings: ExportSettings, source: ModelSource, critic: Critic, system: System, written: Written, refit: Refit | None
) -> dict[str, Any]:
    """What `--json` prints, but for what was compared."""
    target = settings.target.directory
    bias: dict[str, Any] = {"value": critic.head.bias.item(), "where": written.bias}
    if refit is not None:
        bias = {
            "value": refit.bias,
            "where": "none: the head was fitted without one",
            "fitted_to_response_tokens": refit.tokens,
            "compared_response_tokens": refit.compared,
            "largest_change": refit.largest_change,
            "root_mean_square_change": refit.mean_square_change**0.5,
        }
    return {
        "status": "finished",
        "to": settings.target.system,
        "directory": target,
        "model": str(source.path),
        "class": written.model_class,
        "head": written.head[0],
        "bias": bias,
        "source": system.source,
        "usage": system.usage(target),
        "bytes": sum(path.stat().st_size for path in Path(target).rglob("*") if path.is_file()),
    }
