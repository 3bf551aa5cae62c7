"""How evenly a mini-batch of the sample's real rollouts is shared out over ranks, and what that costs."""

import time
from pathlib import Path
from typing import Any

import numpy as np

from bench.entry import Options, Table
from critic_train.data.order import epoch_plan
from critic_train.data.reading import RolloutReader
from critic_train.data.shards import find_shards
from critic_train.layers.prefix_tree import prefix_order
from critic_train.model.work_sharing import Cost, Pieces, shares
from critic_train.rollouts import Rollouts

NAME = "balance"
TITLE = "Work shared out over ranks, real rollouts"
DEVICES = ("cpu", "cuda")

SAMPLE = Path(__file__).parents[2] / "sample_data" / "train"
COST = Cost.of(106_000_000, layers=30, width=576)
"""SmolLM2-135M's, which made the rollouts."""
MAX_TOKENS = 1024


def run(options: Options) -> Table:
    """Share out every mini-batch of an epoch."""
    batches = list(RolloutReader(find_shards([str(SAMPLE)])))
    table = Table(
        columns={
            "rollouts a step": "",
            "ranks": "",
            "max/mean": ".4f",
            "worst": ".4f",
            "round robin": ".2f",
            "in step": ".4f",
            "work added": ".1%",
            "ms a step": ".2f",
        }
    )
    for batch_size in (64, 256) if options.quick else (64, 128, 256):
        steps = [step for batch in batches for step in mini_batches(batch, batch_size)]
        table.rows += [measured(steps, ranks) for ranks in (2, 3, 4, 8)]
    table.notes = [
        "max/mean: the busiest rank's work beside the mean, over the mini-batches; worst: the largest of them",
        "in step: the sum of the dearest micro-batches that are computed together, beside the mean rank's work",
        "round robin: max/mean of whole prefix trees dealt out in turn; work added: prefixes computed again at cuts",
    ]
    return table


def mini_batches(rollouts: Rollouts, batch_size: int) -> list[Rollouts]:
    """The full mini-batches of an epoch."""
    plan = epoch_plan(rollouts.group, batch_size=batch_size, seed=0, epoch=0)
    bounds = zip(plan.bounds[:-1].tolist(), plan.bounds[1:].tolist(), strict=True)
    return [rollouts.take(plan.order[start:stop]) for start, stop in bounds if stop - start == batch_size]


def measured(steps: list[Rollouts], ranks: int) -> dict[str, Any]:
    """One row of the table."""
    level, dealt, in_step, added, seconds = [], [], [], [], 0.0
    for step in steps:
        order = prefix_order(step)
        began = time.process_time()
        pieces = Pieces(order, step.lengths, COST)
        every = shares(pieces, ranks, MAX_TOKENS)
        seconds += time.process_time() - began
        work = np.asarray([[pieces.work_together(places) for places in mine] for mine in every])
        trees = [float(pieces.work(*tree)) for tree in pieces.trees(MAX_TOKENS)]
        turns = np.asarray([sum(trees[rank::ranks]) for rank in range(ranks)])
        level.append(work.sum(1).max() / work.sum(1).mean())
        dealt.append(turns.max() / turns.mean())
        in_step.append(work.max(0).sum() * ranks / work.sum())
        added.append(work.sum() / sum(trees) - 1)
    return {
        "rollouts a step": len(steps[0]),
        "ranks": ranks,
        "max/mean": float(np.mean(level)),
        "worst": max(level),
        "round robin": float(np.mean(dealt)),
        "in step": float(np.mean(in_step)),
        "work added": float(np.mean(added)),
        "ms a step": 1000 * seconds / len(steps),
    }
