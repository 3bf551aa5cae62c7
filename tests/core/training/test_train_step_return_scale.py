"""Returns of any scale train alike, and a checkpoint's values are in the unit of the returns.

The yardstick of a step is the standardised critic written out: transformers' own classifier, whose head is divided by
the scale, trained by torch's AdamW on standardised returns and multiplied by the scale again.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hidden_chain import make_chain, rollouts_of
from support import branching_rollouts, small_config, write_shard
from transformers import AutoModelForTokenClassification

from critic_train.data.rollout_cache import RolloutCache, write_cache
from critic_train.events import Event, Notice, RunEnded, StepEnded
from critic_train.model.compute import Compute
from critic_train.rollouts import Rollouts
from critic_train.settings import FitSettings
from critic_train.stopping import StopRequest
from critic_train.training.dataset import RolloutSet
from critic_train.training.fit import fit
from critic_train.training.optimizer import build_optimizer, set_learning_rates
from critic_train.training.train_step import LossRecipe, accumulate_gradient, clip_gradient
from critic_train.weights.loading import build_critic
from critic_train.weights.saving import save_critic

CPU = Compute(device=torch.device("cpu"), precision="fp32", max_tokens=10_000)
EPS, GRAD_CLIP, LR, HEAD_LR, STEPS = 0.5, 1.0, 1e-3, 3e-3, 4


def values_alone(model: torch.nn.Module, rollouts: Rollouts) -> torch.Tensor:
    """float32 [M]: of the response tokens, one rollout at a time, with transformers alone."""
    found = []
    for start, stop in zip(rollouts.offsets[:-1].tolist(), rollouts.offsets[1:].tolist(), strict=True):
        ids = torch.from_numpy(rollouts.input_ids[start:stop].astype(np.int64))
        logits = model(input_ids=ids[None]).logits[0, :, 0]
        found.append(torch.cat([torch.zeros(1), logits[:-1]]))
    return torch.cat(found)[torch.from_numpy(rollouts.response_mask)]


@pytest.mark.parametrize(("unit", "shift"), [(1000.0, 0.0), (0.001, 0.0), (1.0, 50.0), (40.0, -300.0)])
def test_steps_are_those_of_a_critic_that_is_standardised_by_hand(unit, shift, tmp_path):
    plain = branching_rollouts()
    mask = torch.from_numpy(plain.response_mask)
    rollouts = replace(plain, returns=plain.returns * unit + shift, values=plain.values * unit + shift)
    spread = 2 * float(rollouts.returns[plain.response_mask].astype(np.float64).std())
    critic = build_critic(small_config("Llama"), seed=3)
    with torch.no_grad():  # a head that is not at 0, in the unit of the returns
        critic.head.weight.normal_(std=0.5 * unit, generator=torch.Generator().manual_seed(1))
        critic.head.bias.fill_(shift)
    save_critic(critic, tmp_path, None)

    reference = AutoModelForTokenClassification.from_pretrained(tmp_path).eval()
    head = list(reference.score.parameters())
    with torch.no_grad():
        reference.score.weight /= spread
        reference.score.bias.fill_(0.0)
    body = [p for name, p in reference.named_parameters() if not name.startswith("score.")]
    theirs = torch.optim.AdamW(
        [
            {"params": [p for p in body if p.ndim > 1], "lr": LR, "weight_decay": 0.01},
            {"params": [p for p in body if p.ndim == 1], "lr": LR, "weight_decay": 0.0},
            {"params": head, "lr": HEAD_LR, "weight_decay": 0.0},
        ]
    )
    target, old = ((torch.from_numpy(column)[mask] - shift) / spread for column in (rollouts.returns, rollouts.values))

    recipe = LossRecipe(cliprange_value=EPS * unit, mode="token-mean", scale_factor=None, return_scale=spread)
    ours = build_optimizer(critic, lr=LR, head_lr=HEAD_LR, weight_decay=0.01, return_scale=spread)
    for _ in range(STEPS):
        assert set_learning_rates(ours, 1.0) == LR
        result = accumulate_gradient(critic, rollouts, recipe, CPU, forest=True, stop=StopRequest())
        norm = clip_gradient(critic, GRAD_CLIP)
        ours.step()
        ours.zero_grad(set_to_none=True)

        value = values_alone(reference, rollouts)
        eps = EPS * unit / spread
        clipped = old + (value - old).clamp(-eps, eps)
        loss = 0.5 * torch.maximum((value - target) ** 2, (clipped - target) ** 2).mean()
        loss.backward()
        expected_norm = float(torch.nn.utils.clip_grad_norm_(reference.parameters(), GRAD_CLIP))
        theirs.step()
        theirs.zero_grad()
        assert expected_norm > GRAD_CLIP  # the clip of the norm takes part
        assert norm == pytest.approx(expected_norm, rel=1e-3)
        assert result.value_loss == pytest.approx(loss.item() * spread**2, rel=1e-3)
        outside = ((value - old).abs() > eps).float().mean().item()
        assert 0.05 < outside < 0.95  # and so does the clip of the values
        assert result.vpred_mean == pytest.approx(value.mean().item() * spread + shift, abs=1e-3 * spread)

    trained = dict(reference.model.named_parameters())
    for name, parameter in critic.trunk.named_parameters():
        assert torch.allclose(parameter, trained[name], atol=2e-5), name
    weight, bias = head
    assert torch.allclose(critic.head.weight / spread, weight, atol=2e-5)
    assert critic.head.bias.item() == pytest.approx(bias.item() * spread + shift, abs=1e-3 * spread)


def settings_for(data: Path, out: Path, **changes: object) -> FitSettings:
    defaults: dict[str, object] = {
        "data": [str(data)],
        "out": str(out),
        "preset": "tiny",
        "batch_size": 48,
        "epochs": 4,
        "eval_every": 20,
        "old_values": "none",
        "device": "cpu",
        "no_report": True,
    }
    return FitSettings(**(defaults | changes))  # type: ignore[arg-type]


def run(settings: FitSettings, stop_after: int | None = None) -> list[Event]:
    """Run to the end, or have it stop after a step."""
    stop, events = StopRequest(), list[Event]()
    for event in fit(settings, stop):
        events.append(event)
        if isinstance(event, StepEnded) and event.step == stop_after:
            stop.signal_number = 15
    return events


def shards_in_unit(folder: Path, unit: float, shift: float, groups: int) -> Path:
    """A world whose returns are 0 and 1, in another unit."""
    rollouts, _ = rollouts_of(make_chain(), groups, seed=3)
    assert rollouts.values is not None
    returns, values = (
        (column * unit + shift).astype(np.float32) * rollouts.response_mask
        for column in (rollouts.returns, rollouts.values)
    )
    write_shard(folder / "a.parquet", replace(rollouts, returns=returns, values=values))
    return folder


def records(out: Path, event: str) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


def test_returns_in_any_unit_are_learnt_as_well(tmp_path):
    units = {"plain": (1.0, 0.0), "thousands": (1000.0, 50_000.0), "thousandths": (0.001, 0.0)}
    for name, (unit, shift) in units.items():
        shards = shards_in_unit(tmp_path / "data" / name, unit, shift, groups=64)
        run(settings_for(shards, tmp_path / name, old_values="column", cliprange_value=0.5 * unit))
    plain_steps, plain_last = records(tmp_path / "plain", "step"), records(tmp_path / "plain", "evaluation")[-1]
    assert plain_last["explained_variance"] > 0.15
    for name, (unit, shift) in units.items():
        last = records(tmp_path / name, "evaluation")[-1]
        assert last["explained_variance"] == pytest.approx(plain_last["explained_variance"], abs=0.01), name
        assert last["mse"] == pytest.approx(plain_last["mse"] * unit**2, rel=0.02), name
        for mine, theirs in zip(records(tmp_path / name, "step"), plain_steps, strict=True):
            assert mine["value_loss"] == pytest.approx(theirs["value_loss"] * unit**2, rel=0.02)
            assert mine["vpred_mean"] == pytest.approx(theirs["vpred_mean"] * unit + shift, abs=0.02 * unit)
            assert mine["clipfrac"] == pytest.approx(theirs["clipfrac"], abs=0.02)
            assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=0.05)
            assert mine["lr"] == theirs["lr"]


def test_a_checkpoint_holds_plain_values_and_goes_on_to_the_bit(tmp_path):
    shards = shards_in_unit(tmp_path / "data", 200.0, -100.0, groups=16)
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    run(settings_for(shards, whole, max_steps=9, epochs=None))
    ended = run(settings_for(shards, resumed, max_steps=9, epochs=None), stop_after=4)[-1]
    assert isinstance(ended, RunEnded)
    assert ended.status == "interrupted"
    run(settings_for(shards, resumed, max_steps=9, epochs=None))
    last = "checkpoints/step-00000009"
    for name in ("model.safetensors", "optimizer.safetensors", "trainer.json"):
        assert (whole / last / name).read_bytes() == (resumed / last / name).read_bytes(), name
    assert (whole / "metrics.jsonl").read_bytes() == (resumed / "metrics.jsonl").read_bytes()

    rollouts, _ = rollouts_of(make_chain(), 16, seed=3)
    reference = AutoModelForTokenClassification.from_pretrained(whole / last).eval()
    with torch.no_grad():
        values = values_alone(reference, rollouts)
    # One group of 16 is held out; the mean value of the others is what the next step would log.
    assert values.mean().item() == pytest.approx(records(whole, "step")[-1]["vpred_mean"], abs=20)


def test_a_run_that_recorded_no_scale_goes_on_in_plain_units(tmp_path):
    shards = shards_in_unit(tmp_path / "data", 200.0, -100.0, groups=16)
    run(settings_for(shards, tmp_path / "run", max_steps=4, epochs=None), stop_after=2)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["resolved"].pop("return_scale") == pytest.approx(200, rel=0.1)
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    run(settings_for(shards, tmp_path / "run", max_steps=4, epochs=None))
    assert json.loads((tmp_path / "run" / "run.json").read_text())["resolved"]["return_scale"] == 1.0


def set_of(cache: RolloutCache, index: list[int]) -> RolloutSet:
    return RolloutSet(cache=cache, index=np.asarray(index), files=[], renames={})


def test_the_deviation_is_that_of_the_response_tokens(tmp_path):
    rollouts, _ = rollouts_of(make_chain(), 3, seed=1)
    tokens = np.arange(len(rollouts.input_ids), dtype=np.float32)
    cache = write_cache(tmp_path / "cache", [replace(rollouts, returns=tokens)])
    chosen = [0, 2, 7]
    mine = np.concatenate([tokens[rollouts.offsets[i] : rollouts.offsets[i + 1]][4:] for i in chosen])
    assert set_of(cache, chosen).return_deviation() == pytest.approx(mine.astype(float).std(), rel=1e-12)
    constant = write_cache(tmp_path / "same", [replace(rollouts, returns=np.full_like(tokens, 0.1))])
    assert set_of(constant, chosen).return_deviation() == 0.0


@pytest.mark.parametrize(
    ("unit", "changes", "said"),
    [
        (2000.0, {}, "--cliprange-value 0.5 is narrow for returns with a standard deviation of"),
        (0.001, {}, "--cliprange-value 0.5 is wide for returns with a standard deviation of"),
        (0.0, {}, "every return of the rollouts to train on is 3"),
        (1.0, {}, ""),
        (2000.0, {"no_clip": True}, ""),
        (2000.0, {"cliprange_value": 900.0}, ""),
    ],
)
def test_returns_that_the_clip_does_not_fit_are_told(unit, changes, said, tmp_path):
    shards = shards_in_unit(tmp_path / "data", unit, 3.0, groups=8)
    events = run(settings_for(shards, tmp_path / "run", max_steps=1, epochs=None, old_values="column", **changes))
    told = [e.message for e in events if isinstance(e, Notice) and e.level == "warning"]
    told = [message for message in told if message.startswith(("--cliprange-value", "every return"))]
    assert len(told) == (said != "")
    assert all(message.startswith(said) for message in told)
