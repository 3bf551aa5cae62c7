"""What epochs cost once the states of a frozen trunk are kept: CPU time of the first beside that of every later one.

The first epoch goes through the whole trunk and then trains; the ones after it train only. With the last K of L layers
trained, about L / (3 K) + 1 is what arithmetic allows: a layer costs one part forward and two backward. First, the
exact value head: all of `fit --train head`, beside all of `predict` over the same rollouts (--only exact: no more). Set
BENCH_MODEL and BENCH_DATA to measure on a model and rollouts of yours.
"""

import os
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from bench.entries.memory import write_shards
from bench.entry import Options, Table
from critic_train.events import Progress, StepEnded
from critic_train.model_files.config import preset_config
from critic_train.predict.predict import predict
from critic_train.settings import FitSettings, PredictSettings
from critic_train.stopping import StopRequest
from critic_train.training.fit import fit
from critic_train.weights.loading import build_critic

NAME = "frozen"
TITLE = "Epochs of a frozen trunk, CPU seconds"
DEVICES = ("cpu",)

EPOCHS = {"quick": 2, "usual": 5, "full": 8}
ROLLOUTS = 128
TRAINED = (("head", 1), ("last-1", 1), ("last-2", 1), ("head", 2), ("last-2", 2))
"""What learns, on how many processes."""


def run(options: Options) -> Table:
    """Train on a random transformer of twelve layers, or on BENCH_MODEL."""
    table = Table(
        columns={
            "train": "",
            "ranks": "d",
            "first epoch": ".2f",
            "later epochs": ".4f",
            "first / later": ".1f",
            "exact head": ".2f",
            "predict": ".2f",
            "exact head / predict": ".3f",
        }
    )
    with tempfile.TemporaryDirectory() as folder:
        data, model = os.environ.get("BENCH_DATA"), os.environ.get("BENCH_MODEL")
        if data is None:
            Path(folder, "drawn").mkdir()
            write_shards(Path(folder, "drawn"), 1)
            data = str(Path(folder, "few.parquet"))
            pq.write_table(pq.read_table(Path(folder, "drawn")).slice(0, ROLLOUTS), data)
        if model is None:
            model = str(Path(folder, "model"))
            config = preset_config("small", max_token_id=999, max_length=512)
            config.num_hidden_layers = 12
            build_critic(config, seed=0).trunk.save_pretrained(model)
        for _ in range(options.rounds):
            table.add({"train": "exact head, no epoch", "ranks": 1, **solved_and_predicted(data, model, folder)})
        for train, ranks in () if options.only == "exact" else TRAINED:
            out = str(Path(folder, f"{train}-{ranks}"))
            first, later = seconds(data, model, train, EPOCHS[options.size], out, ranks)
            figures = {"first epoch": first, "later epochs": later, "first / later": first / later}
            table.rows.append({"train": train, "ranks": ranks, **figures})
    return table


def seconds(data: str, model: str, train: str, epochs: int, out: str, ranks: int) -> tuple[float, float]:
    """CPU seconds of rank 0 in the first epoch, states and steps, and the median of those after it."""
    spent: dict[str, float] = defaultdict(float)
    settings = FitSettings(
        data=[data],
        out=out,
        model=model,
        train=train,
        epochs=epochs,
        nproc=ranks,
        old_values="none",
        val_fraction=0.0,
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
    return first, statistics.median(spent[f"epoch {epoch}"] for epoch in range(1, epochs))


def solved_and_predicted(data: str, model: str, folder: str) -> dict[str, float]:
    """CPU seconds of `fit --train head`, and of `predict` with the critic that it gives over the same rollouts."""
    with tempfile.TemporaryDirectory(dir=folder) as here:
        common = {"data": [data], "device": "cpu"}
        run: Any = {"out": f"{here}/run", "model": model, "train": "head", "val_fraction": 0.0, "no_report": True}
        began = time.process_time()
        list(fit(FitSettings(**common, **run)))
        solved = time.process_time()
        files: Any = {"model": f"{here}/run", "to": f"{here}/predicted"}
        list(predict(PredictSettings(**common, **files)))
        solving, predicting = solved - began, time.process_time() - solved
    return {"exact head": solving, "predict": predicting, "exact head / predict": solving / predicting}
