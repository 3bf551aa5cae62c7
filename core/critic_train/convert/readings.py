"""How a file's records are read: which fields hold several samples, and which field is what, by its first records."""

from collections.abc import Iterator

from critic_train.convert import text_records
from critic_train.convert.chat import Retokenizer
from critic_train.convert.field_values import (
    PAIR,
    Fields,
    UnclearError,
    carriers_of,
    flat,
    is_scored_pair,
    listed,
    of_whole_record,
    samples_of,
)
from critic_train.convert.fields import Reading, read_fields
from critic_train.convert.rewards import reward_fields, trl_reward, verl_reward
from critic_train.errors import DataError

SAMPLES_SEEN = 256
"""From so many samples, at most, it is concluded which field is which."""


def choose_reading(first: list[Fields], renames: dict[str, str], kind: str) -> tuple[tuple[str, ...], Reading]:
    """The fields that hold several samples, and which field is what.

    A record is a sample, or it holds several in one of its fields, or in a field of these. A reading is possible where
    all that a rollout needs is in it, the response in what was taken apart.

    Raises:
        UnclearError: no reading is possible, or several are.
    """
    possible: list[tuple[tuple[str, ...], Reading]] = []
    refusals: list[DataError] = []
    for carriers, samples in _taken_apart(first):
        try:
            reading = _read(samples, renames, kind, of_whole_record(first, carriers))
        except DataError as error:
            refusals.append(error)
            continue
        if carriers and carriers != PAIR and not f"{reading.response}.".startswith(f"{carriers[-1]}."):
            continue
        try:
            text_records.check_renames(samples, reading, renames)
            _check_reward(first, carriers, reading)
        except DataError as error:
            refusals.append(error)
            continue
        possible.append((carriers, reading))
    if not possible:
        # What is wrong with the records taken apart says more than that they are nothing as they are.
        plain = [error for error in refusals if not error.message.startswith("is in no known format")]
        raise (plain or refusals or [UnclearError("no field holds rollouts")])[0]
    tokens = [one for one in possible if one[1].is_tokens] or possible
    if len(tokens) > 1:
        names = [reading.response for _, reading in tokens]
        raise UnclearError(
            f"{' and '.join(f'`{name}`' for name in names)} could each be what the policy wrote",
            hint=f"say which: --column response={names[0]}",
        )
    return tokens[0]


def _read(samples: list[Fields], renames: dict[str, str], kind: str, shared: frozenset[str]) -> Reading:
    find_reward = {text_records.TRL: trl_reward, text_records.VERL: verl_reward}.get(kind, reward_fields)
    return read_fields(samples, renames, find_reward, shared)


def _taken_apart(first: list[Fields], depth: int = 2) -> Iterator[tuple[tuple[str, ...], list[Fields]]]:
    """The records as they are, and taken apart by each field that may hold several samples, the samples too."""
    is_pair = all(name in first[0] for name in PAIR) and is_scored_pair([flat(record) for record in first])
    waiting: list[tuple[str, ...]] = [(), *([PAIR] if is_pair else [])]
    while waiting:
        carriers = waiting.pop(0)
        try:
            samples = [sample for record in first for sample in samples_of(record, carriers)][:SAMPLES_SEEN]
        except ValueError:
            continue
        if not samples:
            continue
        yield carriers, samples
        if len(carriers) < depth and carriers != PAIR:
            waiting += [
                (*carriers, name) for name in carriers_of(samples) if not carriers or name.startswith(carriers[-1])
            ]


def _check_reward(first: list[Fields], carriers: tuple[str, ...], reading: Reading) -> None:
    """Raise where several samples of one record share a reward that stands once."""
    reward = reading.reward if carriers and carriers != PAIR else None
    for name in reward.names if reward is not None else ():
        for outer in (sample for record in first for sample in samples_of(record, carriers[:-1])):
            if len(outer[carriers[-1]] or ()) > 1 and isinstance(outer.get(name), str | bool | int | float):
                raise UnclearError(
                    f"`{name}` has one number for all {len(outer[carriers[-1]])} samples in `{carriers[-1]}`",
                    hint="--column reward=NAME takes a field with one number for each sample",
                )


def understanding(
    reading: Reading,
    carriers: tuple[str, ...],
    first: list[Fields],
    retokenizer: Retokenizer | None,
    *,
    apply_chat_template: bool,
) -> dict[str, str]:
    """What was understood, with how several samples stand in a record, and whether texts go through a template."""
    understood = dict(reading.understood)
    if carriers:
        understood["samples"] = listed(carriers if carriers == PAIR else carriers[-1:])
    if retokenizer is None:
        return understood
    understood["mask"] = "what the policy wrote"
    if retokenizer.has_template and "prompt" in reading.parts and not apply_chat_template:
        samples = [sample for record in first for sample in samples_of(record, carriers)]
        prompts = [sample.get(reading.parts["prompt"]) for sample in samples]
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        if len(texts) == len(prompts) and not any(map(retokenizer.is_templated, texts)):
            how = "none, prompt and response are joined as they are (--apply-chat-template uses it)"
            understood["chat template"] = how
    return understood
