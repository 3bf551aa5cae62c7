"""--sequence-parallel: what is refused, what chooses itself, and what is said of it."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from support import branching_rollouts, small_config

from critic_train.errors import ConfigError, ModelError
from critic_train.model import sequence_sharing
from critic_train.model.compute import Compute
from critic_train.model.selfcheck import PackingChoice
from critic_train.model.sequence_sharing import (
    ChosenLayout,
    choose_layout,
    cut_before_host_memory,
    ranks_that_hold,
    refuse_sequence_parallel,
)
from critic_train.settings import FitSettings, TrainComputeSettings
from critic_train.stopping import StopRequest
from critic_train.text import format_bytes
from critic_train.training.fit import fit
from critic_train.weights.loading import build_critic


class FourRanks:
    """As many ranks as the choice asks about; nothing is computed together."""

    rank, size, local_rank, sharded, is_main = 2, 4, 2, True, False

    def adjacent(self, size: int) -> str:
        return f"group of {size}"


COMPUTE = Compute(device=torch.device("cpu"), precision="fp32", max_tokens=40_000, ranks=FourRanks())  # type: ignore[arg-type]


@pytest.fixture
def choose(monkeypatch):
    """(settings, longest rollout, whether the budget is measured, whether a forest is right) -> (compute, notices)."""
    critic = build_critic(small_config("Llama", num_attention_heads=14, num_key_value_heads=2, hidden_size=112), seed=0)

    def chosen(longest, *, measured=False, forest=True, **settings):
        packing = PackingChoice(forest=forest, reason="" if forest else "its layers look elsewhere")
        monkeypatch.setattr(sequence_sharing, "select_packing", lambda *_, **__: (packing, ["said"]))
        given = FitSettings(data=["none"], **settings).compute
        compute = replace(COMPUTE, max_tokens=given.max_tokens or 40_000)
        before = ChosenLayout(packing, [], []) if measured else None
        layout = choose_layout(critic, branching_rollouts(), given, compute, longest=longest, before=before)
        return compute, [choice.sentence() for choice in layout.cuts] + [notice.message for notice in layout.notices]

    return chosen


def compute_settings(**given: object) -> TrainComputeSettings:
    return FitSettings(data=["none"], **given).compute  # type: ignore[arg-type]


@pytest.mark.parametrize(("given", "size"), [(1, 1), (1, 4), (2, 4), (4, 4), (None, 1)])
def test_a_number_of_ranks_that_divides_them_is_taken(given, size):
    refuse_sequence_parallel(compute_settings(sequence_parallel=given), size)


def test_another_is_refused_with_those_that_are_possible():
    with pytest.raises(ConfigError, match="over 3 ranks, and this is a run on 4") as caught:
        refuse_sequence_parallel(compute_settings(sequence_parallel=3), 4)
    assert "--sequence-parallel 1, 2 or 4" in caught.value.hint
    with pytest.raises(ConfigError, match="a run on 1 process") as caught:
        refuse_sequence_parallel(compute_settings(sequence_parallel=2), 1)
    assert "--nproc 2" in caught.value.hint


def test_padded_rows_are_refused_before_anything_is_read(tmp_path):
    """By the command as by the settings: here there is nothing to read at all."""
    with pytest.raises(ConfigError, match="not padded rows: --packing rows"):
        refuse_sequence_parallel(compute_settings(sequence_parallel=2, packing="rows"), 2)
    refuse_sequence_parallel(compute_settings(sequence_parallel=1, packing="rows"), 2)
    settings = FitSettings(data=[str(tmp_path)], out=str(tmp_path / "run"), sequence_parallel=2, packing="rows")
    with pytest.raises(ConfigError, match="not padded rows: --packing rows"):
        list(fit(settings, StopRequest()))


@pytest.mark.parametrize(
    ("longest", "budget", "size", "expected"),
    [(40_000, 40_000, 8, 1), (40_001, 40_000, 8, 2), (64_000, 20_000, 8, 4), (64_000, 20_000, 6, 6), (9, 1, 8, None)],
)
def test_the_fewest_ranks_whose_budgets_hold_the_longest_rollout(longest, budget, size, expected):
    assert ranks_that_hold(longest, budget, size) == expected


def test_it_chooses_itself_where_a_rollout_is_beyond_the_budget_and_says_why(choose):
    compute, said = choose(65_536, max_tokens=40_000)
    assert (compute.sequence.size, compute.sequence.rank, compute.sequence.group) == (2, 0, "group of 2")
    assert (compute.data_size, compute.data_rank) == (2, 1)
    assert said == [
        "--sequence-parallel 2: the longest rollout has 65,536 tokens, and one rank takes 40,000 at once",
        "said",
    ]
    compute, said = choose(65_536_000, max_tokens=40_000)
    assert compute.sequence_size == 4
    assert said[0].endswith("all 4 take 160,000; attention computes 16 heads for its 14")


@pytest.mark.parametrize(
    "settings", [{"max_tokens": 70_000}, {}, {"max_tokens": 4_000, "sequence_parallel": 1}, {"packing": "rows"}]
)
def test_each_rank_computes_whole_rollouts_where_they_fit_or_that_is_asked_for(choose, settings):
    compute, said = choose(65_536, **settings)
    assert (compute.sequence, compute.data_size, said[0]) == (None, 4, "said")  # and perhaps what would cut it


@pytest.mark.parametrize(
    ("max_tokens", "cut"),
    [
        (40_000, "--sequence-parallel 2 cuts it over 2 ranks"),
        (17_000, "--sequence-parallel 4 cuts it over 4 ranks"),
        (4_000, "32 ranks with --sequence-parallel 32 cut it over them"),
    ],
)
def test_a_rollout_that_goes_alone_is_told_with_the_ranks_that_would_cut_it(choose, max_tokens, cut):
    said = choose(65_536, max_tokens=max_tokens, sequence_parallel=1)[1]
    assert said[1] == (
        f"the longest rollout has 65,536 tokens: beyond --max-tokens {max_tokens:,} a rollout goes through the model "
        f"alone; {cut}"
    )


def test_a_budget_that_is_not_given_asks_for_ranks_once_it_is_measured(choose):
    assert choose(65_536)[0].sequence is None
    assert choose(65_536, measured=True)[0].sequence_size == 2
    assert choose(65_536, measured=True, sequence_parallel=1)[1] == []


def test_padded_rows_are_not_cut(choose):
    with pytest.raises(ModelError, match="not padded rows: its layers look elsewhere"):
        choose(10, forest=False, sequence_parallel=2)
    compute, said = choose(65_536, forest=False, max_tokens=40_000)
    assert compute.sequence is None
    assert said == ["said", "padded rows are not cut over ranks: each of them computes whole rollouts"]


def test_cutting_comes_before_host_memory_where_the_all_to_all_takes_less_time(monkeypatch):
    """14 heads of 8 numbers and 2 key heads, on 4 ranks 16 and 4: bf16, three passes, 3 of 4 parts leave the rank."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    critic = build_critic(small_config("Llama", num_attention_heads=14, num_key_value_heads=2, hidden_size=112), seed=0)
    compute = replace(COMPUTE, device=torch.device("cuda", 0), precision="bf16")
    automatic, one = FitSettings(data=["none"]).compute, FitSettings(data=["none"], sequence_parallel=1).compute
    cut = cut_before_host_memory(critic, compute, automatic, forest=True)
    exchanged, copied = 3 * 2 * 8 * (16 + 4 + 4 + 16) * 3 / 4, 2 * 4 * 112
    assert exchanged / 450e9 < copied / 50e9
    assert cut is not None
    assert cut.ranks == 4
    for said in (exchanged, copied):
        assert f"({format_bytes(said)})" in cut.reason
    asked = partial(cut_before_host_memory, critic)
    assert asked(compute, one, forest=True) is None
    assert asked(compute, automatic, forest=False) is None
    assert asked(replace(compute, device=torch.device("cpu")), automatic, forest=True) is None
    # One GPU a machine: what they exchange goes over the network.
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert asked(compute, automatic, forest=True) is None
    # Heads that are many times as wide as the layer's input.
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    critic.trunk.config.head_dim = 128
    assert asked(compute, automatic, forest=True) is None
