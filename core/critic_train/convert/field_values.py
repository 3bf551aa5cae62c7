"""What the fields of a record hold, and records of several samples taken apart into one record a sample."""

import ast
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from critic_train.errors import DataError

Fields = dict[str, Any]
"""Field name -> value; a field of a nested object has a dotted name."""

NUMBER, TEXT, IDS, NUMBERS = "a number", "text", "token ids", "a list of numbers"
MESSAGES, SEVERAL, NOTHING, OTHER = "messages", "several", "nothing", "something else"
"""Kinds of values; SEVERAL is a list of texts, objects or lists, as of the samples of one prompt."""
IGNORED_LABEL = -100
PAIR = ("chosen", "rejected")
"""The two samples of a preference, in place of fields that hold several samples."""
ROLE_KEYS = ("role", "from")
WRITTEN_MESSAGES = re.compile(r"""\s*\[\s*\{\s*["'](role|from|content|value)["']\s*:""")
"""How a conversation begins that was written into a text."""
PER_SAMPLE = frozenset({
    "reward", "score", "correct", "correctness", "accuracy", "acc", "success", "passed", "truncated", "reason",
    "length",
})  # fmt: skip
"""Words in the names of lists of numbers that have one entry a sample."""


class UnclearError(DataError):
    """Fields that cannot be read as rollouts, or in two ways."""


def flat(record: Fields, prefix: str = "") -> Fields:
    """A record with the fields of nested objects under dotted names, such as `reward_model.score`."""
    fields: Fields = {}
    for name, value in record.items():
        if isinstance(value, dict) and value:
            fields |= flat(value, f"{prefix}{name}.")
        else:
            fields[f"{prefix}{name}"] = _written_out(value) if isinstance(value, str) else value
    return fields


def _written_out(text: str) -> Any:
    """The conversation that a text holds as JSON, or as Python prints it; any other text as it is."""
    if WRITTEN_MESSAGES.match(text) is None:
        return text
    try:
        value = json.loads(text)
    except ValueError:
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            return text
    return value if is_messages(value) else text


def samples_of(record: Fields, carriers: tuple[str, ...]) -> list[Fields]:
    """The samples of a record, their fields flat.

    Args:
        record: as in the file.
        carriers: fields that hold a list with one entry a sample, the outermost first; none where a record is a sample.

    Raises:
        ValueError: a carrier holds no list.
    """
    samples = [flat(record)]
    if carriers == PAIR:
        return _chosen_and_rejected(samples[0])
    for carrier in carriers:
        samples = [sample for fields in samples for sample in _apart(fields, carrier)]
    return samples


def _chosen_and_rejected(fields: Fields) -> list[Fields]:
    """Two samples of a preference with scores (UltraFeedback as it is binarised)."""
    others = {name: value for name, value in fields.items() if name != "messages" and not words_of(name) & set(PAIR)}
    return [{**others, "response": fields.get(which), "score": fields.get(f"score_{which}")} for which in PAIR]


def _apart(fields: Fields, carrier: str) -> Iterator[Fields]:
    entries = fields.get(carrier)
    if not isinstance(entries, list):
        raise ValueError(f"`{carrier}` holds no list of samples")
    for number, entry in enumerate(entries):
        sample = {
            name: value[number] if _has_one_a_sample(name, value, len(entries)) else value
            for name, value in fields.items()
            if name != carrier
        }
        yield flat({**sample, carrier: entry})


def _has_one_a_sample(name: str, value: Any, samples: int) -> bool:
    """Whether a list beside the samples has one entry for each: texts, lists, objects, scores; not token ids."""
    if not isinstance(value, list) or len(value) != samples or is_messages(value):
        return False
    return not all(isinstance(entry, int | float) for entry in value) or (
        not words_of(name).isdisjoint(PER_SAMPLE) or all(isinstance(entry, bool) for entry in value)
    )


def is_messages(value: Any) -> bool:
    """Whether a value is a conversation: a list of objects with a role."""
    return isinstance(value, list) and bool(value) and all(_role(message) is not None for message in value)


def _role(message: Any) -> str | None:
    role = next((message[key] for key in ROLE_KEYS if key in message), None) if isinstance(message, dict) else None
    return role if isinstance(role, str) else None


def ends_with_the_policy(value: Any) -> bool:
    """Whether the last message of a conversation is the assistant's."""
    return is_messages(value) and _role(value[-1]) in ("assistant", *ASSISTANTS)


def begins_with_the_policy(value: Any) -> bool:
    """Whether the first message is the assistant's, as in a response that is messages."""
    return is_messages(value) and _role(value[0]) in ("assistant", *ASSISTANTS)


ASSISTANTS = ("gpt", "chatgpt", "bot", "model", "function_call")
"""Names of the assistant's role in other formats (ShareGPT, Gemma, LLaMA-Factory)."""


def kind_of_value(value: Any) -> str:
    """What a field of one record holds."""
    if value is None or (isinstance(value, list | dict | tuple) and not value):
        return NOTHING
    if isinstance(value, bool | int | float):
        return NUMBER
    if isinstance(value, str):
        return TEXT
    if not isinstance(value, list):
        return OTHER
    if is_messages(value):
        return MESSAGES
    types = set(map(type, value))
    if types <= {int}:
        lowest = min(value)
        is_ids = lowest >= 0 or (lowest == IGNORED_LABEL and not any(IGNORED_LABEL < entry < 0 for entry in value))
        return IDS if is_ids else NUMBERS
    if types <= {int, bool, float, type(None)}:
        return NUMBERS
    return SEVERAL


def kinds_of(samples: Iterable[Fields]) -> dict[str, str]:
    """Field name -> what it holds in most samples, NOTHING where it is empty in all, OTHER where they differ."""
    counts: dict[str, Counter[str]] = {}
    for sample in samples:
        for name, value in sample.items():
            counts.setdefault(name, Counter())[kind_of_value(value)] += 1
    kinds = {}
    for name, count in counts.items():
        del count[NOTHING]
        if IDS in count and NUMBERS in count:
            count[NUMBERS] += count.pop(IDS)
        ((kind, most),) = count.most_common(1) or [(NOTHING, 0)]
        kinds[name] = kind if 2 * most >= count.total() else OTHER
    return kinds


def carriers_of(samples: list[Fields]) -> list[str]:
    """Fields that may hold one entry a sample."""
    names = {
        name: None
        for sample in samples
        for name, value in sample.items()
        if isinstance(value, list) and value and not isinstance(value[0], int | float)
    }
    return [name for name in names if kinds_of([{name: sample.get(name)} for sample in samples])[name] == SEVERAL]


def is_scored_pair(samples: list[Fields]) -> bool:
    """Whether samples are preferences with a score of each response."""
    kinds = kinds_of(samples)
    return all(kinds.get(which) in (TEXT, MESSAGES) and kinds.get(f"score_{which}") == NUMBER for which in PAIR)


def of_whole_record(first: list[Fields], carriers: tuple[str, ...]) -> frozenset[str]:
    """Fields that all samples of a record share, since they have no entry for each."""
    if not carriers or carriers == PAIR:
        return frozenset()
    shared: set[str] = set()
    for record in first:
        for outer in samples_of(record, carriers[:-1]):
            entries = outer.get(carriers[-1]) or []
            shared |= {n for n, v in outer.items() if n != carriers[-1] and not _has_one_a_sample(n, v, len(entries))}
    return frozenset(shared)


def words_of(name: str) -> frozenset[str]:
    """The words of a field's name, in lower case and in the singular."""
    return frozenset(word_list(name))


def word_list(name: str) -> list[str]:
    """The words of a field's name in order: `generatedSolutions` and `generated_solutions` have the same."""
    spaced = "".join(f"_{letter}" if letter.isupper() else letter for letter in name) if _is_camel(name) else name
    parts = [word for word in spaced.lower().replace(".", "_").replace("-", "_").replace(" ", "_").split("_") if word]
    parts = [word.rstrip("0123456789") or word for word in parts]
    return [word[:-1] if word.endswith("s") and not word.endswith("ss") and len(word) > 2 else word for word in parts]


def _is_camel(name: str) -> bool:
    return any(letter.isupper() for letter in name[1:]) and any(letter.islower() for letter in name)


def leaf(name: str) -> str:
    """The last part of a dotted name."""
    return name.rpartition(".")[2]


def are_equal(samples: Iterable[Fields], names: list[str]) -> bool:
    """Whether fields hold the same in every sample."""
    return all(sample.get(name) == sample.get(names[0]) for sample in samples for name in names)


def listed(names: Iterable[str]) -> str:
    """Names as a message lists them."""
    return " and ".join(f"`{name}`" for name in names)
