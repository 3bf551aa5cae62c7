"""Train a small critic on the sample rollouts, and print what happens.

    python examples/python/fit.py [OUT] [STEPS]

Ctrl-C writes a checkpoint and ends; the same command goes on from there.
"""

import signal
import sys
from pathlib import Path

from critic_train import CheckpointSaved, EvaluationEnded, FitSettings, Notice, RunEnded, StepEnded, StopRequest, fit

SAMPLE = Path(__file__).parents[2] / "sample_data"


def main(out: str = "runs/example", steps: str = "60") -> None:
    settings = FitSettings(
        data=[str(SAMPLE / "train")],
        val_data=[str(SAMPLE / "val")],
        out=out,
        preset="tiny",
        max_steps=int(steps),
    )
    stop = StopRequest()
    signal.signal(signal.SIGINT, lambda number, frame: setattr(stop, "signal_number", number))
    for event in fit(settings, stop):
        match event:
            case Notice():
                print(f"{event.level}: {event.message}")
            case StepEnded():
                print(f"step {event.step}: loss {event.metrics['value_loss']:.4f}")
            case EvaluationEnded():
                print(f"step {event.step}: held-out explained variance {event.metrics['explained_variance']:.3f}")
            case CheckpointSaved():
                print(f"step {event.step}: {event.path}")
            case RunEnded():
                print(f"{event.status}: the best critic is {event.result.get('best')}")


if __name__ == "__main__":
    main(*sys.argv[1:])
