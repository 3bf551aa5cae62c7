"""What a run chooses for the settings that were not given, and why; a resumed run keeps what it chose when it began."""

from collections.abc import Generator
from typing import Any

from critic_train.errors import ConfigError
from critic_train.events import Event, Notice
from critic_train.model.loading import ModelSource
from critic_train.run.run_directory import RunDirectory
from critic_train.settings import FitSettings, flag_of
from critic_train.training.targets import Targets

Recipe = dict[str, dict[str, Any]]
"""Name of a setting -> its value and the reason for it, as run.json keeps it under "recipe"."""


def choose_recipe(settings: FitSettings, source: ModelSource | None, targets: Targets) -> Recipe:
    """Choose what was not given.

    Args:
        settings: as given.
        source: what --model names; None for a new transformer.
        targets: what the returns are made of.
    """
    recipe: Recipe = {}
    if settings.model.head_init is None:
        recipe["head_init"] = _head_init(source)
    head_init = settings.model.head_init or recipe["head_init"]["value"]
    optimizer = settings.optimizer
    asked = (optimizer.epochs, optimizer.max_steps, optimizer.lr, optimizer.head_lr)
    only_head = settings.model.train == "head" and head_init == "exact"
    if only_head and not targets.moving and all(value is None for value in asked):
        recipe["epochs"] = _choice(0, "with --train head the exact value head is the answer")
    return recipe


def _head_init(source: ModelSource | None) -> dict[str, Any]:
    if source is None:
        return _choice("mean", "the states of a new transformer know nothing")
    if source.head is not None:
        return _choice("kept", f"the model has a value head, {source.head}.weight")
    return _choice("exact", "the model has no value head")


def _choice(value: Any, reason: str) -> dict[str, Any]:
    return {"value": value, "reason": reason}


def recipe_of_run(
    settings: FitSettings, source: ModelSource | None, targets: Targets, run: RunDirectory, resumed: str | None
) -> Generator[Event, None, Recipe]:
    """What a run has chosen when it began, or chooses now. Rank 0 calls it alone.

    Args:
        settings: as given.
        source: what --model names.
        targets: what the returns are made of.
        run: its run.json has the choices of a run that has begun.
        resumed: the checkpoint from which the run goes on, if any.

    Yields:
        A notice with the choices.
    """
    if resumed:
        recorded = (run.read_json("run.json") or {}).get("recipe")
        if isinstance(recorded, dict):
            return recorded
        # The run was begun by a critic-train that had no such choices.
        has_head = source is not None and source.head is not None
        return {"head_init": _choice("kept" if has_head else "mean", "as this run was begun")}
    recipe = choose_recipe(settings, source, targets)
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
    given = {name for section in settings.sections() for name in chosen if getattr(section, name, None) is not None}
    resolved = settings.replace(**{name: value for name, value in chosen.items() if name not in given})
    if resolved.optimizer.epochs == 0 and resolved.model.head_init != "exact":
        raise ConfigError("--epochs 0 trains nothing", hint="--head-init exact solves the value head in no epoch")
    return resolved
