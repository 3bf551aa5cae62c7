"""Which rollouts are read, and how."""

import re
from dataclasses import dataclass
from typing import Any, Literal

from critic_train.settings.fields import Settings, setting, shown_as, too_small

CREDENTIALS = re.compile(r"[\w+.-]{2,}://([^/]*@|[^@]*:[^@]*@|.*[?&][\w-]+=)", re.DOTALL)
"""An address with a user or a key in it, or with options; `hf://datasets/a/b@main` has none."""

OnBadRows = Literal["fail", "skip"]
OnBadFile = Literal["fail", "skip"]


def column_setting() -> Any:
    """The flag --column, for every command that reads columns."""
    return setting(
        [],
        "Read a column under another name, as in returns=my_returns; repeatable.",
        panel="Data",
        metavar="NAME=COLUMN",
    )


@dataclass(frozen=True, kw_only=True)
class SourceSettings(Settings):
    """Part of every command that reads shards."""

    data: list[str] = setting(
        [],
        "Rollouts: a folder, a Parquet file or a glob, here or at s3://, gs:// or hf://; repeatable.",
        panel="Data",
        metavar="PATH",
    )
    column: list[str] = column_setting()

    def faults(self) -> list[str]:
        """See Settings."""
        wrong = [] if self.data else [f"{shown_as(self, 'data')} is needed: a folder, a Parquet file or a glob"]
        return wrong + address_faults(shown_as(self, "data"), self.data) + column_faults(self.column)


@dataclass(frozen=True, kw_only=True)
class ReadingSettings(SourceSettings):
    """Part of every command that needs every row, or is told to do without the bad ones."""

    on_bad_rows: OnBadRows = setting("fail", "Stop at rows that cannot be used, or leave them out.", panel="Data")
    on_bad_file: OnBadFile = setting("fail", "Stop at files that cannot be used, or leave them out.", panel="Data")
    max_length: int | None = setting(
        None,
        "Longest rollout in tokens; a longer one is a bad row. [default: the model's context; 131072 from scratch]",
        panel="Data",
    )

    def faults(self) -> list[str]:
        """See Settings."""
        return too_small(self, 2, "max_length")


def address_faults(flag: str, names: list[str]) -> list[str]:
    """What is wrong with addresses of stores, one line each; it never shows the address.

    Addresses are kept in run.json and in logs, so they may hold no secret.
    """
    odd = [name.partition("://")[0] for name in names if re.match(CREDENTIALS, name)]
    return [
        f"{flag} takes {scheme}:// addresses without credentials or options, since addresses are recorded; "
        "those belong in the environment"
        for scheme in odd
    ]


def column_faults(pairs: list[str]) -> list[str]:
    """What is wrong with the values of --column, one line each."""
    return [
        f"--column takes NAME=COLUMN, as in returns=my_returns, not {pair!r}"
        for pair in pairs
        if not all(pair.partition("=")[::2])
    ]


def column_renames(pairs: list[str]) -> dict[str, str]:
    """`["returns=my_returns"]` -> `{"returns": "my_returns"}` (canonical name -> the shard's column)."""
    return dict(tuple(pair.split("=", 1)) for pair in pairs)  # type: ignore[misc]
