"""Host memory of `fit`, `eval` and `predict` against the size of the data: it should not grow.

Random shards of each size are written to a temporary folder; `critic-train fit --preset tiny --max-steps 3`,
`critic-train eval` and `critic-train predict` with that critic run on them as processes of their own, and the most
resident memory each held is shown. predict computes every token, so it is left out above PREDICTED megabytes.
"""

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bench.entry import Options, Table

NAME = "memory"
TITLE = "Host memory against the size of the data, MB"
DEVICES = ("cpu",)

MEGABYTES = {"quick": (1,), "usual": (10, 100), "full": (10, 100, 1000)}
PREDICTED = 30
VOCABULARY = 1000
PROMPT, RESPONSE, RESPONSES = 100, 300, 8
ROWS_A_GROUP = 1000


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


def run(options: Options) -> Table:
    """Measure the commands at every size."""
    program = [sys.executable, "-m", "critic_train_cli"]
    table = Table(columns={"shards": ".0f", "rollouts": ",", "fit": ".0f", "eval": ".0f", "predict": ".0f"})
    for megabytes in MEGABYTES[options.size]:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            data = folder / "rollouts"
            data.mkdir()
            written, rollouts = write_shards(data, megabytes)
            row: dict[str, Any] = {"shards": written / 10**6, "rollouts": rollouts}
            for name, words in commands(data, folder).items():
                if name != "predict" or megabytes <= PREDICTED:
                    row[name] = peak_of([*program, *words, "--quiet"])
            table.rows.append(row)
    for name in ("fit", "eval", "predict"):
        found = [row[name] for row in table.rows if name in row]
        table.notes.append(f"{name}: {max(found) / min(found) - 1:.1%} between the least and the most")
    return table
