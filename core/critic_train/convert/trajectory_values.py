"""NeMo-RL's trajectory-value JSONL: a trajectory as of the Responses API, and scalar targets at places in it.

Read against NeMo-RL's pull request 3310 (schemas trajectory_value_v1, v2 and v3). A target pairs with the first token
that the policy writes in the state it tells of, or with an end-of-text token behind all: those tokens alone are in the
mask, and `returns` holds the targets. `evaluation_targets` are not trained on there and are not read here.
"""

from typing import Any

from critic_train.convert.chat import Retokenizer, UnusableError, messages_of
from critic_train.convert.raw_records import Line, LineFormat, Records, Rows

KIND = "NeMo-RL trajectory values"
VERSIONS = ("trajectory_value_v1", "trajectory_value_v2", "trajectory_value_v3")
Item = dict[str, Any]


def kind_of(record: dict[str, Any]) -> str | None:
    """KIND of a record with value targets, None of any other."""
    return KIND if record.get("schema_version") in VERSIONS else None


def records(lines: list[Line], _: str, retokenizer: Retokenizer) -> Records:
    """The rollouts of some lines."""
    rows = Rows()
    for row, line in lines:
        try:
            entries = _entries(line, retokenizer)
        except UnusableError as refusal:
            rows.refuse(row, "", refusal.actual, refusal.expected)
            continue
        names = ("trajectory_id", "instance_id", "experiment_id", "pivot_id", "split", "label_source")
        others = {name: line[name] for name in names if isinstance(line.get(name), str)}
        others |= {"uid": line["instance_id"]} if isinstance(line.get("instance_id"), str) else {}
        rows.add(row, {**others, **entries})
    rows.notes.setdefault(
        "the targets are the returns: each pairs with the first token that the policy writes there, which alone is in "
        "the mask; an end-of-text token is put behind all"
    )
    return rows.records()


def _entries(line: dict[str, Any], retokenizer: Retokenizer) -> dict[str, Any]:
    """Token columns of a trajectory."""
    if "trajectory_ref" in line:
        raise UnusableError("a trajectory in another file (trajectory_ref)", "one in the record itself")
    params = line.get("responses_create_params")
    items = params.get("input") if isinstance(params, dict) else None
    items = [{"type": "message", "role": "user", "content": items}] if isinstance(items, str) else items
    if not isinstance(params, dict) or not isinstance(items, list) or retokenizer.end is None:
        raise UnusableError("no responses_create_params.input", "the items of a trajectory")
    messages, message_of_item = _messages(items)
    tools = [_tool(tool) for tool in params.get("tools") or [] if isinstance(tool, dict)]
    try:
        return _at_places(line, messages, message_of_item, tools, retokenizer)
    except UnusableError:
        raise
    except Exception as error:
        # A template may raise any exception.
        raise UnusableError(f"a chat template that fails ({str(error)[:80]})", "one that takes this") from error


def _at_places(
    line: dict[str, Any], messages: list[Item], message_of_item: list[int], tools: list[Item], retokenizer: Retokenizer
) -> dict[str, Any]:
    states = _states(line, len(message_of_item))
    text = ""
    ids: list[int] = []
    places: dict[int, float] = {}
    for state in sorted(states):
        # Behind the messages up to and with the one of the item, the policy begins to write.
        shown = messages_of(messages[: message_of_item[state] + 1])
        through = retokenizer.templated(shown, tools, add_generation_prompt=True)
        if not through.startswith(text):
            raise UnusableError("a chat template that rewrites earlier turns", "one that only adds to them")
        ids += retokenizer.ids(through[len(text) :])
        text = through
        places[len(ids)] = states[state]
    complete = retokenizer.templated(messages_of(messages), tools, add_generation_prompt=False)
    is_last = message_of_item[max(states)] == len(messages) - 1
    if not is_last and complete.startswith(text):
        ids += retokenizer.ids(complete[len(text) :])
    elif not is_last:
        raise UnusableError("a chat template that rewrites earlier turns", "one that only adds to them")
    ids.append(retokenizer.end or 0)
    mask, returns = [0] * len(ids), [0.0] * len(ids)
    for position, target in places.items():
        mask[position], returns[position] = 1, target
    retokenizer.counted(ids, mask)
    return {"input_ids": ids, "response_mask": mask, "returns": returns}


def _states(line: dict[str, Any], items: int) -> dict[int, float]:
    """Index of the item behind which a target tells of the state -> the target."""
    if line["schema_version"] == VERSIONS[0]:
        return {items - 1: _number(line.get("value_target"))}
    states: dict[int, float] = {}
    for target in line.get("targets") or []:
        location = target.get("location") if isinstance(target, dict) else None
        index = location.get("item_index") if isinstance(location, dict) else None
        if not isinstance(location, dict) or location.get("type") != "post_item_state" or not isinstance(index, int):
            raise UnusableError("a target at another place than behind an item", "location.type post_item_state")
        if not 0 <= index < items or index in states:
            raise UnusableError(f"a target behind item {index} of {items}", "one target for each state")
        states[index] = _number(target.get("value_target"))
    if not states:
        raise UnusableError("no targets", "at least one")
    return states


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UnusableError("a value_target that is no number", "a number")
    return float(value)


def _messages(items: list[Item]) -> tuple[list[Item], list[int]]:
    """Items of the Responses API as chat messages, and the index of the message that each item is in.

    Thinking, text and calls in a row are one message of the assistant.
    """
    messages: list[Item] = []
    message_of_item: list[int] = []
    for item in items:
        kind = item.get("type", "message") if isinstance(item, dict) else None
        written = kind in ("reasoning", "function_call") or (kind == "message" and item.get("role") == "assistant")
        if kind not in ("message", "reasoning", "function_call", "function_call_output"):
            raise UnusableError(f"an item of type {kind}", "message, reasoning, function_call or function_call_output")
        if written and not (messages and messages[-1]["role"] == "assistant"):
            messages.append({"role": "assistant", "content": ""})
        message_of_item.append(len(messages) - 1 if written else len(messages))
        if kind == "reasoning":
            parts = item.get("content") or item.get("summary") or []
            messages[-1]["reasoning_content"] = "".join(part.get("text", "") for part in parts)
        elif kind == "function_call":
            function = {"name": item.get("name"), "arguments": item.get("arguments")}
            messages[-1].setdefault("tool_calls", []).append({"function": function, "id": item.get("call_id")})
        elif written:
            messages[-1]["content"] += _text(item.get("content"))
        elif kind == "function_call_output":
            messages.append({"role": "tool", "content": _text(item.get("output")), "tool_call_id": item.get("call_id")})
        else:
            messages.append({"role": item.get("role"), "content": _text(item.get("content"))})
    return messages, message_of_item


def _text(content: Any) -> str:
    parts = content if isinstance(content, list) else [content]
    return "".join(part.get("text", "") if isinstance(part, dict) else str(part or "") for part in parts)


def _tool(tool: Item) -> Item:
    """A tool as chat templates take it."""
    function = {name: tool[name] for name in ("name", "description", "parameters") if name in tool}
    return tool if "function" in tool else {"type": "function", "function": function}


FORMAT = LineFormat(name="nemo-rl", title="NeMo-RL trajectory values", recognise=kind_of, read=records, is_text=True)
