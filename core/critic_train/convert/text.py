"""Records of text: prompt and response, or chat messages, with a score; turned into tokens anew.

The policy's own token ids are gone from such a dump. What the tokenizer makes of the text can differ from them where
words meet, and special tokens that were left out of the text (verl skips them) do not come back.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from critic_train.convert.records import Records, Rows
from critic_train.errors import ModelError, first_line

VERL, TRL, TEXT = "verl rollout data (text)", "TRL completions (text)", "text"
NAMES = {
    "messages": ("messages", "conversation", "conversations", "chat"),
    "prompt": ("prompt", "input", "question", "instruction", "query"),
    "response": ("response", "completion", "output", "answer"),
    "reward": ("reward", "score", "rewards"),
}
"""What a record of text is made of -> the names it goes by, the first that is there."""

ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant"}
"""ShareGPT's roles -> those of chat templates."""
BESIDE = frozenset({"step", "prompt", "completion", "advantage", "mode"})
"""Columns of a TRL table that are no reward function's."""
EXPECTED_MESSAGES = "a list of {role, content} with an answer of the assistant's at its end"


def kind_of(names: Iterable[str]) -> str | None:
    """What kind of text dump has these fields, None where they are none's."""
    there = set(names)
    if {"input", "output", "score", "step"} <= there:
        return VERL
    if {"step", "prompt", "completion"} <= there:
        return TRL
    if there & set(NAMES["messages"]) or (there & set(NAMES["prompt"]) and there & set(NAMES["response"])):
        return TEXT
    return None


@dataclass(slots=True)
class Retokenizer:
    """Makes token ids of text.

    Args:
        directory: a Hugging Face directory with a tokenizer.

    Attributes:
        rollouts, tokens: made so far.

    Raises:
        ModelError: there is no tokenizer that can be loaded.
    """

    directory: Path
    rollouts: int = 0
    tokens: int = 0
    _tokenizer: Any = field(init=False)

    def __post_init__(self) -> None:
        from transformers import AutoTokenizer

        if not self.directory.is_dir():
            raise ModelError(f"--tokenizer {self.directory}: there is no such folder", hint="give the policy's folder")
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(str(self.directory), local_files_only=True)
        except Exception as error:
            why = first_line(error)
            raise ModelError(
                f"--tokenizer {self.directory} holds no tokenizer that can be loaded: {why}",
                hint="give the policy's Hugging Face folder (tokenizer.json, tokenizer_config.json)",
            ) from error

    @property
    def has_chat_template(self) -> bool:
        """Whether chat messages can be turned into text."""
        return bool(self._tokenizer.chat_template)

    def pair(self, prompt: str, response: str) -> tuple[list[int], list[int]]:
        """(ids, mask) of a prompt, with the special tokens that the tokenizer begins with, and a response without."""
        left = self._tokenizer(prompt)["input_ids"]
        end = self._tokenizer.eos_token_id
        if left and left[-1] == end and not prompt.endswith(str(self._tokenizer.eos_token)):
            left = left[:-1]
        right = self._tokenizer(response, add_special_tokens=False)["input_ids"]
        return self._counted([*left, *right], [0] * len(left) + [1] * len(right))

    def chat(self, messages: list[dict[str, str]]) -> tuple[list[int], list[int]] | None:
        """(ids, mask) of a conversation, the mask on what the assistant wrote, to its end-of-turn token.

        Returns:
            None where the chat template changes earlier turns, so that a turn's tokens cannot be told.
        """
        ids: list[int] = []
        mask: list[int] = []
        for place, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._templated(messages[:place], add_generation_prompt=True)
            through = self._templated(messages[: place + 1], add_generation_prompt=False)
            if before[: len(ids)] != ids or through[: len(before)] != before:
                return None
            said = through[len(before) :]
            mask += [0] * (len(before) - len(ids)) + self._until_end(said)
            ids = through
        # What the template puts behind the last turn's end was written by nobody.
        last = len(mask) - mask[::-1].index(1) if 1 in mask else len(mask)
        return self._counted(ids[:last], mask[:last])

    def _until_end(self, said: list[int]) -> list[int]:
        end = self._tokenizer.eos_token_id
        length = len(said) - said[::-1].index(end) if end in said else len(said)
        return [1] * length + [0] * (len(said) - length)

    def _templated(self, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> list[int]:
        text = self._tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _counted(self, ids: list[int], mask: list[int]) -> tuple[list[int], list[int]]:
        self.rollouts += 1
        self.tokens += len(ids)
        return ids, mask


def records(
    lines: list[tuple[int, dict[str, Any]]], kind: str, retokenizer: Retokenizer, renames: dict[str, str]
) -> Records:
    """The rollouts of some records of text.

    Args:
        lines: (record number, fields).
        kind: VERL, TRL or TEXT.
        retokenizer: makes the ids.
        renames: messages, prompt, response or reward -> the field that is it, from --column.
    """
    rows = Rows()
    for row, line in lines:
        taken = {what: _field(line, what, renames) for what in NAMES}
        reward = _reward(line, taken["reward"], kind, rows)
        if reward is None:
            rows.refuse(row, taken["reward"] or "score", "no number", "a score of the rollout")
            continue
        made = _tokens(row, line, taken, retokenizer, rows)
        if made is not None:
            others = {
                k: v for k, v in line.items() if k not in taken.values() and isinstance(v, str | int | float | bool)
            }
            rows.add(row, {**_own(others, kind), "input_ids": made[0], "response_mask": made[1], "reward": reward})
    return rows.records()


def _field(line: dict[str, Any], what: str, renames: dict[str, str]) -> str | None:
    if what in renames:
        return renames[what]
    return next((name for name in NAMES[what] if line.get(name) is not None), None)


def _reward(line: dict[str, Any], name: str | None, kind: str, rows: Rows) -> float | None:
    value = line.get(name) if name else None
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if value is None and kind == TRL:
        found = {k: v for k, v in line.items() if k not in BESIDE and isinstance(v, int | float)}
        if len(found) > 1:
            rows.notes.setdefault(
                f"reward is the sum of {', '.join(found)}; --column reward=NAME takes one of them alone"
            )
        value = sum(v for v in found.values() if v == v) if found else None
    return float(value) if isinstance(value, int | float) else None


def _tokens(
    row: int, line: dict[str, Any], taken: dict[str, str | None], retokenizer: Retokenizer, rows: Rows
) -> tuple[list[int], list[int]] | None:
    """(ids, mask) of a record; None where it was refused."""
    prompt, response = (line.get(taken[what] or "") for what in ("prompt", "response"))
    if isinstance(prompt, str) and isinstance(response, str):
        return retokenizer.pair(prompt, response)
    messages = line.get(taken["messages"] or "")
    if messages is None:
        messages = [*_as_messages(prompt, "user"), *_as_messages(response, "assistant")]
    said = [_message(message) for message in messages] if isinstance(messages, list) else []
    column = taken["messages"] or taken["response"] or "messages"
    if not said or None in said or said[-1] is None or said[-1]["role"] != "assistant":
        rows.refuse(row, column, "no conversation that ends with the assistant", EXPECTED_MESSAGES)
        return None
    try:
        made = retokenizer.chat([message for message in said if message is not None])
    except Exception as error:
        # Templates are programs: they raise whatever they like.
        rows.refuse(row, column, f"a chat template that fails ({str(error)[:80]})", "one that takes this conversation")
        return None
    if made is None:
        rows.refuse(row, column, "a chat template that rewrites earlier turns", "one that only adds to them")
    return made


def _as_messages(value: Any, role: str) -> list[Any]:
    return [{"role": role, "content": value}] if isinstance(value, str) else value if isinstance(value, list) else []


def _message(message: Any) -> dict[str, str] | None:
    if not isinstance(message, dict):
        return None
    role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
    if not isinstance(role, str) or not isinstance(content, str):
        return None
    return {"role": ROLES.get(role, role), "content": content}


def _own(others: dict[str, Any], kind: str) -> dict[str, Any]:
    """What is carried along, with ids that are a rollout's own kept from passing for a prompt group's."""
    if kind == VERL:
        if "request_id" in others:
            others["request"] = others.pop("request_id")
        if isinstance(others.get("uid"), str):
            others["uid"] = re.sub(r"_\d+_\d+$", "", others["uid"])
    return others
