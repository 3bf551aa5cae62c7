"""What it costs that a run is never lost: syncs, digests, manifests, the lock, clearing away.

    OMP_NUM_THREADS=1 python bench/durability.py --data rollouts/ --steps 100

One run of `fit --preset tiny` with a checkpoint every 100 steps; the CPU and wall time inside those parts is taken
apart from all the rest of the run, and its share of the rest is printed. The files themselves would be written anyway.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from critic_train.run import checkpoint, lock, manifest, storage
from critic_train.run import checkpoint as keeping
from critic_train.run import run_directory as directory
from critic_train.run import storage as durable
from critic_train.settings import FitSettings
from critic_train.stopping import StopRequest
from critic_train.training.fit import fit

PARTS: list[tuple[Any, str]] = [
    *((module, "sync_directory") for module in (storage, durable, checkpoint, directory)),
    *((module, "sync_file") for module in (storage, checkpoint)),
    (storage.File, "sync"),
    (checkpoint, "write_manifest"),
    (checkpoint, "inspect"),
    (keeping, "inspect"),
    (manifest, "sha256"),
    (lock.Lock, "__enter__"),
    (lock.Lock, "__exit__"),
]


class Clock:
    """Time inside the outermost of the wrapped calls."""

    def __init__(self) -> None:
        self.cpu = self.wall = 0.0
        self.calls = self.depth = 0

    def around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """The same call, timed."""

        def timed(*arguments: Any, **more: Any) -> Any:
            cpu, wall = time.process_time(), time.perf_counter()
            self.depth += 1
            try:
                return call(*arguments, **more)
            finally:
                self.depth -= 1
                if not self.depth:
                    self.cpu += time.process_time() - cpu
                    self.wall += time.perf_counter() - wall
                    self.calls += 1

        return timed


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, nargs="+")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=16)
    chosen = parser.parse_args()
    clock = Clock()
    for owner, name in PARTS:
        setattr(owner, name, clock.around(getattr(owner, name)))
    with tempfile.TemporaryDirectory() as temporary:
        settings = FitSettings(
            data=chosen.data,
            out=str(Path(temporary) / "run"),
            preset="tiny",
            batch_size=chosen.batch_size,
            max_steps=chosen.steps,
            eval_every=chosen.steps,
            checkpoint_every=100,
            device="cpu",
            no_report=True,
        )
        cpu, wall = time.process_time(), time.perf_counter()
        for _ in fit(settings, StopRequest()):
            pass
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    rest_cpu, rest_wall = cpu - clock.cpu, wall - clock.wall
    result = {
        "calls": clock.calls,
        "cpu_seconds": round(clock.cpu, 4),
        "rest_cpu_seconds": round(rest_cpu, 2),
        "cpu_ratio": round(cpu / rest_cpu, 4),
        "wall_seconds": round(clock.wall, 3),
        "rest_wall_seconds": round(rest_wall, 2),
        "wall_ratio": round(wall / rest_wall, 4),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
