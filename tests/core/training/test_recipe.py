"""What a run chooses for settings that were not given, and what an earlier run keeps."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from critic_train.run.run_directory import RunDirectory
from critic_train.settings import FitSettings
from critic_train.training.recipe import choose_recipe, recipe_of_run, with_recipe
from critic_train.training.targets import Targets

NO_HEAD, HEAD = SimpleNamespace(head=None, path=Path("m")), SimpleNamespace(head="score", path=Path("m"))


def chosen(source, **given) -> tuple[dict, FitSettings]:
    settings = FitSettings(data=["none"], **({"model": "m"} if source else {}), **given)
    recipe = choose_recipe(settings, source, Targets.of(settings.returns, settings.loss))
    return {name: choice["value"] for name, choice in recipe.items()}, with_recipe(settings, recipe)


@pytest.mark.parametrize(
    ("source", "given", "head_init", "epochs"),
    [
        (NO_HEAD, {}, "exact", None),
        (NO_HEAD, {"train": "head"}, "exact", 0),
        (NO_HEAD, {"train": "head", "lr": 1e-3}, "exact", None),
        (NO_HEAD, {"train": "head", "head_lr": 1e-3}, "exact", None),
        (NO_HEAD, {"train": "head", "epochs": 2}, "exact", 2),
        (NO_HEAD, {"train": "head", "max_steps": 5}, "exact", None),
        (NO_HEAD, {"train": "head", "head_init": "mean"}, "mean", None),
        (NO_HEAD, {"train": "head", "returns": "gae", "lam": 0.9, "old_values": "epoch"}, "exact", None),
        (HEAD, {}, None, None),
        (HEAD, {"train": "head"}, None, None),
        (HEAD, {"train": "head", "head_init": "exact"}, "exact", 0),
        (None, {}, "mean", None),
    ],
)
def test_the_head_and_whether_more_is_trained(source, given, head_init, epochs):
    _, settings = chosen(source, **given)
    assert (settings.model.head_init, settings.optimizer.epochs) == (head_init, epochs)


@pytest.mark.parametrize(("source", "head_init"), [(NO_HEAD, "mean"), (HEAD, "kept")])
def test_a_run_begun_without_a_recipe_goes_on_as_it_was(source, head_init, tmp_path):
    settings = FitSettings(data=["none"], model="m", train="head")
    with RunDirectory(tmp_path / "run") as run:
        (run.path / "run.json").write_text(json.dumps({"settings": {}}))
        choosing = recipe_of_run(
            settings, source, Targets.of(settings.returns, settings.loss), run, resumed="step-00000004"
        )
        with pytest.raises(StopIteration) as ended:
            next(choosing)
    recipe = ended.value.value
    assert {name: choice["value"] for name, choice in recipe.items()} == {"head_init": head_init}
    assert with_recipe(settings, recipe).optimizer.epochs is None


def test_a_resumed_run_keeps_what_it_chose(tmp_path):
    settings = FitSettings(data=["none"], model="m", train="head")
    recorded = {"head_init": {"value": "exact", "reason": "..."}, "epochs": {"value": 0, "reason": "..."}}
    with RunDirectory(tmp_path / "run") as run:
        (run.path / "run.json").write_text(json.dumps({"recipe": recorded}))
        choosing = recipe_of_run(
            settings, HEAD, Targets.of(settings.returns, settings.loss), run, resumed="step-00000004"
        )
        with pytest.raises(StopIteration) as ended:
            next(choosing)
    assert ended.value.value == recorded
    assert with_recipe(settings.replace(epochs=4), recorded).optimizer.epochs == 4, "what is given stays"
