"""`critic-train report`: which runs, which place."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

import critic_train
from critic_train.errors import ConfigError, MachineError
from critic_train.report.page import report
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


def changed_somewhere(value, draw):
    """The same JSON with one value somewhere in it replaced by something else."""
    if isinstance(value, dict) and value and draw.random() < 0.95:
        key = draw.choice(sorted(value))
        return value | {key: changed_somewhere(value[key], draw)}
    if isinstance(value, list) and value and draw.random() < 0.95:
        place = draw.randrange(len(value))
        return [*value[:place], changed_somewhere(value[place], draw), *value[place + 1 :]]
    return draw.choice([None, "words", -1, 1e300, [], {}, [None], {"a": 1}, True, float("nan")])


@pytest.mark.parametrize("seed", range(6))
def test_a_file_that_somebody_has_changed_is_no_bug(here, make_evaluation, seed):
    """It has a page, or is refused in words."""
    draw = random.Random(seed)
    value = json.loads(make_evaluation("x.json", ["a", "b"]).read_text())
    for _ in range(12):
        value = changed_somewhere(value, draw)
    Path("x.json").write_text(json.dumps(value))
    refused = ""
    try:
        page = report(ReportSettings(runs=["x.json"])).path.read_text()
    except ConfigError as error:
        refused, page = error.message, ""
    assert refused.startswith("x.json") or (page.startswith("<!doctype html>") and page.endswith("</html>"))


def test_the_library_that_draws_keeps_its_thoughts_to_itself(here):
    """Where its cache cannot be written it warns, in the middle of somebody's run."""
    script = (
        "from critic_train.report.svg_charts import svg\n"
        "print(len(svg(lambda axes: axes.plot([0, 1]), name='a', described='b')) > 100)"
    )
    environment = {name: value for name, value in os.environ.items() if name not in ("MPLCONFIGDIR", "XDG_CACHE_HOME")}
    environment |= {"HOME": "/proc", "PYTHONPATH": str(Path(critic_train.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")
