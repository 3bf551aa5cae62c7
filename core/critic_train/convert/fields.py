"""Which field of a record is the prompt, which the response, which the reward: by what fields hold, and by their names.

Where two readings are possible and nothing decides, the file is refused with the flag that does.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from critic_train.convert.field_values import (
    MESSAGES,
    NUMBER,
    TEXT,
    Fields,
    UnclearError,
    are_equal,
    begins_with_the_policy,
    ends_with_the_policy,
    is_messages,
    kinds_of,
    leaf,
    listed,
    word_list,
)
from critic_train.convert.rewards import RewardFields, reward_fields
from critic_train.convert.token_fields import PROMPTS, RESPONSES, token_parts

TEXT_PARTS = ("messages", "prompt", "response", "system")
"""Canonical names of a record of text, beside `reward` and `uid`."""
POLICY = frozenset({"model", "llm", "policy", "actor", "assistant", "agent", "student", "bot", "predicted", "sampled"})
CONTENTS = frozenset({
    "answer", "solution", "text", "output", "message", "content", "reply", "response", "str", "string", "raw",
})  # fmt: skip
WEAK_RESPONSES = ("answer", "solution", "text", "content")
"""In most data sets the ground truth: read as the response only where nothing else can be it."""
NOT_WRITTEN = frozenset({
    "gold", "golden", "ground", "truth", "groundtruth", "gt", "reference", "ref", "target", "expected", "standard",
    "label", "human", "rejected", "original", "baseline", "teacher", "demonstration", "example", "shot", "previous",
    "history", "tool", "correct", "chosen", "judge", "critique", "feedback",
})  # fmt: skip
"""Words in the names of texts that the policy did not write."""
THOUGHTS = frozenset({"reasoning", "thinking", "thought", "cot", "rationale"})
TEMPLATED = re.compile(r"<\|[^|<>]+\|>|<start_of_turn>|\[INST\]|<\uff5c|</s>|<s>")
"""What a chat template leaves in a text."""


FindReward = Callable[[list[Fields], dict[str, str], dict[str, str]], RewardFields | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """Which field is what.

    Attributes:
        parts: canonical name -> field: the ids of `input_ids` or `prompts` and `responses`, or text in `messages`, or
            in `prompt` and `response`; and `system`, `tools`, `response_length`.
        prompt_parts: fields that make the prompt together, where they are several.
        reward: how the reward is read; None where there is none.
        understood: what is told of it: prompt, response, reward -> in words.
    """

    parts: dict[str, str]
    reward: RewardFields | None
    prompt_parts: tuple[str, ...] = ()
    understood: dict[str, str] = field(default_factory=dict)

    @property
    def is_tokens(self) -> bool:
        """Whether the policy's token ids are there."""
        return "input_ids" in self.parts or "responses" in self.parts

    @property
    def response(self) -> str:
        """The field that holds the policy's part."""
        return next(
            self.parts[name] for name in ("input_ids", "responses", "messages", "response") if name in self.parts
        )


def read_fields(
    samples: list[Fields],
    renames: dict[str, str],
    find_reward: FindReward = reward_fields,
    shared: frozenset[str] = frozenset(),
) -> Reading:
    """How samples are read.

    Args:
        samples: some of a file, flat.
        renames: canonical name -> field, from --column.
        find_reward: which field is the reward: samples, field -> what it holds, and renames -> the fields.
        shared: fields that several samples of a record share, so that none is a response.

    Raises:
        UnclearError: something is missing, or two readings are possible.
    """
    kinds = kinds_of(samples)
    # A number of the sample's own comes before one that all samples of its record share.
    of_sample = {name: kind for name, kind in kinds.items() if name not in shared}

    def reward_of() -> RewardFields | None:
        return find_reward(samples, of_sample, renames) or find_reward(samples, kinds, renames)

    if not set(renames) & {"messages", "prompt", "response"}:
        tokens = token_parts(kinds, samples, renames)
        if tokens is not None:
            reward = reward_of()
            return Reading(parts=tokens, reward=reward, understood=_description(tokens, (), reward))
    finder = _TextFinder(samples=samples, kinds=kinds, renames=renames, shared=shared)
    parts, prompt_parts = finder.parts()
    reward = reward_of()
    if reward is None:
        raise UnclearError(
            f"no field is a reward: {_numbers_of(kinds, NUMBER)}",
            hint=f"--column reward={_first(kinds, NUMBER) or 'NAME'} takes a field of numbers as the reward",
        )
    return Reading(
        parts=parts, prompt_parts=prompt_parts, reward=reward, understood=_description(parts, prompt_parts, reward)
    )


def _description(parts: dict[str, str], prompt_parts: tuple[str, ...], reward: RewardFields | None) -> dict[str, str]:
    prompt = " and ".join(f"`{name}`" for name in prompt_parts) or f"`{parts.get('prompt', parts.get('prompts', ''))}`"
    response = f"`{parts.get('response', parts.get('responses', ''))}`"
    if "messages" in parts:
        prompt, response = (f"{what} in `{parts['messages']}`" for what in ("what others say", "the assistant's turns"))
    elif "input_ids" in parts:
        prompt = f"`{parts['input_ids']}` before the response"
        response = f"what the mask marks in `{parts['input_ids']}`"
    if "system" in parts:
        prompt = f"`{parts['system']}` and {prompt}"
    return {"prompt": prompt, "response": response, **({} if reward is None else {"reward": reward.description})}


@dataclass(frozen=True, slots=True, kw_only=True)
class _TextFinder:
    """Finds the fields of text: a conversation, or a prompt and a response."""

    samples: list[Fields]
    kinds: dict[str, str]
    renames: dict[str, str]
    shared: frozenset[str]

    def parts(self) -> tuple[dict[str, str], tuple[str, ...]]:
        """(canonical name -> field, the fields of a prompt that is made of several)."""
        given = {name: self.renames[name] for name in ("messages", "prompt", "response") if name in self.renames}
        if "messages" in given and len(given) > 1:
            other = next(name for name in given if name != "messages")
            raise UnclearError(
                f"--column {other}={given[other]} has no effect beside --column messages={given['messages']}",
                hint="leave one of them out: a conversation holds its prompt and its response",
            )
        conversation = given.get("messages") or (None if "response" in given else self._conversation())
        if conversation is not None:
            response = None if "messages" in given else self._response_beside(conversation)
            if response is None:
                return {"messages": conversation, **self._beside_messages(conversation)}, ()
        response = given.get("response") or self._response()
        prompt, prompt_parts = self._prompt(response)
        parts = {"prompt": prompt, "response": response} | self._beside_messages(prompt)
        self._check_thoughts(response)
        return parts, prompt_parts

    def _conversation(self) -> str | None:
        """A field of conversations that end with the policy's turn; None where there is none."""
        names = self._of_kind(MESSAGES, lambda n: n not in self.shared and not set(word_list(leaf(n))[-1:]) & PROMPTS)
        full = [name for name in names if self._most(name, ends_with_the_policy)]
        full = [n for n in full if not self._is_response_name(n) or not self._most(n, begins_with_the_policy)]
        written = [name for name in full if not set(word_list(name)) & NOT_WRITTEN]
        return self._one_of(full if len(full) == 1 else written, "messages")

    def _response_beside(self, conversation: str) -> str | None:
        """A response that stands beside a conversation and is to be read in its place.

        Raises:
            UnclearError: it is not what the conversation ends with.
        """
        names = [name for name in self.kinds if self._is_response_name(name) and self.kinds[name] == TEXT]
        if not names:
            return None
        for name in names:
            if not self._same_text(conversation, name):
                raise UnclearError(
                    f"`{conversation}` ends with another text than `{name}`: either could be what the policy wrote",
                    hint=f"say which: --column messages={conversation} or --column response={name}",
                )
        prompts = [name for name in self.kinds if self._is_prompt_name(name) and self.kinds[name] == TEXT]
        is_templated = any(TEMPLATED.search(sample.get(name) or "") for sample in self.samples for name in prompts)
        return names[0] if is_templated else None

    def _same_text(self, conversation: str, name: str) -> bool:
        for sample in self.samples:
            messages, text = sample.get(conversation), sample.get(name)
            if (
                messages
                and text
                and str(messages[-1].get("content", messages[-1].get("value"))).strip() != text.strip()
            ):
                return False
        return True

    def _response(self) -> str:
        """The field of what the policy wrote.

        Raises:
            UnclearError: none can be it, or several can.
        """
        strong = [n for n in self.kinds if self._is_response_name(n) and self.kinds[n] in (TEXT, MESSAGES)]
        named = self._one_of(strong, "response")
        if named is not None:
            return named
        if {"chosen", "rejected"} <= set(self.kinds) and not strong:
            raise UnclearError(
                "`chosen` and `rejected` are a preference, which says nothing of what either is worth",
                hint="give both a score, as score_chosen and score_rejected; or take one: --column response=chosen "
                "--column reward=NAME",
            )
        weak = [name for name in WEAK_RESPONSES if self.kinds.get(name) == TEXT and name not in self.shared]
        others = [name for name in self.kinds if name not in weak and self._could_be_written(name)]
        if len(weak) == 1 and not others:
            return weak[0]
        if weak or others:
            raise UnclearError(
                f"{listed([*weak, *others])} could be what the policy wrote, and none is named as that",
                hint=f"say which: --column response={(others or weak)[0]}",
            )
        raise UnclearError(
            f"is in no known format: its fields are {', '.join(list(self.kinds)[:20])}; none is what the policy wrote",
            hint="--column response=NAME takes a field of text, --column responses=NAME one of token ids",
        )

    def _prompt(self, response: str) -> tuple[str, tuple[str, ...]]:
        """(the field of the prompt, all of them where it is made of several).

        Raises:
            UnclearError: there is none, or there are several and none holds the others.
        """
        if "prompt" in self.renames:
            return self.renames["prompt"], ()
        conversations = [n for n in self._of_kind(MESSAGES, lambda n: n != response) if not self._is_response_name(n)]
        conversations = [name for name in conversations if not self._most(name, ends_with_the_policy)]
        texts = [name for name in self.kinds if self.kinds[name] == TEXT and self._is_prompt_name(name)]
        texts = [name for name in texts if name != response]
        if conversations:
            return self._one_of(conversations, "prompt") or "", ()
        is_alpaca = {"instruction", "input"} <= set(texts) and not {"prompt", "question"} & set(texts)
        if is_alpaca and not self._holds("instruction", "input") and not self._holds("input", "instruction"):
            return "instruction", ("instruction", "input")
        widest = [name for name in texts if all(self._holds(name, other) for other in texts)]
        if texts and not widest:
            raise UnclearError(
                f"{listed(texts)} could each be the prompt, and none holds the others",
                hint=f"say which: --column prompt={texts[0]}",
            )
        if not widest:
            raise UnclearError(
                f"no field is the prompt; its fields are {', '.join(list(self.kinds)[:20])}",
                hint="--column prompt=NAME takes a field of text or of messages",
            )
        return widest[0], ()

    def _beside_messages(self, prompt: str) -> dict[str, str]:
        """A system message and tools that stand in fields of their own."""
        beside = {}
        systems = [n for n in self.kinds if self.kinds[n] == TEXT and self._is_system_name(n)]
        systems = [self.renames["system"]] if "system" in self.renames else systems
        if systems and systems[0] != prompt:
            beside["system"] = systems[0]
        tools = next((name for name in ("tools", "tool_defs", "functions") if name in self.kinds), None)
        return beside | ({} if tools is None else {"tools": tools})

    def _check_thoughts(self, response: str) -> None:
        """Raise where the policy's thinking stands in a field of its own, and --column does not say to leave it out."""
        for name, kind in self.kinds.items():
            is_thought = kind == TEXT and bool(set(word_list(leaf(name))) & THOUGHTS) and name != response
            if is_thought and "response" not in self.renames and not self._holds(response, name):
                raise UnclearError(
                    f"`{name}` holds text that `{response}` lacks: it may be a part of what the policy wrote",
                    hint=f"join them in one field, or say that the response is whole: --column response={response}",
                )

    def _of_kind(self, kind: str, wanted: Callable[[str], bool]) -> list[str]:
        return [name for name in self.kinds if self.kinds[name] == kind and wanted(name)]

    def _most(self, name: str, holds: Callable[[Any], bool]) -> bool:
        held = [holds(sample[name]) for sample in self.samples if is_messages(sample.get(name))]
        return 2 * sum(held) >= len(held)

    def _one_of(self, names: list[str], part: str) -> str | None:
        if len(names) > 1 and not are_equal(self.samples, names):
            raise UnclearError(
                f"{listed(names)} could each be the {'conversation' if part == 'messages' else part}",
                hint=f"say which: --column {part}={names[0]}",
            )
        return names[0] if names else None

    def _holds(self, name: str, other: str) -> bool:
        pairs = [(sample.get(name), sample.get(other)) for sample in self.samples]
        return all(isinstance(a, str) and b.strip() in a for a, b in pairs if isinstance(b, str))

    def _could_be_written(self, name: str) -> bool:
        """Whether a text may be what a policy wrote, by what it holds: several words, not the same in all samples."""
        texts = [sample[name] for sample in self.samples if isinstance(sample.get(name), str)]
        is_known = self._is_prompt_name(name) or self._is_system_name(name) or bool(set(word_list(name)) & NOT_WRITTEN)
        if self.kinds[name] != TEXT or is_known or "." in name or name in self.shared:
            return False
        return any(len(text.split()) > 1 for text in texts) and (len(set(texts)) > 1 or len(texts) == 1)

    def _is_response_name(self, name: str) -> bool:
        name_words = word_list(leaf(name))
        around = set(word_list(name))
        if not name_words or around & NOT_WRITTEN or name in self.shared:
            return False
        if name_words[-1] in RESPONSES:
            return True
        return name_words[-1] in CONTENTS and bool(around & (RESPONSES | POLICY | {"choice"}))

    def _is_prompt_name(self, name: str) -> bool:
        name_words = word_list(leaf(name))
        if not name_words or set(name_words) & (NOT_WRITTEN | {"system"}) or self._is_response_name(name):
            return False
        return name_words[-1] in PROMPTS or (name_words[-1] in CONTENTS and bool(set(name_words) & PROMPTS))

    def _is_system_name(self, name: str) -> bool:
        name_words = word_list(leaf(name))
        return name_words[0] == "system" and name_words[-1] in ("system", "prompt", "message") if name_words else False


def _first(kinds: dict[str, str], kind: str) -> str | None:
    return next((name for name, value in kinds.items() if value == kind), None)


def _numbers_of(kinds: dict[str, str], kind: str) -> str:
    names = [name for name, value in kinds.items() if value == kind]
    return f"the numbers are {', '.join(f'`{name}`' for name in names[:12])}" if names else "there are no numbers"
