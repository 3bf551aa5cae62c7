"""Planning a million rollouts: the order of an epoch, prefix trees, micro-batches; and how full those are.

Micro-batches are planned inside a mini-batch, which is the shuffle window: no gradient mixes two of them, so rollouts
cannot move from one to another to fill a gap. Fill is the share of the token budget that is used. What a mini-batch
leaves in its last micro-batch cannot be filled by any packing; "of what fits" leaves that out: the fewest
micro-batches that the mini-batch's positions could take, over those that it takes. A forest holds no padding: what is
left of a budget costs nothing but the micro-batch it makes necessary.
"""

import time

import numpy as np

from bench.drawing import draw_dump
from bench.entry import Options, Table
from critic_train.data.order import epoch_plan
from critic_train.model.microbatches import forest_micro_batches
from critic_train.rollouts import Rollouts

NAME = "planning"
TITLE = "Planning a million rollouts into trees and micro-batches, beyond the reading"
DEVICES = ("cpu", "cuda")

GROUPS = {"quick": 64, "usual": 2500, "full": 125_000}
ROLLOUTS = 1_000_000
BUDGET = 32_768
WINDOWS = (64, 256, 1024, 4096)
GOAL_SECONDS, GOAL_FILL = 15.0, 0.985


def run(options: Options) -> Table:
    """Plan an epoch with mini-batches of several sizes; prompts of about 100 tokens, responses of about 250."""
    groups = GROUPS[options.size]
    rollouts = draw_dump(groups, prompt=100, response=250)
    table = Table(
        columns={
            "mini-batch": ",",
            "seconds a million": ".1f",
            "fill": ".1%",
            "of what fits": ".1%",
            "micro-batches": ",",
        }
    )
    for window in WINDOWS:
        found = [plan(rollouts, window) for _ in range(min(3, options.rounds))]
        seconds = float(np.median([seconds for seconds, _, _ in found])) * ROLLOUTS / len(rollouts)
        _, positions, counts = found[0]
        fewest = sum(-(-part // BUDGET) for part in positions)
        table.rows.append(
            {
                "mini-batch": window,
                "seconds a million": seconds,
                "fill": sum(positions) / (BUDGET * sum(counts)),
                "of what fits": fewest / sum(counts),
                "micro-batches": sum(counts),
            }
        )
    table.notes = [
        f"{len(rollouts):,} rollouts of about {len(rollouts.input_ids) // len(rollouts)} tokens, eight a prompt; "
        f"{BUDGET:,} positions a micro-batch; CPU time, scaled to a million; the goal is {GOAL_SECONDS:g} s and "
        f"{GOAL_FILL:.1%} in a window of a thousand and more",
    ]
    return table


def plan(rollouts: Rollouts, window: int) -> tuple[float, list[int], list[int]]:
    """(CPU seconds, positions of each mini-batch, micro-batches of each)."""
    began = time.process_time()
    epoch = epoch_plan(rollouts.group, batch_size=window, seed=0, epoch=0)
    seconds = time.process_time() - began
    positions, counts = [], []
    for first, last in zip(epoch.bounds[:-1], epoch.bounds[1:], strict=True):
        read = rollouts.take(epoch.order[first:last])
        began = time.process_time()
        parts = forest_micro_batches(read, BUDGET)
        seconds += time.process_time() - began
        positions.append(int(sum(read.lengths[part.index].sum() - part.shared.sum() for part in parts)))
        counts.append(len(parts))
    return seconds, positions, counts
