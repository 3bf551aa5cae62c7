"""The page as a whole: true, complete in itself, and safe whatever the data say."""

import json
import re

import pytest
from looking import Page, stands_at

from critic_train.errors import MachineError
from critic_train.report.page import render, write_page
from critic_train.report.report_sources import evaluation_source, read_sources

MEGABYTE = 1_000_000


def page_of(*paths, **options) -> Page:
    return Page(render(read_sources([str(path) for path in paths]), **options))


def numbers_in(text: str) -> list[float]:
    scale = {"k": 1e3, "M": 1e6, "%": 0.01, "": 1.0}
    found = re.findall(r"([-+]?\d[\d,]*\.?\d*(?:e[-+]\d+)?)\s?([kM%]?)", text)
    return [float(digits.replace(",", "")) * scale[unit] for digits, unit in found]


def test_every_figure_is_in_the_files_and_is_what_they_say(compared, compared_html):
    page = Page(compared_html)
    assert len(page.figures) > 300
    for place, value, text in page.figures:
        there = stands_at(place, compared)
        assert json.loads(value) == there, place
        if isinstance(there, str):
            assert text == there
            continue
        wanted = there if isinstance(there, list) else [there]
        for shown, figure in zip(numbers_in(text), wanted, strict=True):
            assert shown == pytest.approx(figure, rel=0.02, abs=0.0006), (place, text)


def test_no_figure_of_a_table_or_tile_comes_from_nowhere(compared_html):
    """Besides the spans of bins, and the settings, which are shown as texts."""
    page = Page(compared_html)
    settings = {"0.1", "0.001", "not set", "1e-05"}
    assert [text for text in page.bare if text not in settings] == []


def test_the_figures_of_the_top_are_those_of_the_verdict(make_run):
    run = make_run("a")
    verdict = json.loads((run / "evaluation.json").read_text())
    page = page_of(run)
    shown = {place.split("#")[1]: json.loads(value) for place, value, _ in page.figures if "evaluation.json" in place}
    critic = verdict["critics"]["critic"]
    for key in (
        "explained_variance",
        "explained_variance_interval",
        "mse",
        "bias",
        "auc",
        "expected_calibration_error",
    ):
        assert shown[f"/critics/critic/{key}"] == critic[key]
    for sentence in verdict["words"]:
        assert sentence in page.text


def test_it_stands_alone(compared_html):
    page = Page(compared_html)
    assert not {"script", "link", "img", "iframe", "object", "embed", "form", "base"} & set(page.tags)
    assert not [name for _, name, _ in page.attributes if name.startswith("on") or name == "src"]
    for tag, name, value in page.attributes:
        if name in ("href", "xlink:href"):
            assert value.startswith("#"), (tag, value)
    assert re.findall(r"url\((?!#)", compared_html) == []
    assert "@import" not in compared_html
    assert "content=\"default-src 'none'; style-src 'unsafe-inline'\"" in compared_html


def test_references_inside_the_page_lead_somewhere_and_no_identifier_is_used_twice(compared_html):
    page = Page(compared_html)
    assert len(page.ids) == len(set(page.ids))
    used = set(re.findall(r"url\(#([\w.-]+)\)", compared_html)) | {
        value[1:] for _, name, value in page.attributes if name == "href" and value.startswith("#")
    }
    assert used
    assert used <= set(page.ids)


HOSTILE = (
    "</style><script>alert(1)</script>\"'><img src=x onerror=alert(1)>{{ 7*7 }}{% raw %}$\\frac{1}$&amp;\u202e\ud800"
)


def test_whatever_data_say_is_text(make_run, make_evaluation):
    run = make_run("a", uid=HOSTILE, model="<b>m</b>" + HOSTILE[:-1])
    evaluation = json.loads((run / "evaluation.json").read_text())
    evaluation["critics"]["critic"]["by"] = {HOSTILE: {HOSTILE: {"explained_variance": 0.5, "tokens": 3}}}
    evaluation["words"] = [HOSTILE]
    evaluation["examples"][0]["why"] = "nobody's"
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    other = make_evaluation("x.json", [HOSTILE, "b"], uid=HOSTILE)
    html = render(read_sources([str(run), str(other)])).encode("utf-8", errors="replace").decode()
    page = Page(html)
    assert "script" not in page.tags
    assert "img" not in page.tags
    assert "<b>m" not in html
    assert set(re.findall(r"onerror=alert\(1\)>(.{9})", page.text)) == {"{{ 7*7 }}"}
    assert page.text.count("<script>alert(1)</script>") > 3


def test_the_same_run_gives_the_same_page(make_run):
    sources = read_sources([str(make_run("a"))])
    assert render(sources) == render(sources)


def test_nothing_empty_is_shown(make_run):
    """A run that nobody judged has its curves, and no panel for what is not there."""
    page = page_of(make_run("a", evaluate=False))
    assert "Not judged yet" in page.text
    assert {"verdict", "curves", "origin"} <= set(page.ids)
    assert not {"where", "groups", "rollouts"} & set(page.ids)
    assert "Calibration" not in page.text
    everything = page_of(make_run("b"))
    assert {"verdict", "curves", "where", "groups", "rollouts", "origin"} <= set(everything.ids)


def test_a_run_at_its_very_start(make_run):
    run = make_run("a", steps=1, evaluate=False)
    (run / "metrics.jsonl").write_text("")
    (run / "timings.jsonl").unlink()
    page = page_of(run)
    assert "step 0 of 1" in page.text
    assert "curves" not in page.ids


def test_half_a_line_at_the_end_is_left_out(make_run):
    run = make_run("a")
    before = page_of(run).text
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"event": "step", "step": 99, "value_')
    assert page_of(run).text == before


def test_a_run_from_before_verdicts_were_kept(make_run):
    """metrics.jsonl alone still gives the verdict in words and figures, without the rollouts."""
    run = make_run("a")
    words = json.loads((run / "evaluation.json").read_text())["words"]
    (run / "evaluation.json").unlink()
    page = page_of(run)
    assert all(sentence in page.text for sentence in words)
    assert any(place.startswith("1:metrics.jsonl:") for place, _, _ in page.figures)
    assert "rollouts" not in page.ids


def test_runs_are_compared(compared_html):
    page = Page(compared_html)
    assert "Settings that differ" in page.text
    assert "held_out.json" in page.text
    titles = [f"{name} beats" for name in ("x", "y~1")] + ["cannot tell x from y~1"]
    assert any(title in page.text for title in titles)


def test_critics_judged_on_different_rollouts_are_not_compared(make_run, make_evaluation):
    page = page_of(make_run("a", steps=4), make_evaluation("x.json", ["m"], seed=1))
    assert "judged on different rollouts" in page.text
    assert "constant mean (a)" in page.text
    assert "constant mean (m)" in page.text
    alike = page_of(make_run("b", steps=4), make_evaluation("y.json", ["m"]))
    assert "judged on different rollouts" not in alike.text
    assert alike.text.count("constant mean (") == 0


def test_what_others_write_for_no_number_is_none(make_evaluation):
    path = make_evaluation("x.json", ["m"])
    value = json.loads(path.read_text())
    value["critics"]["m"]["explained_variance"] = float("nan")
    value["critics"]["m"]["calibration"][0]["mean_value"] = float("inf")
    path.write_text(json.dumps(value))
    assert "Cannot tell" in page_of(path).text


@pytest.mark.slow
def test_very_many_evaluations_stay_small(make_run):
    run = make_run("a", steps=4)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    evaluation = {
        key: value for key, value in json.loads(lines[0]).items() if not isinstance(value, list) or key[-1] == "l"
    }
    more = [json.dumps(evaluation | {"step": n, "explained_variance": n / 1e4}) for n in range(1000)]
    (run / "metrics.jsonl").write_text("\n".join([*lines, *more]) + "\n")
    html = render(read_sources([str(run)]))
    assert len(html) < MEGABYTE
    assert "#/explained_variance" in html
    assert ">999<" in html


@pytest.mark.slow
def test_a_long_run_stays_small(make_run, tmp_path):
    run = make_run("long", steps=8)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    step = json.loads(lines[1])
    assert step["event"] == "step"
    long = [json.dumps(step | {"step": n, "value_loss": 1.0 if n == 70_000 else 0.1}) for n in range(1, 100_001)]
    (run / "metrics.jsonl").write_text("\n".join(lines + long) + "\n")
    size = write_page(tmp_path / "page.html", read_sources([str(run)]))
    assert size == (tmp_path / "page.html").stat().st_size
    assert size < MEGABYTE


def test_without_room_the_old_page_stands(make_run, tmp_path, monkeypatch):
    from critic_train.run.storage import watched

    sources = read_sources([str(make_run("a"))])
    page = tmp_path / "page.html"
    page.write_text("old")

    def full(operation):
        if operation.kind == "write":
            raise OSError(28, "No space left on device")

    with watched(full), pytest.raises(MachineError, match="cannot be written: No space"):
        write_page(page, sources)
    assert page.read_text() == "old"
    assert list(tmp_path.glob(".page*")) == []


def test_an_evaluation_in_memory_is_named_after_its_critics(make_evaluation):
    result = json.loads(make_evaluation("x.json", ["runs/a", "runs/b"]).read_text())
    assert "<h1>evaluation of a, b</h1>" in render([evaluation_source(result)])
    assert "<h1>evaluation of stored values</h1>" in render([evaluation_source(result | {"models": []})])
