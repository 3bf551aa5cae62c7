"""docs/models.md is what the code does with each architecture; `./dev models` writes it anew."""

import re

import pytest
from architectures import MULTIMODAL, TEXT
from models_table import PAGE, page, row

SAMPLED = ("Qwen3", "Gemma 3 (text)", "Mixtral")


def test_every_architecture_has_its_line():
    models = re.findall(r"^\| (.+?)(?: \(multimodal\))? \| `", PAGE.read_text(), flags=re.MULTILINE)
    assert models == [*TEXT, *MULTIMODAL]


@pytest.mark.parametrize("name", SAMPLED)
def test_a_line_says_what_is_done(name):
    assert row(name) in PAGE.read_text().splitlines()


@pytest.mark.slow
def test_the_page_is_what_is_done_with_every_model():
    assert page() == PAGE.read_text()
