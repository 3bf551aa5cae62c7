"""`critic-train check`: read a data set, describe it, find how its returns were computed, advise flags for `fit`."""

import shlex
from collections.abc import Iterator
from typing import Any

import numpy as np

from critic_train.check.returns_match import match_returns
from critic_train.check.survey import Survey, leak
from critic_train.data.bad_input import BadFiles
from critic_train.data.reading import RolloutReader
from critic_train.data.scanning import full_reader, read_through
from critic_train.data.shards import find_shards, fingerprint
from critic_train.events import Event, Notice, Progress, RunEnded
from critic_train.rollouts import Rollouts
from critic_train.settings import CheckSettings, ComputeSettings, LossSettings
from critic_train.stopping import Stopped, StopRequest

HELD_BACK = 0.2
"""Share of tokens whose return is beyond the clip around their old value, above which --old-values epoch is advised."""


def advice(result: dict[str, Any], settings_data: list[str], columns: list[str]) -> list[tuple[list[str], str]]:
    """Flags for `critic-train fit`, each with the reason.

    Args:
        result: of `check`: a survey, with "bad_rows", "returns_match" and "clip".
        settings_data: the values of --data.
        columns: the values of --column.

    Returns:
        (flags, why), the data first.
    """
    advised: list[tuple[list[str], str]] = [([part for path in settings_data for part in ("--data", path)], "")]
    advised += [(["--column", pair], "") for pair in columns]
    if result["bad_rows"]["count"]:
        advised.append((["--on-bad-rows", "skip"], f"{result['bad_rows']['count']:,} rows cannot be used"))
    if result["returns"] is None and result["rewards"] is not None:
        advised.append((["--returns", "mc"], "there are rewards and no returns"))
    match = result["returns_match"]
    if match and match["found"] and match["lam"] < 1:
        flags = ["--returns", "mc"] + ([] if match["gamma"] == 1 else ["--gamma", f"{match['gamma']:g}"])
        advised.append((flags, "to pretrain: the stored returns lean on the stored values (lambda below 1)"))
    advised += _old_values(result)
    longest = result["tokens_of_the_longest"]
    if longest > ComputeSettings.max_tokens:
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
        "returns_match", "clip", "leak", "advice", "command" and "sound" added.

    Raises:
        DataError: there is not one row that can be used.
    """
    stop = stop or StopRequest()
    bad_files = BadFiles()
    shards = find_shards(settings.reading.data, bad_files)
    reader = full_reader(shards, settings.reading.column, stop, bad_files, MOST_BAD_ROWS)
    survey, other = Survey(), None
    try:
        yield from read_through(reader, stop, survey.add)
        if settings.reading.against:
            other = Survey()
            other_reader = full_reader(find_shards(settings.reading.against), settings.reading.column, stop, None)
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
    advised = advice(result, settings.reading.data, settings.reading.column)
    result |= {
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
        "schema": {} if reader.first_columns is None else reader.first_columns.as_dict(),
        "files": len(reader.shards),
        "data_digest": digest,
        **summary,
        "returns_match": None if match is None else match.as_dict(),
        "clip": _clip(sample) if summary["returns"] else None,
        "bad_rows": reader.bad_rows.summary(),
        "bad_files": reader.bad_files.summary(),
    }


def _clip(sample: Rollouts) -> dict[str, float] | None:
    """Share of the response tokens whose return the clip keeps a critic from, at its default width."""
    if sample.values is None:
        return None
    eps: Any = LossSettings.cliprange_value
    apart = np.abs(sample.returns - sample.values)[sample.response_mask]
    return {"eps": eps, "held_back": float((apart > eps).mean())}
