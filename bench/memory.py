"""Host memory of `fit`, `eval` and `predict` against the size of the data: it should not grow.

    python bench/memory.py --megabytes 10 100 1000

Random shards of each size are written to a temporary folder; `critic-train fit --preset tiny --max-steps 3`,
`critic-train eval` and `critic-train predict` with that critic run on them as processes of their own, and the most
resident memory each held is printed. --only chooses among them: predict computes every token and takes the longest.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

VOCABULARY = 1000
PROMPT, RESPONSE, RESPONSES = 100, 300, 8
ROWS_A_GROUP = 1000
COMMANDS = ("fit", "eval", "predict")


def write_shards(folder: Path, megabytes: int) -> tuple[int, int]:
    """Write shards until they weigh so much; returns (bytes, rollouts)."""
    rng = np.random.default_rng(0)
    rollouts = written = 0
    while written < megabytes * 10**6:
        groups = ROWS_A_GROUP // RESPONSES
        length = PROMPT + RESPONSE
        prompts = rng.integers(1, VOCABULARY, (groups, 1, PROMPT)).repeat(RESPONSES, axis=1)
        responses = rng.integers(1, VOCABULARY, (groups, RESPONSES, RESPONSE))
        ids = np.concatenate([prompts, responses], axis=2).reshape(-1, length).astype(np.int32)
        mask = np.broadcast_to(np.arange(length) >= PROMPT, ids.shape)
        numbers = rng.normal(size=(2, *ids.shape)).astype(np.float32)
        columns = {"input_ids": ids, "response_mask": mask, "values": numbers[0], "returns": numbers[1]}
        table = {
            name: pa.FixedSizeListArray.from_arrays(pa.array(column.ravel()), length)
            for name, column in columns.items()
        }
        table["uid"] = pa.array([f"{rollouts}-{row // RESPONSES}" for row in range(len(ids))])
        path = folder / f"part-{rollouts:08d}.parquet"
        pq.write_table(pa.table(table), path, compression="zstd")
        rollouts += len(ids)
        written += path.stat().st_size
    return written, rollouts


def peak_of(command: list[str]) -> float:
    """Run a command; the most resident memory of it, in MB. Children are measured one at a time, largest last."""
    code = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL); "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    done = subprocess.run([sys.executable, "-c", code, *command], check=True, capture_output=True, text=True)
    return int(done.stdout) * (1 if sys.platform == "darwin" else 1024) / 10**6


def commands(data: Path, folder: Path) -> dict[str, list[str]]:
    """Name -> arguments of each command, in the order in which they can run."""
    run, read = str(folder / "run"), ["--data", str(data)]
    fit = ["--out", run, "--preset", "tiny", "--max-steps", "3", "--val-fraction", "0", "--device", "cpu"]
    predict = ["--model", run, "--to", str(folder / "next"), "--device", "cpu"]
    return {"fit": ["fit", *read, *fit], "eval": ["eval", *read], "predict": ["predict", *read, *predict]}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[10, 100])
    parser.add_argument("--only", nargs="+", choices=COMMANDS, default=COMMANDS)
    chosen = parser.parse_args()
    program = [sys.executable, "-m", "critic_train_cli"]
    print(f"{'shards':>10} {'rollouts':>9} " + " ".join(f"{f'{name} peak':>12}" for name in chosen.only))
    for megabytes in chosen.megabytes:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            data = folder / "rollouts"
            data.mkdir()
            written, rollouts = write_shards(data, megabytes)
            needed = {*chosen.only, "fit"} if "predict" in chosen.only else set(chosen.only)
            peaks = {
                name: peak_of([*program, *words, "--quiet"])
                for name, words in commands(data, folder).items()
                if name in needed
            }
            shown = " ".join(f"{peaks[name]:9.0f} MB" for name in chosen.only)
            print(f"{written / 10**6:7.0f} MB {rollouts:9} {shown}", flush=True)


if __name__ == "__main__":
    main()
