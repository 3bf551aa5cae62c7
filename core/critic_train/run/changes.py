"""Which settings and inputs may differ between the command that began a run and the one that resumes it."""

from pathlib import Path
from typing import Any

from critic_train.errors import ConfigError
from critic_train.settings import flag_of

RESUMABLE = frozenset(
    {
        "log_every",
        "keep",
        "checkpoint_every",
        "out",
        "data",
        "val_data",
        "model",
        "log_to",
        "log_project",
        "patience",
        "no_report",
        "nproc",
    }
)
"""Settings that may differ when a run is resumed: they change nothing in its result. Paths are among them because
fingerprints identify their content."""

ROUNDING_ONLY = frozenset(
    {
        *("max_tokens", "device", "attention", "activation_checkpointing", "compile", "no_compile", "offload"),
        "sequence_parallel",
    }
)
"""Settings that may differ at the price of bit-identity: sums are taken in another order."""

AUTOMATIC = ("precision", "max_tokens", "activation_checkpointing", "offload", "sequence_parallel")
"""Settings that choose themselves where they are "auto" or not given: a run goes on with what it chose."""

HORIZON = ("epochs", "max_steps")
"""Settings that say how long a run is."""
SHOWN = 5


def refuse_changes(before: dict[str, Any], now: dict[str, Any], out: Path, flag: str = "--out") -> list[str]:
    """Compare the settings and inputs a run was started with to those of the command that resumes it.

    Args:
        before: run.json.
        now: the same of this command; keys it lacks are not compared.
        out: the run directory, for the message.
        flag: the flag that names it.

    Returns:
        Notices about changes that are allowed.

    Raises:
        ConfigError: something changed that the result depends on; every such change is listed.
    """
    refused: list[str] = []
    notices: list[str] = []
    old, new = before.get("settings", {}) | chosen_settings(before), now["settings"]
    longer = is_longer(before, now)
    for name in new:
        if name in RESUMABLE or old.get(name) == new[name] or _is_automatic(name, new[name]):
            continue
        line = f"{flag_of(name)} was {_shown(old.get(name))}, is now {_shown(new[name])}"
        if name in HORIZON and longer:
            notices.append(f"{line}: the run goes on beyond where it was to end")
        elif name in ROUNDING_ONLY:
            notices.append(f"{line}: the result may differ from the undisturbed run's by rounding")
        elif name in HORIZON:
            refused.append(
                f"{line} (a run can be made longer with --lr-schedule constant, --warmup-steps and "
                "--eval-every given, and without --old-values epoch: nothing else depends on its length then)"
            )
        else:
            refused.append(line)
    for name, what in (("data", "rollouts"), ("val_data", "held-out rollouts")):
        if name in now and before.get(name) != now[name]:
            refused.append(f"the {what} changed since the run began: {changed_files(before.get(name), now[name])}")
    refused += _other_models(before, now)
    for name, what in (
        ("versions", "library versions"),
        ("threads", "number of threads"),
        ("ranks", "number of ranks"),
    ):
        if name in now and before.get(name, now[name]) != now[name]:
            notices.append(f"the {what} changed since the run began: the result may differ by rounding")
    if refused:
        raise ConfigError(
            f"{out} holds a run that was started differently:\n" + "\n".join(f"  {line}" for line in refused),
            hint=f"run the same command to resume it, or give this one another {flag}",
        )
    return notices


def _other_models(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What is another model than the one that the run began with, or its tokenizer."""
    was, wanted = before.get("model", now.get("model")), now.get("model")
    if (was is None) != (wanted is None):
        return [
            "it began from scratch, not from --model" if was is None else "it began from a --model, which is not set"
        ]
    return [
        f"the {what} changed since the run began"
        for name, what in (("model", "base model"), ("tokenizer", "base model's tokenizer"))
        if name in now and before.get(name, now[name]) != now[name]
    ]


def chosen_settings(record: dict[str, Any]) -> dict[str, Any]:
    """What a run computes with, of the settings that choose themselves: as they were given, else as they chose.

    Args:
        record: run.json.
    """
    given, chosen = record.get("settings", {}), record.get("chosen", {})
    return {
        name: chosen[name] if _is_automatic(name, given.get(name)) else given[name]
        for name in AUTOMATIC
        if name in chosen or not _is_automatic(name, given.get(name))
    }


def _is_automatic(name: str, value: object) -> bool:
    return name in AUTOMATIC and value in (None, "auto")


def is_longer(before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether a run is only made longer, and none of its steps so far depended on its length.

    The learning rate depends on it unless it is constant; the default warm-up and the default interval of evaluations
    are shares of the run; old values of an incomplete epoch were removed with the cache when the run ended.
    """
    old, new = before.get("settings", {}), now["settings"]
    if all(old.get(name) == new.get(name) for name in HORIZON):
        return False
    lengths = [(old.get(name), new.get(name)) for name in HORIZON]
    grows = all(was == wanted or (was is not None and wanted is not None and wanted > was) for was, wanted in lengths)
    independent = new.get("lr_schedule") == "constant" and None not in (new.get("warmup_steps"), new.get("eval_every"))
    return grows and independent and new.get("old_values") != "epoch"


def is_more_patient(before: dict[str, Any], now: dict[str, Any], result: dict[str, Any] | None) -> bool:
    """Whether a run that --patience ended may go on, since it is given more of it.

    Args:
        before: run.json, with what the run had chosen in place of what was not given.
        now: the same of this command.
        result: result.json of the run, if there is one.
    """
    if result is None or not result.get("stopped_early") or now["settings"].get("old_values") == "epoch":
        return False
    was, wanted = before.get("settings", {}).get("patience"), now["settings"].get("patience")
    return was is not None and wanted is not None and wanted > was


def changed_files(before: dict[str, Any] | None, now: dict[str, Any] | None) -> str:
    """Which files of a data set were added, removed, changed or reordered, as text."""
    was = {file["name"]: file for file in (before or {}).get("files", [])}
    files = {file["name"]: file for file in (now or {}).get("files", [])}
    changes = {
        "added": [name for name in files if name not in was],
        "removed": [name for name in was if name not in files],
        "changed": [name for name in files if name in was and files[name] != was[name]],
    }
    parts = [
        f"{what} {', '.join(names[:SHOWN])}" + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
        for what, names in changes.items()
        if names
    ]
    return "; ".join(parts) or "their order is another"


def _shown(value: object) -> str:
    return "not set" if value is None else str(value)
