"""The exact value head against scikit-learn's Ridge, and the runs that start from it."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ranks
import torch
from rank_work import critic_of
from ranks import on_ranks
from safetensors.torch import load_file
from sklearn.linear_model import Ridge
from support import StopAfter, branching_rollouts, readable_rollouts, records, small_config, write_shard
from transformers import AutoModelForCausalLM

from critic_train.errors import ConfigError
from critic_train.events import CheckpointSaved, EvaluationEnded, Notice, RunEnded, StepEnded
from critic_train.model.compute import Compute
from critic_train.model.selfcheck import use_stock_attention
from critic_train.rollouts import Rollouts
from critic_train.run.checkpoint import checkpoints
from critic_train.settings import FitSettings
from critic_train.stopping import StopRequest
from critic_train.training import frozen_cache
from critic_train.training.dry_run import dry_run
from critic_train.training.exact_head import (
    STRENGTHS,
    _heads,
    second_moments,
    solve_ridge,
)
from critic_train.training.fit import fit

ONE = Compute(device=torch.device("cpu"), precision="fp32", max_tokens=70)


def states_of(rollouts: Rollouts) -> np.ndarray:
    """float64 [T, 64]: the state that each response token's value is read from, one rollout at a time; 0 elsewhere."""
    critic, states = critic_of("Llama"), np.zeros((len(rollouts.input_ids), 64))
    use_stock_attention(critic)
    for start, stop in zip(rollouts.offsets[:-1], rollouts.offsets[1:], strict=True):
        ids = torch.from_numpy(rollouts.input_ids[start:stop].astype(np.int64))[None]
        with torch.no_grad():
            hidden = critic.trunk(input_ids=ids).last_hidden_state[0].double().numpy()
        states[start + 1 : stop] = hidden[:-1]
    return states


@pytest.mark.parametrize(("forest", "max_tokens"), [(True, 40), (True, 4000), (False, 90)])
def test_the_head_is_that_of_scikit_learn_however_it_is_packed(forest, max_tokens):
    rollouts = branching_rollouts()
    weights = np.random.default_rng(0).uniform(0.5, 2.0, len(rollouts))
    critic = critic_of("Llama")
    if not forest:
        use_stock_attention(critic)
    moments = second_moments(
        critic,
        rollouts,
        np.repeat(weights, rollouts.lengths),
        replace(ONE, max_tokens=max_tokens),
        forest=forest,
        stop=StopRequest(),
    )
    mask, of_token = rollouts.response_mask, np.repeat(weights, rollouts.lengths)[rollouts.response_mask]
    states, returns = states_of(rollouts)[mask], rollouts.returns[mask].astype(np.float64)
    total = of_token.sum()
    np.testing.assert_allclose(moments[:-2, -2] / total, (of_token @ states) / total, atol=1e-6)
    # The strength is a share of the mean eigenvalue of the weighted covariance.
    centred = states - of_token @ states / total
    mean_eigenvalue = np.trace((centred * of_token[:, None]).T @ centred) / total / 64
    for strength in (0.01, 1.0):
        weight, bias = np.split(_heads(moments, [strength])[0].numpy(), [64])
        reference = Ridge(alpha=strength * mean_eigenvalue * total, solver="svd")
        reference.fit(states, returns, sample_weight=of_token)
        np.testing.assert_allclose(states @ weight + bias, reference.predict(states), atol=1e-6)


def test_cross_validation_is_what_refitting_gives():
    draw = np.random.default_rng(1)
    states = draw.normal(size=(400, 5)) * [1.0, 2.0, 0.5, 1.0, 3.0] + 7.0
    returns = states @ [0.3, -0.1, 0.0, 0.2, 0.0] + draw.normal(size=400)
    weights, fold = draw.uniform(0.5, 2.0, 400), draw.integers(0, 3, 400)
    columns = np.column_stack([states, np.ones(400), returns])
    moments = [
        torch.from_numpy((columns[fold == k] * weights[fold == k, None]).T @ columns[fold == k]) for k in range(3)
    ]
    errors = np.full((len(STRENGTHS) + 1, 400), np.nan)
    for k in range(3):
        kept, w = fold != k, weights[fold != k]
        mean = np.average(states[kept], axis=0, weights=w)
        eigenvalue = np.average((states[kept] - mean) ** 2, axis=0, weights=w).mean()
        for i, strength in enumerate(STRENGTHS):
            model = Ridge(alpha=strength * eigenvalue * w.sum(), solver="svd")
            model.fit(states[kept], returns[kept], sample_weight=w)
            errors[i, ~kept] = model.predict(states[~kept]) - returns[~kept]
        errors[-1, ~kept] = np.average(returns[kept], weights=w) - returns[~kept]
    squared = (errors**2 * weights).sum(1)
    best = int(squared.argmin())
    assert 0 < best < len(STRENGTHS), "the case is no test otherwise"

    def variance(numbers: np.ndarray) -> float:
        return float(np.average((numbers - np.average(numbers, weights=weights)) ** 2, weights=weights))

    found = solve_ridge(moments)
    assert found.strength == STRENGTHS[best]
    assert found.explained_variance == pytest.approx(1 - variance(errors[best]) / variance(returns), abs=1e-10)


def test_states_that_know_nothing_leave_the_mean():
    # What one fold teaches is wrong in the other.
    state = np.random.default_rng(2).normal(size=40)
    columns = np.column_stack([state, np.ones(40), 3.0 + np.where(np.arange(40) < 20, state, -state)])
    found = solve_ridge([torch.from_numpy(part.T @ part) for part in np.split(columns, 2)])
    assert found.strength == float("inf")
    assert not found.weight.any()
    assert found.bias == pytest.approx(columns[:, -1].mean())
    constant = np.column_stack([np.ones((6, 4)), np.ones(6), np.full(6, 2.0)])
    found = solve_ridge([torch.from_numpy(part.T @ part) for part in np.split(constant, 2)])
    assert not found.weight.any()
    assert (found.bias, found.explained_variance) == (pytest.approx(2.0), None)


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> FitSettings:
    folder = tmp_path_factory.mktemp("exact")
    write_shard(folder / "data" / "a.parquet", readable_rollouts(24, seed=1))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = small_config("Llama", num_hidden_layers=2)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / "base")
    return FitSettings(
        data=[str(folder / "data")],
        out=str(folder / "unused"),
        model=str(folder / "base"),
        batch_size=16,
        max_tokens=120,
        no_clip=True,
        no_report=True,
        device="cpu",
    )


def head_of(out: Path, step: int = 0) -> torch.Tensor:
    tensors = load_file(out / "checkpoints" / f"step-{step:08d}" / "model.safetensors")
    return torch.cat([tensors["score.weight"][0], tensors["score.bias"]])


def test_train_head_is_the_exact_head_in_one_pass(settings, tmp_path):
    events = list(fit(settings.replace(out=str(tmp_path / "run"), train="head"), StopRequest()))
    kinds = [type(e) for e in events if isinstance(e, EvaluationEnded | CheckpointSaved | StepEnded | RunEnded)]
    assert kinds == [EvaluationEnded, CheckpointSaved, RunEnded]
    result = events[-1].result
    assert (result["status"], result["steps"], result["best_step"]) == ("finished", 0, 0)
    solved = result["exact_head"]
    assert min(solved["explained_variance"], result["explained_variance"]) > 0.5
    assert [r["event"] for r in records(tmp_path / "run")] == ["exact_head", "evaluation"]
    said = [e.message for e in events if isinstance(e, Notice)]
    assert any(f"explained variance {solved['explained_variance']:.3f} in 5-fold" in line for line in said)
    recipe = json.loads((tmp_path / "run" / "run.json").read_text())["recipe"]
    assert (recipe["head_init"]["value"], recipe["epochs"]["value"]) == ("exact", 0)

    again = list(fit(settings.replace(out=str(tmp_path / "run"), train="head"), StopRequest()))
    assert again[-1].status == "already finished"


def test_without_a_step_no_state_is_written(settings, tmp_path, monkeypatch):
    """Every state is needed once: to solve the head, or to judge it on held-out rollouts."""
    made: list[str] = []
    monkeypatch.setattr(frozen_cache.StatesWriter, "__enter__", lambda self: made.append("states"))
    changed = {"train": "head", "val_fraction": 0.2}
    events = list(fit(settings.replace(out=str(tmp_path / "run"), **changed), StopRequest()))
    assert events[-1].status == "finished"
    assert not made
    estimate = list(dry_run(settings.replace(**changed), tmp_path / "none", StopRequest()))[-1].result
    assert (estimate["disk"]["states"], estimate["seconds"]["keeping_states"], made) == (0, 0.0, [])
    assert estimate["seconds"]["solving_head"] > 0
    monkeypatch.undo()
    stepped = list(dry_run(settings.replace(epochs=1, **changed), tmp_path / "none", StopRequest()))[-1].result
    assert stepped["disk"]["states"] > 0


def test_fine_tuning_starts_from_the_exact_head(settings, tmp_path):
    exact = settings.replace(out=str(tmp_path / "head"), train="head")
    list(fit(exact, StopRequest()))
    for train in ("full", "last-1"):
        out = tmp_path / train
        events = list(fit(settings.replace(out=str(out), train=train, max_steps=3, lr=1e-5), StopRequest()))
        first = next(e for e in events if isinstance(e, EvaluationEnded))
        assert (first.step, first.best) == (0, True)
        assert first.metrics["explained_variance"] > 0.5
        torch.testing.assert_close(head_of(out, 3), head_of(tmp_path / "head"), rtol=1e-3, atol=1e-4)
        resolved = json.loads((out / "run.json").read_text())["resolved"]
        assert resolved["head_lr"] == resolved["lr"] == 1e-5, "a solved head takes no larger steps than the trunk"
    mean = tmp_path / "mean"
    list(fit(settings.replace(out=str(mean), head_init="mean", max_steps=1), StopRequest()))
    evaluation = records(mean)[0]
    assert (evaluation["event"], evaluation["step"]) == ("evaluation", 0)
    assert evaluation["explained_variance"] == pytest.approx(0.0, abs=1e-6)


def test_a_resumed_run_does_not_solve_again(settings, tmp_path):
    changed = {"train": "last-1", "max_steps": 6, "lr": 1e-3, "checkpoint_every": 2}
    list(fit(settings.replace(out=str(tmp_path / "whole"), **changed), StopRequest()))
    stopped = tmp_path / "stopped"
    for looks in (20, 31, 37, 60):
        events = list(fit(settings.replace(out=str(stopped), **changed), StopAfter(looks=looks)))
        if events[-1].status == "finished":
            break
    events = list(fit(settings.replace(out=str(stopped), **changed), StopRequest()))
    assert not [e for e in events if isinstance(e, Notice) and "solved by ridge" in e.message]
    assert records(stopped) == records(tmp_path / "whole")
    newest = [checkpoints(tmp_path / name / "checkpoints")[-1] / "model.safetensors" for name in ("whole", "stopped")]
    assert newest[0].read_bytes() == newest[1].read_bytes()


def test_a_head_that_exists_is_kept_unless_asked(settings, tmp_path):
    list(fit(settings.replace(out=str(tmp_path / "first"), max_steps=2, head_init="mean"), StopRequest()))
    critic = str(tmp_path / "first" / "checkpoints" / "step-00000002")
    kept = settings.replace(out=str(tmp_path / "kept"), model=critic, max_steps=1, lr=0.0, head_lr=0.0)
    list(fit(kept, StopRequest()))
    torch.testing.assert_close(head_of(tmp_path / "kept", 1), head_of(tmp_path / "first", 2), rtol=0, atol=0)
    events = list(fit(kept.replace(out=str(tmp_path / "anew"), head_init="exact"), StopRequest()))
    assert events[-1].result["exact_head"]["explained_variance"] > 0.5


def test_no_epochs_without_the_exact_head_are_refused(settings, tmp_path):
    with pytest.raises(ConfigError, match="--epochs 0 trains nothing"):
        list(fit(settings.replace(out=str(tmp_path / "run"), epochs=0, head_init="mean"), StopRequest()))
    with pytest.raises(ConfigError, match="--head-init exact needs --model"):
        FitSettings(data=["none"], head_init="exact")


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_ranks_sum_their_parts(size, settings, tmp_path):
    list(fit(settings.replace(out=str(tmp_path / "alone"), train="head"), StopRequest()))
    answers = on_ranks(size, ranks.fit_run, settings.replace(out=str(tmp_path / "ranks"), train="head"))
    assert all("fault" not in answer for answer in answers), answers
    torch.testing.assert_close(head_of(tmp_path / "ranks"), head_of(tmp_path / "alone"), rtol=1e-4, atol=1e-5)
    one, several = records(tmp_path / "alone")[0], records(tmp_path / "ranks")[0]
    assert one["explained_variance"] == pytest.approx(several["explained_variance"], abs=1e-6)
