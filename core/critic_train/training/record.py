"""What a run says of itself: run.json, held against an earlier start, and its result."""

import time
import uuid
from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch

from critic_train.distributed.ranks import Ranks
from critic_train.errors import ConfigError
from critic_train.events import Event, Notice
from critic_train.judging.verdict import without_tables
from critic_train.model.loading import ModelSource
from critic_train.model.saving import TOKENIZER_FILES, exported_class
from critic_train.model.selfcheck import PackingChoice
from critic_train.reporting.place import PAGE
from critic_train.run.changes import is_longer, refuse_changes
from critic_train.run.checkpoint import checkpoints
from critic_train.run.directory import RunDirectory
from critic_train.run.model_digest import model_digest, tokenizer_digest
from critic_train.settings import FitSettings, as_dict
from critic_train.settings.fields import defaults_of
from critic_train.training.dataset import (
    RunShards,
)
from critic_train.training.trainer import Trainer
from critic_train.versions import versions


def compare_with_before(
    settings: FitSettings, run: RunDirectory, shards: RunShards, source: ModelSource | None, ranks: Ranks
) -> Generator[Event, None, dict[str, Any] | None]:
    """Write run.json, or hold this command against the one the run was started with.

    A run without a checkpoint has nothing to lose, so it may be started anew with other settings.

    Returns:
        The result, where the run is finished.
    """
    record = {
        "settings": as_dict(settings),
        "data": shards.data_fingerprint,
        "val_data": shards.val_fingerprint,
        "model": model_digest(source.path) if source else None,
        "tokenizer": tokenizer_digest(source.path, TOKENIZER_FILES) if source else None,
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "ranks": ranks.size,
    }
    before = run.read_json("run.json")
    if not checkpoints(run.checkpoints):
        run.start_afresh()
        run.write_json("run.json", {"id": uuid.uuid4().hex[:8], **record})
        return None
    if before is None:
        raise ConfigError(
            f"{run.path} has checkpoints but no readable run.json: nobody can say how it was started",
            hint="put run.json back, or give this run another --out",
        )
    # A flag that did not exist when the run began had its default.
    before = {**before, "settings": defaults_of(FitSettings) | before.get("settings", {})}
    for message in refuse_changes(before, record, run.path):
        yield Notice(message=message, level="warning")
    if is_longer(before, record):
        run.reopen()
        run.write_json("run.json", before | {"settings": record["settings"]})
    return run.read_json("result.json")


def summary_of(trainer: Trainer, choice: PackingChoice) -> dict[str, Any]:
    settings, data, plan = trainer.settings, trainer.data, trainer.plan
    held_out = data.held_out
    skipped = sum(int(part.get("count", 0)) for part in data.left_out.values())
    return {
        "rollouts": len(data.train),
        "prompt_groups": len(set(data.train.groups.tolist())),
        "response_tokens": data.train.response_tokens,
        "held_out_rollouts": len(held_out) if held_out else 0,
        "rows_left_out": skipped,
        "files_left_out": sum(int(part["count"]) for part in data.files_left_out.values()),
        "mean_return": data.train.mean_return,
        "returns": trainer.targets.in_words() if trainer.targets.recipe.from_rewards else None,
        "model": settings.model or f"{settings.preset} (from scratch)",
        "architecture": exported_class(trainer.critic),
        "parameters": sum(p.numel() for p in trainer.critic.parameters()),
        "packing": "forest" if choice.forest else "rows",
        "attention": trainer.compute.attention if choice.forest else "as transformers has it",
        "device": str(trainer.compute.device),
        "precision": trainer.compute.precision,
        "lr": trainer.optimizer.param_groups[0]["peak_lr"],
        "head_lr": trainer.optimizer.param_groups[-1]["peak_lr"],
        "steps": plan.total_steps,
        "warmup_steps": plan.warmup_steps,
        "eval_every": plan.eval_every,
    }


def result_of(trainer: Trainer, began: float, status: str) -> dict[str, Any]:
    """What `--json` prints: how the run ended and how good its best critic is."""
    judged = trainer.best_evaluation or trainer.last_evaluation
    evaluation = without_tables(judged or {})
    if "baselines" in evaluation:
        evaluation["baselines"] = {name: without_tables(found) for name, found in evaluation["baselines"].items()}
    return {
        "status": status,
        **places_of(trainer.run, trainer.checkpoint),
        "steps": trainer.position.step,
        "total_steps": trainer.plan.total_steps,
        "best_step": trainer.position.best_step,
        "skips": trainer.position.skips,
        "stopped_early": trainer.out_of_patience,
        "training": trainer.last_metrics,
        "rows_left_out": trainer.data.left_out,
        "files_left_out": trainer.data.files_left_out,
        **evaluation,
        "elapsed_seconds": time.monotonic() - began,
    }


def places_of(run: RunDirectory, newest: Path | None) -> dict[str, Any]:
    """Where the run's results stand, as seen from here."""
    return {
        "out": str(run.path),
        "checkpoint": str(newest) if newest else None,
        "best": str(run.path / "best") if run.best else None,
        "report": str(run.path / PAGE) if (run.path / PAGE).is_file() else None,
    }
