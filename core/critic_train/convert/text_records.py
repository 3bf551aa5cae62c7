"""Records of text: prompt and response, or chat messages, with a score; tokenized again.

The policy's own token ids are not in such a dump. What the tokenizer makes of the text can differ from them where texts
were joined, and special tokens that were left out of the text (verl skips them) do not come back.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from critic_train.convert.raw_records import Line, Records, Rows
from critic_train.errors import ModelError

VERL, TRL, TEXT = "verl rollout data (text)", "TRL completions (text)", "text"
KINDS = {"verl": VERL, "trl": TRL, "text": TEXT}
"""The value of --from -> the kind of text dump, for messages."""
TITLE = "TRL Parquet, and JSONL or Parquet of token ids, of messages, or of prompt, response and score"
"""What is read without a format of its own, as error messages list it."""
NAMES = {
    "messages": ("messages", "conversation", "conversations", "chat"),
    "prompt": ("prompt", "input", "question", "instruction", "query"),
    "response": ("response", "completion", "output", "answer"),
    "reward": ("reward", "score", "rewards"),
}
"""Part of a record -> the field names it may have; the first that is there is read."""

ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant"}
"""ShareGPT's roles -> those of chat templates."""
NOT_REWARDS = frozenset({"step", "prompt", "completion", "advantage", "mode"})
"""Columns of a TRL table that are not of reward functions."""
EXPECTED_MESSAGES = "a list of {role, content} with an answer of the assistant's at its end"


def kind_of(names: Iterable[str]) -> str | None:
    """Which kind of text dump has these fields; None where no kind has."""
    fields = set(names)
    if {"input", "output", "score", "step"} <= fields:
        return VERL
    if {"step", "prompt", "completion"} <= fields:
        return TRL
    if fields & set(NAMES["messages"]) or (fields & set(NAMES["prompt"]) and fields & set(NAMES["response"])):
        return TEXT
    return None


@dataclass(slots=True)
class Retokenizer:
    """Makes token ids of text.

    Args:
        directory: a Hugging Face directory with a tokenizer.

    Attributes:
        rollouts, tokens: how many were made.

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
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ModelError(
                f"--tokenizer {self.directory} holds no tokenizer that can be loaded: {reason}",
                hint="give the policy's Hugging Face folder (tokenizer.json, tokenizer_config.json)",
            ) from error

    def pair(self, prompt: str, response: str) -> tuple[list[int], list[int]]:
        """(ids, mask) of a prompt, with the special tokens that the tokenizer begins with, and a response without."""
        prompt_ids = self._tokenizer(prompt)["input_ids"]
        end = self._tokenizer.eos_token_id
        if prompt_ids and prompt_ids[-1] == end and not prompt.endswith(str(self._tokenizer.eos_token)):
            prompt_ids = prompt_ids[:-1]
        response_ids = self._tokenizer(response, add_special_tokens=False)["input_ids"]
        return self._counted([*prompt_ids, *response_ids], [0] * len(prompt_ids) + [1] * len(response_ids))

    def chat(self, messages: list[dict[str, str]]) -> tuple[list[int], list[int]] | None:
        """(ids, mask) of a conversation, the mask on each turn of the assistant, through its end-of-turn token.

        Returns:
            None where the chat template changes earlier turns, so that a turn's tokens are unknown.
        """
        ids: list[int] = []
        mask: list[int] = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._templated(messages[:i], add_generation_prompt=True)
            through = self._templated(messages[: i + 1], add_generation_prompt=False)
            if before[: len(ids)] != ids or through[: len(before)] != before:
                return None
            mask += [0] * (len(before) - len(ids)) + self._until_end(through[len(before) :])
            ids = through
        # Drop what the template puts behind the end of the last turn.
        last = len(mask) - mask[::-1].index(1) if 1 in mask else len(mask)
        return self._counted(ids[:last], mask[:last])

    def _until_end(self, turn: list[int]) -> list[int]:
        end = self._tokenizer.eos_token_id
        length = len(turn) - turn[::-1].index(end) if end in turn else len(turn)
        return [1] * length + [0] * (len(turn) - length)

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


def records(lines: list[Line], kind: str, retokenizer: Retokenizer, renames: dict[str, str]) -> Records:
    """The rollouts of some records of text.

    Args:
        lines: (record number, fields).
        kind: VERL, TRL or TEXT.
        retokenizer: makes the ids.
        renames: messages, prompt, response or reward -> the field that is it, from --column.
    """
    rows = Rows()
    for row, line in lines:
        names = {part: _field(line, part, renames) for part in NAMES}
        reward = _reward(line, names["reward"], kind, rows)
        if reward is None:
            rows.refuse(row, names["reward"] or "score", "no number", "a score of the rollout")
            continue
        tokens = _tokens(row, line, names, retokenizer, rows)
        if tokens is not None:
            others = {
                k: v for k, v in line.items() if k not in names.values() and isinstance(v, str | int | float | bool)
            }
            entries = {"input_ids": tokens[0], "response_mask": tokens[1], "reward": reward}
            rows.add(row, {**_carried(others, kind), **entries})
    return rows.records()


def _field(line: dict[str, Any], part: str, renames: dict[str, str]) -> str | None:
    if part in renames:
        return renames[part]
    return next((name for name in NAMES[part] if line.get(name) is not None), None)


def _reward(line: dict[str, Any], name: str | None, kind: str, rows: Rows) -> float | None:
    value = line.get(name) if name else None
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if value is None and kind == TRL:
        rewards = {k: v for k, v in line.items() if k not in NOT_REWARDS and isinstance(v, int | float)}
        if len(rewards) > 1:
            rows.notes.setdefault(
                f"reward is the sum of {', '.join(rewards)}; --column reward=NAME takes one of them alone"
            )
        value = sum(v for v in rewards.values() if v == v) if rewards else None
    return float(value) if isinstance(value, int | float) else None


def _tokens(
    row: int, line: dict[str, Any], names: dict[str, str | None], retokenizer: Retokenizer, rows: Rows
) -> tuple[list[int], list[int]] | None:
    """(ids, mask) of a record; None where it was refused."""
    prompt, response = (line.get(names[part] or "") for part in ("prompt", "response"))
    if isinstance(prompt, str) and isinstance(response, str):
        return retokenizer.pair(prompt, response)
    messages = line.get(names["messages"] or "")
    if messages is None:
        messages = [*_as_messages(prompt, "user"), *_as_messages(response, "assistant")]
    turns = [_message(message) for message in messages] if isinstance(messages, list) else []
    column = names["messages"] or names["response"] or "messages"
    if not turns or None in turns or turns[-1] is None or turns[-1]["role"] != "assistant":
        rows.refuse(row, column, "no conversation that ends with the assistant", EXPECTED_MESSAGES)
        return None
    try:
        tokens = retokenizer.chat([message for message in turns if message is not None])
    except Exception as error:
        # A template may raise any exception.
        rows.refuse(row, column, f"a chat template that fails ({str(error)[:80]})", "one that takes this conversation")
        return None
    if tokens is None:
        rows.refuse(row, column, "a chat template that rewrites earlier turns", "one that only adds to them")
    return tokens


def _as_messages(value: Any, role: str) -> list[Any]:
    return [{"role": role, "content": value}] if isinstance(value, str) else value if isinstance(value, list) else []


def _message(message: Any) -> dict[str, str] | None:
    if not isinstance(message, dict):
        return None
    role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
    if not isinstance(role, str) or not isinstance(content, str):
        return None
    return {"role": ROLES.get(role, role), "content": content}


def _carried(others: dict[str, Any], kind: str) -> dict[str, Any]:
    """Other fields under names that do not take a rollout's own id for that of its prompt group."""
    if kind == VERL:
        if "request_id" in others:
            others["request"] = others.pop("request_id")
        if isinstance(others.get("uid"), str):
            others["uid"] = re.sub(r"_\d+_\d+$", "", others["uid"])
    return others
