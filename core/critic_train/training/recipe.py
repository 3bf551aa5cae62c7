"""What a run chooses for the settings that were not given, and why; a resumed run keeps what it chose when it began."""

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from critic_train.distributed.ranks import SINGLE_PROCESS
from critic_train.errors import ConfigError
from critic_train.events import Event, Notice
from critic_train.model_files.config import LEARNING_RATES
from critic_train.run.run_directory import RunDirectory
from critic_train.settings import FitSettings, ModelSettings, as_dict, flag_of
from critic_train.training.dataset import RolloutSet
from critic_train.training.next_token_loss import response_id_counts
from critic_train.training.plan import DEFAULT_EPOCHS
from critic_train.training.targets import Targets
from critic_train.weights.loading import ModelSource

Recipe = dict[str, dict[str, Any]]
"""Name of a setting -> its value and the reason for it, as run.json keeps it under "recipe"."""

FEW_TOKENS = 1_000_000
"""Response tokens below which a new transformer is tiny, and goes through them more often."""
EPOCHS_OF_FEW = 6
EPOCHS_WITH_LM_LOSS = 12
"""Of few tokens, where a next-token loss pays: on a drawn world twice as many passes explain 97.7 % in place of 97.1 %
of the true values' variance, and 93.4 % in place of 90.9 % within prompts. Without that loss, on real text, six are no
better than four."""
TOKENS_PER_ID = 200.0
"""Response tokens for each id that occurs in them, from which a next-token loss pays for a new transformer."""
LM_LOSS_WEIGHT = 1.0
LM_LOSS_AHEAD = 8
PATIENCE = 3
"""Evaluations, of ten in a run, in which fine-tuning has to get further."""

EMA_DECAY = 0.99
"""Of the weights that are trained."""

LR_FINE_TUNING, WIDE = 1e-5, 2048
"""The learning rate of verl's critic, and the width from which it is taken as it is. A narrower model takes steps that
are larger in inverse proportion to its width, as maximal-update parametrisation transfers the rate of Adam (Yang et al.
2022, arXiv 2203.03466)."""
ADAPTERS = 10
"""LoRA learns best at about ten times the rate of full fine-tuning (Biderman et al. 2024, arXiv 2405.09673)."""
LR_NEW_HEAD = 1e-3
AVERAGED_PARAMETERS = 2e9
"""Of a model, up to which fine-tuning all of it keeps an average of its weights: it takes four bytes for each, and four
more in a checkpoint."""


@dataclass(frozen=True, slots=True)
class DataFacts:
    """What the choices depend on, of the rollouts to train on.

    Attributes:
        response_tokens: of all of them.
        response_ids: finds the ids that occur among these, int64, ascending; a run reads all its rollouts for it.
    """

    response_tokens: int
    response_ids: Callable[[], NDArray[np.int64]]


def choose_recipe(
    settings: FitSettings, source: ModelSource | None, targets: Targets, data: Callable[[], DataFacts]
) -> Recipe:
    """Choose what was not given.

    Args:
        settings: as given.
        source: what --model names; None for a new transformer.
        targets: what the returns are made of.
        data: asked only for a new transformer.
    """
    if settings.optimizer.recipe == "verl":
        return _not_given(settings, source, _before_recipes(source, "--recipe verl"))
    recipe: Recipe = {"head_init": _head_init(source)}
    if source is None:
        recipe |= _for_new_transformer(settings, data())
    else:
        recipe |= _for_model(settings, recipe, targets)
        recipe |= _for_fine_tuning(_replaced(settings, recipe), source)
    return _not_given(settings, source, recipe)


def _not_given(settings: FitSettings, source: ModelSource | None, recipe: Recipe) -> Recipe:
    """Choices for what was not given, with the learning rates that follow from all of them."""
    recipe = {name: choice for name, choice in recipe.items() if _value(settings, name) is None}
    rates = _learning_rates(_replaced(settings, recipe), source)
    return recipe | {name: choice for name, choice in rates.items() if _value(settings, name) is None}


def _for_new_transformer(settings: FitSettings, facts: DataFacts) -> Recipe:
    few = facts.response_tokens < FEW_TOKENS
    recipe = {"preset": _preset(facts, few)}
    recipe["ema_decay"] = _choice(EMA_DECAY, "the average of a new transformer's weights is ahead of them on the way")
    if settings.loss.lm_loss_weight is None:
        recipe["lm_loss_weight"] = _lm_loss_weight(facts)
    weight = _replaced(settings, recipe).loss.lm_loss_weight
    if weight:
        reason = "several of the tokens that follow tell more of where a rollout goes than the next one alone"
        recipe["lm_loss_ahead"] = _choice(LM_LOSS_AHEAD, reason)
    if few:
        reason = "are few: mini-batches of more prompts teach more by each pass, though less of the prefixes is shared"
        recipe["shuffle"] = _choice("rollouts", f"{_tokens(facts)} {reason}")
    if (settings.optimizer.epochs, settings.optimizer.max_steps) == (None, None):
        recipe["epochs"] = _epochs(facts, few, bool(weight))
    return recipe


def _epochs(facts: DataFacts, few: bool, has_lm_loss: bool) -> dict[str, Any]:
    if not few:
        return _choice(DEFAULT_EPOCHS, f"{_tokens(facts)} teach in few passes")
    if has_lm_loss:
        reason = "are few: with the next-token loss, many passes still teach from scratch"
        return _choice(EPOCHS_WITH_LM_LOSS, f"{_tokens(facts)} {reason}")
    return _choice(EPOCHS_OF_FEW, f"{_tokens(facts)} are few: more passes still teach from scratch")


def _for_model(settings: FitSettings, recipe: Recipe, targets: Targets) -> Recipe:
    """How long a model is trained, and when that ends early."""
    optimizer = settings.optimizer
    horizon, rates = (optimizer.epochs, optimizer.max_steps), (optimizer.lr, optimizer.head_lr)
    is_exact = (settings.model.head_init or recipe["head_init"]["value"]) == "exact"
    only_head = settings.model.train == "head" and is_exact and not targets.moving
    if only_head and (*horizon, *rates) == (None,) * 4:
        return {"epochs": _choice(0, "with --train head the exact value head is the answer")}
    if horizon != (None, None):
        return {}
    chosen = {"epochs": _choice(DEFAULT_EPOCHS, "as many as fine-tuning takes where it gains anything")}
    if is_exact and (settings.reading.val_data or settings.reading.val_fraction):
        reason = f"fine-tuning from the exact value head ends where {PATIENCE} evaluations in a row get no further"
        chosen["patience"] = _choice(PATIENCE, reason)
    return chosen


def _for_fine_tuning(settings: FitSettings, source: ModelSource) -> Recipe:
    """The learning rate, and whether weights are averaged, for settings that say what is trained and how long."""
    trained, steps = settings.model.train or "full", settings.optimizer.epochs != 0
    rate = LR_FINE_TUNING * max(1.0, WIDE / source.hidden_size)
    reason = f"a model whose states have {source.hidden_size:,} numbers"
    if trained == "lora":
        rate, reason = ADAPTERS * rate, f"adapters of {reason}, ten times that of full fine-tuning"
    recipe = {"lr": _choice(float(f"{rate:.2g}"), f"for {reason}")}
    if steps and (trained != "full" or source.trunk_parameters <= AVERAGED_PARAMETERS):
        recipe["ema_decay"] = _choice(EMA_DECAY, "the average of the weights is ahead of them on the way")
    return recipe


def _before_recipes(source: ModelSource | None, reason: str) -> Recipe:
    """What critic-train did before it chose anything, which is what verl does."""
    has_head = source is not None and source.head is not None
    values: dict[str, Any] = {"head_init": "kept" if has_head else "mean"}
    if source is None:
        values["preset"] = "small"
    return {name: _choice(value, reason) for name, value in values.items()}


def _preset(facts: DataFacts, few: bool) -> dict[str, Any]:
    reason = "as good as small on so few, at a tenth of the time" if few else "enough for more than tiny"
    return _choice("tiny" if few else "small", f"{_tokens(facts)}: {reason}")


def _lm_loss_weight(facts: DataFacts) -> dict[str, Any]:
    ids = len(facts.response_ids())
    each = facts.response_tokens / max(1, ids)
    pays = each >= TOKENS_PER_ID
    reason = f"{each:,.0f} response tokens for each of {ids:,} ids teach"
    return _choice(LM_LOSS_WEIGHT, f"{reason} what follows what") if pays else _choice(0.0, f"{reason} too little")


def _tokens(facts: DataFacts) -> str:
    return f"{facts.response_tokens:,} response tokens"


def _head_init(source: ModelSource | None) -> dict[str, Any]:
    if source is None:
        return _choice("mean", "the states of a new transformer know nothing")
    if source.head is not None:
        return _choice("kept", f"the model has a value head, {source.head}.weight")
    return _choice("exact", "the model has no value head")


def _learning_rates(settings: FitSettings, source: ModelSource | None) -> Recipe:
    """Peak learning rates of the trunk and of the value head, for settings that are resolved but for these."""
    model, lr = settings.model, settings.optimizer.lr
    recipe: Recipe = {}
    if lr is None:
        if source is None:
            assert model.preset is not None, "chosen by now"
            recipe["lr"] = _choice(LEARNING_RATES[model.preset], f"for a new {model.preset} transformer")
        elif model.train == "lora":
            recipe["lr"] = _choice(ADAPTERS * LR_FINE_TUNING, "for adapters, ten times that of full fine-tuning")
        else:
            recipe["lr"] = _choice(LR_FINE_TUNING, "for fine-tuning")
        lr = recipe["lr"]["value"]
    if model.head_init == "exact":
        # A head that was solved is where it should be: larger steps would only lead it away.
        recipe["head_lr"] = _choice(lr, "that of the transformer: the value head is solved already")
    elif starts_new_head(model, source):
        recipe["head_lr"] = _choice(max(lr, LR_NEW_HEAD), "for a new value head")
    else:
        recipe["head_lr"] = _choice(lr, "that of the transformer: the value head is kept")
    return recipe


def starts_new_head(model: ModelSettings, source: ModelSource | None) -> bool:
    """Whether a run begins with a value head of its own, in place of one that --model may have."""
    return source is None or source.head is None or model.head_init is not None


def _choice(value: Any, reason: str) -> dict[str, Any]:
    return {"value": value, "reason": reason}


def recipe_of_run(
    settings: FitSettings,
    source: ModelSource | None,
    targets: Targets,
    train: RolloutSet,
    run: RunDirectory,
    resumed: str | None,
) -> Generator[Event, None, tuple[Recipe, list[int] | None]]:
    """What a run has chosen when it began, or chooses now. Rank 0 calls it alone.

    Args:
        settings: as given.
        source: what --model names.
        targets: what the returns are made of.
        train: the rollouts to train on.
        run: its run.json has the choices of a run that has begun.
        resumed: the checkpoint from which the run goes on, if any.

    Yields:
        A notice for each choice.

    Returns:
        (the choices; the ids that occur in the training responses, None where nothing asked for them).
    """
    if resumed:
        # A run that was begun by a critic-train without some of the choices has none of them in run.json.
        record = run.read_json("run.json") or {}
        # What chose itself by memory and ranks is taken over by `resumed_settings`, where it still fits.
        chosen = record.get("chosen") or {}
        recorded = {name: choice for name, choice in (record.get("recipe") or {}).items() if name not in chosen}
        return _not_given(settings, source, _before_recipes(source, "as this run was begun") | recorded), None
    counted: list[NDArray[np.int64]] = []

    def count_ids() -> NDArray[np.int64]:
        counted.append(np.flatnonzero(response_id_counts(train, SINGLE_PROCESS)))
        return counted[0]

    def facts() -> DataFacts:
        return DataFacts(train.response_tokens, count_ids)

    recipe = choose_recipe(settings, source, targets, facts)
    yield from choice_notices(settings, recipe)
    return recipe, counted[0].tolist() if counted else None


def choice_notices(settings: FitSettings, recipe: Recipe) -> Iterator[Notice]:
    """A notice for each choice that the run makes use of."""
    unused = {"lr", "head_lr"} if _replaced(settings, recipe).optimizer.epochs == 0 else set()
    for name, choice in recipe.items():
        if name not in {"head_init"} | unused:  # how the head begins is said with what the model has
            yield Notice(message=f"{flag_of(name)} {choice['value']}: {choice['reason']}")


def with_recipe(settings: FitSettings, recipe: Recipe) -> FitSettings:
    """Settings with the choices in place of what was not given; a setting that was given stays.

    Raises:
        ConfigError: there is nothing to train.
    """
    resolved = _replaced(settings, recipe)
    if resolved.optimizer.epochs == 0 and resolved.model.head_init != "exact":
        raise ConfigError("--epochs 0 trains nothing", hint="--head-init exact solves the value head in no epoch")
    return resolved


def _replaced(settings: FitSettings, recipe: Recipe) -> FitSettings:
    chosen = {name: choice["value"] for name, choice in recipe.items() if choice["value"] != "kept"}
    return settings.replace(**{name: value for name, value in chosen.items() if _value(settings, name) is None})


def _value(settings: FitSettings, name: str) -> Any:
    return as_dict(settings)[name]
