"""Which view suits where stderr goes."""

import os
import sys

from critic_train.errors import ConfigError
from critic_train_cli.output import Output
from critic_train_cli.terminal import can_redraw
from critic_train_cli.views import PlainView, View

VARIABLE = "CRITIC_TRAIN_PROGRESS"


def choose_view(output: Output, *, stopping: str) -> View:
    """The view that suits stderr, unless CRITIC_TRAIN_PROGRESS says which.

    Args:
        output: where the view writes.
        stopping: what happens after the first signal.

    Raises:
        ConfigError: the variable holds another word.
    """
    word = os.environ.get(VARIABLE, "").lower()
    if word not in ("", "0", "plain", "live"):
        raise ConfigError(f"{VARIABLE} must be live, plain or 0, not {word!r}")
    if output.quiet or output.silent or word == "0":
        return View(output, stopping=stopping)
    if word == "live" or (not word and can_redraw(sys.stderr)):
        from critic_train_cli.live import LiveView

        return LiveView(output, stopping=stopping)
    return PlainView(output, stopping=stopping)
