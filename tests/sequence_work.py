"""What single ranks do in the tests of positions that are cut over ranks: functions that a forked process can find."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist
from architectures import TEXT, text_config
from support import branching_rollouts, rollouts_of, small_config

from critic_train.distributed.init import init_ranks
from critic_train.layers.prefix_tree import prefix_order
from critic_train.layers.sequence_parallel import SequenceRanks, share_frequencies
from critic_train.model.critic import Critic
from critic_train.model.model_input import ModelInput, tree_input
from critic_train.model.selfcheck import choose_packing
from critic_train.rollouts import Rollouts
from critic_train.settings import FitSettings
from critic_train.weights.loading import build_critic

SETTINGS = FitSettings(data=["none"])
CPU = torch.device("cpu")


def rollouts_with_long_prompts() -> Rollouts:
    """Two prompts of 150 tokens, of which the last layer need compute none, and an observation of 80; an odd number of
    positions."""
    draw = np.random.default_rng(0)
    sequences = []
    for _ in range(2):
        prompt = draw.integers(1, 90, 150)
        sequences += [np.concatenate([prompt, draw.integers(1, 90, n)]).astype(np.int32) for n in (120, 121)]
    rollouts = rollouts_of(sequences, [150] * 4)
    mask = rollouts.response_mask.copy()
    mask[160:240] = False
    return replace(rollouts, response_mask=mask)


def small_ids(rollouts: Rollouts) -> Rollouts:
    """With ids that every small configuration has and none gives another sense."""
    return replace(rollouts, input_ids=rollouts.input_ids % 90)


DATA: dict[str, Callable[[], Rollouts]] = {
    "branching": lambda: small_ids(branching_rollouts()),
    "long prompts": rollouts_with_long_prompts,
    "tiny": lambda: rollouts_of([np.asarray([5, 6], dtype=np.int32)], [1]),
}


def critic_of(name: str, changes: dict[str, object]) -> Critic:
    """A critic of an entry of `architectures.TEXT`, or of a family of `support`, that no rounding hides anything of."""
    config = text_config(name, **changes) if name in TEXT else small_config(name, **changes)
    critic = build_critic(config, seed=3)
    with torch.no_grad():
        critic.head.weight.normal_(generator=torch.Generator().manual_seed(1))
    return critic.train()


Case = tuple[str, dict[str, object], str]
"""(architecture, changes to its configuration, which rollouts: a key of DATA)."""


def differences(size: int, cases: list[Case]) -> list[dict[str, float]]:
    """How far values and gradients of ranks together are from those of this rank alone, in each case.

    Args:
        size: ranks that cut a micro-batch among them; with more of them than that, all do the same.
        cases: what is computed.
    """
    with init_ranks(SETTINGS, nproc=1, device="cpu") as ranks:
        sequence = SequenceRanks(group=ranks.adjacent(size), size=size, rank=ranks.rank % size)
        return [difference(sequence, *case) for case in cases]


def difference(sequence: SequenceRanks, name: str, changes: dict[str, object], data: str) -> dict[str, float]:
    """The largest difference of a value, of a gradient (relative to its norm, or to a thousandth of the largest where
    it is nothing but rounding) and of a hidden state in the self-check; and the positions that this rank computes."""
    rollouts, critic = DATA[data](), critic_of(name, changes)
    share_frequencies(critic.trunk, sequence)
    choice = choose_packing(critic, rollouts, "forest", positions=200, sequence=sequence)
    order, slope = prefix_order(rollouts), torch.from_numpy(rollouts.returns)

    def passed(batch: ModelInput) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        critic.zero_grad()
        values = torch.zeros(len(rollouts.input_ids))
        own = critic(batch)
        values[batch.response_tokens] = own.detach()
        (own * slope[batch.response_tokens]).sum().backward()
        return values, {n: p.grad.clone() for n, p in critic.named_parameters() if p.grad is not None}

    expected, theirs = passed(tree_input(rollouts, order, CPU))
    batch = tree_input(rollouts, order, CPU, sequence=sequence)
    values, ours = passed(batch)
    for tensor in (values, *(ours[n] for n in sorted(ours))):
        dist.all_reduce(tensor, group=sequence.group)
    assert ours.keys() == theirs.keys()
    largest = max(float(g.norm()) for g in theirs.values())
    return {
        "values": float((values - expected).abs().max()),
        "gradients": max(
            float((ours[n] - theirs[n]).norm()) / max(float(theirs[n].norm()), 1e-3 * largest) for n in theirs
        ),
        "check": float(choice.difference or 0.0),
        "computed": batch.computed_tokens,
        "narrowed": float(choice.narrowed),
    }
