"""`critic-train check`, from top to bottom: read everything, survey it, match its returns, advise."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numpy as np

from critic_train.data.bad_files import BadFiles
from critic_train.data.reading import RolloutReader
from critic_train.data.shards import find_shards, fingerprint
from critic_train.data.whole import read_through, whole_reader
from critic_train.doctor.advice import advice, command_line
from critic_train.doctor.matching import match_returns
from critic_train.doctor.survey import Survey, leak
from critic_train.events import Event, Notice, Progress, RunEnded
from critic_train.rollouts import Rollouts
from critic_train.settings.check import CheckSettings
from critic_train.settings.fields import default_of
from critic_train.settings.fit import FitSettings
from critic_train.stopping import StopRequest

MOST_BAD_ROWS = 10_000
"""Bad rows that are named one by one; all are counted."""


def check(settings: CheckSettings, stop: StopRequest) -> Iterator[Event]:
    """Say what is in a data set. Streams: memory does not grow with the tokens.

    Args:
        settings: what to look at.
        stop: looked at between batches of rows.

    Yields:
        Progress and notices; RunEnded last, whose result is `Survey.told` with "schema", "bad_rows", "bad_files",
        "returns_match", "clip", "leak", "advice", "command" and "sound" added.

    Raises:
        DataError: there is not one row that can be used.
    """
    bad_files = BadFiles()
    shards = find_shards(settings.data, bad_files)
    reader = whole_reader(shards, settings.column, stop, bad_files, MOST_BAD_ROWS)
    survey, other = Survey(), None
    yield from read_through(reader, stop, survey.add)
    if settings.against and not stop.requested:
        apart = whole_reader(find_shards(settings.against), settings.column, stop, None)
        other = Survey()
        yield from read_through(apart, stop, other.add, "reading the other rollouts")
    if stop.requested:
        yield RunEnded(status="interrupted", signal_number=stop.signal_number)
        return
    for sentence in reader.notices:
        yield Notice(message=sentence)
    yield Progress(stage="matching returns", done=0, total=1, unit="data set")
    found = _found(survey, reader, fingerprint(shards)["digest"])
    found["leak"] = None if other is None else leak(survey, other)
    advised = advice(found, settings.data, settings.column)
    found |= {
        "advice": [{"flags": flags, "why": why} for flags, why in advised],
        "command": command_line(advised),
        "sound": not (found["bad_rows"]["count"] or bad_files or (found["leak"] or {}).get("prompts")),
    }
    yield RunEnded(status="finished", result=found)


def _found(survey: Survey, reader: RolloutReader, digest: str) -> dict[str, Any]:
    told = survey.told()
    sample = survey.sample.rollouts()
    assert sample is not None, "the reader raises where no row is good"
    if "returns" not in reader.kept:
        told |= {"returns": None, "stored_values": None, "group_mean": None}
    match = match_returns(sample) if told["returns"] else None
    return {
        "schema": {} if reader.understood is None else reader.understood.as_dict(),
        "files": len(reader.shards),
        "data_digest": digest,
        **told,
        "returns_match": None if match is None else asdict(match),
        "clip": _clip(sample) if told["returns"] else None,
        "bad_rows": reader.bad_rows.summary(),
        "bad_files": reader.bad_files.summary(),
    }


def _clip(sample: Rollouts) -> dict[str, float] | None:
    """How much of the data lies beyond the clip's reach, at its default width."""
    if sample.values is None:
        return None
    eps: Any = default_of(FitSettings, "cliprange_value")
    apart = np.abs(sample.returns - sample.values)[sample.response_mask]
    return {"eps": eps, "held_back": float((apart > eps).mean())}
