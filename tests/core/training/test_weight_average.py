"""The average of the weights: its formula, what is judged and saved by it, and a resumed run with it, to the bit."""

from signal import SIGTERM

import numpy as np
import pytest
import ranks
import torch
from rank_work import critic_of
from ranks import on_ranks
from safetensors.torch import load_file
from support import newest, readable_rollouts, records, small_config, write_shard
from transformers import AutoModelForCausalLM

from critic_train.errors import ConfigError, ModelError
from critic_train.events import StepEnded
from critic_train.inference import load_critic
from critic_train.settings import FitSettings
from critic_train.stopping import StopRequest
from critic_train.training.dry_run import dry_run
from critic_train.training.fit import fit
from critic_train.training.weight_average import WEIGHTS_FILE, WeightAverage

FILES = ("model.safetensors", "optimizer.safetensors", WEIGHTS_FILE)


def test_its_formula(monkeypatch):
    monkeypatch.setattr("critic_train.training.weight_average.PIECE", 100)  # rows are exchanged in several parts
    critic = critic_of("Llama")
    frozen = critic.trunk.embed_tokens.weight.requires_grad_(False)
    before = frozen.clone()
    average, draw = WeightAverage(critic, 0.5), torch.Generator().manual_seed(0)
    with average.in_place():
        assert torch.equal(frozen, before), "before the first step the critic is what it is"
    trained = {name: p for name, p in critic.named_parameters() if p.requires_grad}
    expected: dict[str, np.ndarray] = {}
    for step in range(1, 21):
        for name, parameter in trained.items():
            parameter.data += torch.randn(parameter.shape, generator=draw)
            now, decay = parameter.detach().double().numpy().copy(), min(0.5, (1 + step) / (10 + step))
            expected[name] = now if step == 1 else decay * expected[name] + (1 - decay) * now
        average.update(step)
    after = {name: p.detach().clone() for name, p in trained.items()}
    with average.in_place(), average.in_place():
        for name, parameter in trained.items():
            np.testing.assert_allclose(parameter.detach().numpy(), expected[name], rtol=1e-5, atol=1e-5)
        assert torch.equal(frozen, before)
    assert all(torch.equal(p, after[name]) for name, p in trained.items())


def test_what_training_goes_on_with_is_saved_also_while_the_average_is_in_place(tmp_path):
    """As where memory runs out in an evaluation."""
    critic = critic_of("Llama")
    average = WeightAverage(critic, 0.9)
    average.update(1)
    with torch.no_grad():
        critic.head.weight += 1.0
    average.update(2)
    found = critic.head.weight.detach().clone()
    with average.in_place():
        assert not torch.equal(critic.head.weight, found)
        average.save_weights(tmp_path)
    assert torch.equal(load_file(tmp_path / WEIGHTS_FILE)["head.weight"], found)
    (other := critic_of("Llama")).head = torch.nn.Linear(3, 1)
    with pytest.raises(ModelError, match=r"head.weight does not fit this model"):
        WeightAverage(other, 0.9).load(tmp_path)


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> FitSettings:
    folder = tmp_path_factory.mktemp("average")
    write_shard(folder / "data" / "a.parquet", readable_rollouts(16, seed=1))
    return FitSettings(
        data=[str(folder / "data")],
        out=str(folder / "unused"),
        preset="tiny",
        batch_size=16,
        max_tokens=120,
        max_steps=6,
        eval_every=2,
        checkpoint_every=2,
        ema_decay=0.9,
        lr=3e-3,
        no_report=True,
        device="cpu",
    )


def test_what_is_judged_is_what_is_saved_and_training_does_not_change(settings, tmp_path):
    settings = settings.replace(val_data=settings.reading.data)
    for name, decay in (("averaged", 0.9), ("plain", 0.0)):
        list(fit(settings.replace(out=str(tmp_path / name), ema_decay=decay), StopRequest()))
    averaged, plain = records(tmp_path / "averaged"), records(tmp_path / "plain")
    assert [r for r in averaged if r["event"] == "step"] == [r for r in plain if r["event"] == "step"]
    assert averaged[-1] != plain[-1]
    rollouts = readable_rollouts(16, seed=1)
    rows = np.split(rollouts.input_ids, rollouts.offsets[1:-1])
    masks = np.split(rollouts.response_mask, rollouts.offsets[1:-1])
    critic = load_critic(str(newest(tmp_path / "averaged")), device="cpu")
    values = np.concatenate(critic.values([row.tolist() for row in rows], [int(m.argmax()) for m in masks]))
    errors = rollouts.returns[rollouts.response_mask] - values
    explained = 1 - errors.var() / rollouts.returns[rollouts.response_mask].var()
    assert averaged[-1]["explained_variance"] == pytest.approx(explained, abs=1e-4)
    own, kept = (load_file(newest(tmp_path / name) / "model.safetensors") for name in ("plain", "averaged"))
    goes_on = load_file(newest(tmp_path / "averaged") / WEIGHTS_FILE)
    assert torch.equal(goes_on["head.weight"], own["score.weight"])
    assert not torch.equal(kept["score.weight"], own["score.weight"])
    assert not (newest(tmp_path / "plain") / WEIGHTS_FILE).exists()


MANNERS = [
    {"lm_loss_weight": 1.0},
    {"train": "last-1", "head_init": "exact"},
    {"train": "lora"},
    {"optimizer": "adamw-8bit", "packing": "rows", "precision": "bf16"},
]


@pytest.mark.parametrize("manner", MANNERS, ids=lambda manner: "-".join(map(str, manner.values())))
def test_a_stopped_run_ends_bit_for_bit_as_the_undisturbed(manner, settings, tmp_path):
    if manner.get("train") == "lora":
        pytest.importorskip("peft")
    if "optimizer" in manner:
        pytest.importorskip("bitsandbytes")
    if "train" in manner:
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(small_config("Llama")).save_pretrained(tmp_path / "base")
        manner = manner | {"model": str(tmp_path / "base"), "preset": None}
    settings = settings.replace(**manner)
    list(fit(settings.replace(out=str(tmp_path / "whole")), StopRequest()))
    stopped = settings.replace(out=str(tmp_path / "stopped"))
    for at in (1, 3):  # before the average is more than the weights, and between two evaluations
        stop = StopRequest()
        for event in fit(stopped, stop):
            if isinstance(event, StepEnded) and event.step == at:
                stop.signal_number = SIGTERM
        assert records(tmp_path / "stopped")[-1]["step"] == at
    list(fit(stopped, StopRequest()))
    assert records(tmp_path / "stopped") == records(tmp_path / "whole")
    for name in FILES:
        found, expected = ((newest(tmp_path / run) / name).read_bytes() for run in ("stopped", "whole"))
        assert found == expected, name


def test_ranks_keep_parts_of_it(settings, tmp_path):
    settings = settings.replace(max_steps=4, val_fraction=0.0)
    list(fit(settings.replace(out=str(tmp_path / "alone")), StopRequest()))
    on_ranks(2, ranks.fit_run, settings.replace(out=str(tmp_path / "ranks")), stop_at=(0, 3))
    answers = on_ranks(3, ranks.fit_run, settings.replace(out=str(tmp_path / "ranks")))
    assert [answer["status"] for answer in answers] == ["finished"] * 3
    for name in FILES:
        found, expected = (load_file(newest(tmp_path / run) / name) for run in ("ranks", "alone"))
        assert found.keys() == expected.keys()
        if name != "optimizer.safetensors":
            for tensor in found:
                torch.testing.assert_close(found[tensor], expected[tensor], rtol=1e-3, atol=1e-4)


def test_its_memory_and_disk_are_reckoned_with(settings, tmp_path):
    with_it, without = (
        list(dry_run(settings.replace(ema_decay=decay), tmp_path, StopRequest()))[-1].result for decay in (0.9, 0.0)
    )
    size = 4 * with_it["trained_parameters"]
    assert (with_it["memory"]["average"], without["memory"]["average"]) == (size, 0)
    assert with_it["disk"]["checkpoint"] - without["disk"]["checkpoint"] == size


def test_a_decay_that_is_none(settings):
    for decay in (-0.1, 1.0):
        with pytest.raises(ConfigError, match="--ema-decay must be from 0 to below 1"):
            settings.replace(ema_decay=decay)
