"""`fit`, stopped and resumed, `eval` and `predict` on real rollouts, on SmolLM2-135M's shape with random weights."""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import transformers

from bench.device.telling import tell

ROOT = Path(__file__).parents[2]
DATA = ROOT / "sample_data"
SMOLLM2 = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49_152,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
SMALL = {"hidden_size": 192, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 3}
STEPS = 6


def run(quick: bool) -> None:
    """A run in one go, one that stops halfway, and what comes after."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = folder / "model"
        config = transformers.LlamaConfig(**{**SMOLLM2, **(SMALL if quick else {})})
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(model)
        whole = fit(folder / "whole", model, STEPS)
        fit(folder / "resumed", model, STEPS // 2, "--no-report")
        resumed = fit(folder / "resumed", model, STEPS, "--no-report")
        off = max((abs(a - b) / max(abs(a), 1e-9) for a, b in zip(whole, resumed, strict=True)), default=0.0)
        tell(f"{len(whole)} steps in one go, and stopped after {STEPS // 2}: losses differ by {off:.1e}", off=off)
        tell("losses " + ", ".join(f"{loss:.4f}" for loss in whole))
        held_out = DATA / "val"
        command("eval", "--model", folder / "whole", "--data", held_out)
        command("predict", "--model", folder / "whole", "--data", held_out, "--to", folder / "predicted")
        fit(folder / "compiled", model, STEPS, "--compile", "--no-report")


def fit(out: Path, model: Path, steps: int, *more: str) -> list[float]:
    """Train for some steps; returns the losses that are on record."""
    length = ("--max-steps", steps, "--checkpoint-every", STEPS, "--eval-every", STEPS, "--batch-size", 128)
    same = ("--lr-schedule", "constant", "--warmup-steps", 0, "--head-init", "mean", "--val-fraction", 0.05)
    command("fit", "--data", DATA / "train", "--model", model, "--out", out, *length, *same, *more)
    chosen = json.loads((out / "run.json").read_text())
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    rates = [json.loads(line) for line in (out / "timings.jsonl").read_text().splitlines()]
    tell(f"  chose {chosen.get('chosen')}, attention {chosen['resolved']['attention']}", last=rates[-1:])
    return [line["value_loss"] for line in lines if line["event"] == "step"]


def command(*arguments: Any) -> None:
    """Run critic-train, and tell how it ended."""
    began = time.monotonic()
    path = os.pathsep.join([str(ROOT / "core"), str(ROOT / "cli"), os.environ.get("PYTHONPATH", "")])
    words = [sys.executable, "-m", "critic_train_cli", *map(str, arguments), "--device", "cuda"]
    ended = subprocess.run(words, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False)
    how = f"{arguments[0]}: exit code {ended.returncode} after {time.monotonic() - began:.1f} s"
    tell(how, output=ended.stdout[-1500:], errors=ended.stderr[-3000:])
    if ended.returncode:
        tell(f"  {ended.stderr.strip()[-400:]}")
        raise SystemExit(1)
