"""How a run or an evaluation was made: settings, data, model, versions, and the command that makes it again."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from critic_train.report.report_sources import Record, Source
from critic_train.settings import EvalSettings, FitSettings, Settings, ShowSettings, defaults_of
from critic_train.settings.command_lines import command_line

Rows = list[tuple[str, str]]

NOT_SHOWN = ("model", "nproc", "max_length")
"""Settings of a run that the command to look at its rollouts does not take over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """How one source was made.

    Attributes:
        label: the run's directory or the evaluation's file.
        command: the command line that does the same again; empty where it was not recorded.
        given: settings that are not the default, name -> value.
        chosen: what a run chose for settings that were not given, name -> value and reason.
        defaults: settings that are at their default, of which nothing was chosen.
        resolved: what a run recorded at its start: rollouts, parameters, device and so on.
        data: fingerprints of data and model.
        versions: of this program and what it computes with.
    """

    label: str
    command: str
    given: Rows
    chosen: Rows
    defaults: Rows
    resolved: Rows
    data: Rows
    versions: Rows


def provenance_of(source: Source) -> Provenance:
    """Gather it from run.json, or from eval's result."""
    record = source.started if source.is_run else source.evaluation
    kind: type[Settings] = FitSettings if source.is_run else EvalSettings
    settings = record.part("settings").data
    usual = defaults_of(kind)
    given = {name: value for name, value in settings.items() if name not in usual or value != usual[name]}
    chosen = _chosen(record) if source.is_run else {}
    return Provenance(
        label=source.label,
        command=command_line(kind, settings) if settings else "",
        given=_rows(given),
        chosen=[(name.replace("_", " "), _with_reason(choice)) for name, choice in chosen.items()],
        defaults=_rows({name: value for name, value in settings.items() if name not in given.keys() | chosen.keys()}),
        resolved=_rows(record.part("resolved").data) if source.is_run else [],
        data=_fingerprints(record),
        versions=_rows(record.part("versions").data),
    )


def show_command(source: Source, critic: str, uid: str) -> str:
    """The command that shows the rollouts of a prompt group in the terminal; empty where the data was not recorded.

    Args:
        source: a run or an evaluation.
        critic: the name of the critic in the evaluation.
        uid: of the group.
    """
    record = source.started if source.is_run else source.evaluation
    settings = record.part("settings").data
    data = settings.get("val_data") or settings.get("data")
    if not data:
        return ""
    usual = defaults_of(ShowSettings)
    given = {name: value for name, value in settings.items() if name in usual and name not in NOT_SHOWN}
    models = source.evaluation.get("models") or []
    model = [str(source.path)] if source.is_run else [critic] if critic in models else models[:1]
    return command_line(ShowSettings, {**given, "model": model, "data": data, "uid": [uid]})


def different_settings(sources: Sequence[Source]) -> list[list[str]]:
    """The settings in which runs differ, as a table: headings first, a run a column."""
    runs = [_effective(source.started) for source in sources if source.is_run]
    if len(runs) < 2:
        return []
    names = [name for name in dict.fromkeys(name for run in runs for name in run) if name != "out"]
    differing = [name for name in names if any(run.get(name) != runs[0].get(name) for run in runs)]
    return [[name, *(readable(run.get(name)) for run in runs)] for name in differing]


def _effective(record: Record) -> dict[str, Any]:
    """A run's settings, with what it chose in place of what was not given."""
    return {**record.part("settings").data, **{name: choice.get("value") for name, choice in _chosen(record).items()}}


def _chosen(record: Record) -> dict[str, Mapping[str, Any]]:
    """Name -> {"value", and "reason" where it was told} of what a run chose for settings that were not given."""
    settings, recipe = record.part("settings").data, record.part("recipe").parts()
    choices: dict[str, Mapping[str, Any]] = {name: choice.data for name, choice in recipe.items()}
    # What a run computes with chooses itself, by memory and ranks; "chosen" has it where it was given too.
    choices |= {name: {"value": value} for name, value in record.part("chosen").data.items() if name not in choices}
    no_step = record.part("resolved").get("steps") == 0
    unused = {"lr", "head_lr", "warmup_steps"} if no_step else set()
    return {
        name: choice
        for name, choice in choices.items()
        if name in settings and _is_not_given(settings[name]) and name not in unused
    }


def _is_not_given(value: Any) -> bool:
    return value is None or value is False or value == "auto"


def _with_reason(choice: Mapping[str, Any]) -> str:
    reason = choice.get("reason")
    return readable(choice.get("value")) + (f": {reason}" if reason else "")


def readable(value: Any) -> str:
    """A setting's value as text."""
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return ", ".join(readable(inner) for inner in value) or "none"
    return str(value)


def _rows(values: Mapping[str, Any]) -> Rows:
    return [
        (name.replace("_", " "), readable(value)) for name, value in values.items() if not isinstance(value, Mapping)
    ]


def _fingerprints(record: Record) -> Rows:
    """Digests of the data, and of the model's files."""
    rows: Rows = []
    for key, what in (("data", "rollouts"), ("val_data", "held-out rollouts")):
        part = record.part(key)
        if part.get("digest"):
            files = part.rows("files")
            rows.append((what, f"{part.get('digest')} ({len(files)} file{'' if len(files) == 1 else 's'})"))
    if record.get("data_digest"):
        rows.append(("rollouts", str(record.get("data_digest"))))
    for name, file in record.part("model").part("files").parts().items():
        rows.append((name, f"{file.get('sampled_sha256')} (sampled, {readable(file.get('bytes'))} bytes)"))
    return rows
