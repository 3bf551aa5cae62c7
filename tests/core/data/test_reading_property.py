"""Random ragged rollouts of every alignment, through Parquet, equal what plain Python makes of each row."""

import math
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from critic_train.data.reading import RolloutReader, RowLimits
from critic_train.data.shards import find_shards
from critic_train.errors import DataError

VOCABULARY, CONTEXT = 50, 12
LISTS = [pa.list_, pa.large_list]
IDS = st.integers(0, VOCABULARY - 1) | st.integers(0, VOCABULARY - 1) | st.sampled_from([-1, VOCABULARY, 2**31, 2**40])
GOOD_IDS = st.integers(0, VOCABULARY - 1)
NUMBERS = st.floats(-4, 4, width=16)
ODD = st.sampled_from([math.nan, math.inf, -math.inf, 1e39])


@st.composite
def rows(draw: Any, paired: bool) -> dict[str, Any]:
    """A raw row: mostly sound, sometimes broken anywhere."""
    ids = GOOD_IDS if draw(st.integers(0, 5)) else IDS
    prompt = draw(st.lists(ids, min_size=0 if draw(st.integers(0, 9)) == 0 else 1, max_size=5))
    response = draw(st.lists(ids, min_size=0 if draw(st.integers(0, 9)) == 0 else 1, max_size=8))
    mask = [draw(st.integers(0, 4)) > 0 for _ in response]
    if not paired and mask:
        mask[0] = True
    numbers = {name: [draw(NUMBERS) for _ in response] for name in ("returns", "values")}
    row: dict[str, Any] = {"prompts": prompt, "responses": response, "input_ids": prompt + response}
    row["response_mask"] = [int(m) for m in mask]
    row |= numbers
    for name in ("response_mask", "returns", "values"):
        if draw(st.booleans()):
            filling = 0 if name == "response_mask" else draw(ODD | NUMBERS)
            row[name] = [filling] * len(prompt) + row[name]
    if draw(st.integers(0, 3)) == 0:
        name = draw(st.sampled_from(["prompts", "responses", "input_ids", "response_mask", "returns", "values"]))
        harm = draw(st.sampled_from(["null", "element", "short", "long", "odd", "empty"]))
        if harm == "null":
            row[name] = None
        elif harm == "empty":
            row[name] = []
        elif harm == "short":
            row[name] = row[name][:-1]
        elif harm == "long":
            row[name] = [*row[name], 1]
        elif row[name]:
            at = draw(st.integers(0, len(row[name]) - 1))
            odd = draw(ODD) if name in ("returns", "values") else 7
            row[name] = [*row[name][:at], None if harm == "element" else odd, *row[name][at + 1 :]]
    return row


def reference(row: dict[str, Any], paired: bool, has_mask: bool) -> dict[str, Any] | None:
    """One row in plain Python; None where it is bad."""
    used = ["prompts", "responses"] if paired else ["input_ids"]
    used += ["response_mask"] * has_mask + ["returns", "values"]
    if any(row[name] is None for name in used):
        return None
    if any(None in row[name] for name in used if name not in ("returns", "values")):
        return None
    ids = row["prompts"] + row["responses"] if paired else row["input_ids"]
    n = len(ids)
    start = len(row["prompts"]) if paired else None
    mask = row["response_mask"] if has_mask else [0] * start + [1] * len(row["responses"])
    if any(m not in (0, 1) for m in mask):
        return None
    if len(mask) != n:
        if not mask or len(mask) > n or (paired and len(mask) != n - start):
            return None
        start = n - len(mask) if start is None else start
        mask = [0] * (n - len(mask)) + mask
    if 1 not in mask or mask[0] or n > CONTEXT or not all(0 <= i < VOCABULARY for i in ids):
        return None
    start = mask.index(1) if start is None else start
    result: dict[str, Any] = {"ids": ids, "mask": [bool(m) for m in mask]}
    for name in ("returns", "values"):
        column = row[name]
        if len(column) == n - start:
            column = [0.0] * start + column
        elif len(column) != n:
            return None
        kept = [x if m else 0.0 for x, m in zip(column, mask, strict=True)]
        if any(x is None or not abs(x) <= 1e19 for x in kept):
            return None
        result[name] = kept
    return result


@st.composite
def shards(draw: Any) -> tuple[list[dict[str, Any]], bool, bool, Any, int]:
    paired = draw(st.booleans())
    has_mask = not paired or draw(st.booleans())
    return (
        draw(st.lists(rows(paired), min_size=1, max_size=12)),
        paired,
        has_mask,
        draw(st.sampled_from(LISTS)),
        draw(st.integers(1, 6)),
    )


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(shards())
def test_reading_equals_a_reference_in_plain_python(case: Any) -> None:
    raw, paired, has_mask, kind, row_group_size = case
    columns = {"prompts": pa.int64(), "responses": pa.int32()} if paired else {"input_ids": pa.int64()}
    if paired:  # what int32 cannot hold goes into no int32 column
        for row in raw:
            row["responses"] = row["responses"] and [i if i is None else min(i, 2**31 - 1) for i in row["responses"]]
    columns |= {"response_mask": pa.int8()} if has_mask else {}
    columns |= {"returns": pa.float64(), "values": pa.float64()}
    table = pa.table({name: pa.array([row[name] for row in raw], kind(item)) for name, item in columns.items()})
    expected = [reference(row, paired, has_mask) for row in raw]
    good = [i for i, row in enumerate(expected) if row is not None]
    with tempfile.TemporaryDirectory() as folder:
        pq.write_table(table, Path(folder) / "a.parquet", row_group_size=row_group_size)
        reader = RolloutReader(
            find_shards([folder]), on_bad_rows="skip", limits=RowLimits(vocab_size=VOCABULARY, max_length=CONTEXT)
        )
        found: dict[int, dict[str, Any]] = {}
        try:
            for batch in reader:
                for k, (start, stop) in enumerate(zip(batch.offsets[:-1], batch.offsets[1:], strict=True)):
                    found[int(batch.row[k])] = {
                        "ids": batch.input_ids[start:stop].tolist(),
                        "mask": batch.response_mask[start:stop].tolist(),
                        "returns": batch.returns[start:stop].tolist(),
                        "values": batch.values[start:stop].tolist(),
                    }
        except DataError:
            assert not good
    assert list(found) == good
    assert [found[i] for i in good] == [expected[i] for i in good]
    assert reader.bad_rows.count == len(raw) - len(good)
    assert [b.row_group * row_group_size + b.row for b in reader.bad_rows.first] == [
        i for i, row in enumerate(expected) if row is None
    ][:10]
