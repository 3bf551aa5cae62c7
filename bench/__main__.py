"""Measure critic-train: `python -m bench`, or some of it by name: `python -m bench step data`.

Prints a table for each benchmark with the machine and the versions; `--json FILE` keeps all of it. Times on a CPU are
CPU time on one thread, so that other work on the machine does not count; things that are compared take turns, and
medians are shown. On CUDA they are wall time between synchronisations. Inputs are random, never zeros.
"""

import argparse
import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from bench.entry import Options, entries
from bench.measuring import machine
from critic_train.model.compute import resolve_device


def main() -> int:
    """Measure and print; 2 where a name is unknown."""
    known = entries()
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(known) + "; all that the device can run")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", choices=("quick", "usual", "full"), default="usual")
    parser.add_argument("--minutes", type=float, default=11.0, help="how long `device` may take")
    parser.add_argument("--json", type=Path)
    critics = parser.add_argument_group("quality, ablation")
    critics.add_argument("--rollouts", type=Path, help="a folder with train and val, in place of drawn worlds")
    critics.add_argument("--model", type=Path, help="what critics of --rollouts start from")
    critics.add_argument("--keep", type=Path, help="where drawn worlds are kept for the next time")
    critics.add_argument(
        "--world", choices=("chain", "adding", "policy"), help="the kind of drawn worlds, in place of all"
    )
    critics.add_argument("--only", choices=("fit", "yardstick", "exact"), help="of quality; of frozen, exact")
    critics.add_argument("--yardstick-preset", choices=("tiny", "small"), default="tiny", help="its size")
    critics.add_argument("--yardstick-steps", type=int, help="end the yardstick after so many steps")
    chosen = parser.parse_args()
    unknown = [name for name in chosen.names if name not in known]
    if unknown:
        print(f"no benchmark {unknown[0]!r}; there are {', '.join(known)}", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    options = Options(
        device=resolve_device(chosen.device),
        rounds=chosen.rounds,
        size=chosen.size,
        rollouts=chosen.rollouts,
        model=chosen.model,
        keep=chosen.keep,
        world=chosen.world,
        only=chosen.only,
        yardstick_preset=chosen.yardstick_preset,
        yardstick_steps=chosen.yardstick_steps,
        minutes=chosen.minutes,
        json=chosen.json,
    )
    about = machine(options)
    print(", ".join(f"{name} {value}" for name, value in about.items()), flush=True)
    kept = []
    for name in chosen.names or known:
        entry = known[name]
        if not chosen.names and options.device.type not in entry.DEVICES:
            where = f"it runs on {' and '.join(entry.DEVICES)}" if entry.DEVICES else "it runs where it is named"
            print(f"\n{name}: left out, {where}", flush=True)
            continue
        began = time.perf_counter()
        table = entry.run(options)
        kept.append({"name": name, "title": entry.TITLE, **asdict(table), "seconds": time.perf_counter() - began})
        print("\n" + "\n".join([f"{name}: {entry.TITLE}", *table.lines()]), flush=True)
    if chosen.json:
        chosen.json.write_text(json.dumps({"machine": about, "benchmarks": kept}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
