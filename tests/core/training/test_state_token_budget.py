"""Where memory ran out once, a run that goes on starts with what was enough."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support import StopAfter, readable_rollouts, write_shard

from critic_train.errors import MachineError
from critic_train.events import Event, Notice, RunEnded
from critic_train.model.critic import Critic
from critic_train.settings import FitSettings
from critic_train.stopping import StopRequest
from critic_train.training.fit import fit

ROOM = 200
"""Tokens that the device has memory for."""


@pytest.fixture
def passes(monkeypatch, request) -> Iterator[list[int]]:
    """A device that runs out above ROOM; the tokens of every pass through the model, those that failed too.

    Of tests of the self-check, which has passes without gradients; of the others, passes of training alone: the
    self-check tries as many positions as a mini-batch has, and does with fewer where they do not fit.
    """
    seen: list[int] = []
    training_only = "self_check" not in request.node.name
    whole = Critic.hidden

    def hidden(self, batch):
        if torch.is_grad_enabled() or not training_only:
            seen.append(batch.computed_tokens)
        if batch.computed_tokens > ROOM:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return whole(self, batch)

    monkeypatch.setattr(Critic, "hidden", hidden)
    return seen


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("rollouts")
    write_shard(folder / "a.parquet", readable_rollouts(16))
    return folder


def run(shards: Path, out: Path, stop: StopRequest | None = None, **more: object) -> list[Event]:
    settings = {"data": [str(shards)], "out": str(out), "preset": "tiny", "max_steps": 4, "batch_size": 32}
    settings |= {"device": "cpu", "val_fraction": 0.0, "no_report": True}
    return list(fit(FitSettings(**(settings | more)), stop or StopRequest()))  # type: ignore[arg-type]


def told(events: list[Event]) -> list[str]:
    return [event.message for event in events if isinstance(event, Notice) and "memory ran out" in event.message]


def test_a_resumed_run_does_not_run_out_again_and_is_the_undisturbed_one_bit_for_bit(shards, tmp_path, passes):
    run(shards, tmp_path / "whole")
    assert max(passes) > ROOM
    (sentence,) = told(run(shards, tmp_path / "parts", StopAfter(looks=18)))
    assert "from now on" in sentence
    passes.clear()
    events = run(shards, tmp_path / "parts")
    assert isinstance(events[-1], RunEnded)
    assert 0 < max(passes) <= ROOM
    (sentence,) = told(events)
    assert sentence.startswith("memory ran out with 4,096 tokens at once before: starting with ")
    assert (tmp_path / "parts" / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()


def test_another_max_tokens_is_taken_at_its_word(shards, tmp_path, passes):
    run(shards, tmp_path, StopAfter(looks=18))
    passes.clear()
    events = run(shards, tmp_path, max_tokens=5000)
    assert max(passes) > ROOM
    assert [sentence.startswith("memory ran out with 5,000 tokens at once: from now on") for sentence in told(events)]


def test_the_self_check_tries_fewer_rollouts_where_memory_is_short(shards, tmp_path, passes, monkeypatch):
    monkeypatch.setitem(globals(), "ROOM", 100)  # less than the rollouts of the trial take together
    (sentence, *_) = told(run(shards, tmp_path))
    assert max(passes) > 100
    assert re.fullmatch(
        r"memory ran out while the packing was tried on rollouts of up to \d+ tokens: it was tried up to \d+ only",
        sentence,
    )


def test_a_self_check_without_any_room_ends_with_what_to_do(shards, tmp_path, passes, monkeypatch):
    monkeypatch.setitem(globals(), "ROOM", 1)
    with pytest.raises(MachineError, match=r"memory ran out while the packing was tried on rollouts of up to \d+ "):
        run(shards, tmp_path)
