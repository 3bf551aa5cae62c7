"""Settings that choose themselves on a GPU: from what passes hold there. CUDA's memory is a model of its own here."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from support import small_config

from critic_train.distributed.ranks import SingleProcess
from critic_train.layers.attention import TREE_ATTENTION
from critic_train.layers.prefix_tree import build_tree_layout, prefix_order
from critic_train.model import automatic, memory_use
from critic_train.model.automatic import (
    choose_memory,
    choose_offload,
    choose_tokens,
    set_memory,
    try_largest,
)
from critic_train.model.compute import Compute, Cut, Keeping
from critic_train.model.microbatches import micro_batches
from critic_train.model.next_token_head import NextTokenHead
from critic_train.rollouts import Rollouts
from critic_train.settings import TrainComputeSettings
from critic_train.weights.loading import build_critic

GIB = 2**30
CUDA = torch.device("cuda", 0)

KEEPINGS = [*map(Keeping, automatic.CHECKPOINTING), Keeping("layer-tiles", on_host=True)]


def compute_of(**changes):
    return Compute(**{"device": CUDA, "precision": "bf16", "max_tokens": 4096} | changes)


def tiny_critic():
    return build_critic(small_config("Llama"), seed=0)


def group_of(prompt, response, count):
    """Rollouts of one prompt, random after it."""
    rng = np.random.default_rng(0)
    length = prompt + response
    ids = rng.integers(0, 100, (count, length))
    ids[:, :prompt] = ids[0, :prompt]
    return Rollouts(
        input_ids=ids.ravel().astype(np.int32),
        offsets=np.arange(count + 1) * length,
        response_mask=np.tile(np.arange(length) >= prompt, count),
        returns=np.zeros(count * length, np.float32),
        values=None,
        group=np.zeros(count, np.int64),
        row=np.arange(count),
    )


class Device:
    """A device of so many GiB, on which a pass holds `fixed` bytes and some for each position.

    `most` is the largest micro-batch that a pass survives, whatever was measured.
    """

    def __init__(self, monkeypatch, total, fixed, per_token, most=10**9):
        self.kind, self.passes = "none", []
        self.fixed, self.per_token, self.most = fixed, per_token, most
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(total), int(total)))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
        for module in (automatic, memory_use):
            monkeypatch.setattr(module, "release_memory", lambda device: None)
            monkeypatch.setattr(module, "peak", self.peak)
        monkeypatch.setattr(automatic, "set_keeping", self.set_keeping)

    def peak(self, critic, compute, rollouts, *, forest, training):
        positions = len(build_tree_layout(rollouts, prefix_order(rollouts)))
        positions = min(positions, compute.max_tokens)
        self.passes.append((positions, training))
        if positions > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return positions, int(self.fixed + self.per_token[self.kind] * positions)

    def set_keeping(self, critic, compute, keeping):
        self.kind = str(keeping)
        compute.keep(keeping)


def choose(device, compute, largest, **changes):
    asked = {"optimizer": "adamw", "keepings": KEEPINGS, "max_tokens": None} | changes
    return choose_memory(tiny_critic(), compute, forest=True, largest=largest, **asked)


def test_the_fastest_kind_of_checkpointing_is_taken_that_holds_the_largest_prompt(monkeypatch):
    hosted = str(KEEPINGS[-1])
    per_token = {"none": 4e6, "selective": 1.2e6, "layer": 1.1e6, "layer-tiles": 8e5, hosted: 2.5e5}
    # 80 GiB but for 8 % of them and 10 fixed: 17,000 tokens, 57,000, 62,000, or (capped) 65,536; or one long rollout.
    cases = {
        "none": (1000, 100, 8),
        "selective": (4000, 3000, 8),
        "layer": (4000, 7000, 8),
        "layer-tiles": (4000, 8000, 8),
        hosted: (200_000, 10, 2),
    }
    for expected, prompt in cases.items():
        device = Device(monkeypatch, 80 * GIB, 10 * GIB, per_token)
        compute = compute_of()
        kind, choices = choose(device, compute, group_of(*prompt))
        assert str(kind) == expected == device.kind
        room = 80 * GIB * (1 - automatic.RESERVED_SHARE) - 10 * GIB
        trained = sum(p.numel() for p in tiny_critic().parameters())
        fits = int((room - 8 * trained) / per_token[expected])
        assert compute.max_tokens == pytest.approx(min(fits, max(65_536, prompt[0] + prompt[1])), rel=1e-3)
        names = [choice.name for choice in choices]
        assert names == ["activation_checkpointing", *(["offload"] if expected == hosted else []), "max_tokens"]
        assert f"--max-tokens {compute.max_tokens}: a token takes" in choices[-1].sentence()
        assert compute.offload == ("activations" if expected == hosted else "none")


def test_a_kind_that_runs_out_of_memory_while_it_is_measured_is_passed_over(monkeypatch):
    device = Device(monkeypatch, 80 * GIB, 10 * GIB, {"selective": 1.2e6})

    def peak(*given, **named):
        if device.kind == "none":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return device.peak(*given, **named)

    monkeypatch.setattr(memory_use, "peak", peak)
    keeping, choices = choose(device, compute_of(), group_of(1000, 100, 8))
    assert (str(keeping), choices[0].value) == ("selective", "selective")
    with pytest.raises(torch.OutOfMemoryError):
        choose(device, compute_of(), group_of(1000, 100, 8), keepings=(Keeping("none"),))


def test_what_is_given_is_not_chosen(monkeypatch):
    device = Device(monkeypatch, 80 * GIB, 10 * GIB, {"none": 4e6, "selective": 1e6, "layer": 2.5e5})
    compute = compute_of()
    kind, choices = choose(device, compute, group_of(100, 10, 4), keepings=(Keeping("layer"),))
    assert (kind.kind, [c.name for c in choices], compute.max_tokens) == ("layer", ["max_tokens"], 65_536)
    compute = compute_of()
    kind, choices = choose(device, compute, group_of(100, 10, 4), max_tokens=50_000)
    assert (kind.kind, [c.name for c in choices], compute.max_tokens) == (
        "selective",
        ["activation_checkpointing"],
        50_000,
    )


def test_a_resumed_run_may_keep_as_little_as_before():
    """What the run chose at first is given by then; where its layer inputs went to the host later, they may again."""
    given = TrainComputeSettings(activation_checkpointing="none", offload="optimizer", max_tokens=4096)
    for may_offload, hosted in ((True, [KEEPINGS[-1]]), (False, [])):
        compute = compute_of(may_keep_less=True, may_offload=may_offload)
        set_memory(tiny_critic(), compute, given, "adamw", group_of(10, 10, 2), forest=True)
        assert [*compute.keep_less] == [Keeping("layer"), Keeping("layer-tiles"), *hosted]


def test_moments_that_wait_on_the_host_leave_their_room_to_tokens(monkeypatch):
    per_token = dict.fromkeys(map(str, KEEPINGS), 1e5)
    trained = sum(p.numel() for p in tiny_critic().parameters())
    budgets = {}
    for offload, kind in (("none", "adamw"), ("none", "adamw-8bit"), ("optimizer", "adamw")):
        device = Device(monkeypatch, 8 * trained + 3e9, 1e9, per_token)
        compute = compute_of(offload=offload)
        choose(device, compute, group_of(10, 10, 2), optimizer=kind)
        budgets[offload, kind] = compute.max_tokens
    assert budgets["none", "adamw"] < budgets["none", "adamw-8bit"] < budgets["optimizer", "adamw"]


def test_an_average_of_the_weights_takes_its_room(monkeypatch):
    """4 bytes a trained parameter, on the device unless all waits on the host."""
    per_token = dict.fromkeys(map(str, KEEPINGS), 1e5)
    critic, trained = tiny_critic(), sum(p.numel() for p in tiny_critic().parameters())
    budgets = []
    for averages in (False, True):
        device = Device(monkeypatch, 8 * trained + 3e9, 1e9, per_token)
        compute = compute_of(averages_weights=averages)
        choose(device, compute, group_of(10, 10, 2), optimizer="adamw")
        budgets.append(compute.max_tokens)
    assert budgets[0] - budgets[1] == pytest.approx(4 * trained / 1e5, abs=1)
    room = int(1.1 * 18 * trained / 0.84)
    assert choose_offload(critic, compute_of(), "adamw", room) is None
    choice = choose_offload(critic, compute_of(averages_weights=True), "adamw", room)
    assert (choice.name, choice.value) == ("offload", "optimizer")


def test_a_head_for_the_next_token_counts(monkeypatch):
    """Before it is there, by its number of parameters; once it is, with the logits that a pass makes."""
    critic, trained = tiny_critic(), sum(p.numel() for p in tiny_critic().parameters())
    room = int(1.2 * 18 * trained / 0.84)
    assert choose_offload(critic, compute_of(), "adamw", room) is None
    choice = choose_offload(critic, compute_of(), "adamw", room, trained)
    assert (choice.name, choice.value) == ("offload", "optimizer")
    critic.next_token_head = NextTokenHead(np.arange(50), 64)
    critic.next_token_head.to_empty(device="cpu")
    torch.nn.init.normal_(critic.next_token_head.weight)
    rollouts = memory_use.random_rollouts(64, 100)
    compute = Compute(device=torch.device("cpu"), precision="fp32", max_tokens=10_000)
    (batch,) = micro_batches(rollouts, compute, forest=True)
    critic.trunk.set_attn_implementation(TREE_ATTENTION)
    given = []
    critic.next_token_head.register_forward_pre_hook(lambda _, args: given.extend(args[1:]))
    memory_use.some_loss(critic, batch).backward()
    # Those of a CUDA device are none that numpy can sort.
    assert [type(each) for each in given] == [np.ndarray] * 3
    assert all(
        p.grad is not None and bool(p.grad.any()) for p in (*critic.head.parameters(), critic.next_token_head.weight)
    )


def test_the_rank_with_the_least_memory_decides(monkeypatch):
    class Two(SingleProcess):
        size, rank = 2, 0

        def all_reduce_sum(self, numbers):
            return numbers + torch.tensor([0.0, 700.0], dtype=torch.float64)

    device = Device(monkeypatch, 80 * GIB, 0, dict.fromkeys(map(str, KEEPINGS), 1e6))
    compute = compute_of(ranks=Two())
    choose(device, compute, group_of(100, 10, 2))
    assert compute.max_tokens == 700


def test_a_prediction_is_measured_without_a_backward_pass_and_a_cpu_not_at_all(monkeypatch):
    device = Device(monkeypatch, 10 * GIB, GIB, {"none": 1e6})
    compute = compute_of()
    choose_tokens(tiny_critic(), compute, forest=True, largest=group_of(100, 10, 2))
    assert compute.max_tokens == int((10 * GIB * (1 - automatic.RESERVED_SHARE) - GIB) / 1e6)
    assert {training for _, training in device.passes} == {False}
    cpu = compute_of(device=torch.device("cpu"), precision="fp32")
    device.passes.clear()
    choose_tokens(tiny_critic(), cpu, forest=True, largest=group_of(100, 10, 2))
    assert (cpu.max_tokens, device.passes) == (4096, [])


def test_a_micro_batch_that_does_not_fit_lowers_the_budget_until_it_does(monkeypatch):
    device = Device(monkeypatch, 80 * GIB, 0, {"none": 1.0}, most=3000)
    compute, critic = compute_of(max_tokens=5000), tiny_critic()
    sentence = try_largest(critic, compute, group_of(1000, 500, 20), forest=True)
    assert [positions for positions, _ in device.passes] == [5000, 3750, 2812]
    assert compute.max_tokens == 2812
    assert sentence == "--max-tokens 2812: the largest prompt did not fit at 5,000 tokens at once"
    assert try_largest(critic, compute, group_of(1000, 500, 20), forest=True) == ""


class TwoPeaks(Device):
    """A device on which a position takes a third more in the backward pass, whose peak is above with many of them."""

    def peak(self, critic, compute, rollouts, *, forest, training):
        positions, forward = super().peak(critic, compute, rollouts, forest=forest, training=training)
        return positions, max(forward, int(self.fixed - GIB + 4 / 3 * self.per_token[self.kind] * positions))


def test_what_fits_is_measured_again_by_a_pass_of_nearly_as_many_tokens(monkeypatch):
    device = TwoPeaks(monkeypatch, 20 * GIB, 10 * GIB, {"layer": 1.5e5})
    compute = compute_of()
    choose(device, compute, group_of(100, 10, 2), keepings=[Keeping("layer")])
    room = 20 * GIB * (1 - automatic.RESERVED_SHARE) - 8 * sum(p.numel() for p in tiny_critic().parameters())
    few, fit = (room - 10 * GIB) / 1.5e5, (room - 9 * GIB) / 2e5
    assert 0.99 * fit <= compute.max_tokens <= 1.03 * fit < 0.92 * few
    assert device.passes[-1][0] == pytest.approx(automatic.FAR * few, rel=1e-3)


def test_a_further_pass_that_runs_out_of_memory_is_made_with_half(monkeypatch):
    device = Device(monkeypatch, 20 * GIB, 10 * GIB, {"layer": 1.5e5}, most=30_000)
    compute = compute_of()
    choose(device, compute, group_of(100, 10, 2), keepings=[Keeping("layer")])
    positions = [positions for positions, _ in device.passes]
    assert positions[-1] == pytest.approx(positions[-3] / 2, abs=8)
    assert compute.max_tokens > 50_000


def test_moments_are_offloaded_where_the_device_does_not_hold_them():
    critic = tiny_critic()
    total = sum(p.numel() for p in critic.parameters())
    needed = (4 + 4 + 8 + 2) * total  # weights, gradients, moments, and weights cast to bf16
    roomy, tight = (int(needed / (1 - 2 * automatic.RESERVED_SHARE) * factor) for factor in (1.01, 0.99))
    assert choose_offload(critic, compute_of(), "adamw", roomy) is None
    choice = choose_offload(critic, compute_of(), "adamw", tight)
    assert (choice.name, choice.value) == ("offload", "optimizer")
    assert choose_offload(critic, replace(compute_of(), precision="fp32"), "adamw", tight) is None
    critic.trunk.requires_grad_(False)
    assert choose_offload(critic, compute_of(), "adamw", tight) is None


def test_a_rollout_is_cut_over_ranks_before_its_layer_inputs_go_to_host_memory(monkeypatch):
    """Where the ranks hold it; and where not, or where no other rollout is cut, they go there as they did."""
    hosted = str(KEEPINGS[-1])
    per_token = dict.fromkeys(map(str, KEEPINGS), 4e6) | {"layer-tiles": 8e5, hosted: 2.5e5}
    long = group_of(200_000, 10, 2)  # of which layer-tiles holds some 79,000 tokens
    cut = Cut(ranks=4, reason="an all-to-all is cheaper")
    for given, rollouts, expected in (
        (None, long, hosted),
        (cut, long, "layer-tiles"),
        (cut._replace(ranks=2), long, hosted),
        (cut, group_of(1000, 100, 8), "none"),
    ):
        compute = compute_of(cut_first=given)
        device = Device(monkeypatch, 80 * GIB, 10 * GIB, per_token)
        keeping, choices = choose(device, compute, rollouts)
        assert str(keeping) == expected == device.kind
        assert compute.offload == ("activations" if expected == hosted else "none")
        said = choices[0].sentence()
        assert (cut.reason in said) == (given == cut and rollouts is long)
        assert [choice.name for choice in choices[1:-1]] == (["offload"] if expected == hosted else [])
    # What was given to wait in host memory still does.
    device = Device(monkeypatch, 80 * GIB, 10 * GIB, per_token)
    compute = compute_of(offload="activations", cut_first=cut)
    assert str(choose(device, compute, long, keepings=KEEPINGS[-1:])[0]) == hosted
