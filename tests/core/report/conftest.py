"""Runs and evaluations as they lie on disk, made without training: real verdicts on random values."""

import json
import random
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import readable_rollouts

sys.path.insert(0, str(Path(__file__).parent))

from critic_train.evaluation.examples import Examples
from critic_train.evaluation.judge import Judge
from critic_train.evaluation.summary_text import summary_text
from critic_train.run.manifest import versions
from critic_train.settings import EvalSettings, FitSettings, as_dict
from critic_train.training.evaluator import OF_THE_DATA

MakeRun = Callable[..., Path]


def verdict_of(names: list[str], *, seed: int = 0, noise: float = 0.5, uid: str = "prompt") -> dict[str, Any]:
    """A verdict on critics that see the return through noise, with rollouts to read."""
    rollouts = readable_rollouts(12, seed=seed)
    draw = np.random.default_rng(seed)
    right = draw.random(len(rollouts)) < np.where(rollouts.group % 2 == 1, 0.7, 0.3)
    rollouts = replace(rollouts, returns=np.repeat(right.astype(np.float32), rollouts.lengths))
    task = np.array(["sum" if group % 3 else "word" for group in rollouts.group.tolist()])
    rollouts = replace(rollouts, labels={"task": task})

    def uids(rows: Any) -> dict[int, str | None]:
        return {row: f"{uid}-{row // 4}" for row in rows}

    judge = Judge(names, by=["task"], resamples=200, uids=uids)
    examples = Examples(seed=seed, uids=uids)
    values = {
        name: rollouts.returns + draw.normal(0, noise, len(rollouts.returns)).astype(np.float32) for name in names
    }
    judge.add(rollouts, values)
    examples.add(rollouts, values)
    verdict = judge.verdict()
    return verdict | {"words": summary_text(verdict), "examples": examples.records()}


def write_run(
    folder: Path, name: str, *, steps: int = 20, evaluate: bool = True, uid: str = "prompt", **changes: Any
) -> Path:
    """A run directory, as after `steps` steps."""
    run = folder / name
    run.mkdir(parents=True)
    settings = FitSettings(**({"data": ["rollouts"], "out": str(run), "preset": "tiny"} | changes))
    record = {
        "settings": as_dict(settings),
        "data": {"files": [{"name": "a.parquet", "bytes": 10, "rows": 3}], "digest": "ab12" * 16},
        "val_data": None,
        "model": None,
        "versions": versions(),
        "resolved": {"rollouts": 48, "steps": steps, "device": "cpu"},
    }
    (run / "run.json").write_text(json.dumps(record))
    draw = random.Random(steps)
    lines, timings = [], []
    for step in range(steps + 1):
        if step:
            figures = {"value_loss": 0.2 / step**0.3 + 0.02 * draw.random(), "clipfrac": 0.1 * draw.random()}
            figures |= {"saturation": 0.05 * draw.random(), "grad_norm": draw.random(), "lr": 1e-3 / step}
            lines.append({"event": "step", "step": step, "epoch": 0, **figures})
            speed = {"rollout_tokens_per_second": 1e4 + step, "computed_tokens_per_second": 5e3 + step}
            timings.append({"step": step, "step_seconds": 0.1, **speed})
        if evaluate and step % max(1, steps // 4) == 0:
            verdict = verdict_of(["critic"], noise=2.0 / (1 + step), uid=uid)
            metrics = verdict["critics"]["critic"] | {"baselines": verdict["baselines"]}
            metrics |= {name: verdict[name] for name in OF_THE_DATA}
            lines.append({"event": "evaluation", "step": step, "epoch": 0, **metrics})
            (run / "evaluation.json").write_text(json.dumps({"step": step, "best": True, **verdict}))
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "timings.jsonl").write_text("".join(json.dumps(line) + "\n" for line in timings))
    return run


def write_evaluation(folder: Path, name: str, critics: list[str], **changes: Any) -> Path:
    """A file of eval's JSON."""
    verdict = verdict_of(critics, **changes)
    settings = EvalSettings(data=["held_out"], model=critics)
    first = {k: v for k, v in verdict["critics"][critics[0]].items() if isinstance(v, float | list)}
    told = {**first, "data": ["held_out"], "data_digest": "cd34" * 16, "models": critics, **verdict}
    path = folder / name
    path.write_text(json.dumps(told | {"settings": as_dict(settings), "versions": versions()}))
    return path


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """`make_run("a", steps=20)` -> a run directory."""
    return partial(write_run, tmp_path)


@pytest.fixture
def make_evaluation(tmp_path: Path) -> MakeRun:
    """`make_evaluation("x.json", ["a", "b"])` -> a file of eval's JSON."""
    return partial(write_evaluation, tmp_path)


@pytest.fixture(scope="session")
def compared(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs with different settings, and an evaluation of two critics."""
    folder = tmp_path_factory.mktemp("compared")
    evaluation = write_evaluation(folder, "held_out.json", ["m/x", "m/y~1"])
    return [write_run(folder, "a"), write_run(folder, "b", lr=0.1), evaluation]


@pytest.fixture(scope="session")
def compared_html(compared: list[Path]) -> str:
    """Their page."""
    from critic_train.report.page import render
    from critic_train.report.report_sources import read_sources

    return render(read_sources([str(path) for path in compared]))
