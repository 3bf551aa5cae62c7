"""Conversions run in a test's own folder."""

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parent))

import dumps

from critic_train.convert.conversion import convert
from critic_train.events import Event, RunEnded
from critic_train.settings import ConvertSettings, FitSettings
from critic_train.stopping import StopRequest
from critic_train.training.fit import fit

FIXTURES = Path(__file__).parent / "fixtures"

VOCABULARY = "<pad> <s> </s> <unk> say p q is said , times user assistant : 0 1 2 3 4 5 6 7"
WORDS = VOCABULARY.split()
TEMPLATE = (
    "{% for m in messages %}{{ m.role }} : {{ m.content }} {% if m.role == 'assistant' %}</s> 0 {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)
"""Every turn is opened by its role; the assistant's is closed by `</s>` and a `0` that nobody chose."""


class Conversion:
    """What `convert` made, and what it said."""

    def __init__(self, to: Path, events: list[Event]) -> None:
        self.to = to
        self.events = events
        self.ended = next(event for event in events if isinstance(event, RunEnded))
        self.result = self.ended.result
        self.said = "\n".join(event.message for event in events if hasattr(event, "message"))

    @property
    def table(self) -> pa.Table:
        """All shards, in order."""
        return pa.concat_tables(
            [pq.read_table(p) for p in sorted(self.to.glob("*.parquet"))], promote_options="default"
        )


def run(to: Path, *sources: Path | str, stop: StopRequest | None = None, **settings: Any) -> Conversion:
    """Convert."""
    chosen = ConvertSettings(source=[str(source) for source in sources], to=str(to), **settings)
    return Conversion(to, list(convert(chosen, stop or StopRequest())))


@pytest.fixture
def converted(tmp_path: Path) -> Callable[..., Conversion]:
    """`run` into a folder of the test's own."""
    return lambda *sources, **settings: run(tmp_path / "shards", *sources, **settings)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A word-level tokenizer that begins with <s>, and a chat template."""
    folder = tmp_path_factory.mktemp("tokenizer")
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    return folder


def ids_of(text: str) -> list[int]:
    """The ids of words, by hand."""
    return [WORDS.index(word) for word in text.split()]


def fits(data: Path, out: Path, returns: str, has_values: bool) -> bool:
    """Two steps of training on shards."""
    settings = FitSettings(
        data=[str(data)],
        out=str(out),
        preset="tiny",
        max_steps=2,
        batch_size=4,
        val_fraction=0.0,
        returns=returns,
        old_values="column" if has_values else "none",
        device="cpu",
        no_report=True,
    )
    ended = [event for event in fit(settings, StopRequest()) if isinstance(event, RunEnded)]
    return ended[-1].status == "finished" and ended[-1].result["steps"] == 2


def write_lines(path: Path, lines: list[object]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def lines(path, count, *, start=0, bad=()):
    rows = [
        {"input_ids": [1, 2 + i % 90, 3], "response_mask": [0, 1, 1], "returns": [0, 1, i], "uid": str(i // 4)}
        for i in range(start, start + count)
    ]
    for place in bad:
        rows[place]["returns"] = [1] * 5
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix == ".parquet"}


@pytest.fixture
def three(tmp_path):
    folder = tmp_path / "dumps"
    folder.mkdir()
    for place, name in enumerate(("1.jsonl", "2.jsonl", "10.jsonl")):
        lines(folder / name, 20, start=20 * place)
    return folder


def fixture(name: str):
    return lambda path: FIXTURES / name


def fresh(package: str, write, name: str):
    """The same by the framework's own code, now, where it is installed with what it needs."""

    def made(path: Path) -> Path:
        try:
            importlib.import_module(package)
        except ImportError as error:
            pytest.skip(f"{package} is not here whole: {error}")
        write(path / name)
        return path / name

    return made


def built(write, name: str):
    def made(path: Path) -> Path:
        write(dumps.rollouts(), path / name)
        return path / name

    return made
