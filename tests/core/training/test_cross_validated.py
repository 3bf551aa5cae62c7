"""What an exact head is worth on prompts it has not seen, against scikit-learn's Ridge refitted fold by fold."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ranks
import torch
from ranks import on_ranks
from sklearn.linear_model import Ridge
from support import readable_rollouts, small_config, write_shard
from transformers import AutoModel, AutoModelForCausalLM

from critic_train.events import Notice
from critic_train.jsonio import read_json_object
from critic_train.settings import FitSettings
from critic_train.stopping import StopRequest
from critic_train.training import cross_validated, exact_head
from critic_train.training.cross_validated import prompt_folds, shuffled_prompts
from critic_train.training.fit import fit

MADE = readable_rollouts(24, seed=1)
NOISE = np.repeat(np.random.default_rng(0).normal(size=len(MADE)).astype(np.float32), MADE.lengths)
ROLLOUTS = replace(MADE, returns=np.where(MADE.response_mask, MADE.returns + 0.3 * NOISE, 0.0).astype(np.float32))
"""Of which rollouts of one prompt differ in their returns."""


def test_folds_hold_prompts_together_however_they_are_named():
    groups, prompts = np.arange(12), np.repeat([5, 6, 7, 8, 9, 10], 2)
    order, what = shuffled_prompts(groups, prompts, seed=0)
    folds = prompt_folds(order)
    assert (what, set(folds)) == ("6 prompts", set(range(5)))
    assert (folds[::2] == folds[1::2]).all()
    order, what = shuffled_prompts(np.zeros(3, dtype=np.int64), np.zeros(3, dtype=np.int64), seed=0)
    folds = prompt_folds(order)
    assert (sorted(folds), what) == ([0, 1, 2], "3 rollouts of the only prompt")


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> FitSettings:
    folder = tmp_path_factory.mktemp("validated")
    write_shard(folder / "data" / "a.parquet", ROLLOUTS)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = small_config("Llama", num_hidden_layers=2)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / "base")
    return FitSettings(
        data=[str(folder / "data")],
        out=str(folder / "unused"),
        model=str(folder / "base"),
        train="head",
        max_tokens=120,
        val_fraction=0.0,
        no_report=True,
        device="cpu",
    )


def explained(values: np.ndarray, returns: np.ndarray, groups: np.ndarray | None = None) -> float:
    """1 - Var(G - V) / Var(G); with groups, about the mean of each."""
    groups = np.zeros(len(values), dtype=np.int64) if groups is None else groups

    def squares(numbers: np.ndarray) -> float:
        return float(sum(((part := numbers[groups == g]) - part.mean()) @ (part - part.mean()) for g in set(groups)))

    return 1 - squares(returns - values) / squares(returns)


def refitted(model: Path, strength: float, folds: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(cross-validated values, returns, prompt group) of all response tokens."""
    trunk = AutoModel.from_pretrained(model).eval()
    states = []
    for start, stop in zip(ROLLOUTS.offsets[:-1], ROLLOUTS.offsets[1:], strict=True):
        with torch.no_grad():
            ids = torch.from_numpy(ROLLOUTS.input_ids[start:stop].astype(np.int64))[None]
            hidden = trunk(input_ids=ids).last_hidden_state[0].double().numpy()
        states.append(np.concatenate([hidden[:1] * 0, hidden[:-1]]))
    mask = ROLLOUTS.response_mask
    x, returns = np.concatenate(states)[mask], ROLLOUTS.returns[mask].astype(np.float64)
    groups = np.repeat(ROLLOUTS.group, ROLLOUTS.lengths)[mask]
    fold, values = np.repeat(folds, ROLLOUTS.lengths)[mask], np.zeros(len(x))
    for k in range(5):
        others = x[fold != k]
        penalty = strength * others.var(0).mean() * len(others)
        values[fold == k] = Ridge(penalty, solver="svd").fit(others, returns[fold != k]).predict(x[fold == k])
    return values, returns, groups


def test_every_prompt_is_judged_by_a_head_that_has_not_seen_it(settings, tmp_path, monkeypatch):
    folds: list[np.ndarray] = []
    monkeypatch.setattr(exact_head, "prompt_folds", lambda order: folds.append(prompt_folds(order)) or folds[-1])
    events = list(fit(settings.replace(out=str(tmp_path / "run")), StopRequest()))
    solved = events[-1].result["exact_head"]
    found = solved["cross_validated"]
    values, returns, groups = refitted(Path(settings.model.model), solved["strength"], folds[0])
    assert (found["rollouts"], found["prompt_groups"]) == (len(ROLLOUTS), len(set(groups)))
    assert found["explained_variance"] == pytest.approx(explained(values, returns), abs=1e-5)
    assert found["explained_variance"] == pytest.approx(solved["explained_variance"], abs=1e-5)
    within = explained(values, returns, groups)
    assert found["explained_variance_within_group"] == pytest.approx(within, abs=1e-5)
    low, high = found["explained_variance_interval"]
    assert low < found["explained_variance"] < high
    assert found["fused"]["explained_variance"] is not None
    (said,) = [e.message for e in events if isinstance(e, Notice) and "have not seen them" in e.message]
    assert f"explained variance {found['explained_variance']:.3f} [{low:.3f}, {high:.3f}]" in said


def test_more_states_than_memory_is_given_leave_whole_prompts_out(settings, tmp_path, monkeypatch):
    one = 4 * 64 * ROLLOUTS.response_mask.sum() / 24
    monkeypatch.setattr(cross_validated, "KEPT_BYTES", 8 * one)
    ended = list(fit(settings.replace(out=str(tmp_path / "few")), StopRequest()))[-1].result["exact_head"]
    assert 4 <= ended["cross_validated"]["prompt_groups"] <= 12
    assert ended["cross_validated"]["rollouts"] == 4 * ended["cross_validated"]["prompt_groups"]
    monkeypatch.setattr(cross_validated, "KEPT_BYTES", 0)
    ended = list(fit(settings.replace(out=str(tmp_path / "none")), StopRequest()))[-1].result["exact_head"]
    assert ended["explained_variance"] > 0.5
    assert "cross_validated" not in ended


def test_ranks_tell_the_same(settings, tmp_path):
    found = []
    for size in (1, 2):
        out = tmp_path / str(size)
        if size == 1:
            list(fit(settings.replace(out=str(out)), StopRequest()))
        else:
            on_ranks(size, ranks.fit_run, settings.replace(out=str(out)))
        found.append(read_json_object(out / "result.json")["exact_head"]["cross_validated"])
    assert found[0]["fused"]["explained_variance"] == pytest.approx(found[1]["fused"]["explained_variance"], abs=1e-5)
    assert found[0]["explained_variance_interval"] == pytest.approx(found[1]["explained_variance_interval"], abs=1e-5)
