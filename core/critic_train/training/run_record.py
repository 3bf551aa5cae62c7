"""What a run says of itself: run.json, held against an earlier start, and its result.

Which checkpoint a run goes on from, and whether the disk has room for those to come.
"""

import time
import uuid
from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch

from critic_train.data.parquet_footer import FooterError, read_footer
from critic_train.data.shards import Shard
from critic_train.data.stores import open_file
from critic_train.distributed.ranks import Ranks
from critic_train.errors import ConfigError, ModelError
from critic_train.evaluation.verdict import without_tables
from critic_train.events import Event, Notice
from critic_train.model.loading import ModelSource
from critic_train.model.saving import TOKENIZER_FILES, checkpoint_bytes, exported_class
from critic_train.model.selfcheck import PackingChoice
from critic_train.report.report_sources import PAGE
from critic_train.run.changes import is_longer, refuse_changes
from critic_train.run.checkpoint import checkpoints, newest_checkpoint, set_aside
from critic_train.run.manifest import model_digest, tokenizer_digest
from critic_train.run.run_directory import RunDirectory
from critic_train.run.storage import remove, require_room
from critic_train.settings import FitSettings, as_dict, defaults_of
from critic_train.text import format_bytes
from critic_train.training.dataset import RunShards
from critic_train.training.state_files import BUDGET_FILE
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
        if before is not None and before.get("settings") != record["settings"]:
            remove(run.path / BUDGET_FILE)  # it is of another critic, or of other rollouts
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
        "model": settings.model.model or f"{settings.model.preset} (from scratch)",
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


CACHED_BYTES_PER_TOKEN = 13
"""Of the run's cache: token id 4, mask 1, return 4, value 4."""


def find_resume_checkpoint(run: RunDirectory) -> Generator[Event, None, Path | None]:
    """Find the newest whole checkpoint; newer ones that are damaged are told of and set aside, never deleted.

    Returns:
        The checkpoint, None where the run has none yet.

    Raises:
        ModelError: there are checkpoints and none is whole, or a later critic-train wrote the newest.
    """
    newest, wrong = newest_checkpoint(run.checkpoints)
    if newest is None and wrong:
        lines = "".join(f"\n  {path.name}: {found.fault}" for path, found in wrong.items())
        raise ModelError(
            f"none of the checkpoints of {run.path} is whole{lines}",
            hint=f"put a whole one back, or start anew with another --out; nothing in {run.path} was touched",
        )
    for path, found in wrong.items():
        if found.kind == "damaged":
            yield Notice(
                message=f"{path.name} is damaged ({found.fault}); kept as {set_aside(path).name}", level="warning"
            )
        else:
            yield Notice(message=f"{path.name} is incomplete ({found.fault}) and ignored")
    return newest


def require_room_for_cache(run: RunDirectory, shards: list[Shard]) -> None:
    """Raise MachineError where the rollouts, once read, will not fit on the disk. A cache that stands counts as room.

    The size is a lower bound, from the shards' footers: no disk is refused that would have done.
    """
    standing = sum(file.stat().st_size for file in run.cache.rglob("*") if file.is_file())
    tokens = sum(_tokens(shard) for shard in shards)
    require_room(
        run.path,
        CACHED_BYTES_PER_TOKEN * tokens - standing,
        f"the cache of {tokens:,} tokens",
        hint="make room, or give another --out",
    )


def _tokens(shard: Shard) -> int:
    """At least how many tokens a shard holds: the longest column of whole numbers, by the footer."""
    try:
        with open_file(shard.path) as file:
            groups = read_footer(file).row_groups()
    except (FooterError, OSError):
        return 0  # the reader will say what is wrong with it
    return sum(max((chunk.elements for chunk in group.chunks if chunk.is_integer), default=0) for group in groups)


def require_room_for_checkpoints(trainer: Trainer) -> None:
    """Raise MachineError where the run's checkpoints will not fit: those kept, the best, and one being written."""
    settings, plan, step = trainer.settings, trainer.plan, trainer.position.step
    left = plan.total_steps - step
    to_come = min(left, -(-left // settings.run.checkpoint_every) + -(-left // plan.eval_every))
    standing = len(checkpoints(trainer.run.checkpoints))
    count = min(to_come, max(1, settings.run.keep + 2 - standing))
    size = checkpoint_bytes(trainer.critic)
    require_room(
        trainer.run.path,
        count * size,
        f"{count} checkpoints of {format_bytes(size)}" if count > 1 else "a checkpoint",
        hint="make room, give another --out, or keep fewer with --keep",
    )
