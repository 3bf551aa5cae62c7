"""What a run chooses for the settings that were not given, and why; a resumed run keeps what it chose when it began."""

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import numpy as np

from critic_train.distributed.ranks import SINGLE_PROCESS
from critic_train.errors import ConfigError
from critic_train.events import Event, Notice
from critic_train.run.run_directory import RunDirectory
from critic_train.settings import FitSettings, as_dict, flag_of
from critic_train.training.dataset import RolloutSet
from critic_train.training.next_token_loss import response_id_counts
from critic_train.training.targets import Targets
from critic_train.weights.loading import ModelSource

Recipe = dict[str, dict[str, Any]]
"""Name of a setting -> its value and the reason for it, as run.json keeps it under "recipe"."""

FEW_TOKENS = 1_000_000
"""Response tokens below which a new transformer is tiny, and goes through them more often."""
EPOCHS_OF_FEW = 6
TOKENS_PER_ID = 200.0
"""Response tokens for each id that occurs in them, from which a next-token loss pays for a new transformer."""
LM_LOSS_WEIGHT = 1.0


@dataclass(frozen=True, slots=True)
class DataFacts:
    """What the choices for a new transformer depend on.

    Attributes:
        response_tokens: of the rollouts to train on.
        response_ids: how many ids occur among them.
    """

    response_tokens: int
    response_ids: int

    @classmethod
    def of(cls, train: RolloutSet) -> "DataFacts":
        """Those of a run; reads all its rollouts once."""
        counts = response_id_counts(train, SINGLE_PROCESS)
        return cls(int(counts.sum()), int(np.count_nonzero(counts)))


def choose_recipe(
    settings: FitSettings, source: ModelSource | None, targets: Targets, data: Callable[[], DataFacts]
) -> Recipe:
    """Choose what was not given.

    Args:
        settings: as given.
        source: what --model names; None for a new transformer.
        targets: what the returns are made of.
        data: asked for a new transformer only.
    """
    if settings.optimizer.recipe == "verl":
        return _before_recipes(source, "--recipe verl")
    recipe: Recipe = {"head_init": _head_init(source)}
    optimizer = settings.optimizer
    horizon = (optimizer.epochs, optimizer.max_steps)
    if source is None:
        facts = data()
        recipe |= {"preset": _preset(facts), "lm_loss_weight": _lm_loss_weight(facts)}
        if horizon == (None, None) and facts.response_tokens < FEW_TOKENS:
            recipe["epochs"] = _choice(EPOCHS_OF_FEW, f"{_tokens(facts)} are few: more passes still teach from scratch")
    head_init = settings.model.head_init or recipe["head_init"]["value"]
    only_head = settings.model.train == "head" and head_init == "exact"
    if only_head and not targets.moving and (*horizon, optimizer.lr, optimizer.head_lr) == (None,) * 4:
        recipe["epochs"] = _choice(0, "with --train head the exact value head is the answer")
    return {name: choice for name, choice in recipe.items() if _value(settings, name) is None}


def _before_recipes(source: ModelSource | None, reason: str) -> Recipe:
    """What critic-train did before it chose anything, which is what verl does."""
    has_head = source is not None and source.head is not None
    values: dict[str, Any] = {"head_init": "kept" if has_head else "mean"}
    if source is None:
        values["preset"] = "small"
    return {name: _choice(value, reason) for name, value in values.items()}


def _preset(facts: DataFacts) -> dict[str, Any]:
    few = facts.response_tokens < FEW_TOKENS
    reason = "as good as small on so few, at a tenth of the time" if few else "enough for more than tiny"
    return _choice("tiny" if few else "small", f"{_tokens(facts)}: {reason}")


def _lm_loss_weight(facts: DataFacts) -> dict[str, Any]:
    each = facts.response_tokens / max(1, facts.response_ids)
    pays = each >= TOKENS_PER_ID
    reason = f"{each:,.0f} response tokens for each of {facts.response_ids:,} ids teach"
    return _choice(LM_LOSS_WEIGHT, f"{reason} what follows what") if pays else _choice(0.0, f"{reason} too little")


def _tokens(facts: DataFacts) -> str:
    return f"{facts.response_tokens:,} response tokens"


def _head_init(source: ModelSource | None) -> dict[str, Any]:
    if source is None:
        return _choice("mean", "the states of a new transformer know nothing")
    if source.head is not None:
        return _choice("kept", f"the model has a value head, {source.head}.weight")
    return _choice("exact", "the model has no value head")


def _choice(value: Any, reason: str) -> dict[str, Any]:
    return {"value": value, "reason": reason}


def recipe_of_run(
    settings: FitSettings,
    source: ModelSource | None,
    targets: Targets,
    train: RolloutSet,
    run: RunDirectory,
    resumed: str | None,
) -> Generator[Event, None, Recipe]:
    """What a run has chosen when it began, or chooses now. Rank 0 calls it alone.

    Args:
        settings: as given.
        source: what --model names.
        targets: what the returns are made of.
        train: the rollouts to train on.
        run: its run.json has the choices of a run that has begun.
        resumed: the checkpoint from which the run goes on, if any.

    Yields:
        A notice with the choices.
    """
    if resumed:
        # A run that was begun by a critic-train without some of the choices has none of them in run.json.
        return _before_recipes(source, "as this run was begun") | (
            (run.read_json("run.json") or {}).get("recipe") or {}
        )
    recipe = choose_recipe(settings, source, targets, lambda: DataFacts.of(train))
    for name, choice in recipe.items():
        if name != "head_init":  # said with what the model has
            yield Notice(message=f"{flag_of(name)} {choice['value']}: {choice['reason']}")
    return recipe


def with_recipe(settings: FitSettings, recipe: Recipe) -> FitSettings:
    """Settings with the choices in place of what was not given; a setting that was given stays.

    Raises:
        ConfigError: there is nothing to train.
    """
    chosen = {name: choice["value"] for name, choice in recipe.items() if choice["value"] != "kept"}
    resolved = settings.replace(**{name: value for name, value in chosen.items() if _value(settings, name) is None})
    if resolved.optimizer.epochs == 0 and resolved.model.head_init != "exact":
        raise ConfigError("--epochs 0 trains nothing", hint="--head-init exact solves the value head in no epoch")
    return resolved


def _value(settings: FitSettings, name: str) -> Any:
    return as_dict(settings)[name]
