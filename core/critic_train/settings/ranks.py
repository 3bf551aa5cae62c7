"""On how many processes a job runs."""

from dataclasses import dataclass

from critic_train.settings.fields import Settings, setting, too_small


@dataclass(frozen=True, kw_only=True)
class RanksSettings(Settings):
    """Part of every command that can run on several processes."""

    nproc: int = setting(
        1, "Processes on this machine, one a GPU; the gradient stays the same. Not under torchrun.", panel="Compute"
    )

    def faults(self) -> list[str]:
        """See Settings."""
        return too_small(self, 1, "nproc")
