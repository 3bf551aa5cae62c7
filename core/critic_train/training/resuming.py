"""Which checkpoint a run goes on from, and whether the disk has room for those to come."""

from collections.abc import Generator
from pathlib import Path

from critic_train.data.footer import FooterError, row_groups_of
from critic_train.data.shards import Shard
from critic_train.errors import ModelError
from critic_train.events import Event, Notice
from critic_train.model.saving import checkpoint_bytes
from critic_train.run.checkpoint import checkpoints, newest_checkpoint, set_aside
from critic_train.run.directory import RunDirectory
from critic_train.run.room import in_units, require_room
from critic_train.training.trainer import Trainer

CACHED_BYTES_PER_TOKEN = 13
"""Of the run's cache: token id 4, mask 1, return 4, value 4."""


def take_up(run: RunDirectory) -> Generator[Event, None, Path | None]:
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
        groups = row_groups_of(shard.path)
    except (FooterError, OSError):
        return 0  # the reader will say what is wrong with it
    return sum(max((chunk.elements for chunk in group.chunks if chunk.is_integer), default=0) for group in groups)


def require_room_for_checkpoints(trainer: Trainer) -> None:
    """Raise MachineError where the run's checkpoints will not fit: those kept, the best, and one being written."""
    settings, plan, step = trainer.settings, trainer.plan, trainer.position.step
    left = plan.total_steps - step
    to_come = min(left, -(-left // settings.checkpoint_every) + -(-left // plan.eval_every))
    standing = len(checkpoints(trainer.run.checkpoints))
    count = min(to_come, max(1, settings.keep + 2 - standing))
    size = checkpoint_bytes(trainer.critic)
    require_room(
        trainer.run.path,
        count * size,
        f"{count} checkpoints of {in_units(size)}" if count > 1 else "a checkpoint",
        hint="make room, give another --out, or keep fewer with --keep",
    )
