"""What epochs cost once the states of a frozen trunk are kept: CPU time of the first beside that of every later one.

    python bench/frozen.py --model SmolLM2-135M/ --data rollouts/ --train head last-2

The first epoch goes through the whole trunk and then trains; the ones after it train only. The figure is the ratio of
the two.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections import defaultdict

from critic_train.events import Progress, StepEnded
from critic_train.settings import FitSettings
from critic_train.stopping import StopRequest
from critic_train.training.fit import fit


def measure(model: str, data: list[str], train: str, epochs: int, precision: str) -> dict[str, object]:
    """CPU seconds of the first epoch (states and steps) and of those after it."""
    spent: dict[str, float] = defaultdict(float)
    with tempfile.TemporaryDirectory() as out:
        settings = FitSettings(
            data=data,
            out=out,
            model=model,
            train=train,
            epochs=epochs,
            old_values="none",
            val_fraction=0.0,
            precision=precision,  # type: ignore[arg-type]
            no_report=True,
            device="cpu",
        )
        before = time.process_time()
        for event in fit(settings, StopRequest()):
            now = time.process_time()
            if isinstance(event, Progress) and "frozen" in event.stage and event.done:
                spent["states"] += now - before
            elif isinstance(event, StepEnded):
                spent[f"epoch {event.epoch}"] += now - before
            before = now
    first = spent["states"] + spent["epoch 0"]
    later = statistics.median(spent[f"epoch {epoch}"] for epoch in range(1, epochs))
    return {"train": train, "first_seconds": first, "later_seconds": later, "ratio": first / later}


def main() -> None:
    """Print a line for each kind of training, and write all of them as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a Hugging Face directory")
    parser.add_argument("--data", required=True, nargs="+", help="rollouts")
    parser.add_argument("--train", nargs="+", default=["head", "last-2"])
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--json", help="a file for the figures")
    asked = parser.parse_args()
    found = [measure(asked.model, asked.data, train, asked.epochs, asked.precision) for train in asked.train]
    for row in found:
        print(
            f"{row['train']:>8}: first epoch {row['first_seconds']:.2f} s, later ones {row['later_seconds']:.4f} s, "
            f"ratio {row['ratio']:.1f}"
        )
    if asked.json:
        with open(asked.json, "w", encoding="utf-8") as file:
            json.dump(found, file, indent=2)


if __name__ == "__main__":
    main()
