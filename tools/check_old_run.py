"""Check that runs which an older critic-train began are resumed, read and verified by this one.

    python tools/check_old_run.py OLD_CHECKOUT

The older code trains once without a stop, and begins two more runs that are stopped in the middle: one by SIGKILL, one
by SIGTERM. Each of these is copied; the older code finishes one copy and the code of this checkout the other. Weights,
moments and the figures of every step must be those of the undisturbed run, to the bit. Of evaluations, the position and
the result, this code must have every figure that the older code has, with the same value but for the last digits of a
sum; intervals, by whatever method, may be others, and new figures may stand beside. Then `report`, `eval`
and `verify` of this checkout read what the older code wrote.

Prints one line for each check, and exits with 1 where one fails.
"""

import argparse
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

NEW = Path(__file__).resolve().parents[1]
STEPS = 12
STOP_AT = 6
PATIENCE_SECONDS = 300.0
SAME_BYTES = ("model.safetensors", "optimizer.safetensors")
MAY_CHANGE = ("interval", "elapsed_seconds", "metrics_bytes")
"""Parts of the names of figures that are not compared: a method's choice, or what follows from time and new figures."""
LAST_DIGITS = 1e-12
"""Relative difference that another order of summation leaves in float64."""
RUN = "run"
VARIANTS = {
    "column": [],
    "epoch": ["--old-values", "epoch", "--eval-every", "3"],
}
"""Name -> flags of the run beyond the common ones."""


def command(*arguments: str) -> list[str]:
    """A call of the program."""
    return [sys.executable, "-m", "critic_train_cli", *arguments]


def fit(flags: list[str]) -> list[str]:
    """The command that every start of a run uses, in a folder of its own, so that all paths in its files are equal."""
    data = NEW / "sample_data"
    fixed = ["--data", str(data / "train"), "--val-data", str(data / "val"), "--preset", "tiny", "--device", "cpu"]
    fixed += ["--max-steps", str(STEPS), "--checkpoint-every", "4", "--keep", "9", "--no-report", "--out", RUN]
    return command("fit", *fixed, *flags)


def environment(checkout: Path) -> dict[str, str]:
    """The environment in which the code of a checkout runs; one thread, so that sums have one order."""
    path = os.pathsep.join([str(checkout / "core"), str(checkout / "cli")])
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def run(checkout: Path, arguments: list[str], folder: Path) -> "subprocess.CompletedProcess[str]":
    """Run a command with the code of a checkout, to its end."""
    return subprocess.run(arguments, cwd=folder, env=environment(checkout), capture_output=True, text=True)


def stop_in_the_middle(checkout: Path, arguments: list[str], folder: Path, number: signal.Signals) -> None:
    """Begin a run and send it a signal once it has logged some steps."""
    metrics = folder / RUN / "metrics.jsonl"
    process = subprocess.Popen(
        arguments,
        cwd=folder,
        env=environment(checkout),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    until = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < until and process.poll() is None:
        if metrics.is_file() and metrics.read_text().count('"event": "step"') >= STOP_AT:
            break
        time.sleep(0.01)
    process.send_signal(number)
    process.wait(PATIENCE_SECONDS)
    if (folder / RUN / "result.json").exists():
        raise SystemExit("the run ended before it was stopped; a larger STEPS is needed")


def final_state(folder: Path) -> dict[str, Any]:
    """What must be equal of two runs that ended at the same step: bytes to the bit, the rest as `agrees` says."""
    out = folder / RUN
    last = sorted((out / "checkpoints").glob("step-*"))[-1]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    state: dict[str, Any] = {name: (last / name).read_bytes() for name in SAME_BYTES}
    return state | {
        "steps of metrics.jsonl": json.dumps([line for line in lines if line["event"] == "step"]).encode(),
        "evaluations of metrics.jsonl": [line for line in lines if line["event"] != "step"],
        "trainer.json": json.loads((last / "trainer.json").read_text()),
        "result.json": json.loads((out / "result.json").read_text()),
        "best": (out / "best").resolve().name,
    }


def agrees(older: Any, this: Any) -> bool:
    """Whether every figure of the older code stands in what this code wrote."""
    if isinstance(older, dict):
        compared = [name for name in older if not any(part in name for part in MAY_CHANGE)]
        return isinstance(this, dict) and all(name in this and agrees(older[name], this[name]) for name in compared)
    if isinstance(older, list):
        return isinstance(this, list) and len(older) == len(this) and all(map(agrees, older, this))
    if isinstance(older, float) and isinstance(this, float):
        return math.isclose(older, this, rel_tol=LAST_DIGITS, abs_tol=LAST_DIGITS)
    return bool(older == this)


def differences(expected: dict[str, Any], state: dict[str, Any]) -> str:
    """The names of what differs."""
    return ", ".join(name for name in expected if not agrees(expected[name], state[name]))


class Checks:
    """Prints checks, and remembers whether one failed."""

    def __init__(self) -> None:
        self.failed = False

    def check(self, name: str, fault: str) -> None:
        """Report a check; `fault` is empty where it holds."""
        print(f"{'FAILED' if fault else 'ok':7}{name}{': ' + fault if fault else ''}", flush=True)
        self.failed = self.failed or bool(fault)


def check_variant(name: str, flags: list[str], old: Path, folder: Path, checks: Checks) -> None:
    """Check that runs with these flags are resumed to the bit.

    Args:
        name: of the variant.
        flags: beyond the common ones.
        old: the older checkout.
        folder: an empty one; the undisturbed run stands in `undisturbed` afterwards.
        checks: takes the outcome.
    """
    undisturbed = folder / "undisturbed"
    undisturbed.mkdir(parents=True)
    done = run(old, fit(flags), undisturbed)
    checks.check(f"{name}: the older code trains", done.stderr if done.returncode else "")
    expected = final_state(undisturbed)
    for number in (signal.SIGKILL, signal.SIGTERM):
        stopped = folder / number.name
        stopped.mkdir()
        stop_in_the_middle(old, fit(flags), stopped, number)
        for which, checkout in (("older", old), ("this", NEW)):
            copy = folder / f"{number.name}-{which}"
            shutil.copytree(stopped, copy, symlinks=True)
            done = run(checkout, fit(flags), copy)
            fault = done.stderr if done.returncode else differences(expected, final_state(copy))
            checks.check(f"{name}: stopped by {number.name}, finished by {which} code", fault)
    again = run(NEW, [*fit(flags), "--json"], undisturbed)
    status = json.loads(again.stdout)["status"] if again.returncode == 0 else again.stderr
    checks.check(f"{name}: this code knows a finished run", "" if status == "already finished" else status)


def check_readers(folder: Path, checks: Checks) -> None:
    """Check that report, eval and verify read a run of the older code in a folder."""
    readers = {
        "report": ["report", RUN, "--to", "page.html"],
        "eval": ["eval", "--model", RUN, "--data", str(NEW / "sample_data" / "val"), "--json"],
        "verify": ["verify", RUN],
    }
    for name, arguments in readers.items():
        done = run(NEW, command(*arguments), folder)
        checks.check(f"{name} reads it", done.stderr if done.returncode else "")
    if not (folder / "page.html").is_file():
        checks.check("report writes a page", "there is none")


def main() -> int:
    """Run all checks; returns 1 where one fails."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", maxsplit=1)[0])
    parser.add_argument("old", type=Path, help="a checkout of an older commit")
    old = parser.parse_args().old.resolve()
    if not (old / "core" / "critic_train").is_dir():
        raise SystemExit(f"{old} is no checkout of critic-train")
    checks = Checks()
    with tempfile.TemporaryDirectory(prefix="old-run-") as folder:
        for name, flags in VARIANTS.items():
            check_variant(name, flags, old, Path(folder, name), checks)
        check_readers(Path(folder, "column", "undisturbed"), checks)
        check_readers(Path(folder, "epoch", "SIGTERM"), checks)
    return 1 if checks.failed else 0


if __name__ == "__main__":
    sys.exit(main())
