"""`critic-train check`, from top to bottom: read everything, survey it, match its returns, advise."""

from collections.abc import Generator, Iterator
from dataclasses import asdict
from typing import Any

import numpy as np

from critic_train.data.bad_files import BadFiles
from critic_train.data.columns import Needs
from critic_train.data.reading import RolloutReader
from critic_train.data.shards import find_shards, fingerprint
from critic_train.doctor.advice import advice, command_line
from critic_train.doctor.matching import match_returns
from critic_train.doctor.survey import Survey, leak
from critic_train.events import Event, Notice, Progress, RunEnded
from critic_train.rollouts import Rollouts
from critic_train.settings import column_renames
from critic_train.settings.check import CheckSettings
from critic_train.settings.fields import default_of
from critic_train.settings.fit import FitSettings
from critic_train.stopping import StopRequest

MOST_BAD_ROWS = 10_000
"""Bad rows that are named one by one; all are counted."""

EVERYTHING = Needs(returns="where there", values=False, rewards="where there", truncated="where there")


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
    reader = RolloutReader(
        shards,
        renames=column_renames(settings.column),
        on_bad_rows="skip",
        on_bad_file="skip",
        bad_files=bad_files,
        needs=EVERYTHING,
        bad_rows_kept=MOST_BAD_ROWS,
        stop=stop,
    )
    survey = yield from _surveyed(reader, "reading rollouts", stop)
    other = None
    if settings.against and not stop.requested:
        apart = RolloutReader(
            find_shards(settings.against),
            renames=column_renames(settings.column),
            on_bad_rows="skip",
            needs=EVERYTHING,
            stop=stop,
        )
        other = yield from _surveyed(apart, "reading the other rollouts", stop)
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


def _surveyed(reader: RolloutReader, stage: str, stop: StopRequest) -> Generator[Event, None, Survey]:
    survey = Survey()
    total = sum(shard.num_rows for shard in reader.shards)
    for batch in reader:
        if stop.requested:
            break
        survey.add(batch)
        yield Progress(stage=stage, done=int(batch.row[-1]) + 1, total=total)
    return survey


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
