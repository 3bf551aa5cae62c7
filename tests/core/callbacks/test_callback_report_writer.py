"""The page of a run that goes on: how often it is written, and what a failure costs."""

import json
from pathlib import Path

import pytest

from critic_train.callbacks.callback import FIRST_PAGE_SECONDS, MAX_SHARE, ReportWriter, with_callbacks
from critic_train.events import EvaluationEnded, Notice, StepEnded
from critic_train.report import page


class Clock:
    """Moves by what a page costs whenever one is written, and otherwise by hand."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def run(tmp_path) -> Path:
    (tmp_path / "run.json").write_text("{}")
    return tmp_path


@pytest.fixture
def pages(monkeypatch):
    """Pages written, in place of drawing them; each takes two seconds."""
    written: list[Path] = []
    clock = Clock()

    def write(path, sources, **options):
        written.append(path)
        clock.now += 2.0
        return 1

    monkeypatch.setattr(page, "write_page", write)
    return written, clock


def evaluation(step, *, best=True, figure=0.5):
    verdict = {"critics": {"critic": {"explained_variance": figure}}, "baselines": {}}
    return EvaluationEnded(step=step, metrics={"explained_variance": figure}, best=best, verdict=verdict)


def stored(run: Path) -> dict:
    return json.loads((run / "evaluation.json").read_text())


def test_pages_take_a_small_share_of_the_time_and_the_last_is_always_written(run, pages):
    written, clock = pages
    writer = ReportWriter(run, clock=clock)
    for step in range(200):
        clock.now += 5.0
        writer.on_event(evaluation(step))
    assert 5 <= len(written) <= 200
    assert 2.0 * len(written) <= MAX_SHARE * clock.now + 2.0
    before = len(written)
    writer.close()
    assert len(written) == before + 1
    assert set(written) == {run / "report.html"}


def test_the_first_evaluation_of_a_young_run_waits(run, pages):
    written, clock = pages
    writer = ReportWriter(run, clock=clock)
    clock.now = 0.9 * FIRST_PAGE_SECONDS / MAX_SHARE
    writer.on_event(evaluation(0))
    assert written == []
    clock.now = 1.1 * FIRST_PAGE_SECONDS / MAX_SHARE
    writer.on_event(evaluation(1))
    assert len(written) == 1


def test_the_best_verdict_is_kept(run, pages):
    writer = ReportWriter(run, clock=pages[1])
    writer.on_event(evaluation(0, best=False, figure=0.0))
    assert (stored(run)["step"], stored(run)["best"]) == (0, False)
    writer.on_event(evaluation(10, figure=0.6))
    writer.on_event(evaluation(20, best=False, figure=0.4))
    assert (stored(run)["step"], stored(run)["best"]) == (10, True)
    assert stored(run)["critics"]["critic"]["explained_variance"] == 0.6
    resumed = ReportWriter(run, clock=pages[1])
    resumed.on_event(evaluation(30, best=False, figure=0.3))
    assert stored(run)["step"] == 10
    resumed.on_event(evaluation(40, figure=0.7))
    assert stored(run)["step"] == 40


def test_other_events_cost_nothing(run, pages):
    writer = ReportWriter(run, clock=pages[1])
    pages[1].now = 1e6
    writer.on_event(StepEnded(step=1, epoch=0, metrics={}, timing={}))
    assert pages[0] == []
    assert not (run / "evaluation.json").exists()


def test_a_page_that_fails_is_told_once_and_the_run_goes_on(run, monkeypatch):
    tries = []

    def write(path, sources, **options):
        tries.append(path)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(page, "write_page", write)
    clock = Clock()
    writer = ReportWriter(run, clock=clock)
    clock.now = 1e6
    events = [evaluation(1), StepEnded(step=2, epoch=0, metrics={}, timing={}), evaluation(3)]
    told = list(with_callbacks(iter(events), [writer]))
    notices = [event for event in told if isinstance(event, Notice)]
    assert [event for event in told if not isinstance(event, Notice)] == events
    assert len(notices) == 1
    assert notices[0].level == "warning"
    assert "report.html failed" in notices[0].message
    assert len(tries) == 1
    assert stored(run)["step"] == 1


def test_a_run_that_failed_has_its_page(run, pages):
    def events():
        yield evaluation(1)
        raise RuntimeError("diverged")

    with pytest.raises(RuntimeError, match="diverged"):
        list(with_callbacks(events(), [ReportWriter(run, clock=pages[1])]))
    assert pages[0] == [run / "report.html"]
