"""A page as a browser takes it apart."""

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

VOID = {"meta", "br", "hr", "link", "img", "input", "path", "use"}


class Page(HTMLParser):
    """What a test asks of a page.

    Attributes:
        tags: every element's name.
        attributes: (element, name, value) of every attribute.
        figures: (place, value, text) of every figure that names its place.
        bare: texts of figure cells that name none, and hold a digit.
        text: all that is read.
        ids: every identifier.
    """

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.figures: list[tuple[str, str, str]] = []
        self.bare: list[str] = []
        self.text = ""
        self.ids: list[str] = []
        self._open: list[tuple[str, dict[str, str]]] = []
        self._row: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        told = {name: value or "" for name, value in attrs}
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in told.items()]
        if "id" in told:
            self.ids.append(told["id"])
        if tag not in VOID:
            self._open.append((tag, told))

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop()[0] != tag:
            pass

    def handle_data(self, data: str) -> None:
        names = [tag for tag, _ in self._open]
        if "style" in names:
            return
        self.text += data
        last, told = self._open[-1] if self._open else ("", {})
        if last == "data":
            self.figures.append((told["data-at"], told["value"], data))
        elif any(name in ("td", "small") for name in names) and any(c.isdigit() for c in data):
            self.bare.append(data)


def stands_at(place: str, paths: list[Path]) -> Any:
    """The value that a figure's place leads to, in the files of the sources."""
    number, rest = place.split(":", 1)
    file, pointer = rest.split("#", 1)
    source = paths[int(number) - 1]
    line = None
    if ".jsonl:" in file:
        file, line = file.split(":")
    path = source / file if source.is_dir() else source
    text = path.read_text()
    value = json.loads(text.splitlines()[int(line) - 1] if line else text)
    for step in pointer.split("/")[1:]:
        step = step.replace("~1", "/").replace("~0", "~")
        value = value[int(step)] if isinstance(value, list) else value[step]
    return value
