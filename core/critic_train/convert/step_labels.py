"""Responses in steps with a label each: PRM800K, Math-Shepherd, TRL's stepwise supervision.

A label tells what the state at the end of its step is worth. A critic reads a value off the state before a token, so a
label pairs with the token behind its step, and with an end-of-text token behind the last. Those tokens alone are in the
mask, and `returns` holds the labels.
"""

import hashlib
import re
from typing import Any

from critic_train.convert.chat import Retokenizer, UnusableError
from critic_train.convert.raw_records import Line, LineFormat, Records, Rows
from critic_train.convert.rewards import number_of

KIND = "step labels"
SHEPHERD = "ки"
"""What ends every step of Math-Shepherd's `input`; `label` has + or - in its place."""
SHEPHERD_LABELS = {"+": 1.0, "-": 0.0}
SEPARATOR = "\n"
PROBLEM = re.compile(r"(?=Step 1:)")
Steps = tuple[str, list[tuple[str, float | None]]]
"""A prompt, and the steps with their labels; None where a step has none."""


def kind_of(record: dict[str, Any]) -> str | None:
    """KIND of a record with step labels, None of any other."""
    return None if _reader_of(record) is None else KIND


def records(lines: list[Line], _: str, retokenizer: Retokenizer) -> Records:
    """The rollouts of some records."""
    rows = Rows()
    for row, line in lines:
        read = _reader_of(line)
        try:
            if read is None:
                raise UnusableError("no steps", "steps with a label each")
            prompt, steps = read(line)
            entries = _entries(prompt, steps, retokenizer)
        except (UnusableError, ValueError, KeyError, TypeError, IndexError) as error:
            rows.refuse(row, "", getattr(error, "actual", f"no steps ({error})"), "a prompt, and steps with labels")
            continue
        others = {name: value for name, value in line.items() if isinstance(value, int | float | bool)}
        # The tokens before the mask hold the first step as well: they do not tell the prompt.
        uid = hashlib.blake2b(prompt.encode("utf-8", "replace"), digest_size=8).hexdigest()
        rows.add(row, {**others, "uid": uid, **entries})
    rows.notes.setdefault(
        "labels are the returns at the ends of steps: each pairs with the token behind its step, which alone is in the "
        "mask; an end-of-text token is put behind the last step"
    )
    return rows.records()


def _reader_of(record: dict[str, Any]) -> Any:
    label, completions, labels = (record.get(name) for name in ("label", "completions", "labels"))
    if isinstance(label, dict) and isinstance(label.get("steps"), list) and isinstance(record.get("question"), dict):
        return _prm800k
    is_texts = isinstance(completions, list) and completions and all(isinstance(text, str) for text in completions)
    if is_texts and isinstance(labels, list) and isinstance(record.get("prompt"), str):
        return _trl if not {"rewards", "scores"} & set(record) else None
    if isinstance(record.get("input"), str) and isinstance(label, str) and SHEPHERD in record["input"]:
        return _shepherd
    return None


def _prm800k(record: dict[str, Any]) -> Steps:
    """OpenAI's phase 1 and 2: of a step, the completion that was gone on with, or the human's; ratings -1, 0, 1."""
    steps: list[tuple[str, float | None]] = []
    for step in record["label"]["steps"]:
        chosen, completions = step.get("chosen_completion"), step.get("completions") or []
        if chosen is None and step.get("human_completion"):
            break  # a human went on: no longer the policy's
        if chosen is None and len(completions) != 1 and step is not record["label"]["steps"][-1]:
            raise UnusableError("a step of which no completion was chosen", "chosen_completion")
        completion = completions[chosen if chosen is not None else 0]
        rating = completion.get("rating")
        steps.append((completion["text"], None if rating is None else float(rating)))
    return record["question"]["problem"], steps


def _trl(record: dict[str, Any]) -> Steps:
    if len(record["completions"]) != len(record["labels"]):
        raise UnusableError(f"{len(record['labels'])} labels beside {len(record['completions'])} steps", "one a step")
    steps: list[tuple[str, float | None]] = []
    for text, value in zip(record["completions"], record["labels"], strict=True):
        label = number_of(value)
        if isinstance(label, list):
            raise UnusableError("a list as a label", "a number or a truth value a step")
        steps.append((text, label))
    return record["prompt"], steps


def _shepherd(record: dict[str, Any]) -> Steps:
    texts = record["input"].split(SHEPHERD)
    prompt, first = PROBLEM.split(texts[0], maxsplit=1)[0], texts[0]
    if "Step 1:" not in first:
        raise UnusableError("no `Step 1:`", "a problem, and steps that begin with their number")
    steps: list[tuple[str, float | None]] = []
    label = record["label"]
    for number, text in enumerate(texts[:-1]):
        at = label.find(text)
        mark = label[at + len(text) : at + len(text) + 1]
        if at < 0 or mark not in SHEPHERD_LABELS:
            raise UnusableError(f"no + or - behind step {number + 1} of `label`", "the text of `input`, + or - for ки")
        label = label[at + len(text) + 1 :]
        step = first[len(prompt) :] if number == 0 else text
        steps.append((step.strip(), SHEPHERD_LABELS[mark]))
    return prompt.strip(), steps


def _entries(prompt: str, steps: list[tuple[str, float | None]], retokenizer: Retokenizer) -> dict[str, Any]:
    """Token columns of a prompt and its steps."""
    if not steps or all(label is None for _, label in steps):
        raise UnusableError("no step with a label", "at least one")
    if retokenizer.end is None:
        raise UnusableError("a tokenizer without an end-of-text token", "one: the last label pairs with it")
    ids, _ = retokenizer.pair(prompt, SEPARATOR)
    mask = [0] * len(ids)
    returns = [0.0] * len(ids)
    due: float | None = None
    for text, label in steps:
        step_ids = retokenizer.ids(text.rstrip() + SEPARATOR)
        ids += step_ids
        mask += [int(due is not None), *[0] * (len(step_ids) - 1)]
        returns += [due or 0.0, *[0.0] * (len(step_ids) - 1)]
        due = label
    ids.append(retokenizer.end)
    mask.append(int(due is not None))
    returns.append(due or 0.0)
    return {"input_ids": ids, "response_mask": mask, "returns": returns}


FORMAT = LineFormat(
    name="steps", title="step labels (PRM800K, Math-Shepherd, TRL)", recognise=kind_of, read=records, is_text=True
)
