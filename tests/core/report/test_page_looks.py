"""The page in a real browser: nothing overflows, overlaps, is cut or empty, from a phone to a wide screen.

Set CRITIC_TRAIN_SCREENSHOTS to a folder to keep the pictures.
"""

import os
import re
from itertools import combinations
from pathlib import Path

import pytest
from browser import CHROMIUM, MISSING, measured, printed, screenshot

from critic_train.report.page import write_page
from critic_train.report.report_sources import read_sources

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=MISSING)

WIDTHS = [320, 390, 768, 1300, 1900]
SMALLEST_TEXT = 7.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    kept = os.environ.get("CRITIC_TRAIN_SCREENSHOTS")
    if kept:
        Path(kept).mkdir(parents=True, exist_ok=True)
    return Path(kept) if kept else tmp_path_factory.mktemp("pictures")


@pytest.fixture(scope="module")
def pages(compared, compared_html, folder) -> dict[str, Path]:
    """One run's page, and one that compares."""
    one, several = folder / "one.html", folder / "several.html"
    write_page(one, read_sources([str(compared[0])]))
    several.write_text(compared_html)
    return {"one": one, "several": several}


@pytest.fixture(scope="module", params=["one", "several"])
def layouts(request, pages):
    return measured(pages[request.param], WIDTHS)


def overlap(a: list[float], b: list[float]) -> bool:
    return min(a[2], b[2]) - max(a[0], b[0]) > 1 and min(a[3], b[3]) - max(a[1], b[1]) > 1


def test_nothing_is_wider_than_the_window(layouts):
    for layout, width in zip(layouts, WIDTHS, strict=True):
        assert layout["width"] == width
        assert (width, layout["overflow"], layout["beyond"]) == (width, 0, [])


def test_no_words_are_cut_and_a_screen_has_room_for_every_table(layouts):
    for layout in layouts:
        assert (layout["width"], layout["cut"]) == (layout["width"], [])
        if layout["width"] >= 1300:
            assert layout["scrolled"] == []


def test_labels_of_charts_are_whole_apart_and_large_enough(layouts):
    for layout in layouts:
        assert len(layout["charts"]) >= 15
        for chart in layout["charts"]:
            left, top, right, bottom = chart["box"]
            assert chart["texts"], chart["name"]
            for label in chart["texts"]:
                inside = label["box"][0] >= left - 1 and label["box"][2] <= right + 1
                assert inside, (layout["width"], chart["name"], label)
                assert label["box"][1] >= top - 1, (chart["name"], label)
                assert label["box"][3] <= bottom + 1, (chart["name"], label)
                assert label["size"] >= SMALLEST_TEXT, (layout["width"], chart["name"], label)
            for one, other in combinations(chart["texts"], 2):
                assert not overlap(one["box"], other["box"]), (layout["width"], chart["name"], one, other)


def test_no_panel_is_empty(layouts):
    for layout in layouts:
        assert layout["empty"] == []
        assert all(layout["titles"])
        assert all(chart["marks"] >= 3 for chart in layout["charts"])
        assert all(chart["box"][3] - chart["box"][1] > 40 for chart in layout["charts"])


def mean_brightness(picture: Path) -> float:
    from matplotlib.image import imread

    return float(imread(picture)[..., :3].mean())


def test_light_and_dark(pages, folder):
    light = screenshot(pages["one"], folder / "wide.png", width=1300, height=1800)
    dark = screenshot(pages["one"], folder / "dark.png", width=1300, height=1800, dark=True)
    screenshot(pages["one"], folder / "narrow.png", width=390, height=1800)
    assert mean_brightness(light) > 0.9
    assert mean_brightness(dark) < 0.2


def test_print(pages, folder):
    """Pages of paper, and on white however dark the screen is."""
    paper = printed(pages["one"], folder / "print.pdf").read_bytes()
    assert paper.startswith(b"%PDF")
    assert 3 <= len(re.findall(rb"/Type\s*/Page\b", paper)) <= 15
