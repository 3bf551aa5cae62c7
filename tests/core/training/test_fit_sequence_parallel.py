"""Runs whose rollouts are cut over ranks: the loss curve of one process, its values and files, on any ranks."""

import json
from pathlib import Path

import numpy as np
import pytest
import ranks
from ranks import furthest, on_ranks, records
from support import branching_rollouts, rollouts_of, small_config, write_shard

from critic_train.evaluation.evaluate import evaluate
from critic_train.run.checkpoint import newest_checkpoint
from critic_train.settings import EvalSettings, FitSettings
from critic_train.stopping import StopRequest
from critic_train.training.fit import fit
from critic_train.weights.loading import build_critic

STEPS = 6
FIGURES = ("value_loss", "grad_norm", "vpred_mean", "clipfrac", "saturation")
LEAST = 1e-2
"""A figure next to 0 is compared relative to this."""
VARIANTS = {
    "exact head of two inputs on kept states": {"train": "head", "head_init": "exact", "head_inputs": "last+mean"},
    "exact head, and means of states": {"head_init": "exact", "head_inputs": "last+mean", "model": "base"},
    "last layer on kept states": {"train": "last-1"},
    "adapters": {"train": "lora", "lr": 1e-3},
    "next-token loss and old values": {"lm_loss_weight": 0.1, "old_values": "epoch"},
    "layers computed again": {"activation_checkpointing": "layer"},
    "half of it computed again": {"activation_checkpointing": "selective"},
}


def settings_of(folder: Path, **changes: object) -> FitSettings:
    """A run of a few steps."""
    common = {"preset": "tiny"} if "model" not in changes else {}
    return FitSettings(
        **{
            "data": [str(folder / "data")],
            "out": str(folder / "alone"),
            "batch_size": 8,
            "max_tokens": 60,
            "max_steps": STEPS,
            "eval_every": 3,
            "checkpoint_every": 2,
            "lr": 5e-4,
            "device": "cpu",
            "no_report": True,
            **common,
            **changes,
        }
    )


def run_alone(settings: FitSettings) -> FitSettings:
    """Run on one process to the end."""
    assert list(fit(settings, StopRequest()))[-1].status == "finished"
    return settings


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """With rollouts in `data`, and a model without a head in `base`."""
    made = tmp_path_factory.mktemp("sequence")
    write_shard(made / "data" / "a.parquet", branching_rollouts())
    build_critic(small_config("Qwen2"), seed=0).trunk.save_pretrained(made / "base")
    return made


@pytest.fixture(scope="module")
def alone(folder) -> FitSettings:
    """A run on one process, done; the others differ in `out`."""
    return run_alone(settings_of(folder))


def assert_same_curve(out: str, alone: str) -> None:
    for name in FIGURES:
        assert furthest(out, alone, name, least=LEAST) <= 1e-5, name
    if "lm_loss" in records(alone)[0]:
        assert furthest(out, alone, "lm_loss", least=LEAST) <= 1e-5
    assert furthest(out, alone, "explained_variance", "evaluation", LEAST) <= 1e-4


def chosen(out: str) -> dict[str, object]:
    record: dict[str, object] = json.loads((Path(out) / "run.json").read_text())["chosen"]
    return record


def test_two_ranks_that_cut_rollouts_give_the_loss_curve_of_one(alone, tmp_path):
    ours = alone.replace(out=str(tmp_path / "two"), sequence_parallel=2)
    assert [end["status"] for end in on_ranks(2, ranks.fit_run, ours)] == ["finished", "finished"]
    assert_same_curve(ours.run.out, alone.run.out)
    assert chosen(ours.run.out)["sequence_parallel"] == 2
    (mine, _), (theirs, _) = (newest_checkpoint(Path(out) / "checkpoints") for out in (ours.run.out, alone.run.out))
    assert {p.name for p in mine.iterdir()} == {p.name for p in theirs.iterdir()}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if i else []) for i, name in enumerate(VARIANTS)]
)
def test_whatever_is_trained_the_curve_is_that_of_one_process(folder, name, tmp_path):
    changes = VARIANTS[name]
    if changes.keys() & {"train", "model"}:
        changes = changes | {"model": str(folder / "base")}
    one = run_alone(settings_of(folder, out=str(tmp_path / "one"), **changes))
    ours = one.replace(out=str(tmp_path / "two"), sequence_parallel=2)
    assert [end["status"] for end in on_ranks(2, ranks.fit_run, ours)] == ["finished", "finished"]
    assert_same_curve(ours.run.out, one.run.out)
    if "head_init" in changes:
        (mine,), (theirs,) = (records(out, "exact_head") for out in (ours.run.out, one.run.out))
        assert mine["explained_variance"] == pytest.approx(theirs["explained_variance"], rel=1e-4)


@pytest.mark.slow
def test_a_run_on_4_x_1_goes_on_as_2_x_2_and_as_one_process(alone, tmp_path):
    ours = alone.replace(out=str(tmp_path / "many"), sequence_parallel=1)
    ended = on_ranks(4, ranks.fit_run, ours, stop_at=(3, 2))
    assert [(end["status"], end["step"]) for end in ended] == [("interrupted", 2)] * 4
    ended = on_ranks(4, ranks.fit_run, ours.replace(sequence_parallel=2), stop_at=(1, 4))
    assert [(end["status"], end["step"]) for end in ended] == [("interrupted", 4)] * 4
    run_alone(ours)
    assert_same_curve(ours.run.out, alone.run.out)


def one_long_rollout(folder: Path) -> FitSettings:
    """A run on one process, done: one rollout of 96 tokens among short ones, which goes alone, since 60 go at once."""
    draw = np.random.default_rng(0)
    sequences = [draw.integers(1, 128, length).astype(np.int32) for length in (96, *range(10, 20))]
    write_shard(folder / "data" / "a.parquet", rollouts_of(sequences, [5] * len(sequences)))
    return run_alone(settings_of(folder, val_fraction=0.0, batch_size=4))


def test_a_rollout_beyond_the_budget_of_a_rank_is_cut_without_being_asked_for(tmp_path):
    one = one_long_rollout(tmp_path)
    ours = one.replace(out=str(tmp_path / "two"))
    (ended, _) = on_ranks(2, ranks.told_run, ours)
    assert [told for told in ended["told"] if "sequence" in told] == [
        "--sequence-parallel 2: the longest rollout has 96 tokens, and one rank takes 60 at once"
    ]
    assert chosen(ours.run.out)["sequence_parallel"] == 2
    for name in FIGURES:
        assert furthest(ours.run.out, one.run.out, name, least=LEAST) <= 1e-5, name


@pytest.mark.slow
def test_what_chose_itself_is_kept_where_it_divides_the_ranks_and_chosen_anew_elsewhere(tmp_path):
    one = one_long_rollout(tmp_path)
    ours = one.replace(out=str(tmp_path / "ranks"))
    for size, step, expected in ((2, 2, 2), (2, 3, 2), (4, 4, 2), (3, 5, 3)):
        ended = on_ranks(size, ranks.fit_run, ours, stop_at=(0, step))
        assert {end["status"] for end in ended} == {"interrupted"}
        assert chosen(ours.run.out)["sequence_parallel"] == expected
        reason = json.loads((Path(ours.run.out) / "run.json").read_text())["recipe"]["sequence_parallel"]
        assert (reason["value"], "the longest rollout has 96 tokens" in reason["reason"]) == (expected, True)
    run_alone(ours)
    assert chosen(ours.run.out)["sequence_parallel"] == 1
    for name in FIGURES:
        assert furthest(ours.run.out, one.run.out, name, least=LEAST) <= 1e-5, name


def test_a_judgement_of_rollouts_that_are_cut_is_that_of_one_process(alone, folder):
    trained, _ = newest_checkpoint(Path(alone.run.out) / "checkpoints")
    settings = EvalSettings(data=[str(folder / "data")], model=[str(trained)], device="cpu")
    judged = list(evaluate(settings, StopRequest()))[-1]
    ended = on_ranks(2, ranks.eval_run, settings.replace(sequence_parallel=2, max_tokens=20))
    ours, theirs = (figures_of(result) for result in (ended[0]["result"], judged.result))
    for name in ("explained_variance", "mse", "pearson", "value_loss"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-5), name


def figures_of(result: dict[str, object]) -> dict[str, float]:
    """The figures of the only critic of a judgement."""
    (figures,) = result["critics"].values()  # type: ignore[attr-defined]
    return figures  # type: ignore[no-any-return]
