"""Join the ranks of a run: those that the environment names, those that rank 0 starts, or one process alone."""

from collections.abc import Iterator
from contextlib import contextmanager

from critic_train.distributed.ranks import SINGLE_PROCESS, Ranks, rank_info
from critic_train.errors import ConfigError
from critic_train.settings import Settings
from critic_train.stopping import StopRequest


@contextmanager
def init_ranks(
    settings: Settings, *, nproc: int, device: str, sharded: bool = False, stop: StopRequest | None = None
) -> Iterator[Ranks]:
    """The ranks of this run: those that the environment names (torchrun), `nproc` on this machine, or one.

    An error that ends the block on one rank ends it on all: it is sent to the others, and rank 0 raises it.

    Args:
        settings: of the command, for the ranks that are started here.
        nproc: how many processes to run on this machine where the environment names none.
        device: the setting; "cuda" and "auto" give every rank a device of its own.
        sharded: whether a single process is to be a process group as well.
        stop: checked while the ranks that are started here come up.

    Raises:
        ConfigError: both the environment and `nproc` ask for ranks, and differ.
        MachineError: a rank does not join or is lost, or there are fewer cores or devices than ranks.
        Stopped: asked to stop before all ranks were there.
    """
    info = rank_info()
    if info is None and nproc == 1 and not sharded:
        yield SINGLE_PROCESS
        return
    if info is not None and nproc not in (1, info.size):
        raise ConfigError(
            f"--nproc {nproc}, but the environment says that this is one of {info.size} processes",
            hint="leave --nproc out under torchrun or srun",
        )
    from critic_train.distributed.launch import Workers, refuse_more_ranks
    from critic_train.distributed.process_group import ProcessGroup

    if info is None:
        refuse_more_ranks(nproc, device)
    size = nproc if info is None else 1
    with Workers(settings, size) as workers, ProcessGroup(info, workers, device, stop) as ranks:
        yield ranks
