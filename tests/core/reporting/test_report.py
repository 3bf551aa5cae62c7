"""`critic-train report`: which runs, which place."""

import json
from pathlib import Path

import pytest

from critic_train.errors import ConfigError, MachineError
from critic_train.reporting.report import report
from critic_train.settings import ReportSettings


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("notes.txt").write_text("words")
    Path("list.json").write_text("[1]")
    Path("good.json").write_text('{"critics": {}, "baselines": {}}')
    return tmp_path


@pytest.mark.parametrize(
    ("runs", "settings", "error", "hint"),
    [
        (["nowhere"], {}, "no run and no file nowhere", "--out of fit"),
        (["."], {}, ". holds no run: there is no run.json in it", "--out of fit"),
        (["notes.txt"], {}, "notes.txt is no JSON", "--out of fit"),
        (["list.json"], {}, "list.json is no result of eval", "--out of fit"),
        (["a", "good.json", "b"], {}, "no run and no file a\nno run and no file b", "--out of fit"),
        (["good.json"], {"to": "no/such/page.html"}, "--to: no folder no/such", "make it first"),
        (["good.json"], {"to": "."}, "--to: . is a folder", "report.html"),
        (["good.json"], {"tokenizer": "."}, "--tokenizer: no tokenizer.json in .", "directory of a model"),
    ],
)
def test_what_is_wrong_is_said(here, runs, settings, error, hint):
    with pytest.raises(ConfigError) as caught:
        report(ReportSettings(runs=runs, **settings))
    assert error in caught.value.message
    assert hint in caught.value.hint


def test_a_run_is_needed():
    with pytest.raises(ConfigError, match="a run is needed"):
        ReportSettings()


def test_a_place_that_cannot_be_written(here):
    with pytest.raises(MachineError, match=r"/proc/page\.html cannot be written"):
        report(ReportSettings(runs=["good.json"], to="/proc/page.html"))


def test_where_the_page_goes(here, make_run):
    run = make_run("a", steps=4, evaluate=False)
    assert report(ReportSettings(runs=[str(run)])).path == run / "report.html"
    assert report(ReportSettings(runs=["good.json"])).path == Path("good.html")
    assert report(ReportSettings(runs=["good.json", str(run)])).path == Path("report.html")
    assert report(ReportSettings(runs=["good.json"], to="x.html")).path == Path("x.html")
    assert {p.name for p in here.glob("*.html")} == {"good.html", "report.html", "x.html"}


def test_a_run_named_twice_is_one(here, make_run):
    run = str(make_run("a", steps=4, evaluate=False))
    assert [source.label for source in report(ReportSettings(runs=[run, run])).sources] == [run]


def test_an_evaluation_without_critics_has_a_page(here):
    page = report(ReportSettings(runs=["good.json"])).path.read_text()
    assert json.loads(Path("good.json").read_text())["critics"] == {}
    assert "<svg" not in page
