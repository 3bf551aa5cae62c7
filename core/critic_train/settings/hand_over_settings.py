"""The settings of the commands that take a critic further: `export` and `show`."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from critic_train.settings.base import Section, Settings, minimum_errors, setting
from critic_train.settings.data_sections import ReadingSettings, ReturnsSettings, column_errors
from critic_train.settings.training_sections import ComputeSettings

ExportTo = Literal["transformers", "verl", "openrlhf", "trl", "nemo-rl", "slime", "vllm"]
Bias = Literal["auto", "keep", "refit"]


@dataclass(frozen=True, kw_only=True)
class OptionalReadingSettings(ReadingSettings):
    """Which rollouts are read, by commands that can do without."""

    def validate(self) -> list[str]:
        """See Section."""
        return super().validate() if self.data else column_errors(self.column)


@dataclass(frozen=True, kw_only=True)
class ExportTargetSettings(Section):
    """Which critic `export` writes, for which system, and where to."""

    paths: list[str] = setting(
        [],
        "The critic (a run, a checkpoint or a Hugging Face directory), and the new directory.",
        panel="Model",
        metavar="MODEL DIR",
        positional=True,
    )
    to: ExportTo | None = setting(None, "The system that is to load it.", panel="Output")
    bias: Bias = setting(
        "auto",
        "Keep the head's bias, or fit the head to the states of --data without one (refit). auto refits for OpenRLHF "
        "alone, whose head has none.",
        panel="Output",
    )

    @property
    def model(self) -> str:
        """The critic."""
        return self.paths[0]

    @property
    def directory(self) -> str:
        """The directory to write."""
        return self.paths[1]

    @property
    def system(self) -> ExportTo:
        """The system."""
        assert self.to is not None, "validated"
        return self.to

    def validate(self) -> list[str]:
        """See Section."""
        errors = [] if len(self.paths) == 2 else [f"MODEL DIR: two paths are needed, not {len(self.paths)}"]
        return errors if self.to else [*errors, "--to is needed: the system that is to load the critic"]


@dataclass(frozen=True, init=False)
class ExportSettings(Settings):
    """Settings of `critic-train export`."""

    command: ClassVar[str] = "export"

    target: ExportTargetSettings
    reading: OptionalReadingSettings
    compute: ComputeSettings

    def validate(self) -> list[str]:
        """See Settings."""
        if self.target.bias == "refit" and not self.reading.data:
            return ["--bias refit needs --data: rollouts on whose states the head is fitted"]
        return []


@dataclass(frozen=True, kw_only=True)
class ShownSettings(Section):
    """What `show` prints."""

    model: list[str] = setting(
        [],
        "The critic: a run, a checkpoint or a Hugging Face directory. Without it, the stored values are shown.",
        panel="Model",
        metavar="MODEL",
        positional=True,
    )
    uid: list[str] = setting([], "Show the rollouts of this prompt group; repeatable.", panel="Data", metavar="UID")
    text: list[str] = setting([], "Show the values of this text; repeatable.", panel="Data", metavar="TEXT")
    prompt: str = setting("", "What comes before --text: its tokens get no values.", panel="Data", metavar="TEXT")
    tokenizer: str | None = setting(
        None,
        "Show words by this tokenizer: a model's directory or a tokenizer.json. [default: the one beside the critic]",
        panel="Model",
        metavar="DIR",
    )
    show: int = setting(8, "Rollouts shown of a group, and of the data where no --uid is given.", panel="Output")

    def validate(self) -> list[str]:
        """See Section."""
        errors = ["MODEL: one critic at a time"] if len(self.model) > 1 else []
        if self.prompt and not self.text:
            errors.append("--prompt goes with --text")
        if self.uid and self.text:
            errors.append("--uid shows rollouts of --data, --text shows a text: give one of them")
        return errors + minimum_errors(self, 1, "show")


@dataclass(frozen=True, init=False)
class ShowSettings(Settings):
    """Settings of `critic-train show`."""

    command: ClassVar[str] = "show"

    shown: ShownSettings
    reading: OptionalReadingSettings
    returns: ReturnsSettings
    compute: ComputeSettings

    def validate(self) -> list[str]:
        """See Settings."""
        if bool(self.reading.data) == bool(self.shown.text):
            return ["--data or --text is needed, one of them: what to show"]
        if self.shown.text and not self.shown.model:
            return ["MODEL is needed with --text: the critic that values it"]
        return []
