"""Settings as the shell command that gives them, and the command that comes after one."""

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from critic_train.settings.base import Settings, as_dict, defaults_of, flag_of, settings_fields

READING = ("column", "group_by", "on_bad_rows", "on_bad_file", "max_length")
RETURNS = ("returns", "gamma", "lam", "lam_policy", "length_alpha", "truncated")
COMPUTE = ("device", "precision")
"""Settings that the next command needs too, where it has them: how the same rollouts are read, what their returns are,
and where it computes."""


def command_line(kind: type[Settings], settings: Mapping[str, Any]) -> str:
    """The shell command that gives these settings; what is at its default is left out."""
    usual = defaults_of(kind)
    arguments = ["critic-train", kind.command]
    for declared in settings_fields(kind):
        name = declared.name
        value = settings.get(name, usual[name])
        if value == usual[name] or value is None:
            continue
        flag = [] if declared.metadata["positional"] else [declared.metadata.get("flag") or flag_of(name)]
        if isinstance(value, bool):
            arguments += flag if value else []
            continue
        for one in value if isinstance(value, list) else [value]:
            arguments += [*flag, str(one)]
    return shlex.join(arguments)


def next_command(kind: type[Settings], before: Settings, carried: Sequence[str], **given: Any) -> str:
    """The command to run after another on the same rollouts.

    Args:
        kind: settings of the next command.
        before: of the command that has run.
        carried: names of the settings that are taken over, where both have them.
        given: settings of the next command, by name; None leaves one at its default.
    """
    settings, usual = as_dict(before), defaults_of(kind)
    taken = {name: settings[name] for name in carried if name in settings and name in usual}
    return command_line(kind, taken | given)
