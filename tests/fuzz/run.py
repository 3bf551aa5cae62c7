"""Read mutated shards, many of them, and count what came of each.

    python tests/fuzz/run.py --mutants 10000

Every mutant is read in a process of its own kind: it may not crash, hang, take more memory than twice what the sound
shards take, or be accepted where it should not be. Exit code 1 where any did. Linux only (it reads /proc).
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "core")]

SECONDS_A_MUTANT = 120.0
"""One that takes longer hangs; a busy machine is no hang."""
ADDRESS_SPACE = 16 * 2**30
"""So that a mutant that wants everything does not take the machine with it."""


def peak_bytes() -> int:
    """The most memory this process has had resident since `reset_peak`."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def reset_peak() -> None:
    """Start counting anew."""
    Path("/proc/self/clear_refs").write_text("5")


def work(numbers: list[int]) -> None:
    """In a worker: read the mutants of these numbers, a line of JSON for each; number -1 is all sound shards."""
    from corpus import seeds
    from mutate import mutant
    from shard_target import WrongError, one_file

    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    files = [content for _, content in seeds()]
    with tempfile.TemporaryDirectory() as folder:
        for number in numbers:
            reset_peak()
            began = time.process_time()
            try:
                if number < 0:
                    outcome = "+".join(sorted({one_file(content, folder) for content in files}))
                else:
                    outcome = one_file(mutant(files[number % len(files)], number, files), folder)
                told = ""
            except WrongError as error:
                outcome, told = "wrong", str(error)
            except BaseException as error:
                outcome, told = f"raised {type(error).__name__}", traceback.format_exc(limit=-4)
            record = {
                "number": number,
                "outcome": outcome,
                "told": told,
                "peak": peak_bytes(),
                "seconds": time.process_time() - began,
            }
            print(json.dumps(record), flush=True)


def watched(numbers: list[int]) -> list[dict[str, Any]]:
    """Records of all these mutants; one that ends or holds up its worker is recorded for that, and the rest go on."""
    records: list[dict[str, Any]] = []
    left = list(numbers)
    while left:
        command = [sys.executable, __file__, "--worker", ",".join(map(str, left))]
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            worker = subprocess.Popen(command, stdout=out, stderr=err)
            seen, moved = -1, time.monotonic()
            hung = False
            while worker.poll() is None:
                time.sleep(0.02)
                size = os.fstat(out.fileno()).st_size
                if size != seen:
                    seen, moved = size, time.monotonic()
                hung = time.monotonic() - moved > SECONDS_A_MUTANT
                if hung:
                    worker.kill()
            out.seek(0)
            done = [json.loads(line) for line in out.read().splitlines() if line.endswith("}")]
            err.seek(0)
            told = err.read()[-2000:]
        records += done
        left = left[len(done) :]
        if left:
            outcome = "hung" if hung else f"crashed ({worker.returncode})"
            records.append({"number": left.pop(0), "outcome": outcome, "told": told, "peak": 0, "seconds": 0.0})
    return records


def main() -> int:
    """Run, print the counts, name what went wrong."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--mutants", type=int, default=10_000)
    options.add_argument("--first", type=int, default=0)
    options.add_argument("--numbers", help="read these mutants instead, as in 5,17")
    options.add_argument("--worker", help=argparse.SUPPRESS)
    asked = options.parse_args()
    if asked.worker is not None:
        work([int(number) for number in asked.worker.split(",")])
        return 0
    (clean,) = watched([-1])
    if clean["outcome"] != "read":
        print(f"the sound shards are not even read: {clean['outcome']}\n{clean['told']}")
        return 1
    numbers = [int(number) for number in (asked.numbers or "").split(",") if number]
    numbers = numbers or list(range(asked.first, asked.first + asked.mutants))
    records = [record for start in range(0, len(numbers), 1000) for record in watched(numbers[start : start + 1000])]
    counts = Counter(record["outcome"] for record in records)
    heavy = [record for record in records if record["peak"] > 2 * clean["peak"]]
    wrong = [record for record in records if record["outcome"] not in ("read", "refused", "unchecked")]
    print(f"sound shards: {clean['outcome']}, peak {clean['peak'] / 1e6:.0f} MB")
    print(f"{len(records)} mutants: " + ", ".join(f"{count} {outcome}" for outcome, count in counts.most_common()))
    most = max(records, key=lambda record: record["peak"])
    slowest = max(records, key=lambda record: record["seconds"])
    print(f"peak {most['peak'] / 1e6:.0f} MB (mutant {most['number']}), above twice the sound shards': {len(heavy)}")
    print(f"slowest {slowest['seconds']:.2f} s (mutant {slowest['number']})")
    for record in wrong[:20] + heavy[:10]:
        print(f"mutant {record['number']}: {record['outcome']}, {record['peak'] / 1e6:.0f} MB\n{record['told']}")
    return 1 if wrong or heavy else 0


if __name__ == "__main__":
    sys.exit(main())
