"""Text made into token ids: a prompt with its response, or a conversation through the tokenizer's chat template.

What a message says must be in the tokens of its turn; what a template adds to it is not the policy's.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from critic_train.convert.field_values import ASSISTANTS
from critic_train.errors import ModelError

Tokens = tuple[list[int], list[int]]
"""(token ids, mask: 1 on those of the policy)."""
ROLES = {"human": "user", **dict.fromkeys(ASSISTANTS, "assistant"), "observation": "tool", "function_response": "tool"}
"""Roles in other formats (ShareGPT, LLaMA-Factory) -> those of chat templates."""
REASONING = ("reasoning_content", "reasoning", "thinking")
OPENS, CLOSES = "<think>", "</think>"
EXPECTED = "a list of {role, content} that ends with the assistant"


class UnusableError(ValueError):
    """A record that cannot be used: (what was found, what was expected)."""

    def __init__(self, actual: str, expected: str) -> None:
        super().__init__(actual)
        self.actual = actual
        self.expected = expected


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
    _first: str = field(init=False, default="")
    """The special token that texts begin with."""

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

        added = self._tokenizer("")["input_ids"]
        is_begin = bool(added) and (added[0] != self.end or added[0] == self._tokenizer.bos_token_id)
        self._first = self._tokenizer.convert_ids_to_tokens(added[0]) if is_begin else ""

    @property
    def has_template(self) -> bool:
        """Whether there is a chat template."""
        return self._tokenizer.chat_template is not None

    def is_templated(self, prompt: str) -> bool:
        """Whether a prompt holds one of the tokenizer's special tokens, as behind a chat template."""
        return any(token in prompt for token in self._tokenizer.all_special_tokens)

    @property
    def end(self) -> int | None:
        """The id that ends a text."""
        end: int | None = self._tokenizer.eos_token_id
        return end

    def pair(self, prompt: str, response: str) -> Tokens:
        """(ids, mask) of a prompt, with the special tokens that the tokenizer begins with, and a response without.

        A prompt that begins with those special tokens gets no second ones.
        """
        begins_with_them = self._first and prompt.lstrip().startswith(self._first)
        prompt_ids = self.ids(prompt) if begins_with_them else self._tokenizer(prompt)["input_ids"]
        if prompt_ids and prompt_ids[-1] == self.end and not prompt.endswith(str(self._tokenizer.eos_token)):
            prompt_ids = prompt_ids[:-1]
        response_ids = self.ids(response)
        return self.counted([*prompt_ids, *response_ids], [0] * len(prompt_ids) + [1] * len(response_ids))

    def ids(self, text: str) -> list[int]:
        """The token ids of a text, no special tokens added."""
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def counted(self, ids: list[int], mask: list[int]) -> Tokens:
        """Count a rollout that was made."""
        self.rollouts += 1
        self.tokens += len(ids)
        return ids, mask

    def templated(self, messages: list[dict[str, Any]], tools: Any, *, add_generation_prompt: bool) -> str:
        """A conversation in the template's text."""
        beside = {"tools": tools} if tools else {}
        text: str = self._tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt, **beside
        )
        return text

    def chat(self, messages: list[dict[str, Any]], tools: Any = None, first: int = 0) -> Tokens:
        """(ids, mask) of a conversation, the mask on each turn of the assistant, through its end-of-turn token.

        A turn without thinking or tool calls of its own stands as it was written behind what the template opens a turn
        with. Prompt and turns are tokenized apart, as they are when a policy generates.

        Args:
            messages: as `messages_of` makes them.
            tools: for the template.
            first: index of the first message behind the prompt, in which assistants wrote what the policy did not.

        Raises:
            UnusableError: the template changes earlier turns, or leaves out what a message says.
        """
        text, ids, mask = "", [], []
        for i, message in enumerate(messages):
            if message["role"] != "assistant" or i < first:
                continue
            before = self.templated(messages[:i], tools, add_generation_prompt=True)
            if not before.startswith(text):
                raise UnusableError(
                    "a chat template that rewrites earlier turns",
                    "one that only adds to them, or a record for each turn",
                )
            opened = before[len(text) :]
            self._check_others(messages[:i], before)
            turn = self._turn(messages, i, before, tools)
            opened_ids, turn_ids = self.ids(opened), self.ids(turn)
            ids += opened_ids + turn_ids
            mask += [0] * len(opened_ids) + [1] * len(turn_ids)
            text = before + turn
        return self.counted(ids, mask)

    def _turn(self, messages: list[dict[str, Any]], i: int, before: str, tools: Any) -> str:
        """What the policy wrote in a turn, with the token that ends it."""
        message = messages[i]
        through = self.templated(messages[: i + 1], tools, add_generation_prompt=False)
        content = message.get("content") or ""
        shown = through[len(before) :] if through.startswith(before) else None
        if any(message.get(name) for name in (*REASONING, "tool_calls")):
            return self._rendered(message, shown)
        lead, is_shown, tail = (shown or through).rpartition(content.strip())
        if shown is not None and is_shown and not lead.strip():
            return self._until_end(shown)
        # The template adds to the turn, or takes from it: it stands as the message has it.
        if before.rstrip().endswith(OPENS):
            if CLOSES not in content:
                raise UnusableError("no thinking, where the chat template opens it", "what the policy thought")
            content = content.lstrip().removeprefix(OPENS).lstrip("\n")
        answer = content.rpartition(CLOSES)[2].strip()
        _, is_shown, tail = (shown or through).rpartition(answer) if not is_shown else (lead, is_shown, tail)
        return content + (self._until_end(tail) if is_shown else str(self._tokenizer.eos_token or ""))

    def _rendered(self, message: dict[str, Any], shown: str | None) -> str:
        """A turn of thinking, text and tool calls, as the template joins them."""
        if shown is None:
            raise UnusableError("a chat template that shows a turn in another way than it opens one", "thinking in it")
        for statement in _statements(message):
            in_json = (json.dumps(statement, ensure_ascii=ascii_only)[1:-1] for ascii_only in (True, False))
            if not any(form in shown for form in (statement.strip(), *in_json)):
                raise UnusableError(
                    f"a chat template that leaves out what the assistant said ({statement.strip()[:40]!r})",
                    "one that shows reasoning_content, content and tool_calls",
                )
        return self._until_end(shown)

    def _check_others(self, messages: list[dict[str, Any]], text: str) -> None:
        """Raise where the template leaves out what others say."""
        for message in messages:
            content = message.get("content")
            if message["role"] != "assistant" and isinstance(content, str) and content.strip() not in text:
                raise UnusableError(
                    f"a chat template that leaves out what the {message['role']} said", "one that shows all messages"
                )

    def _until_end(self, turn: str) -> str:
        """A turn without what the template puts behind its last end-of-turn token."""
        end = str(self._tokenizer.eos_token or "")
        before, ends, _ = turn.rpartition(end) if end else ("", "", turn)
        return before + ends if ends else turn

    def shown(self, ids: list[int]) -> str:
        """Token ids as text, special tokens as they are."""
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text


def _statements(message: dict[str, Any]) -> Iterator[str]:
    """All that an assistant's message says."""
    yield from (message[name] for name in (*REASONING, "content") if isinstance(message.get(name), str))
    for call in message.get("tool_calls") or []:
        function = call.get("function", call)
        yield str(function.get("name", ""))
        arguments = function.get("arguments")
        if isinstance(arguments, dict):
            yield from (value if isinstance(value, str) else json.dumps(value) for value in arguments.values())
        elif isinstance(arguments, str):
            yield arguments


def messages_of(value: Any) -> list[dict[str, Any]]:
    """A conversation as chat templates take it, whatever the names of its roles and fields.

    Raises:
        UnusableError: it is none, or holds what is no text.
    """
    if not isinstance(value, list) or not value:
        raise UnusableError("no conversation", EXPECTED)
    return [_message(message) for message in value]


def _message(message: Any) -> dict[str, Any]:
    role = message.get("role", message.get("from")) if isinstance(message, dict) else None
    if not isinstance(role, str):
        raise UnusableError("no conversation", EXPECTED)
    content = _content(message.get("content", message.get("value")))
    calls = _calls(message.get("tool_calls"))
    thoughts = [message[name] for name in REASONING if isinstance(message.get(name), str) and message[name]]
    if content is None and not calls and not thoughts:
        raise UnusableError(f"a message of the {role} that says nothing", "content, reasoning_content or tool_calls")
    made: dict[str, Any] = {"role": ROLES.get(role, role), "content": content or ""}
    made |= {"reasoning_content": thoughts[0]} if thoughts else {}
    made |= {"tool_calls": calls} if calls else {}
    return made | {name: message[name] for name in ("name", "tool_call_id") if isinstance(message.get(name), str)}


def _content(content: Any) -> str | None:
    """A message's text, also out of parts of text."""
    if content is None or isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    strings = [text for text in texts if isinstance(text, str)]
    if not parts or len(strings) < len(texts):
        raise UnusableError("a message with parts that are no text", "text alone: a critic of text sees nothing else")
    return "".join(strings)


def _calls(calls: Any) -> list[dict[str, Any]]:
    """Tool calls, their arguments read where they are JSON in a text, as templates print them as JSON."""
    if not isinstance(calls, list):
        return []
    made = []
    for call in calls:
        call = json.loads(call) if isinstance(call, str) else call
        if not isinstance(call, dict):
            raise UnusableError("a tool call that is no object", "{function: {name, arguments}}")
        function = call.get("function", call)
        arguments = function.get("arguments") if isinstance(function, dict) else None
        if isinstance(arguments, str):
            try:
                parsed = json.loads(arguments)
            except ValueError:
                parsed = arguments
            function = {**function, "arguments": parsed}
        made.append({"type": "function", "function": function} | ({"id": call["id"]} if "id" in call else {}))
    return made
