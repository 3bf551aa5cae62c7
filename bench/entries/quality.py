"""How good a critic comes out on worlds whose values are known, and the CPU time to get there, beside a yardstick.

    python -m bench quality                                        # drawn chains, and a policy that adds numbers,
                                                                   # from scratch and from the policy itself
    python -m bench quality --rollouts DIR --model DIR             # rollouts on disk: DIR/train and DIR/val
    python -m bench quality --keep DIR                             # what is drawn is kept, and taken the next time
    python -m bench quality --world chain --only fit               # not the policy that adds, and no yardstick

Time to quality is the CPU time until a held-out evaluation finds the explained variance of the yardstick's best
evaluation, over the yardstick's own time until that one. Of `fit` everything counts: start, reading, evaluations; of
the yardstick only its steps. A yardstick of size tiny is given what `fit` has chosen: the size and its learning rate.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

from bench.adding import adding_task, policy_task
from bench.critics import EPOCHS, Trained, Yardstick, product
from bench.entry import Options, Table
from bench.worlds import Task, ceiling, chain_task

NAME = "quality"
TITLE = "Critics of known worlds: share of the ceiling, and CPU seconds to the yardstick's best"
DEVICES = ("cpu",)

SIZES = {"quick": [16], "usual": [768], "full": [64, 768, 6144]}
"""Prompts to train on, 8 rollouts each."""
WORLDS = {"chain": chain_task, "adding": adding_task, "policy": policy_task}
SEEDS = {"quick": 1, "usual": 3, "full": 3}
"""Worlds of each kind; fewer with --rounds."""
COLUMNS = {
    "world": "",
    "critic": "",
    "of the ceiling": ".3f",
    "least": ".3f",
    "within prompts": ".3f",
    "least within": ".3f",
    "explained variance": ".3f",
    "explained within": ".3f",
    "CPU s": ".1f",
    "s to yardstick's best": ".1f",
    "of yardstick's": ".3f",
}


def run(options: Options) -> Table:
    """Train every critic on every world; of `fit` each world's, then means over the seeds and the least of them."""
    table = Table(columns=COLUMNS)
    steps, preset = 2 if options.quick else options.yardstick_steps, options.yardstick_preset
    for tasks in task_groups(options):
        size = tasks[0].model.name if tasks[0].model else preset
        yardstick, ours = f"yardstick ({size}), {EPOCHS} epochs", "fit, all defaults"
        world, beside = {"world": tasks[0].name}, None
        known = [found for task in tasks if (found := ceiling(task.held_out())) is not None]
        if known:
            overall, within = mean(each.overall for each in known), mean(each.within for each in known)
            table.add(world | {"critic": "true values", "explained variance": overall, "explained within": within})
        if options.only != "fit":
            beside = [Yardstick(task, preset, steps).train() for task in tasks]
            table.add(world | {"critic": yardstick, **figures(beside, beside)})
        if options.only != "yardstick":
            every = list[Trained]()
            for number, task in enumerate(tasks):
                every.append(product(task, {}))
                if len(tasks) > 1:
                    alone = figures(every[-1:], beside and beside[number : number + 1])
                    table.add({"world": f"{task.name}, seed {task.seed}", "critic": ours, **alone})
            table.add(world | {"critic": ours, **figures(every, beside)})
    table.notes.append(
        "Shares are free of the returns' noise; explained is what is explained of the returns, noise and all."
    )
    if steps:
        table.notes.append(f"The yardstick was ended after {steps} steps.")
    return table


def task_groups(options: Options) -> Iterator[list[Task]]:
    """Worlds of one kind and size at a time, one for each seed."""
    if options.rollouts is not None:
        yield [Task(name=options.rollouts.name, folder=options.rollouts, model=options.model)]
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        seeds = range(min(SEEDS[options.size], options.rounds))
        for prompts in SIZES[options.size]:
            for kind, draw in WORLDS.items():
                if options.world in (None, kind):
                    drawn = "adding" if kind == "policy" else kind
                    yield [draw(folder / f"{drawn}-{prompts}-{seed}", prompts, seed) for seed in seeds]


def figures(found: list[Trained], beside: list[Trained] | None) -> dict[str, Any]:
    """A row: means over the worlds. `beside` are the yardsticks of the same worlds, if there are any."""
    known = [each.shares for each in found if each.shares is not None]
    row = {
        "explained variance": mean(each.best[1] for each in found),
        "explained within": mean(each.within for each in found),
        "CPU s": mean(each.seconds for each in found),
    }
    if known:
        row |= {
            "of the ceiling": mean(each.overall for each in known),
            "least": min(each.overall for each in known),
            "within prompts": mean(each.within for each in known),
            "least within": min(each.within for each in known),
        }
    if beside is None:
        return row
    goals = [each.best for each in beside]
    reached = [each.seconds_to(goal) for each, (_, goal) in zip(found, goals, strict=True)]
    times = [seconds for seconds in reached if seconds is not None]
    if len(times) == len(found):
        row["s to yardstick's best"] = mean(times)
        row["of yardstick's"] = mean(seconds / goal for seconds, (goal, _) in zip(times, goals, strict=True))
    return row
