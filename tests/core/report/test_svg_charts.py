"""Drawings of matplotlib as elements of the page."""

import re
from xml.etree import ElementTree

from critic_train.report.svg_charts import NAME_LENGTH, colour, in_chart, name_row, svg

HOSTILE = '$a$ <b> & id="x" #fe01a7'


def drawn(name="one"):
    def draw(axes):
        axes.plot([0, 1, 2], [0, 1, 0], color=colour("series-1"), marker="o")
        name_row(axes, 0.5, HOSTILE)

    return svg(draw, name=name, described="a <line>")


def attributes(text):
    """(tag, name, value) of every attribute."""
    elements = ElementTree.fromstring(text).iter()
    return [(element.tag, name, value) for element in elements for name, value in element.attrib.items()]


def test_a_drawing_is_well_formed_and_says_what_it_shows():
    root = ElementTree.fromstring(drawn())
    assert root.attrib["aria-label"] == "a <line>"
    assert HOSTILE in "".join(root.itertext())


def test_colours_are_variables_of_the_page():
    values = [value for _, _, value in attributes(drawn())]
    assert any("var(--series-1)" in value for value in values)
    assert [value for value in values if re.search("#fe[0-9a-f]{2}a7", value)] == []


def test_identifiers_have_the_name_of_the_drawing_and_are_referred_to():
    made = attributes(drawn("two"))
    ids = [value for _, name, value in made if name == "id"]
    assert ids
    assert all(identifier.startswith("two-") for identifier in ids)
    referred = {value[1:] for _, name, value in made if name == "href"}
    referred |= {name for _, _, value in made for name in re.findall(r"url\(#([\w.-]+)\)", value)}
    assert referred == set(ids)


def test_long_names_are_cut_at_either_end():
    assert in_chart("a\x07b") == "a?b"
    long = "x" * 50 + "y" * 50
    assert in_chart(long) == long[: NAME_LENGTH - 3] + "..."
    assert in_chart(long, from_end=True).endswith("y" * 43)
    assert len(in_chart(long, from_end=True)) == NAME_LENGTH
