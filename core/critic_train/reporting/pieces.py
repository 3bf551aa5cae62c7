"""The text of each token, by the tokenizer that stands beside the model."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from critic_train.reporting.sources import Source
from critic_train.run.checkpoint import checkpoints

Decode = Callable[[Sequence[int]], str]

UNFINISHED = "\ufffd"
LONGEST_CHARACTER = 4
"""Bytes, and so tokens at most, of a character in UTF-8."""


def pieces(ids: Sequence[int], decode: Decode | None) -> list[str]:
    """The text that each token adds.

    A token's text may depend on the one before it (a leading space), and a character may be spread over several
    tokens: then the last of them has it and the others have none. So each token is decoded together with the
    text just before it, and what that gives beyond the text without it is the token's own.

    Args:
        ids: tokens.
        decode: token ids -> text, special tokens included; None where there is no tokenizer.

    Returns:
        As many texts as ids; the number itself where there is no tokenizer.
    """
    if decode is None:
        return [f" {number}" for number in ids]
    found: list[str] = []
    start = settled = 0  # ids[start:settled] is the text before, all of its characters whole
    before = ""
    for place in range(1, len(ids) + 1):
        text = decode(ids[start:place])
        waits = text.endswith(UNFINISHED) and place - settled < LONGEST_CHARACTER and place < len(ids)
        if waits:
            found.append("")
            continue
        found.append(text[len(before) :] if text.startswith(before) else decode(ids[settled:place]))
        start, settled = settled, place
        before = decode(ids[start:settled])
    return found


def decoder_of(source: Source, tokenizer: str | None = None) -> Decode | None:
    """A decoder from the first place that has a tokenizer: the one named, the critic judged, the model trained.

    Args:
        source: a run or an evaluation.
        tokenizer: a directory with tokenizer.json, or such a file.
    """
    for folder in _places(source, tokenizer):
        file = folder if os.path.isfile(folder) else folder / "tokenizer.json"
        if os.path.isfile(file):  # unlike Path's own, no error for a name that can be none
            return _decoder(file)
    return None


def _places(source: Source, tokenizer: str | None) -> list[Path]:
    if tokenizer is not None:
        return [Path(tokenizer)]
    named = [str(path) for path in source.evaluation.get("models") or []]
    named += [str(source.path)] if source.is_run and source.path else []
    based_on = source.started.part("settings").get("model")
    named += [str(based_on)] if based_on else []
    return [folder for name in named for folder in _folders(Path(name))]


def _folders(path: Path) -> list[Path]:
    """A model's directory, or the checkpoints of a run; no path at all where the name can be none."""
    try:
        return [path, path / "best", *reversed(checkpoints(path / "checkpoints"))]
    except (OSError, ValueError):
        return []


def _decoder(file: Path) -> Decode | None:
    """None where the file cannot be read: the page then shows numbers."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception:  # the library raises bare Exceptions
        return None
    # A token beyond the vocabulary has no text.
    return lambda ids: tokenizer.decode(list(ids), skip_special_tokens=False)
