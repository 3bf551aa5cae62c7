"""What each ingredient of `fit`'s default is worth: all defaults, and all but one, on the same worlds.

    python -m bench ablation                                       # the drawn worlds of `bench quality`
    python -m bench ablation --rollouts DIR --model DIR            # rollouts on disk: DIR/train and DIR/val

An ingredient pays where the table has a loss when it is taken out; one whose loss is below the spread over seeds does
not. What is tried beyond the default stands below: it has no place in it until its gain is above the spread.
"""

from statistics import mean, stdev
from typing import Any

from bench.critics import Trained, product
from bench.entries.quality import task_groups
from bench.entry import Options, Table

NAME = "ablation"
TITLE = "What each ingredient of the default is worth"
DEVICES = ("cpu",)

TAKEN_OUT: dict[str, dict[str, Any]] = {
    "next-token loss": {"lm_loss_weight": 0.0},
    "tokens ahead: the next alone": {"lm_loss_ahead": 1},
    "rollouts shuffled apart: groups together": {"shuffle": "groups"},
    "cosine: constant rate": {"lr_schedule": "constant"},
    "warm-up": {"warmup_steps": 0},
    "weight decay": {"weight_decay": 0.0},
    "clip": {"no_clip": True},
    "the average of the weights": {"ema_decay": 0.0},
}
TRIED: dict[str, dict[str, Any]] = {
    "GAE, lambda 0.95, by epoch": {"returns": "gae", "lam": 0.95, "old_values": "epoch"},
    "the running mean as a second input": {"head_inputs": "last+mean"},
}
OF_A_MODEL: dict[str, dict[str, Any]] = {
    "exact head: at the mean return": {"head_init": "mean"},
    "cosine: constant rate": {"lr_schedule": "constant"},
    "fine-tuning: the head alone": {"train": "head"},
}
"""What is taken out where there is a model to start from."""
COLUMNS = {
    "world": "",
    "critic": "",
    "of the ceiling": ".3f",
    "loss": ".3f",
    "spread": ".3f",
    "within prompts": ".3f",
    "explained variance": ".3f",
    "explained within": ".3f",
    "CPU s": ".1f",
}


def run(options: Options) -> Table:
    """Train with each ingredient taken out; means over the seeds, and the spread of the loss over them."""
    table = Table(columns=COLUMNS)
    for tasks in task_groups(options):
        default = [product(task, {}) for task in tasks]
        row = {"world": tasks[0].name, "critic": "all defaults"}
        table.add(row | figures(default, default))
        taken_out = OF_A_MODEL if tasks[0].model else passes(default[0].epochs)
        recipes = {f"without {name}": given for name, given in taken_out.items()}
        rewarded = "reward" in tasks[0].held_out().column_names
        tried = {name: given for name, given in TRIED.items() if rewarded or "returns" not in given}
        recipes |= {f"with {name}": given for name, given in tried.items()}
        for name, given in recipes.items():
            found = [product(task, given) for task in tasks]
            table.add(row | {"critic": name, **figures(found, default)})
    table.notes.append(
        "The loss is in shares of the ceiling where true values are known, else in explained variance; its spread is "
        "the standard deviation over seeds."
    )
    return table


def passes(epochs: int) -> dict[str, dict[str, Any]]:
    """What is taken out where a new transformer makes so many passes: these, and all else with as many.

    What one ingredient is worth must not depend on what the recipe chooses once it is gone.
    """
    fewer = {f"{epochs} passes: {few}": {"epochs": few} for few in (epochs // 2, epochs // 4) if few}
    return fewer | {name: {"epochs": epochs, **given} for name, given in TAKEN_OUT.items()}


def figures(found: list[Trained], default: list[Trained]) -> dict[str, Any]:
    """A row: means over the worlds, and what is lost against the defaults on the same."""
    losses = [_figure(one) - _figure(other) for one, other in zip(default, found, strict=True)]
    row: dict[str, Any] = {
        "loss": mean(losses),
        "explained variance": mean(each.best[1] for each in found),
        "explained within": mean(each.within for each in found),
        "CPU s": mean(each.seconds for each in found),
    }
    if len(losses) > 1:
        row["spread"] = stdev(losses)
    known = [each.shares for each in found if each.shares is not None]
    if known:
        row["of the ceiling"] = mean(each.overall for each in known)
        row["within prompts"] = mean(each.within for each in known)
    return row


def _figure(trained: Trained) -> float:
    return trained.best[1] if trained.shares is None else trained.shares.overall
