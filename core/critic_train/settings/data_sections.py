"""Sections about data: which rollouts or files a command reads, and which returns it uses."""

import re
from dataclasses import dataclass
from typing import Any, Literal

from critic_train.settings.base import Section, minimum_errors, name_in_usage, setting

OnBadRows = Literal["fail", "skip"]
OnBadFile = Literal["fail", "skip"]
DumpFormat = Literal["slime", "verl", "nemo-rl", "openrlhf", "skyrl", "steps", "trl", "text", "tokens"]
Returns = Literal["column", "mc", "gae"]
Truncated = Literal["terminal", "bootstrap", "drop"]

CREDENTIALS = re.compile(r"[\w+.-]{2,}://([^/]*@|[^@]*:[^@]*@|.*[?&][\w-]+=)", re.DOTALL)
"""An address with a user or a key in it, or with options; `hf://datasets/a/b@main` has none."""

AUTO = "auto"
LENGTH_ALPHA = 0.05
"""VAPO's (arXiv 2504.05118)."""


def _column_setting() -> Any:
    """--column, for every command that reads shards."""
    return setting(
        [],
        "Read a column under another name, as in returns=my_returns; repeatable.",
        panel="Data",
        metavar="NAME=COLUMN",
    )


def _group_setting() -> Any:
    """--group-by, for every command that puts rollouts into prompt groups."""
    return setting(
        None,
        "What the rollouts of a prompt group share: uid, prompt, or a column. [default: the uid, unless every rollout "
        "has one of its own or it starts anew in another file]",
        panel="Data",
        metavar="uid|prompt|COLUMN",
    )


def _data_argument() -> Any:
    """DATA, for the commands that take rollouts without a flag."""
    return setting(
        [],
        "Rollouts: a folder, a Parquet file or a glob.",
        panel="Data",
        metavar="DATA",
        positional=True,
    )


@dataclass(frozen=True, kw_only=True)
class SourceSettings(Section):
    """Which shards are read: for every command that reads rollouts."""

    data: list[str] = setting(
        [],
        "Rollouts: a folder, a Parquet file or a glob, here or at s3://, gs:// or hf://; repeatable.",
        panel="Data",
        metavar="PATH",
    )
    column: list[str] = _column_setting()

    def validate(self) -> list[str]:
        """See Section."""
        name = name_in_usage(self, "data")
        errors = [] if self.data else [f"{name} is needed: a folder, a Parquet file or a glob"]
        return errors + address_errors(name, self.data) + column_errors(self.column)


@dataclass(frozen=True, kw_only=True)
class ReadingSettings(SourceSettings):
    """Which rollouts are read: for commands that use every row, or leave out the bad ones."""

    on_bad_rows: OnBadRows = setting("fail", "Stop at rows that cannot be used, or leave them out.", panel="Data")
    on_bad_file: OnBadFile = setting("fail", "Stop at files that cannot be used, or leave them out.", panel="Data")
    max_length: int | None = setting(
        None,
        "Longest rollout in tokens; a longer one is a bad row. [default: the model's context; 131072 from scratch]",
        panel="Data",
    )

    def validate(self) -> list[str]:
        """See Section."""
        return super().validate() + minimum_errors(self, 2, "max_length")


@dataclass(frozen=True, kw_only=True)
class GroupedReadingSettings(ReadingSettings):
    """Which rollouts are read, and what makes them a prompt group."""

    group_by: str | None = _group_setting()


@dataclass(frozen=True, kw_only=True)
class TrainReadingSettings(GroupedReadingSettings):
    """Which rollouts `fit` trains on, and which it holds out."""

    val_data: list[str] = setting(
        [], "Held-out rollouts: a folder, a file or a glob; repeatable.", panel="Data", metavar="PATH"
    )
    val_fraction: float = setting(
        0.1,
        "Share of the prompt groups held out when there is no --val-data; 0 holds out none.",
        panel="Data",
    )

    def validate(self) -> list[str]:
        """See Section."""
        errors = super().validate() + address_errors("--val-data", self.val_data)
        if not 0.0 <= self.val_fraction < 1.0:
            errors.append(f"--val-fraction must be in [0, 1), not {self.val_fraction:g}")
        return errors


@dataclass(frozen=True, kw_only=True)
class CheckReadingSettings(SourceSettings):
    """Which rollouts `check` reads."""

    data: list[str] = _data_argument()
    group_by: str | None = _group_setting()
    against: list[str] = setting(
        [],
        "Other rollouts, as held-out ones: prompts that stand in both are counted; repeatable.",
        panel="Data",
        metavar="PATH",
    )

    tokenizer: str | None = setting(
        None, "Show a rollout in the words of this tokenizer, a Hugging Face folder.", panel="Data", metavar="DIR"
    )

    def validate(self) -> list[str]:
        """See Section."""
        return super().validate() + address_errors("--against", self.against)


@dataclass(frozen=True, kw_only=True)
class SplitReadingSettings(GroupedReadingSettings):
    """Which rollouts `split` reads."""

    data: list[str] = _data_argument()


@dataclass(frozen=True, kw_only=True)
class VerifyReadingSettings(Section):
    """What `verify` reads."""

    target: list[str] = setting(
        [],
        "Runs, checkpoints, Hugging Face directories, or rollouts: files, folders or globs.",
        panel="Data",
        metavar="TARGET",
        positional=True,
    )
    column: list[str] = _column_setting()

    def validate(self) -> list[str]:
        """See Section."""
        errors = [] if self.target else ["TARGET is needed: a run, a checkpoint, or rollouts"]
        return errors + column_errors(self.column)


@dataclass(frozen=True, kw_only=True)
class ConvertReadingSettings(Section):
    """Which dumps `convert` reads."""

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
    apply_chat_template: bool = setting(
        False, "Put prompts of text through the tokenizer's chat template, as a user's message.", panel="Data"
    )
    group_by: str | None = setting(
        None,
        "The column that becomes uid; prompt writes none, so that equal prompts are a group. [default: uid, or a name "
        "that means it]",
        panel="Data",
        metavar="uid|prompt|COLUMN",
    )

    nproc: int = setting(
        1, "Processes on this machine, each with files of its own; the shards are the same.", panel="Compute"
    )

    def validate(self) -> list[str]:
        """See Section."""
        errors = [] if self.source else ["SOURCE is needed: a file, a folder or a glob"]
        if self.allow_retokenize and not self.tokenizer:
            errors.append("--allow-retokenize needs --tokenizer DIR")
        if self.apply_chat_template and not self.allow_retokenize:
            errors.append("--apply-chat-template needs --tokenizer DIR and --allow-retokenize")
        errors += minimum_errors(self, 1, "nproc")
        return errors + address_errors("SOURCE", self.source) + column_errors(self.column)


@dataclass(frozen=True, kw_only=True)
class ReturnsSettings(Section):
    """Where returns come from: for every command that needs them."""

    returns: Returns = setting(
        "column",
        "Returns: the shard's own, or computed from rewards: Monte-Carlo sums or GAE's lambda-returns.",
        panel="Returns",
    )
    gamma: float = setting(1.0, "Discount of rewards to come, for mc and gae.", panel="Returns")
    lam: float = setting(1.0, "GAE's lambda for returns; at 1 they are Monte-Carlo's.", panel="Returns")
    lam_policy: str | None = setting(
        None,
        "GAE's lambda for the advantages that predict writes and eval judges: a number, or auto: "
        "1 - 1/(alpha * response length). [default: --lam]",
        panel="Returns",
        metavar="X|auto",
    )
    length_alpha: float = setting(LENGTH_ALPHA, "The alpha of --lam-policy auto.", panel="Returns")
    truncated: Truncated = setting(
        "terminal",
        "Rollouts the `truncated` column marks as cut: take their end as the end, add the last value, or leave out.",
        panel="Returns",
    )

    def validate(self) -> list[str]:
        """See Section."""
        errors = [
            f"{flag} must be from 0 to 1, not {number:g}"
            for flag, number in (("--gamma", self.gamma), ("--lam", self.lam))
            if not 0 <= number <= 1
        ]
        if self.lam_policy not in (None, AUTO) and not _is_fraction(self.lam_policy):
            errors.append(f"--lam-policy must be a number from 0 to 1 or auto, not {self.lam_policy!r}")
        if not 0 < self.length_alpha < float("inf"):
            errors.append(f"--length-alpha must be above 0, not {self.length_alpha:g}")
        elif self.length_alpha != LENGTH_ALPHA and self.lam_policy != AUTO:
            errors.append("--length-alpha belongs to --lam-policy auto")
        return errors + self._unused()

    def _unused(self) -> list[str]:
        """A line for each flag that has no effect, or cannot have one, with these returns."""
        if self.returns == "column":
            given = {"--gamma": self.gamma != 1, "--lam": self.lam != 1, "--lam-policy": self.lam_policy is not None}
            reason = "needs --returns mc or gae: stored returns are taken as they are"
            errors = [f"{flag} {reason}" for flag in given if given[flag]]
            if self.truncated == "bootstrap":
                errors.append("--truncated bootstrap needs --returns mc or gae: to stored returns nothing can be added")
            return errors
        if self.returns == "mc" and self.lam != 1:
            return ["--lam needs --returns gae: Monte-Carlo returns have lambda 1"]
        return []


def _is_fraction(text: str | None) -> bool:
    try:
        return 0 <= float(text or "") <= 1
    except ValueError:
        return False


def address_errors(flag: str, addresses: list[str]) -> list[str]:
    """A line for each address of a store that holds credentials or options; it never shows the address.

    Addresses are recorded in run.json and in logs, so they may hold no secret.
    """
    schemes = [address.partition("://")[0] for address in addresses if re.match(CREDENTIALS, address)]
    return [
        f"{flag} takes {scheme}:// addresses without credentials or options, since addresses are recorded; "
        "those belong in the environment"
        for scheme in schemes
    ]


def column_errors(pairs: list[str]) -> list[str]:
    """A line for each value of --column that is not NAME=COLUMN."""
    return [
        f"--column takes NAME=COLUMN, as in returns=my_returns, not {pair!r}"
        for pair in pairs
        if not all(pair.partition("=")[::2])
    ]


def column_renames(pairs: list[str]) -> dict[str, str]:
    """`["returns=my_returns"]` -> `{"returns": "my_returns"}` (canonical name -> the shard's column)."""
    return dict(tuple(pair.split("=", 1)) for pair in pairs)  # type: ignore[misc]
