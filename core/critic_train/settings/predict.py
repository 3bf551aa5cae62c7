"""Settings of `critic-train predict`."""

import re
from dataclasses import dataclass
from typing import ClassVar, Literal

from critic_train.settings.compute import ComputeSettings
from critic_train.settings.fields import setting
from critic_train.settings.reading import ReadingSettings
from critic_train.settings.returns import ReturnsSettings

Written = Literal["values", "returns", "advantages"]


@dataclass(frozen=True, kw_only=True)
class PredictSettings(ComputeSettings, ReturnsSettings, ReadingSettings):
    """Settings of `critic-train predict`."""

    command: ClassVar[str] = "predict"

    model: str | None = setting(
        None, "The critic: a run, a checkpoint or a Hugging Face directory.", panel="Model", metavar="DIR"
    )
    to: str | None = setting(None, "Folder to write the shards to, under their names.", panel="Output", metavar="DIR")
    write: list[Written] = setting(
        [],
        "Column to write; repeatable. Without it: values, and returns with --returns mc or gae.",
        panel="Output",
    )
    whiten_advantages: bool = setting(
        False, "Shift and scale the advantages to mean 0 and variance 1 over all response tokens.", panel="Output"
    )
    part: str | None = setting(
        None,
        "Do the K-th of N equal parts of the files, beside other processes. [default: all, or torchrun's rank]",
        panel="Output",
        metavar="K/N",
    )

    @property
    def written(self) -> tuple[Written, ...]:
        """The columns to write, each once."""
        default: list[Written] = ["values"] if self.returns == "column" else ["values", "returns"]
        return tuple(dict.fromkeys(self.write or default))

    def faults(self) -> list[str]:
        """See Settings."""
        wrong = [] if self.model else ["--model is needed: a run, a checkpoint or a Hugging Face directory"]
        if not self.to:
            wrong.append("--to is needed: the folder to write to")
        if self.part is not None and part_of(self.part) is None:
            wrong.append(f"--part takes K/N, as in 1/4 to 4/4, not {self.part!r}")
        computed = [name for name in self.written if name != "values"]
        if self.returns == "column":
            wrong += [f"--write {name} needs --returns mc or gae: stored returns stay as they are" for name in computed]
            if self.truncated == "drop":
                wrong.append("--truncated drop needs --returns mc or gae: every row is written")
        elif not computed:
            wrong.append(f"--returns {self.returns} computes nothing: add --write returns or --write advantages")
        if self.whiten_advantages and "advantages" not in self.written:
            wrong.append("--whiten-advantages needs --write advantages")
        return wrong


def part_of(text: str) -> tuple[int, int] | None:
    """`2/4` -> (2, 4); None for what is no part."""
    found = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", text.strip())
    if found is None or int(found[1]) > int(found[2]):
        return None
    return int(found[1]), int(found[2])
