"""How progress is shown, and how a job ends."""

import signal

import pytest

from critic_train.errors import ConfigError
from critic_train.events import RunEnded, RunStarted
from critic_train_cli.job import choose_view, exit_code_of, run_inspection, run_job
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
def test_the_view_is_chosen_by_the_terminal_and_the_environment(monkeypatch, word, quiet, terminal, kind):
    monkeypatch.setenv("CRITIC_TRAIN_PROGRESS", word)
    monkeypatch.setattr("critic_train_cli.job.can_redraw", lambda stream: terminal)
    assert type(choose_view(Output(quiet=quiet), stopping="stopping")) is kind


def test_another_value_is_refused(monkeypatch):
    monkeypatch.setenv("CRITIC_TRAIN_PROGRESS", "fancy")
    with pytest.raises(ConfigError, match="must be live, plain or 0, not 'fancy'"):
        choose_view(Output(), stopping="stopping")


def test_a_job_ends_with_its_last_event_and_its_directory_is_known():
    output = Output(quiet=True)
    started = RunStarted(out="runs/a", total_steps=1, steps_per_epoch=[1], first_step=0, summary={})
    ended = run_job(lambda stop: iter_events(started, RunEnded(status="finished")), View(output, stopping=""), output)
    assert (ended.status, exit_code_of(ended), output.run_directory) == ("finished", 0, "runs/a")


def test_the_exit_code_of_an_interrupted_job_is_that_of_its_signal():
    assert exit_code_of(RunEnded(status="interrupted", signal_number=signal.SIGTERM)) == 143
    output = Output(quiet=True)
    ended = run_job(lambda stop: iter_events(RunEnded(status="interrupted")), View(output, stopping=""), output)
    assert exit_code_of(ended) == 130


def test_a_job_that_does_not_say_how_it_ended_is_a_bug():
    output = Output(quiet=True)
    with pytest.raises(RuntimeError, match="without a RunEnded"):
        run_job(lambda stop: iter_events(), View(output, stopping=""), output)


@pytest.mark.parametrize(("sound", "code"), [(True, 0), (False, 1)])
def test_what_is_not_sound_is_exit_code_1(sound, code, capsys):
    ended = RunEnded(status="finished", result={"sound": sound})
    output = Output(quiet=True, as_json=True)
    assert run_inspection(lambda stop: iter_events(ended), lambda console, result: None, output) == code
    assert capsys.readouterr().out == f'{{"sound": {str(sound).lower()}}}\n'


def iter_events(*events):
    yield from events
