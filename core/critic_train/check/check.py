"""`critic-train check`: read a data set, describe it, find how its returns were computed, advise flags for `fit`."""

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from critic_train.check.example import Example
from critic_train.check.survey import Survey, leak
from critic_train.data.bad_input import BadFiles
from critic_train.data.reading import RolloutReader
from critic_train.data.returns import ReturnRecipe
from critic_train.data.scanning import full_reader, read_through
from critic_train.data.shards import find_shards, fingerprint
from critic_train.events import Event, Notice, Progress, RunEnded
from critic_train.rollouts import Rollouts
from critic_train.settings import CPU_MAX_TOKENS, CheckReadingSettings, CheckSettings, LossSettings
from critic_train.stopping import Stopped, StopRequest

GAMMAS = (1.0, 0.999, 0.997, 0.995, 0.99, 0.98, 0.97, 0.95, 0.9, 0.8, 0.5, 0.0)
LAMBDAS = (1.0, 0.99, 0.98, 0.97, 0.96, 0.95, 0.94, 0.92, 0.9, 0.8, 0.7, 0.5, 0.2, 0.0)
"""The simplest first: where several pairs give the same returns, the first of them is named."""

TOLERANCE = 1e-3
"""Largest error of a match, relative to the size of the returns: bf16 columns pass (2^-8 of each number, averaged),
another lambda does not."""

REFINEMENTS = 40
DECIMALS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class ReturnsMatch:
    """What the stored returns were compared with.

    Attributes:
        gamma, lam: the pair that comes closest; lam is 1 where there are no values to try others with.
        error: root mean square difference, relative to the root mean square of the returns.
        bootstrapped: whether truncated rollouts go on with a value behind their last token.
        matches: whether the error is small enough to call it a match.
    """

    gamma: float
    lam: float
    error: float
    bootstrapped: bool
    matches: bool

    def as_dict(self) -> dict[str, float | bool]:
        """For the result of `check`; JSON-able."""
        return {
            "gamma": self.gamma,
            "lam": self.lam,
            "error": self.error,
            "bootstrapped": self.bootstrapped,
            "found": self.matches,
        }


def match_returns(rollouts: Rollouts) -> ReturnsMatch | None:
    """Find (gamma, lambda) from rewards, values and returns.

    A grid of the usual values comes first, then a search around the best of it, so that an unusual pair is found as
    well. Values are not needed for lambda 1.

    Args:
        rollouts: a sample, with rewards and returns; tokens off the mask are skipped.

    Returns:
        The closest pair; None without rewards or returns.
    """
    if rollouts.rewards is None or not rollouts.response_mask.any():
        return None
    trial = _Trial(rollouts)
    best = min(trial.grid(), key=lambda match: (round(match.error, 9), -match.lam, -match.gamma))
    return best if best.matches else trial.refined(best)


class _Trial:
    """Makes returns again and says how far off they are."""

    def __init__(self, rollouts: Rollouts) -> None:
        self._rollouts = rollouts
        mask = rollouts.response_mask
        self._target = rollouts.returns[mask].astype(np.float64)
        self._size = float(np.sqrt(np.mean(self._target**2))) or 1.0
        self._has_values = rollouts.values is not None
        cut = rollouts.truncated
        self._may_bootstrap = cut is not None and bool(cut.any()) and self._has_values

    def grid(self) -> list[ReturnsMatch]:
        """Every pair of the grid, with and without a bootstrap where there is something to bootstrap."""
        lambdas = LAMBDAS if self._has_values else (1.0,)
        modes = (False, True) if self._may_bootstrap else (False,)
        return [self.tried(gamma, lam, mode) for mode, gamma, lam in product(modes, GAMMAS, lambdas)]

    def tried(self, gamma: float, lam: float, bootstrapped: bool) -> ReturnsMatch:
        """How far the returns made with a pair are from those stored."""
        recipe = ReturnRecipe(kind="gae", gamma=gamma, lam=lam, truncated="bootstrap" if bootstrapped else "terminal")
        made = recipe.returns(self._rollouts, self._rollouts.values)[self._rollouts.response_mask].astype(np.float64)
        error = float(np.sqrt(np.mean((made - self._target) ** 2))) / self._size
        return ReturnsMatch(gamma=gamma, lam=lam, error=error, bootstrapped=bootstrapped, matches=error <= TOLERANCE)

    def refined(self, best: ReturnsMatch) -> ReturnsMatch:
        """A pattern search around a pair of the grid, its result rounded to the decimals that people write."""
        step = 0.05
        for _ in range(REFINEMENTS):
            moves = [(step, 0.0), (-step, 0.0), (0.0, step), (0.0, -step), (step, -step), (-step, step)]
            around = [
                self.tried(best.gamma + dg, best.lam + dl, best.bootstrapped)
                for dg, dl in moves
                if 0.0 <= best.gamma + dg <= 1.0 and 0.0 <= best.lam + dl <= 1.0 and (dl == 0.0 or self._has_values)
            ]
            better = min(around, key=lambda match: match.error, default=best)
            if better.error < best.error:
                best = better
            else:
                step /= 2
            if step < 10.0 ** -(DECIMALS + 1):
                break
        written = self.tried(round(best.gamma, DECIMALS), round(best.lam, DECIMALS), best.bootstrapped)
        return written if written.matches or written.error <= best.error else best


UNREAD_WITH_RETURNS = ("rewards", "reward", "truncated")
"""Columns that `fit` does not read where the shards have returns."""
HELD_BACK = 0.2
"""Share of tokens whose return is beyond the clip around their old value, above which --old-values epoch is advised."""


def advice(result: dict[str, Any], reading: CheckReadingSettings) -> list[tuple[list[str], str]]:
    """Flags for `critic-train fit`, each with the reason.

    Args:
        result: of `check`: a survey, with "bad_rows", "bad_files", "returns_match" and "clip".
        reading: what was read.

    Returns:
        (flags, why), the data first.
    """
    advised: list[tuple[list[str], str]] = [([part for path in reading.data for part in ("--data", path)], "")]
    advised += [(["--val-data", path], "") for path in reading.against]
    if result["bad_files"]["count"]:
        advised.append((["--on-bad-file", "skip"], f"{result['bad_files']['count']:,} files cannot be used"))
    if result["bad_rows"]["count"]:
        advised.append((["--on-bad-rows", "skip"], f"{result['bad_rows']['count']:,} rows cannot be used"))
    if result["returns"] is None and result["rewards"] is not None:
        advised.append((["--returns", "mc"], "there are rewards and no returns"))
    match = result["returns_match"]
    if match and match["found"] and match["lam"] < 1:
        flags = ["--returns", "mc"] + ([] if match["gamma"] == 1 else ["--gamma", f"{match['gamma']:g}"])
        advised.append((flags, "to pretrain: the stored returns lean on the stored values (lambda below 1)"))
    # A rename of what `fit` does not read is an error there.
    unread = ("returns", "truncated") if any("--returns" in flags for flags, _ in advised) else UNREAD_WITH_RETURNS
    renames = [(["--column", pair], "") for pair in reading.column if pair.partition("=")[0] not in unread]
    advised[1:1] = renames
    advised += _old_values(result)
    longest = result["tokens_of_the_longest"]
    if longest > CPU_MAX_TOKENS:
        advised.append((["--max-tokens", str(longest)], "the longest rollout goes through the model at once"))
    return advised


def command_line(advised: list[tuple[list[str], str]]) -> str:
    """The advice as a command to copy."""
    return shlex.join(["critic-train", "fit", *(part for flags, _ in advised for part in flags)])


def _old_values(result: dict[str, Any]) -> list[tuple[list[str], str]]:
    clip = result["clip"]
    if clip is None and result["values"] is not None:
        return []
    if clip is None:
        return [(["--old-values", "none"], "no values are stored")]
    if clip["held_back"] > HELD_BACK:
        reason = f"{clip['held_back']:.0%} of the returns lie farther than {clip['eps']:g} from their stored value"
        return [(["--old-values", "epoch"], f"{reason}: a clip around it would keep the critic from them")]
    return []


MOST_BAD_ROWS = 10_000
"""Bad rows that are listed one by one; all are counted."""


def check(settings: CheckSettings, stop: StopRequest | None = None) -> Iterator[Event]:
    """Describe a data set. Streams: memory does not grow with the tokens.

    Args:
        settings: what to read.
        stop: checked between batches of rows.

    Yields:
        Progress and notices; RunEnded last, whose result is `Survey.summary` with "schema", "bad_rows", "bad_files",
        "returns_match", "clip", "leak", "example", "advice", "command" and "sound" added.

    Raises:
        DataError: there is not one row that can be used.
    """
    stop = stop or StopRequest()
    bad_files = BadFiles()
    shards = find_shards(settings.reading.data, bad_files)
    column, group_by = settings.reading.column, settings.reading.group_by
    reader = full_reader(shards, column, stop, bad_files, MOST_BAD_ROWS, group_by)
    survey, other = Survey(), None
    example = Example(settings.reading.tokenizer)

    def use(batch: Rollouts) -> None:
        survey.add(batch)
        example.add(batch)

    try:
        yield from read_through(reader, stop, use)
        if settings.reading.against:
            other = Survey()
            others = find_shards(settings.reading.against)
            other_reader = full_reader(others, column, stop, None, group_by=group_by)
            yield from read_through(other_reader, stop, other.add, "reading the other rollouts")
        stop.check()
    except Stopped:
        yield RunEnded(status="interrupted", signal_number=stop.signal_number)
        return
    for sentence in reader.notices:
        yield Notice(message=sentence)
    yield Progress(stage="matching returns", done=0, total=1, unit="data set")
    result = _described(survey, reader, fingerprint(shards)["digest"])
    result["leak"] = None if other is None else leak(survey, other)
    advised = advice(result, settings.reading)
    advised += [] if group_by is None else [(["--group-by", group_by], "")]
    result |= {
        "example": example.parts(),
        "advice": [{"flags": flags, "why": why} for flags, why in advised],
        "command": command_line(advised),
        "sound": not (result["bad_rows"]["count"] or bad_files or (result["leak"] or {}).get("prompts")),
    }
    yield RunEnded(status="finished", result=result)


def _described(survey: Survey, reader: RolloutReader, digest: str) -> dict[str, Any]:
    summary = survey.summary()
    sample = survey.sample.rollouts()
    assert sample is not None, "the reader raises where no row is good"
    if "returns" not in reader.shared_columns:
        summary |= {"returns": None, "stored_values": None, "group_mean": None}
    match = match_returns(sample) if summary["returns"] else None
    return {
        "grouped_by": "prompt" if reader.groups.by_prompt or not _has_uid(reader) else "uid",
        "schema": {} if reader.first_columns is None else reader.first_columns.as_dict(),
        "files": len(reader.shards),
        "data_digest": digest,
        **summary,
        "returns_match": None if match is None else match.as_dict(),
        "clip": _clip(sample) if summary["returns"] else None,
        "bad_rows": reader.bad_rows.summary(),
        "bad_files": reader.bad_files.summary(),
    }


def _has_uid(reader: RolloutReader) -> bool:
    return reader.first_columns is not None and reader.first_columns.uid is not None


def _clip(sample: Rollouts) -> dict[str, float] | None:
    """Share of the response tokens whose return the clip keeps a critic from, at its default width."""
    if sample.values is None:
        return None
    eps: Any = LossSettings.cliprange_value
    apart = np.abs(sample.returns - sample.values)[sample.response_mask]
    return {"eps": eps, "held_back": float((apart > eps).mean())}
