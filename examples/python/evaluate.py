"""Judge critics on the sample rollouts, or without one their stored values, beside the baselines.

    python examples/python/evaluate.py [CRITIC ...]

A critic is a run, a checkpoint or a Hugging Face directory.
"""

import sys
from pathlib import Path
from typing import Any

from critic_train import EvalSettings, evaluate, run_to_end

VAL = Path(__file__).parents[2] / "sample_data" / "val"
FIGURES = ("explained_variance", "explained_variance_within_group", "mse", "pearson")


def line(name: str, figures: dict[str, Any]) -> str:
    """One row of the table. A figure that does not exist, here or for these rollouts, is missing or None."""
    numbers = [figures.get(key) for key in FIGURES]
    return f"{name:<28}" + "".join(f"{'-':>10}" if number is None else f"{number:10.3f}" for number in numbers)


def main(*critics: str) -> None:
    settings = EvalSettings(data=[str(VAL)], model=list(critics), by=["task"])
    verdict = run_to_end(evaluate(settings)).result
    print(f"{'':<28}" + "".join(f"{title:>10}" for title in ("EV", "within", "MSE", "Pearson")))
    for name, figures in verdict["critics"].items():
        print(line(name, figures))
        for task, part in figures["by"]["task"].items():
            print(line(f"  task {task}", part))
    for name, figures in verdict["baselines"].items():
        print(line(name, figures))
    print(*verdict["words"], sep="\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
