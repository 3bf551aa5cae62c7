"""Settings of `critic-train convert`."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from critic_train.settings.fields import Settings, setting
from critic_train.settings.reading import OnBadFile, OnBadRows, address_faults, column_faults

DumpFormat = Literal["slime", "verl", "nemo-rl", "openrlhf", "trl", "text", "tokens"]


@dataclass(frozen=True, kw_only=True)
class ConvertSettings(Settings):
    """Settings of `critic-train convert`."""

    command: ClassVar[str] = "convert"

    source: list[str] = setting(
        [],
        "Rollout dumps: files, folders or globs, here or at s3://, gs:// or hf://, of one format or several.",
        panel="Data",
        metavar="SOURCE",
        positional=True,
    )
    source_format: DumpFormat | None = setting(
        None, "What wrote them. [default: recognised, file by file]", panel="Data", flag="--from"
    )
    column: list[str] = setting(
        [],
        "Read a column or field under another name, as in reward=my_score; repeatable.",
        panel="Data",
        metavar="NAME=COLUMN",
    )
    on_bad_rows: OnBadRows = setting("fail", "Stop at rollouts that cannot be used, or leave them out.", panel="Data")
    on_bad_file: OnBadFile = setting("fail", "Stop at files that cannot be used, or leave them out.", panel="Data")
    tokenizer: str | None = setting(
        None, "The policy's Hugging Face folder, for sources of text.", panel="Data", metavar="DIR"
    )
    allow_retokenize: bool = setting(
        False, "Make token ids of text; boundaries may differ from the policy's.", panel="Data"
    )
    to: str | None = setting(
        None, "Folder for the shards: new, empty, or of an earlier conversion.", panel="Output", metavar="DIR"
    )

    def faults(self) -> list[str]:
        """See Settings."""
        wrong = [] if self.source else ["SOURCE is needed: a file, a folder or a glob"]
        wrong += [] if self.to else ["--to is needed: the folder for the shards"]
        if self.allow_retokenize and not self.tokenizer:
            wrong.append("--allow-retokenize needs --tokenizer DIR")
        return wrong + address_faults("SOURCE", self.source) + column_faults(self.column)
