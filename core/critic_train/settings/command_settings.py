"""The settings of each command, composed of sections; sections of one command alone are declared beside it."""

import math
import re
from dataclasses import dataclass
from typing import ClassVar, Literal

from critic_train.settings.base import Section, Settings, minimum_errors, seed_errors, setting
from critic_train.settings.data_sections import (
    CheckReadingSettings,
    ConvertReadingSettings,
    GroupedReadingSettings,
    ReturnsSettings,
    SplitReadingSettings,
    TrainReadingSettings,
    VerifyReadingSettings,
)
from critic_train.settings.training_sections import (
    ComputeSettings,
    EvalComputeSettings,
    LossSettings,
    ModelSettings,
    OptimizerSettings,
    RunSettings,
    TrainComputeSettings,
    cliprange_errors,
)

Written = Literal["values", "returns", "advantages"]
Baseline = Literal["critic", "fused"]


@dataclass(frozen=True, init=False)
class FitSettings(Settings):
    """Settings of `critic-train fit`."""

    command: ClassVar[str] = "fit"

    reading: TrainReadingSettings
    returns: ReturnsSettings
    model: ModelSettings
    loss: LossSettings
    optimizer: OptimizerSettings
    compute: TrainComputeSettings
    run: RunSettings

    def validate(self) -> list[str]:
        """See Settings."""
        errors = []
        if self.run.patience is not None and not self.reading.val_data and self.reading.val_fraction == 0:
            errors.append("--patience needs held-out rollouts: --val-data, or --val-fraction above 0")
        if self.loss.lm_loss_weight and self.model.train == "head":
            errors.append("--lm-loss-weight teaches the transformer, which --train head leaves as it is")
        if self.optimizer.optimizer != "adamw" and self.compute.offload not in ("auto", "none", "activations"):
            errors.append(
                f"--optimizer {self.optimizer.optimizer} cannot be combined with --offload {self.compute.offload}"
            )
        return errors


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings(Section):
    """What `eval` judges, and how."""

    model: list[str] = setting(
        [],
        "Critic to judge: a run, a checkpoint or a Hugging Face directory; repeat to compare. "
        "Without it, the stored values are judged.",
        panel="Model",
        metavar="DIR",
    )
    by: list[str] = setting([], "Also judge per value of this column; repeatable.", panel="Judgement", metavar="COLUMN")
    cliprange_value: float = setting(
        0.5,
        "The clip's half-width eps around the stored values, for value_loss and clipfrac.",
        panel="Judgement",
    )
    resamples: int = setting(1000, "Bootstrap resamples of the prompt groups.", panel="Judgement")
    seed: int = setting(0, "Seed of the bootstrap.", panel="Judgement")
    fail_under: list[str] = setting(
        [],
        "Exit 1 where a figure of the verdict, named as in --json, is below VALUE or does not exist, as in "
        "explained_variance_interval.low=0; repeatable.",
        panel="Judgement",
        metavar="METRIC=VALUE",
    )
    fail_over: list[str] = setting(
        [],
        "The same where a figure is above VALUE, as in expected_calibration_error=0.1; repeatable.",
        panel="Judgement",
        metavar="METRIC=VALUE",
    )
    report: str | None = setting(
        None, "Also write an HTML page about it. [default: none]", panel="Output", metavar="FILE"
    )

    def validate(self) -> list[str]:
        """See Section."""
        return [
            *cliprange_errors(self.cliprange_value),
            *minimum_errors(self, 1, "resamples"),
            *seed_errors(self.seed),
            *gate_errors("--fail-under", self.fail_under),
            *gate_errors("--fail-over", self.fail_over),
        ]


@dataclass(frozen=True, init=False)
class EvalSettings(Settings):
    """Settings of `critic-train eval`."""

    command: ClassVar[str] = "eval"

    reading: GroupedReadingSettings
    returns: ReturnsSettings
    compute: EvalComputeSettings
    evaluation: EvaluationSettings


def gate_errors(flag: str, pairs: list[str]) -> list[str]:
    """A line for each value of --fail-under or --fail-over that is not METRIC=VALUE."""
    return [
        f"{flag} takes METRIC=VALUE, as in explained_variance=0.2, not {pair!r}"
        for pair in pairs
        if not read_gate(pair)[0] or not math.isfinite(read_gate(pair)[1])
    ]


def read_gate(pair: str) -> tuple[str, float]:
    """`explained_variance=0.2` -> ("explained_variance", 0.2); NaN where it cannot be read."""
    metric, _, value = pair.rpartition("=")  # a critic's path may hold the sign
    try:
        return metric, float(value)
    except ValueError:
        return metric, math.nan


@dataclass(frozen=True, kw_only=True)
class PredictionSettings(Section):
    """Which critic `predict` runs, and what it writes."""

    model: str | None = setting(
        None, "The critic: a run, a checkpoint or a Hugging Face directory.", panel="Model", metavar="DIR"
    )
    to: str | None = setting(None, "Folder to write the shards to, under their names.", panel="Output", metavar="DIR")
    write: list[Written] = setting(
        [],
        "Column to write; repeatable. Without it: values, and returns with --returns mc or gae.",
        panel="Output",
    )
    baseline: Baseline = setting(
        "critic",
        "Write the critic's values, or these fused with how the prompt's other rollouts ended; returns and advantages "
        "follow from what is written.",
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

    def validate(self) -> list[str]:
        """See Section."""
        errors = [] if self.model else ["--model is needed: a run, a checkpoint or a Hugging Face directory"]
        if not self.to:
            errors.append("--to is needed: the folder to write to")
        if self.part is not None and part_of(self.part) is None:
            errors.append(f"--part takes K/N, as in 1/4 to 4/4, not {self.part!r}")
        return errors


def part_of(text: str) -> tuple[int, int] | None:
    """`2/4` -> (2, 4); None for what is not K/N with K from 1 to N."""
    match = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", text.strip())
    if match is None or int(match[1]) > int(match[2]):
        return None
    return int(match[1]), int(match[2])


@dataclass(frozen=True, init=False)
class PredictSettings(Settings):
    """Settings of `critic-train predict`."""

    command: ClassVar[str] = "predict"

    reading: GroupedReadingSettings
    returns: ReturnsSettings
    compute: ComputeSettings
    prediction: PredictionSettings

    @property
    def written(self) -> tuple[Written, ...]:
        """The columns to write, each once."""
        default: list[Written] = ["values"] if self.returns.returns == "column" else ["values", "returns"]
        return tuple(dict.fromkeys(self.prediction.write or default))

    def validate(self) -> list[str]:
        """See Settings."""
        errors = []
        returns, computed = self.returns.returns, [name for name in self.written if name != "values"]
        if returns == "column":
            errors += [
                f"--write {name} needs --returns mc or gae: stored returns stay as they are" for name in computed
            ]
            if self.returns.truncated == "drop":
                errors.append("--truncated drop needs --returns mc or gae: every row is written")
        elif not computed:
            errors.append(f"--returns {returns} computes nothing: add --write returns or --write advantages")
        if self.prediction.whiten_advantages and "advantages" not in self.written:
            errors.append("--whiten-advantages needs --write advantages")
        if self.reading.group_by and self.prediction.baseline != "fused":
            errors.append("--group-by needs --baseline fused: nothing else that predict writes depends on the group")
        return errors


@dataclass(frozen=True, kw_only=True)
class SplitOutputSettings(Section):
    """What `split` holds out, and where it writes."""

    val_fraction: float = setting(0.1, "Share of the prompt groups to hold out.", panel="Data")
    seed: int = setting(0, "Seed of the split.", panel="Data")
    to: str | None = setting(None, "Folder to write train/ and val/ to.", panel="Output", metavar="DIR")

    def validate(self) -> list[str]:
        """See Section."""
        errors = [] if self.to else ["--to is needed: the folder for train/ and val/"]
        if not 0.0 < self.val_fraction < 1.0:
            errors.append(f"--val-fraction must be between 0 and 1, not {self.val_fraction:g}")
        return errors + seed_errors(self.seed)


@dataclass(frozen=True, init=False)
class SplitSettings(Settings):
    """Settings of `critic-train split`."""

    command: ClassVar[str] = "split"

    reading: SplitReadingSettings
    output: SplitOutputSettings


@dataclass(frozen=True, kw_only=True)
class CheckOutputSettings(Section):
    """What `check` shows."""

    show: int = setting(10, "Bad rows shown; --json lists up to ten thousand.", panel="Output", metavar="N")


@dataclass(frozen=True, init=False)
class CheckSettings(Settings):
    """Settings of `critic-train check`."""

    command: ClassVar[str] = "check"

    reading: CheckReadingSettings
    output: CheckOutputSettings


@dataclass(frozen=True, kw_only=True)
class ConvertOutputSettings(Section):
    """Where `convert` writes."""

    to: str | None = setting(
        None, "Folder for the shards: new, empty, or of an earlier conversion.", panel="Output", metavar="DIR"
    )

    def validate(self) -> list[str]:
        """See Section."""
        return [] if self.to else ["--to is needed: the folder for the shards"]


@dataclass(frozen=True, init=False)
class ConvertSettings(Settings):
    """Settings of `critic-train convert`."""

    command: ClassVar[str] = "convert"

    reading: ConvertReadingSettings
    output: ConvertOutputSettings


@dataclass(frozen=True, init=False)
class VerifySettings(Settings):
    """Settings of `critic-train verify`."""

    command: ClassVar[str] = "verify"

    reading: VerifyReadingSettings


@dataclass(frozen=True, kw_only=True)
class PageSettings(Section):
    """What the page of `report` shows, and where it goes."""

    runs: list[str] = setting(
        [],
        "Run directories, and files that eval --json wrote; several are compared on one page.",
        panel="Data",
        metavar="RUN",
        positional=True,
    )
    tokenizer: str | None = setting(
        None,
        "Show rollouts in the words of this tokenizer: a model's directory or a tokenizer.json. "
        "[default: the one beside the critic]",
        panel="Model",
        metavar="DIR",
    )
    to: str | None = setting(
        None,
        "Where the page goes. [default: report.html in the run; beside the file; here, for several]",
        panel="Output",
        metavar="FILE",
    )

    def validate(self) -> list[str]:
        """See Section."""
        return [] if self.runs else ["a run is needed: the directory that fit wrote, or a file of eval --json"]


@dataclass(frozen=True, init=False)
class ReportSettings(Settings):
    """Settings of `critic-train report`."""

    command: ClassVar[str] = "report"

    page: PageSettings
