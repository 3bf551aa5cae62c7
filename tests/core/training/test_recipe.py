"""What a run chooses for settings that were not given, and what an earlier run keeps."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from support import readable_rollouts, write_shard

from critic_train.errors import ConfigError
from critic_train.events import Notice
from critic_train.run.run_directory import RunDirectory
from critic_train.settings import FitSettings
from critic_train.stopping import StopRequest
from critic_train.training.fit import fit
from critic_train.training.recipe import DataFacts, choose_recipe, recipe_of_run, with_recipe
from critic_train.training.targets import Targets


def source_of(head: str | None = None, *, hidden_size: int = 4096, trunk_parameters: int = 10**9) -> SimpleNamespace:
    return SimpleNamespace(head=head, path=Path("m"), hidden_size=hidden_size, trunk_parameters=trunk_parameters)


NO_HEAD, HEAD = source_of(), source_of("score")


def facts_of(response_tokens: int = 100_000, ids: int = 50_000) -> DataFacts:
    return DataFacts(response_tokens, lambda: np.arange(ids))


FACTS = facts_of()


def chosen(source, facts: DataFacts = FACTS, **given) -> tuple[dict, FitSettings]:
    settings = FitSettings(data=["none"], **({"model": "m"} if source else {}), **given)
    recipe = choose_recipe(settings, source, Targets.of(settings.returns, settings.loss), lambda: facts)
    return recipe, with_recipe(settings, recipe)


@pytest.mark.parametrize(
    ("source", "given", "head_init", "epochs"),
    [
        (NO_HEAD, {}, "exact", 3),
        (NO_HEAD, {"train": "head"}, "exact", 0),
        (NO_HEAD, {"train": "head", "lr": 1e-3}, "exact", 3),
        (NO_HEAD, {"train": "head", "head_lr": 1e-3}, "exact", 3),
        (NO_HEAD, {"train": "head", "epochs": 2}, "exact", 2),
        (NO_HEAD, {"train": "head", "max_steps": 5}, "exact", None),
        (NO_HEAD, {"train": "head", "head_init": "mean"}, "mean", 3),
        (NO_HEAD, {"train": "head", "returns": "gae", "lam": 0.9, "old_values": "epoch"}, "exact", 3),
        (HEAD, {}, None, 3),
        (HEAD, {"train": "head"}, None, 3),
        (HEAD, {"train": "head", "head_init": "exact"}, "exact", 0),
        (HEAD, {"train": "head", "recipe": "verl"}, None, None),
        (NO_HEAD, {"train": "head", "recipe": "verl"}, "mean", None),
    ],
)
def test_the_head_and_whether_more_is_trained(source, given, head_init, epochs):
    _, settings = chosen(source, **given)
    assert (settings.model.head_init, settings.optimizer.epochs) == (head_init, epochs)


@pytest.mark.parametrize(
    ("source", "given", "train", "epochs", "patience"),
    [
        (NO_HEAD, {}, None, 3, 3),
        (NO_HEAD, {"val_fraction": 0.0}, None, 3, None),
        (NO_HEAD, {"train": "full"}, "full", 3, 3),
        (NO_HEAD, {"train": "head"}, "head", 0, None),
        (NO_HEAD, {"train": "last-2"}, "last-2", 3, 3),
        (NO_HEAD, {"train": "lora", "patience": 7}, "lora", 3, 7),
        (NO_HEAD, {"lr": 1e-4}, None, 3, 3),
        (NO_HEAD, {"epochs": 2}, None, 2, None),
        (NO_HEAD, {"max_steps": 9}, None, None, None),
        (NO_HEAD, {"lm_loss_weight": 0.5}, None, 3, 3),
        (NO_HEAD, {"head_init": "mean"}, None, 3, None),
        (HEAD, {}, None, 3, None),
        (NO_HEAD, {"recipe": "verl"}, None, None, None),
    ],
)
def test_a_model_is_fine_tuned_from_its_exact_head_until_it_gets_no_further(source, given, train, epochs, patience):
    recipe, settings = chosen(source, **given)
    assert (settings.model.train, settings.optimizer.epochs, settings.run.patience) == (train, epochs, patience)
    assert settings.optimizer.ema_decay == (None if epochs == 0 or "recipe" in given else 0.99)
    assert not recipe.keys() & given.keys(), "only what was not given is chosen"


@pytest.mark.parametrize(
    ("facts", "given", "preset", "lm_loss_weight", "epochs"),
    [
        (facts_of(217_378, 62), {}, "tiny", 1.0, 12),
        (facts_of(61_600, 4_800), {}, "tiny", 0.0, 6),
        (facts_of(999_999, 4_999), {}, "tiny", 1.0, 12),
        (facts_of(217_378, 62), {"lm_loss_weight": 0.0}, "tiny", 0.0, 6),
        (facts_of(61_600, 4_800), {"lm_loss_weight": 0.3}, "tiny", 0.3, 12),
        (facts_of(1_000_000, 10_000), {}, "small", 0.0, 3),
        (facts_of(50_000_000, 60_000), {}, "small", 1.0, 3),
        (facts_of(217_378, 62), {"preset": "base", "lm_loss_weight": 0.0, "epochs": 2}, "base", 0.0, 2),
        (facts_of(217_378, 62), {"max_steps": 10}, "tiny", 1.0, None),
        (facts_of(217_378, 62), {"recipe": "verl"}, "small", None, None),
        (facts_of(0, 0), {}, "tiny", 0.0, 6),
    ],
)
def test_a_new_transformer_is_as_large_as_the_rollouts_teach(facts, given, preset, lm_loss_weight, epochs):
    recipe, settings = chosen(None, facts, **given)
    assert (settings.model.preset, settings.optimizer.epochs) == (preset, epochs)
    assert settings.optimizer.ema_decay == (None if "recipe" in given else 0.99)
    assert settings.loss.lm_loss_weight == lm_loss_weight
    assert not recipe.keys() & given.keys(), "only what was not given is chosen"
    assert all(choice["reason"] for choice in recipe.values())


@pytest.mark.parametrize(
    ("source", "facts", "given", "ahead"),
    [
        (None, facts_of(217_378, 62), {}, 8),
        (None, facts_of(217_378, 62), {"lm_loss_ahead": 1}, 1),
        (None, facts_of(217_378, 62), {"lm_loss_weight": 0.0}, None),
        (None, facts_of(61_600, 4_800), {}, None),
        (None, facts_of(61_600, 4_800), {"lm_loss_weight": 0.3}, 8),
        (None, facts_of(217_378, 62), {"recipe": "verl", "lm_loss_weight": 1.0}, None),
        (HEAD, facts_of(217_378, 62), {"lm_loss_weight": 1.0}, None),
    ],
)
def test_a_new_transformer_predicts_several_tokens_from_each_state(source, facts, given, ahead):
    recipe, settings = chosen(source, facts, **given)
    assert settings.loss.lm_loss_ahead == ahead
    assert not recipe.keys() & given.keys(), "only what was not given is chosen"


@pytest.mark.parametrize("given", [{"lm_loss_weight": 0.0, "lm_loss_ahead": 2}, {"lm_loss_ahead": 0}])
def test_tokens_ahead_that_no_loss_predicts_are_refused(given):
    with pytest.raises(ConfigError, match="--lm-loss-ahead"):
        FitSettings(data=["none"], **given)


@pytest.mark.parametrize(
    ("source", "facts", "given", "shuffle"),
    [
        (None, facts_of(999_999), {}, "rollouts"),
        (None, facts_of(1_000_000), {}, None),
        (None, facts_of(999_999), {"shuffle": "groups"}, "groups"),
        (None, facts_of(999_999), {"recipe": "verl"}, None),
        (NO_HEAD, facts_of(999_999), {}, None),
        (HEAD, facts_of(999_999), {"shuffle": "rollouts"}, "rollouts"),
    ],
)
def test_rollouts_are_shuffled_apart_where_a_new_transformer_has_few(source, facts, given, shuffle):
    recipe, settings = chosen(source, facts, **given)
    assert settings.optimizer.shuffle == shuffle
    assert ("shuffle" in recipe) == (shuffle is not None and not given)


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        pytest.param(facts_of(1_038, 403), ("tiny", 0.0, 6), id="tiny"),
        pytest.param(facts_of(217_000, 62), ("tiny", 1.0, 12), id="huge groups"),
        pytest.param(facts_of(65_044, 4_779), ("tiny", 0.0, 6), id="scores in [0, 1]"),
        pytest.param(facts_of(141_000, 30), ("tiny", 1.0, 12), id="returns around 0"),
        pytest.param(facts_of(108_000, 62), ("tiny", 1.0, 12), id="one rollout a prompt"),
    ],
)
def test_five_unlike_data_sets(facts, expected):
    _, settings = chosen(None, facts)
    assert (settings.model.preset, settings.loss.lm_loss_weight, settings.optimizer.epochs) == expected


@pytest.mark.parametrize(
    ("source", "given", "expected"),
    [
        (None, {"preset": "tiny"}, (2e-3, 2e-3)),
        (None, {"preset": "base"}, (3e-4, 1e-3)),
        (NO_HEAD, {"head_init": "mean"}, (1e-5, 1e-3)),
        (NO_HEAD, {"train": "full"}, (1e-5, 1e-5)),
        (HEAD, {}, (1e-5, 1e-5)),
        (HEAD, {"train": "lora"}, (1e-4, 1e-4)),
        (NO_HEAD, {"recipe": "verl"}, (1e-5, 1e-3)),
        (NO_HEAD, {"lr": 0.5}, (0.5, 0.5)),
        (HEAD, {"head_lr": 0.0}, (1e-5, 0.0)),
    ],
)
def test_learning_rates_are_those_given_or_those_of_what_is_trained(source, given, expected):
    _, settings = chosen(source, **given)
    assert (settings.optimizer.lr, settings.optimizer.head_lr) == expected


@pytest.mark.parametrize(
    ("hidden_size", "given", "lr"),
    [
        (8192, {}, 1e-5),
        (2048, {}, 1e-5),
        (576, {}, 3.6e-5),
        (576, {"train": "lora"}, 3.6e-4),
        (576, {"train": "last-2"}, 3.6e-5),
        (576, {"lr": 2e-4}, 2e-4),
        (576, {"recipe": "verl"}, 1e-5),
        (64, {}, 3.2e-4),
    ],
)
def test_the_narrower_a_model_the_larger_the_steps_of_its_fine_tuning(hidden_size, given, lr):
    _, settings = chosen(source_of("score", hidden_size=hidden_size), **given)
    assert settings.optimizer.lr == lr


@pytest.mark.parametrize(
    ("given", "ema_decay"),
    [({"train": "full"}, None), ({"train": "last-2"}, 0.99), ({"train": "lora"}, 0.99), ({"ema_decay": 0.9}, 0.9)],
)
def test_the_average_of_all_weights_of_a_large_model_is_left_to_the_user(given, ema_decay):
    _, settings = chosen(source_of(trunk_parameters=7 * 10**9), **given)
    assert settings.optimizer.ema_decay == ema_decay


@pytest.mark.parametrize(("source", "given"), [(NO_HEAD, {}), (HEAD, {}), (None, {"lm_loss_weight": 0.0})])
def test_ids_that_no_choice_depends_on_are_not_counted(source, given):
    def count():
        raise AssertionError("a pass over all rollouts")

    chosen(source, DataFacts(100_000, count), **given)


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
    recipe, response_ids = ended.value.value
    assert response_ids is None
    return recipe


@pytest.mark.parametrize(
    ("source", "values"),
    [
        (NO_HEAD, {"head_init": "mean", "lr": 1e-5, "head_lr": 1e-3}),
        (HEAD, {"head_init": "kept", "lr": 1e-5, "head_lr": 1e-5}),
        (None, {"head_init": "mean", "preset": "small", "lr": 1e-3, "head_lr": 1e-3}),
    ],
)
def test_a_run_begun_without_a_recipe_goes_on_as_it_was(source, values, tmp_path):
    settings = FitSettings(data=["none"], model="m", train="head") if source else FitSettings(data=["none"])
    recipe = of_resumed(settings, source, {"settings": {}}, tmp_path)
    assert {name: choice["value"] for name, choice in recipe.items()} == values
    resolved = with_recipe(settings, recipe).optimizer
    assert (resolved.epochs, resolved.shuffle, resolved.ema_decay) == (None, None, None)


def test_a_resumed_run_keeps_what_it_chose(tmp_path):
    settings = FitSettings(data=["none"], model="m", train="head")
    recorded = {"head_init": {"value": "exact", "reason": "..."}, "epochs": {"value": 0, "reason": "..."}}
    kept = of_resumed(settings, HEAD, {"recipe": recorded}, tmp_path)
    assert {name: kept[name] for name in recorded} == recorded
    assert with_recipe(settings.replace(epochs=4), recorded).optimizer.epochs == 4, "what is given stays"
