"""Records of text, tokenized again, and of token ids that do not stand in columns of their own.

The policy's own token ids are not in a dump of text. What the tokenizer makes of the text can differ from them where
texts were joined, and special tokens that were left out of the text (verl skips them) do not come back.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from critic_train.convert.chat import Retokenizer, Tokens, UnusableError, messages_of
from critic_train.convert.field_values import Fields, UnclearError, samples_of
from critic_train.convert.fields import Reading
from critic_train.convert.raw_records import Line, Records, Rows
from critic_train.data.schema import ALIASES

VERL, TRL, TEXT = "verl rollout data (text)", "TRL completions (text)", "text"
KINDS = {"verl": VERL, "trl": TRL, "text": TEXT}
"""The value of --from -> the kind of text dump, for messages."""
TITLE = (
    "TRL Parquet, and JSON, JSONL, CSV, Parquet or Arrow files of token ids, of messages, or of prompt, response and "
    "score"
)
"""What is read without a format of its own, as error messages list it."""
CANONICAL = {name: canonical for canonical, aliases in ALIASES.items() for name in (canonical, *aliases)}
UNREAD = ("system", "system_prompt", "tools", "history")
"""Fields that belong to the prompt: a record that has one where the first records have none cannot be used."""
SINGLE = ("uid", "truncated")
"""Canonical columns with one entry a rollout, which text may have as well."""


def kind_of(names: Iterable[str]) -> str:
    """Which kind of text dump has these fields."""
    fields = set(names)
    if {"input", "output", "score", "step"} <= fields:
        return VERL
    return TRL if {"step", "prompt", "completion"} <= fields else TEXT


@dataclass(slots=True, kw_only=True)
class RecordReader:
    """Makes rollouts of records, one or several of each.

    Args:
        reading: which field is what.
        carriers: fields that hold several samples.
        renames: from --column.
        kind: VERL, TRL or TEXT.
        retokenizer: makes the ids of text; None where token ids are read.
        apply_chat_template: whether a prompt of text is a user's message for the template.
    """

    reading: Reading
    carriers: tuple[str, ...]
    renames: dict[str, str]
    kind: str = TEXT
    retokenizer: Retokenizer | None = None
    apply_chat_template: bool = False

    def __call__(self, lines: list[Line]) -> Records:
        """The rollouts of some records."""
        rows = Rows()
        for row, line in lines:
            try:
                samples = samples_of(line, self.carriers)
            except ValueError as error:
                rows.refuse(row, self.carriers[0], str(error), "a list with one entry a sample")
                continue
            for sample in samples:
                self._add(rows, row, sample, len(samples))
        return rows.records()

    def _add(self, rows: Rows, row: int, sample: Fields, samples: int) -> None:
        reward = self.reading.reward
        paid: float | list[float] | None = None
        if reward is not None:
            try:
                paid = reward.of(sample)
            except ValueError as error:
                rows.refuse(row, reward.names[0], str(error), "a number, the reward of the rollout")
                return
        if self.carriers and isinstance(paid, list) and not self.reading.is_tokens:
            several = f"{len(paid)} numbers beside {samples} samples"
            rows.refuse(row, reward.names[0] if reward else "", several, "one number for each sample")
            return
        try:
            entries = self._ids(sample) if self.reading.is_tokens else self._text(sample, paid)
        except UnusableError as refusal:
            rows.refuse(row, self.reading.response, refusal.actual, refusal.expected)
            return
        if paid is not None and "rewards" not in entries:
            entries["rewards" if isinstance(paid, list) else "reward"] = paid
        rows.add(row, {**self._others(sample), **entries})

    def _ids(self, sample: Fields) -> dict[str, Any]:
        """Token columns under canonical names; those of a name that is read as one under it."""
        entries: dict[str, Any] = {}
        for name, value in sample.items():
            leaf = name.rpartition(".")[2]
            if isinstance(value, list) and leaf in CANONICAL and not isinstance(value[:1] and value[0], str):
                entries[leaf] = value
        for canonical, name in {**self.reading.parts, **self.renames}.items():
            if canonical == "response_length":
                length = sample.get(name)
                if not isinstance(length, int) or length < 0:
                    raise UnusableError(f"{length!r} as the length of the response", "a number of tokens")
                entries["response_mask"] = [1] * length
            elif canonical not in ("reward", "rewards", *SINGLE):
                entries.pop(name.rpartition(".")[2], None)
                entries[canonical] = sample.get(name)
        for name in self.reading.reward.names if self.reading.reward else ():
            entries.pop(name.rpartition(".")[2], None)
        return entries

    def _text(self, sample: Fields, paid: float | list[float] | None) -> dict[str, Any]:
        assert self.retokenizer is not None, "text is not read without a tokenizer"
        ids, mask = self._tokens(sample, self.retokenizer)
        entries: dict[str, Any] = {"input_ids": ids, "response_mask": mask}
        if isinstance(paid, list):
            entries["rewards"] = _over_turns(paid, mask)
        return entries

    def _tokens(self, sample: Fields, retokenizer: Retokenizer) -> Tokens:
        """(ids, mask) of a sample.

        Raises:
            UnusableError: it cannot be used.
        """
        parts = self.reading.parts
        prompt: Any = sample.get(parts.get("prompt", ""))
        response: Any = sample.get(parts.get("response", ""))
        system = sample.get(parts.get("system", ""))
        unread = next((name for name in UNREAD if name not in parts.values() and sample.get(name)), None)
        if unread is not None:
            raise UnusableError(f"a `{unread}`, which is not read", "all of the prompt in one field, or in messages")
        if self.reading.prompt_parts:
            texts = [sample.get(name) for name in self.reading.prompt_parts]
            prompt = "\n".join(text for text in texts if isinstance(text, str) and text)
        is_pair = "messages" not in parts and isinstance(prompt, str) and isinstance(response, str)
        if is_pair and (not self.apply_chat_template or retokenizer.is_templated(prompt)):
            if isinstance(system, str) and system.strip() and system.strip() not in prompt:
                raise UnusableError(
                    f"`{parts['system']}` beside a prompt that lacks it",
                    "--apply-chat-template, which puts both through the chat template",
                )
            return retokenizer.pair(prompt, response)
        if "messages" in parts:
            messages, written = [], messages_of(sample.get(parts["messages"]))
        else:
            messages, written = _as_messages(prompt, "user"), _as_messages(response, "assistant")
        first = len(messages)
        messages = [*messages, *written]
        if isinstance(system, str) and system.strip() and not any(system.strip() in m["content"] for m in messages):
            if messages and messages[0]["role"] == "system":
                raise UnusableError(f"another system message than `{parts['system']}`", "one system message")
            messages.insert(0, {"role": "system", "content": system})
            first += 1
        if not messages or messages[-1]["role"] != "assistant" or messages[0]["role"] == "assistant":
            raise UnusableError("no conversation that ends with the assistant", "messages that end with its answer")
        return self._chat(messages, sample.get(parts.get("tools", "")), first, retokenizer)

    def _chat(self, messages: list[dict[str, Any]], tools: Any, first: int, retokenizer: Retokenizer) -> Tokens:
        if not retokenizer.has_template:
            raise UnusableError("messages, and a tokenizer without a chat template", "the tokenizer of a chat model")
        try:
            return retokenizer.chat(messages, tools if isinstance(tools, list) else None, first)
        except UnusableError:
            raise
        except Exception as error:
            # A template may raise any exception.
            actual = f"a chat template that fails ({str(error)[:80]})"
            raise UnusableError(actual, "one that takes this conversation") from error

    def _others(self, sample: Fields) -> dict[str, Any]:
        """Other fields with one entry, none under a name that token columns have."""
        used = {*self.reading.parts.values(), *self.reading.prompt_parts}
        used |= {n for n in (self.reading.reward.names if self.reading.reward else ()) if n in ("reward", "rewards")}
        others = {}
        for name, value in sample.items():
            canonical = CANONICAL.get(name)
            if (
                name not in used
                and isinstance(value, str | int | float | bool)
                and canonical in (None, "reward", *SINGLE)
            ):
                others[f"{name}_in_dump" if name == "reward" else name] = value
        others |= {name: sample[self.renames[name]] for name in SINGLE if self.renames.get(name) in sample}
        return _verl(others) if self.kind == VERL else others


def check_renames(samples: list[Fields], reading: Reading, renames: dict[str, str]) -> None:
    """Raise where a value of --column names no field, or has no effect.

    Raises:
        UnclearError: the first such value.
    """
    there = dict.fromkeys(name for sample in samples for name in sample)
    for canonical, name in renames.items():
        missing = [part for part in ([name] if name in there else name.split("+")) if part not in there]
        if missing:
            raise UnclearError(
                f"--column {canonical}={name}: there is no field {missing[0]!r}",
                hint=f"its fields are: {', '.join(list(there)[:40])}",
            )
        if not reading.is_tokens and canonical not in ("messages", "prompt", "response", "system", "reward", *SINGLE):
            raise UnclearError(
                f"--column {canonical}={name} has no effect: this is read as text, which is tokenized anew",
                hint="text has messages, or prompt and response; and reward, uid, truncated, system",
            )


def _over_turns(paid: list[float], mask: list[int]) -> list[float]:
    """Rewards over the tokens: one a turn on the last token of each, or a single one on the last token of all.

    Raises:
        UnusableError: they are neither, so that it is unknown which token earned what.
    """
    ends = [at for at, one in enumerate(mask) if one and not (mask[at + 1 : at + 2] or [0])[0]]
    rewards = [0.0] * len(mask)
    if len(paid) == len(ends):
        for at, reward in zip(ends, paid, strict=True):
            rewards[at] = reward
    elif ends and sum(1 for reward in paid if reward) <= 1:
        rewards[ends[-1]] = sum(paid)
    else:
        raise UnusableError(f"{len(paid)} rewards beside {len(ends)} turns of the policy", "one number, or one a turn")
    return rewards


def _as_messages(value: Any, role: str) -> list[dict[str, Any]]:
    return [{"role": role, "content": value}] if isinstance(value, str) else messages_of(value)


def _verl(others: dict[str, Any]) -> dict[str, Any]:
    """Other fields under names that do not take a rollout's own id for that of its prompt group."""
    if "request_id" in others:
        others["request"] = others.pop("request_id")
    if isinstance(others.get("uid"), str):
        others["uid"] = re.sub(r"_\d+_\d+$", "", others["uid"])
    return others
