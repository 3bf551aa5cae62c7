"""Runs with a next-token loss: its gradient, its head in checkpoints, and its place among the other ways to train."""

from dataclasses import replace
from pathlib import Path
from signal import SIGTERM

import numpy as np
import pytest
import ranks
import torch
import torch.nn.functional as F
from rank_work import ONE, critic_of
from ranks import on_ranks
from safetensors.torch import load_file
from support import branching_rollouts, newest, readable_rollouts, records, small_config, write_shard
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

from critic_train.errors import ConfigError
from critic_train.events import Notice, StepEnded
from critic_train.model.selfcheck import use_stock_attention
from critic_train.settings import FitSettings
from critic_train.stopping import StopRequest
from critic_train.training.fit import fit
from critic_train.training.next_token_loss import HEAD_FILE, add_next_token_head, tokens_ahead
from critic_train.training.train_step import LossRecipe, accumulate_gradient


@pytest.mark.parametrize(
    ("forest", "max_tokens", "ahead"), [(True, 40, 1), (True, 4000, 1), (False, 90, 1), (True, 40, 4), (False, 90, 4)]
)
def test_the_gradient_is_that_of_every_rollout_alone(forest, max_tokens, ahead):
    rollouts = branching_rollouts()
    critic = critic_of("Llama")
    ids = np.unique(rollouts.input_ids[rollouts.response_mask]).astype(np.int64)
    add_next_token_head(critic, ids, ONE, source=None, checkpoint=None, seed=0)
    if not forest:
        use_stock_attention(critic)
    recipe = LossRecipe(
        cliprange_value=None,
        mode="seq-mean-token-mean",
        scale_factor=None,
        lm_loss_weight=0.7,
        lm_loss_ahead=ahead,
    )
    compute = replace(ONE, max_tokens=max_tokens)
    result = accumulate_gradient(critic, rollouts, recipe, compute, forest=forest, stop=StopRequest())

    alone = critic_of("Llama")
    use_stock_attention(alone)
    head = critic.next_token_head.weight.detach().clone().requires_grad_(True)
    value_loss = lm_loss = 0.0
    for start, stop in zip(rollouts.offsets[:-1], rollouts.offsets[1:], strict=True):
        tokens = torch.from_numpy(rollouts.input_ids[start:stop].astype(np.int64))
        mask = torch.from_numpy(rollouts.response_mask[start + 1 : stop])
        states = alone.trunk(input_ids=tokens[None]).last_hidden_state[0, :-1][mask]
        labels = torch.searchsorted(torch.from_numpy(ids), tokens[1:][mask])
        returns = torch.from_numpy(rollouts.returns[start + 1 : stop])[mask]
        value_loss = value_loss + 0.5 * (alone.head(states) - returns).square().mean() / len(rollouts)
        for place, state in enumerate(states):
            following = labels[place : place + ahead]
            each = F.cross_entropy((state @ head.T).expand(len(following), -1), following)
            lm_loss = lm_loss + each / len(states) / len(rollouts)
    (value_loss + 0.7 * lm_loss).backward()
    assert result.value_loss == pytest.approx(value_loss.item(), rel=1e-5)
    assert result.lm_loss == pytest.approx(lm_loss.item(), rel=1e-5)
    expected = {name: p.grad for name, p in alone.named_parameters()} | {"next_token_head.weight": head.grad}
    for name, parameter in critic.named_parameters():
        assert (parameter.grad - expected[name]).norm() < 2e-5 * expected[name].norm(), name


@pytest.mark.parametrize("ahead", [1, 3, 100])
def test_a_state_predicts_the_response_tokens_of_its_rollout_that_follow(ahead):
    rollouts = branching_rollouts()  # with gaps in their masks
    tokens = np.flatnonzero(rollouts.response_mask)[::3]
    expected = []
    for place, token in enumerate(tokens.tolist()):
        end = rollouts.offsets[rollouts.offsets > token][0]
        following = [other for other in range(token, end) if rollouts.response_mask[other]][:ahead]
        expected += [(place, other, pytest.approx(1 / len(following))) for other in following]
    found = tokens_ahead(rollouts, tokens, ahead)
    assert list(zip(*(array.tolist() for array in found), strict=True)) == expected
    assert not any(len(array) for array in tokens_ahead(rollouts, tokens[:0], ahead)), "a rank may have none"


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> FitSettings:
    folder = tmp_path_factory.mktemp("next-token")
    write_shard(folder / "data" / "a.parquet", readable_rollouts(16, seed=1))
    return FitSettings(
        data=[str(folder / "data")],
        out=str(folder / "unused"),
        preset="tiny",
        batch_size=16,
        max_tokens=120,
        max_steps=6,
        checkpoint_every=2,
        lm_loss_weight=1.0,
        no_report=True,
        device="cpu",
    )


def base_of(folder: Path, **changes: object) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(small_config("Llama", **changes)).save_pretrained(folder)
    return folder


def response_ids(settings: FitSettings) -> np.ndarray:
    """Of the run's training rollouts; all of them with --val-fraction 0."""
    rollouts = readable_rollouts(16, seed=1)
    assert settings.reading.val_fraction == 0
    return np.unique(rollouts.input_ids[rollouts.response_mask])


MANNERS = [
    {},
    {"activation_checkpointing": "layer"},
    {"packing": "rows", "precision": "bf16"},
    {"train": "last-1"},
    {"train": "lora"},
    {"optimizer": "adamw-8bit"},
]


@pytest.mark.parametrize("manner", MANNERS, ids=lambda manner: "-".join(map(str, manner.values())) or "full")
def test_a_stopped_run_ends_bit_for_bit_as_the_undisturbed(manner, settings, tmp_path):
    if manner.get("train") == "lora":
        pytest.importorskip("peft")
    if "optimizer" in manner:
        pytest.importorskip("bitsandbytes")
    if "train" in manner:
        manner = manner | {"model": str(base_of(tmp_path / "base"))}
    settings = settings.replace(**manner, val_fraction=0.0)
    list(fit(settings.replace(out=str(tmp_path / "whole")), StopRequest()))
    losses = [record["lm_loss"] for record in records(tmp_path / "whole") if record["event"] == "step"]
    assert losses[-1] < losses[0]
    stopped = settings.replace(out=str(tmp_path / "stopped"))
    stop = StopRequest()
    for event in fit(stopped, stop):
        if isinstance(event, StepEnded) and event.step == 3:
            stop.signal_number = SIGTERM
    assert records(tmp_path / "stopped")[-1]["step"] == 3
    list(fit(stopped, StopRequest()))
    assert records(tmp_path / "stopped") == records(tmp_path / "whole")
    for name in ("model.safetensors", "optimizer.safetensors", HEAD_FILE):
        found, expected = ((newest(tmp_path / run) / name).read_bytes() for run in ("stopped", "whole"))
        assert found == expected, name
    head = load_file(newest(tmp_path / "whole") / HEAD_FILE)
    assert np.array_equal(head["ids"].numpy(), response_ids(settings))


def test_the_exported_critic_has_no_part_of_it(settings, tmp_path):
    list(fit(settings.replace(out=str(tmp_path / "run"), max_steps=1), StopRequest()))
    _, report = AutoModelForTokenClassification.from_pretrained(newest(tmp_path / "run"), output_loading_info=True)
    assert not report["unexpected_keys"]
    assert not report["missing_keys"]


@pytest.mark.parametrize("tied", [True, False])
def test_it_starts_as_the_models_own_head(tied, settings, tmp_path):
    base = base_of(tmp_path / "base", tie_word_embeddings=tied)
    run = settings.replace(out=str(tmp_path / "run"), model=str(base), max_steps=1, lr=0.0, val_fraction=0.0)
    events = list(fit(run, StopRequest()))
    name = "model.embed_tokens.weight" if tied else "lm_head.weight"
    assert any(f"starts as {name} of" in e.message for e in events if isinstance(e, Notice))
    own = AutoModelForCausalLM.from_pretrained(base).get_output_embeddings().weight
    found = load_file(newest(tmp_path / "run") / HEAD_FILE)
    torch.testing.assert_close(found["weight"], own[found["ids"]].detach(), rtol=0, atol=0)


def test_without_it_nothing_changes(settings, tmp_path):
    list(fit(settings.replace(out=str(tmp_path / "run"), lm_loss_weight=0.0, max_steps=2), StopRequest()))
    assert not (newest(tmp_path / "run") / HEAD_FILE).exists()
    assert all("lm_loss" not in record for record in records(tmp_path / "run"))


def test_a_frozen_trunk_learns_nothing_from_it():
    with pytest.raises(ConfigError, match="--lm-loss-weight teaches the transformer"):
        FitSettings(data=["none"], model="m", train="head", lm_loss_weight=1.0)


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_ranks_share_it(size, settings, tmp_path):
    settings = settings.replace(max_steps=4, val_fraction=0.0)
    list(fit(settings.replace(out=str(tmp_path / "alone")), StopRequest()))
    answers = on_ranks(size, ranks.fit_run, settings.replace(out=str(tmp_path / "ranks")), stop_at=(0, 3))
    answers = on_ranks(size, ranks.fit_run, settings.replace(out=str(tmp_path / "ranks")))
    assert [answer["status"] for answer in answers] == ["finished"] * size
    curves = [[r["lm_loss"] for r in records(tmp_path / name) if r["event"] == "step"] for name in ("alone", "ranks")]
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)
    found, expected = (load_file(newest(tmp_path / name) / HEAD_FILE) for name in ("ranks", "alone"))
    torch.testing.assert_close(found["weight"], expected["weight"], rtol=1e-3, atol=1e-4)
