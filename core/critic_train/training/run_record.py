"""run.json and result.json of a run, the checkpoint that it resumes from, and whether the disk has room for it."""

import uuid
from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch

from critic_train.errors import ConfigError, ModelError
from critic_train.evaluation.verdict import without_tables
from critic_train.events import Event, Notice
from critic_train.jsonio import read_json_object_or_none
from critic_train.report.report_sources import PAGE
from critic_train.run.changes import chosen_settings, is_longer, is_more_patient, refuse_changes
from critic_train.run.checkpoint import checkpoint_step, checkpoints, newest_checkpoint, set_aside
from critic_train.run.manifest import model_digest, tokenizer_digest, versions
from critic_train.run.run_directory import RunDirectory
from critic_train.run.storage import remove, require_room
from critic_train.settings import FitSettings, LossSettings, RunSettings, as_dict, defaults_of
from critic_train.text import format_bytes
from critic_train.training.dataset import RolloutSet
from critic_train.training.recipe import Recipe
from critic_train.training.run_shards import RunShards
from critic_train.training.state_files import BUDGET_FILE
from critic_train.training.targets import Targets
from critic_train.training.train_step import LossRecipe
from critic_train.training.trainer import Trainer
from critic_train.weights.loading import ModelSource
from critic_train.weights.saving import TOKENIZER_FILES, checkpoint_bytes, exported_class

NARROW_CLIP, WIDE_CLIP = 0.1, 50.0
"""--cliprange-value in standard deviations of the returns, below and above which the user is warned. The default, 0.5,
is one deviation or more of returns of 0 and 1."""


ONCE_DEFAULTS = {"preset": "small", "train": "full"}
"""Defaults of settings that the recipe chooses by now; a run that was begun before has them as if they were given."""


def compare_with_before(
    settings: FitSettings, run: RunDirectory, shards: RunShards, source: ModelSource | None, ranks: int
) -> Generator[Event, None, dict[str, Any] | None]:
    """Write run.json, or compare this command with the one that the run was started with. Rank 0 calls it alone.

    A run without a checkpoint of what it has learned has nothing to lose: it may be started anew with other settings.

    Args:
        settings: of this command.
        run: the run directory.
        shards: of this command.
        source: the model to start from, if any.
        ranks: number of processes.

    Yields:
        Notices about changed settings that the result does not depend on.

    Returns:
        The result where the run is finished, else None.

    Raises:
        ConfigError: the result depends on something that changed, or run.json is gone.
    """
    if run.left_by:
        yield Notice(message=f"{run.path} was last held by {run.left_by}, which is gone: its lock is taken over")
    record = {
        "settings": as_dict(settings),
        "data": shards.train.fingerprint,
        "val_data": shards.val.fingerprint if shards.val else None,
        "model": model_digest(source.path) if source else None,
        "tokenizer": tokenizer_digest(source.path, TOKENIZER_FILES) if source else None,
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "ranks": ranks,
    }
    before = run.read_json("run.json")
    if not any(_has_learned(path) for path in checkpoints(run.checkpoints)):
        if before is not None and before.get("settings") != record["settings"]:
            remove(run.path / BUDGET_FILE)  # it is of another critic, or of other rollouts
        run.start_afresh()
        run.write_json("run.json", {"id": uuid.uuid4().hex[:8], **record})
        return None
    if before is None:
        raise ConfigError(
            f"{run.path} has checkpoints but no readable run.json: its settings are not known",
            hint="restore run.json, or give this run another --out",
        )
    before = _as_it_was_given(before, settings)
    for message in refuse_changes(before, record, run.path):
        yield Notice(message=message, level="warning")
    if is_longer(before, record) or is_more_patient(before, record, run.read_json("result.json")):
        run.reopen()
        run.write_json("run.json", before | {"settings": record["settings"]})
    return run.read_json("result.json")


def _as_it_was_given(before: dict[str, Any], settings: FitSettings) -> dict[str, Any]:
    """run.json of a run, with settings that can be compared with those of a command that goes on with it."""
    # A flag that did not exist when the run began had its default.
    given, now = defaults_of(FitSettings) | before.get("settings", {}), as_dict(settings)
    chose = before.get("recipe") or {}
    for name, default in ONCE_DEFAULTS.items():
        if now[name] is None and name not in chose and given[name] == default:
            given[name] = None
    for name, choice in chose.items():  # what is given now may be what the run chose
        if given.get(name) is None and now.get(name) is not None:
            given[name] = choice["value"]
    return before | {"settings": given}


def _has_learned(checkpoint: Path) -> bool:
    """Whether a checkpoint may hold more than a run begins with: one of step 0 does where its head was solved."""
    record = None if checkpoint_step(checkpoint) else read_json_object_or_none(checkpoint / "trainer.json")
    return record is None or record.get("exact_head") is not None


def find_return_scale(
    run: RunDirectory, train: RolloutSet, loss: LossSettings, resumed: str | None
) -> Generator[Event, None, float]:
    """The scale in whose units a run trains (see `train_step`). Rank 0 calls it alone.

    Args:
        run: the run directory; a run that is resumed has recorded its scale there, or had none, which is 1.
        train: the rollouts to train on.
        loss: the clip.
        resumed: the checkpoint from which the run goes on, if any.

    Yields:
        Warnings where the returns are all equal, or the clip does not fit them.

    Returns:
        Twice the standard deviation of the returns over response tokens: 1 for returns of 0 and 1 with equal odds, the
        kind for which the default learning rates were chosen. 1 where all returns are equal.
    """
    if resumed:
        resolved = (run.read_json("run.json") or {}).get("resolved", {})
        return float(resolved.get("return_scale", 1.0))
    deviation = train.return_deviation()
    if deviation == 0:
        yield Notice(
            message=f"every return of the rollouts to train on is {train.mean_return:.6g}: a critic can learn nothing "
            "from them but this number",
            level="warning",
        )
        return 1.0
    eps, fitting = LossRecipe.of(loss).cliprange_value, float(f"{deviation:.2g}")
    if eps is not None and eps < NARROW_CLIP * deviation:
        yield Notice(
            message=f"--cliprange-value {eps:g} is narrow for returns with a standard deviation of {deviation:.3g}: a "
            f"value that is farther than {eps:g} from its old value has no gradient to go on; "
            f"--cliprange-value {fitting:g} fits these returns, and --no-clip turns the clip off",
            level="warning",
        )
    elif eps is not None and eps > WIDE_CLIP * deviation:
        yield Notice(
            message=f"--cliprange-value {eps:g} is wide for returns with a standard deviation of {deviation:.3g}: it "
            f"clips nothing; --cliprange-value {fitting:g} fits these returns",
            level="warning",
        )
    return 2 * deviation


def resumed_settings(settings: FitSettings, run: RunDirectory, ranks: int) -> FitSettings:
    """Settings of a command that resumes a run, in which what chooses itself is what the run chose or was given."""
    given, record = as_dict(settings), run.read_json("run.json") or {}
    # An earlier version has cut no rollout over ranks.
    before = {"sequence_parallel": 1} | chosen_settings(record)
    if ranks % before["sequence_parallel"]:  # on another number of ranks it is chosen anew
        del before["sequence_parallel"]
    # An earlier version may have given padded rows to what gets prefix trees now; the results differ by rounding.
    if record.get("resolved", {}).get("packing") == "rows":
        before["packing"] = "rows"
    before = {name: value for name, value in before.items() if given[name] in (None, "auto")}
    # An earlier version has not compiled by itself.
    if not (given["compile"] or given["no_compile"]):
        compiled = record.get("chosen", {}).get("compile", record.get("settings", {}).get("compile", False))
        before["compile" if compiled else "no_compile"] = True
    return settings.replace(**before)


def recorded_reasons(run: RunDirectory, chosen: dict[str, Any]) -> Recipe:
    """Why a run chose what it computes with when it began, of what is `chosen` still."""
    recorded: Recipe = (run.read_json("run.json") or {}).get("recipe") or {}
    return {name: choice for name, choice in recorded.items() if chosen.get(name) == choice["value"]}


def recipe_before(run: RunDirectory, chosen: dict[str, Any]) -> Recipe:
    """What a run chose when it began, without what chooses itself by memory and ranks.

    A start to which one of these settings is given does not ask for the choice; the next one without it does.

    Args:
        run: its run.json has it.
        chosen: what this start computes with; of these settings it says why itself.
    """
    recorded: Recipe = (run.read_json("run.json") or {}).get("recipe") or {}
    return {name: choice for name, choice in recorded.items() if name not in chosen}


def cuts_as_they_come(run: RunDirectory) -> bool:
    """Whether a run was begun by a version that cut large trees where the next rollout no longer fitted."""
    return "tree_cuts" not in (run.read_json("run.json") or {})


def resolved_summary(settings: FitSettings, trainer: Trainer) -> dict[str, Any]:
    """What RunStarted shows and run.json keeps as "resolved": data, model and plan, in display order."""
    data, plan, critic = trainer.data, trainer.plan, trainer.runtime.critic
    compute, forest = trainer.runtime.compute, trainer.runtime.forest
    targets = Targets.of(settings.returns, settings.loss)
    return {
        "rollouts": len(data.train),
        "prompt_groups": len(set(data.train.groups.tolist())),
        "response_tokens": data.train.response_tokens,
        "held_out_rollouts": len(data.held_out) if data.held_out else 0,
        "rows_left_out": sum(int(part.get("count", 0)) for part in data.left_out.values()),
        "files_left_out": sum(int(part["count"]) for part in data.files_left_out.values()),
        "mean_return": data.train.mean_return,
        "return_scale": trainer.loss.return_scale,
        "returns": targets.describe() if targets.recipe.from_rewards else None,
        "model": settings.model.model or f"{settings.model.preset} (from scratch)",
        "architecture": exported_class(critic),
        "parameters": critic.num_parameters,
        "packing": "forest" if forest else "rows",
        "attention": compute.attention if forest else "as transformers has it",
        "device": str(compute.device),
        "precision": compute.precision,
        "lr": trainer.optimizer.param_groups[0]["peak_lr"],
        "head_lr": trainer.optimizer.param_groups[-1]["peak_lr"],
        "steps": plan.total_steps,
        "warmup_steps": plan.warmup_steps,
        "eval_every": plan.eval_every,
    }


def result_of(trainer: Trainer, status: str, elapsed_seconds: float) -> dict[str, Any]:
    """What `--json` prints: how the run ended and how good its best critic is."""
    state, data = trainer.state, trainer.data
    evaluation = without_tables(state.best_evaluation or state.last_evaluation or {})
    if "baselines" in evaluation:
        evaluation["baselines"] = {name: without_tables(made) for name, made in evaluation["baselines"].items()}
    return {
        "status": status,
        **result_paths(trainer.run, trainer.checkpointer.newest),
        "steps": state.position.step,
        "total_steps": trainer.plan.total_steps,
        "best_step": state.position.best_step,
        "skips": state.position.skips,
        "stopped_early": trainer.stopped_early,
        "training": state.last_metrics,
        "rows_left_out": data.left_out,
        "files_left_out": data.files_left_out,
        **({"exact_head": state.exact_head} if state.exact_head else {}),
        **evaluation,
        "elapsed_seconds": elapsed_seconds,
    }


def result_paths(run: RunDirectory, newest: Path | None) -> dict[str, Any]:
    """Paths of a run's results as this process reaches them; None for what does not exist."""
    return {
        "out": str(run.path),
        "checkpoint": str(newest) if newest else None,
        "best": str(run.path / "best") if run.best else None,
        "report": str(run.path / PAGE) if (run.path / PAGE).is_file() else None,
    }


def find_resume_checkpoint(run: RunDirectory) -> Generator[Event, None, str | None]:
    """Find the newest complete checkpoint. Newer ones that are damaged are renamed, not deleted. Only rank 0 calls it.

    Yields:
        A notice for each checkpoint that was passed over.

    Returns:
        The name of the checkpoint, None where the run has none yet.

    Raises:
        ModelError: there are checkpoints and none is complete, or a later critic-train wrote the newest.
    """
    newest, unusable = newest_checkpoint(run.checkpoints)
    if newest is None and unusable:
        lines = "".join(f"\n  {path.name}: {state.fault}" for path, state in unusable.items())
        raise ModelError(
            f"none of the checkpoints of {run.path} is complete{lines}",
            hint=f"restore a complete one, or start anew with another --out; nothing in {run.path} was touched",
        )
    for path, state in unusable.items():
        if state.kind == "damaged":
            yield Notice(
                message=f"{path.name} is damaged ({state.fault}); kept as {set_aside(path).name}", level="warning"
            )
        else:
            yield Notice(message=f"{path.name} is incomplete ({state.fault}) and ignored")
    return newest.name if newest else None


def require_room_for_checkpoints(trainer: Trainer, settings: RunSettings) -> None:
    """Check that the checkpoints still to come will fit on the disk: those kept, the best, and one being written.

    Args:
        trainer: at the step from which the run goes on.
        settings: --checkpoint-every and --keep.

    Raises:
        MachineError: they will not.
    """
    run, plan = trainer.run, trainer.plan
    left = plan.total_steps - trainer.state.position.step
    to_come = min(left, -(-left // settings.checkpoint_every) + -(-left // plan.eval_every))
    to_come += left == plan.total_steps and trainer.evaluator is not None  # that of step 0
    standing = len(checkpoints(run.checkpoints))
    count = min(to_come, max(1, settings.keep + 2 - standing))
    size = checkpoint_bytes(trainer.runtime.critic, averaged=trainer.runtime.average is not None)
    require_room(
        run.path,
        count * size,
        f"{count} checkpoints of {format_bytes(size)}" if count > 1 else "a checkpoint",
        hint="make room, give another --out, or keep fewer with --keep",
    )
