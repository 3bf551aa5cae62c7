"""The same steps on one process and on several: wall time, since processes wait for each other."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.entry import Options, Table
from critic_train.settings import FitSettings
from critic_train.stopping import StopRequest
from critic_train.training.fit import fit

NAME = "scaling"
TITLE = "Steps on several processes (--nproc), the sample's rollouts"
DEVICES = ("cpu", "cuda")

SAMPLE = Path(__file__).parents[2] / "sample_data" / "train"
WARM_UP = 3


def run(options: Options) -> Table:
    """Run a few steps on 1, 2, 4, ... processes: as many as there are GPUs, or cores."""
    most = torch.cuda.device_count() if options.device.type == "cuda" else len(os.sched_getaffinity(0))
    steps = WARM_UP + (5 if options.quick else 20)
    table = Table(columns={"processes": "", "seconds a step": ".3f", "of one": ".2f", "furthest loss": ".1e"})
    alone: dict[str, Any] = {}
    for processes in (2**power for power in range(most.bit_length())):
        found = measured(options, processes, steps)
        alone = alone or found
        table.rows.append(
            {
                "processes": processes,
                "seconds a step": found["seconds"],
                "of one": alone["seconds"] / found["seconds"],
                "furthest loss": float(np.abs(np.divide(found["losses"], alone["losses"]) - 1).max()),
            }
        )
    table.notes = [
        f"preset small, 64 rollouts a step, medians of {steps - WARM_UP} steps, one thread a process",
        "furthest loss: the largest relative difference of a step's loss to that on one process",
    ]
    return table


def measured(options: Options, processes: int, steps: int) -> dict[str, Any]:
    """The median time of a step, and every loss."""
    with tempfile.TemporaryDirectory() as folder:
        settings = FitSettings(
            data=[str(SAMPLE)],
            out=f"{folder}/run",
            preset="small",
            max_steps=steps,
            val_fraction=0.0,
            device=options.device.type,
            nproc=processes,
            no_report=True,
        )
        for _ in fit(settings, StopRequest()):
            pass
        timings = [json.loads(line) for line in (Path(folder) / "run" / "timings.jsonl").read_text().splitlines()]
        records = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
    return {
        "seconds": float(np.median([record["step_seconds"] for record in timings[WARM_UP:]])),
        "losses": [record["value_loss"] for record in records if record["event"] == "step"],
    }
