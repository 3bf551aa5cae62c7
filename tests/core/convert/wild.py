"""Small files in the schemas that data sets and systems have, each with what the policy truly wrote in it.

A case is the records, how they are written, flags, and either the texts of the policy's part, or what the refusal says.
"""

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from conftest import ids_of as ids

Record = dict[str, Any]
PROMPTS = ("say p", "say q , q", "say p , p")
ANSWERS = ("p is said", "q is said , q", "p")
OTHERS = ("q", "p", "q is said")
OBSERVATION = [11, 12, 13]
END = 2


def rows(record: Callable[[int, str, str], Record]) -> list[Record]:
    return [record(i, q, a) for i, (q, a) in enumerate(zip(PROMPTS, ANSWERS, strict=True))]


def chat(prompt: str, answer: str, **more: Any) -> list[Record]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer, **more}]


def json_lines(records: list[Record], path: Path) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def parquet(records: list[Record], path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(records), path)


def packed(pack: Callable[[bytes], bytes]) -> Callable[[list[Record], Path], None]:
    return lambda records, path: path.write_bytes(pack("\n".join(map(json.dumps, records)).encode()))


def zstd(content: bytes) -> bytes:
    """Two frames, as parallel writers make them."""
    half = content.index(b"\n") + 1
    return b"".join(pa.compress(part, "zstd", asbytes=True) for part in (content[:half], content[half:]))


def arrow_stream(records: list[Record], path: Path) -> None:
    table = pa.Table.from_pylist(records)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    (path.parent / "dataset_info.json").write_text("{\n}")


def arrow_file(records: list[Record], path: Path) -> None:
    table = pa.Table.from_pylist(records)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)


def csv_table(records: list[Record], path: Path) -> None:
    lines = [",".join(records[0]), *(",".join(f'"{value}"' for value in record.values()) for record in records)]
    path.write_text("\n".join(lines) + "\n")


@dataclass(frozen=True, kw_only=True)
class Case:
    """See above; `policy` is None where the file is refused with `refusal`."""

    records: list[Record]
    name: str = "a.jsonl"
    write: Callable[[list[Record], Path], None] = json_lines
    policy: list[str] | None = None
    reward: list[float] | None = None
    refusal: str = ""
    flags: dict[str, Any] = field(default_factory=dict)


ALONE = list(ANSWERS)
ENDED = [f"{answer} </s>" for answer in ANSWERS]
BOTH = [text for pair in zip(ANSWERS, OTHERS, strict=True) for text in pair]
SCORED = rows(lambda i, q, a: {"prompt": q, "response": a, "reward": i / 2})
SCORES = [0, 0.5, 1]


def scored(**fields: Callable[[int, str, str], Any]) -> list[Record]:
    return rows(lambda i, q, a: {name: value(i, q, a) for name, value in fields.items()})


def text(i: int, q: str, a: str) -> str:
    return a


def prompt(i: int, q: str, a: str) -> str:
    return q


def score(i: int, q: str, a: str) -> float:
    return i / 2


def whole(i: int, q: str, a: str) -> list[int]:
    return [*ids(q), *ids(a), END]


def mask(i: int, q: str, a: str) -> list[int]:
    return [0] * len(ids(q)) + [1] * (len(ids(a)) + 1)


def labels(i: int, q: str, a: str) -> list[int]:
    return [-100] * len(ids(q)) + [*ids(a), END]


def turns(record: Callable[[list[int], list[int], int], Record]) -> list[Record]:
    """Two turns of the policy with an observation between: prompt ids, response ids, and the length of the answer."""
    return rows(lambda i, q, a: record(ids(q), [*ids(a), *OBSERVATION, *ids(a)], len(ids(a))))


TWICE = [f"{answer} {answer}" for answer in ANSWERS]


def own(n: int) -> list[int]:
    return [1] * n + [0] * len(OBSERVATION) + [1] * n


CASES: dict[str, Case] = {
    # Containers.
    "gzip": Case(records=SCORED, name="a.jsonl.gz", write=packed(gzip.compress), policy=ALONE, reward=SCORES),
    "bzip2": Case(records=SCORED, name="a.jsonl.bz2", write=packed(bz2.compress), policy=ALONE, reward=SCORES),
    "xz": Case(records=SCORED, name="a.json.xz", write=packed(lzma.compress), policy=ALONE, reward=SCORES),
    "zstd": Case(records=SCORED, name="a.jsonl.zst", write=packed(zstd), policy=ALONE, reward=SCORES),
    "array": Case(
        records=SCORED, name="a.json", write=lambda r, path: path.write_text(json.dumps(r)), policy=ALONE
    ),
    "indented array": Case(
        records=SCORED, name="a.json", write=lambda r, path: path.write_text(json.dumps(r, indent=2)), policy=ALONE
    ),
    "indented objects": Case(
        records=SCORED,
        name="a.json",
        write=lambda r, path: path.write_text("\n".join(json.dumps(record, indent=1) for record in r)),
        policy=ALONE,
    ),
    "byte order mark": Case(
        records=SCORED,
        write=lambda r, path: path.write_text("\ufeff" + "\n".join(map(json.dumps, r))),
        policy=ALONE,
    ),
    "arrow stream": Case(records=SCORED, name="data-00000-of-00001.arrow", write=arrow_stream, policy=ALONE),
    "arrow file": Case(records=SCORED, name="a.arrow", write=arrow_file, policy=ALONE),
    "csv": Case(records=SCORED, name="a.csv", write=csv_table, policy=ALONE, reward=SCORES),
    "columns in one object": Case(
        records=[{"prompt": list(PROMPTS), "response": ALONE, "reward": [0.5, 0.25, 1.0]}], policy=ALONE,
        reward=[0.5, 0.25, 1.0],
    ),
    # Names.
    "a generation beside the true answer": Case(
        records=scored(question=prompt, answer=lambda *_: "q , q", generation=text, score=score), policy=ALONE
    ),
    "an output beside the true answer": Case(
        records=scored(prompt=prompt, answer=lambda *_: "q , q", output=text, score=score), policy=ALONE
    ),
    "an answer alone": Case(records=scored(question=prompt, answer=text, score=score), policy=ALONE),
    "a response of a longer name": Case(
        records=scored(problem=prompt, llm_response=text, gold_standard_solution=prompt, score=score), policy=ALONE
    ),
    "two texts and no name": Case(
        records=scored(problem=prompt, answer=text, notes=lambda i, q, a: f"{a} , {i}", score=score),
        refusal="`answer` and `notes` could be what the policy wrote.*--column response=notes",
    ),
    "answer and solution": Case(
        records=scored(problem=prompt, answer=text, solution=lambda i, q, a: f"{a} , {i}", score=score),
        refusal="`answer` and `solution` could be what the policy wrote",
    ),
    "two responses": Case(
        records=scored(prompt=prompt, response=text, completion=lambda i, q, a: OTHERS[i], score=score),
        refusal="`response` and `completion` could each be the response.*--column response=response",
    ),
    "two responses, and which is said": Case(
        records=scored(prompt=prompt, response=lambda i, q, a: OTHERS[i], completion=text, score=score),
        flags={"column": ["response=completion"]}, policy=ALONE,
    ),
    "a prompt that holds the question": Case(
        records=scored(prompt=lambda i, q, a: f"user : {q}", question=prompt, response=text, score=score), policy=ALONE
    ),
    "a prompt and a context": Case(
        records=scored(question=prompt, context=lambda *_: "times times", response=text, score=score),
        refusal="`question` and `context` could each be the prompt",
    ),
    "instruction and input": Case(
        records=scored(instruction=lambda *_: "times", input=prompt, output=text, reward=score), policy=ALONE
    ),
    "thinking in a field of its own": Case(
        records=scored(prompt=prompt, reasoning=lambda *_: "times , times", response=text, score=score),
        refusal="`reasoning` holds text that `response` lacks",
    ),
    "a system text beside a raw prompt": Case(
        records=scored(system=lambda *_: "times times", prompt=prompt, response=text, score=score),
        refusal="`system` beside a prompt that lacks it, expected --apply-chat-template",
    ),
    "no reward": Case(
        records=scored(prompt=prompt, response=text, helpfulness=lambda *_: 3),
        refusal="no field is a reward.*helpfulness",
    ),
    # Rewards.
    "a reward in a text": Case(
        records=scored(prompt=prompt, response=text, score=lambda i, *_: str(i / 2)), policy=ALONE, reward=SCORES
    ),
    "a truth value": Case(
        records=scored(prompt=prompt, response=text, is_correct=lambda i, *_: i == 1), policy=ALONE, reward=[0, 1, 0]
    ),
    "a reward of two parts": Case(
        records=scored(prompt=prompt, response=text, reward=lambda *_: {"acc": 1.0, "format": 0.5}),
        refusal="`reward.acc` and `reward.format` could each be the reward.*--column reward=reward.acc",
    ),
    "the sum of two parts": Case(
        records=scored(prompt=prompt, response=text, reward=lambda *_: {"acc": 1.0, "format": 0.5}),
        flags={"column": ["reward=reward.acc+reward.format"]}, policy=ALONE, reward=[1.5] * 3,
    ),
    "a nested reward": Case(
        records=scored(prompt=prompt, response=text, reward_model=lambda i, *_: {"style": "rule", "score": i / 2}),
        policy=ALONE, reward=SCORES,
    ),
    "two rewards": Case(
        records=scored(prompt=prompt, response=text, math_score=score, style_score=lambda *_: 1.0),
        refusal="`math_score` and `style_score` could each be the reward",
    ),
    "reward before score": Case(
        records=scored(prompt=prompt, response=text, score=lambda *_: 1.0, reward=score), policy=ALONE, reward=SCORES
    ),
    "verl's score before a reward": Case(
        records=scored(input=prompt, output=text, score=score, reward=lambda *_: -1.0, step=lambda *_: 3),
        policy=ALONE, reward=SCORES,
    ),
    # Several samples a record.
    "completions and rewards": Case(
        records=rows(lambda i, q, a: {"prompt": q, "completions": [a, OTHERS[i]], "rewards": [1.0, 0.0]}),
        policy=BOTH, reward=[1, 0] * 3,
    ),
    "generations and their correctness": Case(
        records=rows(lambda i, q, a: {
            "problem": q, "answer": "p", "generations": [a, OTHERS[i]], "correctness_math_verify": [True, False],
            "correctness_count": 1, "messages": chat(q, a),
        }),
        name="a.parquet", write=parquet, policy=BOTH, reward=[1, 0] * 3,
    ),
    "completions as objects": Case(
        records=rows(lambda i, q, a: {
            "instruction": q,
            "completions": [{"model": "m", "response": t, "overall_score": s} for t, s in ((a, 8.5), (OTHERS[i], 4.0))],
        }),
        policy=BOTH, reward=[8.5, 4] * 3,
    ),
    "chosen and rejected": Case(
        records=rows(lambda i, q, a: {
            "prompt": q, "chosen": chat(q, a), "rejected": chat(q, OTHERS[i]), "messages": chat(q, a),
            "score_chosen": 8.5, "score_rejected": 4.0,
        }),
        policy=[f"{answer} </s>" for answer in BOTH], reward=[8.5, 4] * 3,
    ),
    "choices": Case(
        records=rows(lambda i, q, a: {
            "messages": [{"role": "user", "content": q}],
            "choices": [{"message": {"role": "assistant", "content": t}} for t in (a, OTHERS[i])],
            "rewards": [1.0, 0.0],
        }),
        policy=[f"{answer} </s>" for answer in BOTH], reward=[1, 0] * 3,
    ),
    "one reward for two samples": Case(
        records=rows(lambda i, q, a: {"prompt": q, "completions": [a, OTHERS[i]], "reward": 1.0}),
        refusal="`reward` has one number for all 2 samples in `completions`",
    ),
    "groups of token ids": Case(
        records=rows(lambda i, q, a: {
            "tokens": [whole(i, q, a), whole(i, q, OTHERS[i])], "masks": [labels(i, q, a), labels(i, q, OTHERS[i])],
            "scores": [1.0, -1.0],
        }),
        policy=[f"{answer} </s>" for answer in BOTH], reward=[1, -1] * 3,
    ),
    "an engine's outputs": Case(
        records=rows(lambda i, q, a: {
            "prompt": q, "prompt_token_ids": ids(q), "reward": 1.0,
            "outputs": [{"token_ids": [*ids(a), END], "text": a}],
        }),
        policy=ENDED,
    ),
    "steps in trajectories": Case(
        records=rows(lambda i, q, a: {
            "task": {"question": q}, "is_correct": True,
            "trajectories": [{"reward": 1.0, "steps": [{"prompt_ids": ids(q), "response_ids": [*ids(a), END]}]}],
        }),
        policy=ENDED,
    ),
    # Conversations.
    "messages": Case(records=scored(messages=lambda i, q, a: chat(q, a), reward=score), policy=ENDED),
    "messages in a text": Case(
        records=scored(messages=lambda i, q, a: json.dumps(chat(q, a)), reward=score), policy=ENDED
    ),
    "parts of content": Case(
        records=scored(
            messages=lambda i, q, a: [
                {"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in chat(q, a)
            ],
            reward=score,
        ),
        policy=ENDED,
    ),
    "an image among parts": Case(
        records=scored(
            messages=lambda i, q, a: [
                {"role": "user", "content": [{"type": "image_url"}, {"type": "text", "text": q}]},
                {"role": "assistant", "content": a},
            ],
            reward=score,
        ),
        refusal="parts that are no text",
    ),
    "messages of the prompt alone": Case(
        records=scored(messages=lambda i, q, a: chat(q, a)[:1], response=text, reward=score), policy=ENDED
    ),
    "an earlier turn in the prompt": Case(
        records=scored(prompt=lambda i, q, a: [*chat("say p", "p"), *chat(q, a)[:1]], response=text, reward=score),
        policy=ENDED,
    ),
    "messages and another response": Case(
        records=scored(messages=lambda i, q, a: chat(q, "times"), prompt=prompt, response=text, reward=score),
        refusal="`messages` ends with another text than `response`.*--column response=response",
    ),
    "thinking that the template leaves out": Case(
        records=scored(messages=lambda i, q, a: chat(q, a, reasoning_content="times , times"), reward=score),
        refusal="leaves out what the assistant said",
    ),
    "a tool call that the template leaves out": Case(
        records=scored(
            messages=lambda i, q, a: chat(q, a, tool_calls=[{"function": {"name": "times", "arguments": "{}"}}]),
            reward=score,
        ),
        refusal="leaves out what the assistant said",
    ),
    "prompts through the template": Case(
        records=SCORED, flags={"apply_chat_template": True}, policy=ENDED, reward=SCORES
    ),
    "a system text in later records alone": Case(
        records=[{**record, **({"system": "times"} if i else {})} for i, record in enumerate(SCORED)],
        refusal="`system` beside a prompt that lacks it",
    ),
    "an earlier conversation in a field of its own": Case(
        records=scored(
            instruction=prompt, input=lambda *_: "", output=text, history=lambda *_: [["p", "q"]], reward=score
        ),
        refusal="a `history`, which is not read",
    ),
    "a mask of what tools wrote": Case(
        records=turns(lambda p, r, n: {
            "input_ids": p + r, "response_mask": [0] * len(p) + [1] * len(r),
            "tool_mask": [0] * len(p) + [1 - one for one in own(n)], "reward": 1.0,
        }),
        refusal="`tool_mask` marks tokens that count as the policy's",
    ),
    "a preference without scores": Case(
        records=scored(chosen=lambda i, q, a: chat(q, a), rejected=lambda i, q, a: chat(q, OTHERS[i])),
        refusal="are a preference",
    ),
    # Token ids and masks.
    "input and output tokens": Case(
        records=rows(lambda i, q, a: {"input_tokens": ids(q), "output_tokens": [*ids(a), END], "rewards": 1.0}),
        name="a.parquet", write=parquet, policy=ENDED,
    ),
    "labels": Case(records=scored(input_ids=whole, labels=labels, reward=score), policy=ENDED),
    "labels that are shifted": Case(
        records=scored(input_ids=whole, labels=lambda *row: [*labels(*row)[1:], -100], reward=score), policy=ENDED
    ),
    "the length of the response": Case(
        records=scored(tokens=whole, response_length=lambda i, q, a: len(ids(a)) + 1, reward=score), policy=ENDED
    ),
    "a mask over the tokens that predict": Case(
        records=rows(lambda i, q, a: {
            "input_ids": [4, *ids(a), END], "loss_mask": [*[1] * (len(ids(a)) + 1), 0], "reward": 1.0,
        } | {"input_ids": [5, 4, *ids(a), END], "loss_mask": [0, *[1] * (len(ids(a)) + 1), 0]}),
        refusal="`loss_mask` may be shifted by one.*--column response_mask=loss_mask",
    ),
    "two masks": Case(
        records=turns(lambda p, r, n: {
            "input_ids": p + r, "response_mask": [0] * len(p) + [1] * len(r), "loss_mask": [0] * len(p) + own(n),
            "reward": 1.0,
        }),
        policy=TWICE,
    ),
    "a mask with ones on the prompt": Case(
        records=turns(lambda p, r, n: {
            "prompts": p, "responses": r, "info_mask": [1] * len(p) + own(n), "reward": 1.0,
        }),
        name="a.parquet", write=parquet, policy=TWICE,
    ),
    "masks of different tokens": Case(
        records=turns(lambda p, r, n: {
            "input_ids": p + r, "response_mask": [0] * (len(p) + 1) + [1] * (len(r) - 1),
            "loss_mask": [0] * len(p) + [1] * (len(r) - 1) + [0], "reward": 1.0,
        }),
        refusal="`response_mask` and `loss_mask` mark different tokens.*--column response_mask=response_mask",
    ),
    "a reward a turn": Case(
        records=turns(lambda p, r, n: {
            "prompt_ids": p, "response_ids": r, "response_mask": own(n), "rewards": [0.25, 1],
        }),
        policy=TWICE,
    ),
    "padding without an attention mask": Case(
        records=rows(lambda i, q, a: {
            "prompts": [0] * (12 - len(ids(q))) + ids(q), "responses": [*ids(a), END] + [0] * (11 - len(ids(a))),
            "reward": 1.0,
        }),
        refusal="times token 0 at the start, as in most rows, expected an attention_mask",
    ),
    "padding behind a mask": Case(
        records=rows(lambda i, q, a: {
            "input_ids": whole(i, q, a) + [0] * (20 - len(whole(i, q, a))),
            "response_mask": mask(i, q, a) + [0] * (20 - len(whole(i, q, a))), "reward": 1.0,
        }),
        policy=ENDED,
    ),
    "targets that are token ids": Case(
        records=scored(tokens=whole, targets=lambda *row: [*whole(*row)[1:], END], mask=mask, reward=score),
        policy=ENDED,
    ),
}  # fmt: skip
