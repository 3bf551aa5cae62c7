"""What a run chooses for settings that were not given, and what an earlier run keeps."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from support import readable_rollouts, write_shard

from critic_train.events import Notice
from critic_train.run.run_directory import RunDirectory
from critic_train.settings import FitSettings
from critic_train.stopping import StopRequest
from critic_train.training.fit import fit
from critic_train.training.recipe import DataFacts, choose_recipe, recipe_of_run, with_recipe
from critic_train.training.targets import Targets

NO_HEAD, HEAD = SimpleNamespace(head=None, path=Path("m")), SimpleNamespace(head="score", path=Path("m"))


FACTS = DataFacts(100_000, 50_000)


def chosen(source, facts: DataFacts = FACTS, **given) -> tuple[dict, FitSettings]:
    settings = FitSettings(data=["none"], **({"model": "m"} if source else {}), **given)
    recipe = choose_recipe(settings, source, Targets.of(settings.returns, settings.loss), lambda: facts)
    return recipe, with_recipe(settings, recipe)


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
        (HEAD, {"train": "head", "recipe": "verl"}, None, None),
        (NO_HEAD, {"train": "head", "recipe": "verl"}, "mean", None),
    ],
)
def test_the_head_and_whether_more_is_trained(source, given, head_init, epochs):
    _, settings = chosen(source, **given)
    assert (settings.model.head_init, settings.optimizer.epochs) == (head_init, epochs)


@pytest.mark.parametrize(
    ("facts", "given", "preset", "lm_loss_weight", "epochs"),
    [
        (DataFacts(217_378, 62), {}, "tiny", 1.0, 6),
        (DataFacts(61_600, 4_800), {}, "tiny", 0.0, 6),
        (DataFacts(999_999, 4_999), {}, "tiny", 1.0, 6),
        (DataFacts(1_000_000, 10_000), {}, "small", 0.0, None),
        (DataFacts(50_000_000, 60_000), {}, "small", 1.0, None),
        (DataFacts(217_378, 62), {"preset": "base", "lm_loss_weight": 0.0, "epochs": 2}, "base", 0.0, 2),
        (DataFacts(217_378, 62), {"max_steps": 10}, "tiny", 1.0, None),
        (DataFacts(217_378, 62), {"recipe": "verl"}, "small", None, None),
        (DataFacts(0, 0), {}, "tiny", 0.0, 6),
    ],
)
def test_a_new_transformer_is_as_large_as_the_rollouts_teach(facts, given, preset, lm_loss_weight, epochs):
    recipe, settings = chosen(None, facts, **given)
    assert (settings.model.preset, settings.optimizer.epochs) == (preset, epochs)
    assert settings.loss.lm_loss_weight == lm_loss_weight
    assert not recipe.keys() & given.keys(), "only what was not given is chosen"
    assert all(choice["reason"] for choice in recipe.values())


def test_the_facts_are_counted_over_the_training_responses(tmp_path):
    write_shard(tmp_path / "data" / "a.parquet", rollouts := readable_rollouts(8, seed=1))
    settings = {"data": [str(tmp_path / "data")], "out": str(tmp_path / "run"), "val_fraction": 0.0, "max_steps": 1}
    events = list(fit(FitSettings(**settings, device="cpu", no_report=True), StopRequest()))
    chosen_ids = rollouts.input_ids[rollouts.response_mask]
    tokens, ids = len(chosen_ids), len(np.unique(chosen_ids))
    messages = [event.message for event in events if isinstance(event, Notice)]
    assert f"--preset tiny: {tokens} response tokens: as good as small on so few, at a tenth of the time" in messages
    assert any(f"for each of {ids} ids" in message for message in messages)


def of_resumed(settings: FitSettings, source: object, record: dict, folder: Path) -> dict:
    with RunDirectory(folder / "run") as run:
        (run.path / "run.json").write_text(json.dumps(record))
        targets = Targets.of(settings.returns, settings.loss)
        choosing = recipe_of_run(settings, source, targets, None, run, resumed="step-00000001")
        with pytest.raises(StopIteration) as ended:
            next(choosing)
    return ended.value.value


@pytest.mark.parametrize(
    ("source", "values"),
    [(NO_HEAD, {"head_init": "mean"}), (HEAD, {"head_init": "kept"}), (None, {"head_init": "mean", "preset": "small"})],
)
def test_a_run_begun_without_a_recipe_goes_on_as_it_was(source, values, tmp_path):
    settings = FitSettings(data=["none"], model="m", train="head") if source else FitSettings(data=["none"])
    recipe = of_resumed(settings, source, {"settings": {}}, tmp_path)
    assert {name: choice["value"] for name, choice in recipe.items()} == values
    assert with_recipe(settings, recipe).optimizer.epochs is None


def test_a_resumed_run_keeps_what_it_chose(tmp_path):
    settings = FitSettings(data=["none"], model="m", train="head")
    recorded = {"head_init": {"value": "exact", "reason": "..."}, "epochs": {"value": 0, "reason": "..."}}
    assert of_resumed(settings, HEAD, {"recipe": recorded}, tmp_path) == recorded
    assert with_recipe(settings.replace(epochs=4), recorded).optimizer.epochs == 4, "what is given stays"
