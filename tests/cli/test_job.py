"""Which view suits where stderr goes."""

import pytest

from critic_train.errors import ConfigError
from critic_train_cli.job import choose_view
from critic_train_cli.live import LiveView
from critic_train_cli.output import Output
from critic_train_cli.plain_view import PlainView, View


@pytest.mark.parametrize(
    ("word", "quiet", "terminal", "kind"),
    [
        ("", False, True, LiveView),
        ("", False, False, PlainView),
        ("", True, True, View),
        ("0", False, True, View),
        ("plain", False, True, PlainView),
        ("live", False, False, LiveView),
        ("LIVE", True, False, View),
    ],
)
def test_choice(monkeypatch, word, quiet, terminal, kind):
    monkeypatch.setenv("CRITIC_TRAIN_PROGRESS", word)
    monkeypatch.setattr("critic_train_cli.job.can_redraw", lambda stream: terminal)
    assert type(choose_view(Output(quiet=quiet), stopping="stopping")) is kind


def test_another_word_is_refused(monkeypatch):
    monkeypatch.setenv("CRITIC_TRAIN_PROGRESS", "fancy")
    with pytest.raises(ConfigError, match="must be live, plain or 0, not 'fancy'"):
        choose_view(Output(), stopping="stopping")
