"""Columns are put under their tokens, and a row that cannot be used is told with its address."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from critic_train.data import decoding
from critic_train.data import row_checks as checking
from critic_train.data.reading import Needs, RowLimits
from critic_train.data.row_checks import FROM_SCRATCH
from critic_train.errors import DataError

NAN, INF = float("nan"), float("inf")


def one(shards: Any, **columns: Any) -> Any:
    """Read a single rollout; the columns given replace sound ones."""
    sound = {
        "input_ids": [5, 6, 7, 8, 9],
        "response_mask": [0, 0, 1, 0, 1],
        "returns": [0.0, 0.0, 1.0, 2.0, 3.0],
        "values": [0.0, 0.0, 4.0, 5.0, 6.0],
    }
    merged = {name: row for name, row in {**sound, **columns}.items() if row is not None}
    return shards.read({name: row if isinstance(row, pa.Array) else [row] for name, row in merged.items()})


@pytest.mark.parametrize("kind", ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"])
def test_integer_types(shards: Any, kind: str) -> None:
    kinds = pa.list_(getattr(pa, kind)())
    found = one(
        shards, input_ids=pa.array([[1, 2, 3, 4, 127]], kinds), response_mask=pa.array([[0, 1, 1, 0, 1]], kinds)
    )
    assert found.input_ids.tolist() == [1, 2, 3, 4, 127]
    assert found.response_mask.tolist() == [False, True, True, False, True]


@pytest.mark.parametrize("kind", ["float16", "float32", "float64", "int8", "int64", "uint64", "bool"])
def test_number_types(shards: Any, kind: str) -> None:
    numbers = np.array([0, 0, 1, 1, 0], dtype=kind)
    column = pa.array([numbers], pa.list_(pa.from_numpy_dtype(numbers.dtype)))
    found = one(shards, values=column, returns=column, response_mask=column)
    assert found.response_mask.tolist() == [False, False, True, True, False]
    assert found.values.tolist() == found.returns.tolist() == [0.0, 0.0, 1.0, 1.0, 0.0]


FULL = {"response_mask": [0, 0, 1, 0, 1], "returns": [7.0, 7.0, 1.0, 2.0, 3.0], "values": [8.0, 8.0, 4.0, 5.0, 6.0]}


@pytest.mark.parametrize(
    "aligned",
    [{n for i, n in enumerate(FULL) if k >> i & 1} for k in range(8)],
    ids=lambda aligned: "+".join(sorted(aligned)) or "none",
)
def test_response_aligned_in_every_combination(shards: Any, aligned: set[str]) -> None:
    columns = {name: row[2:] if name in aligned else row for name, row in FULL.items()}
    shards.write({"input_ids": [[5, 6, 7, 8, 9]], **{name: [row] for name, row in columns.items()}})
    reader = shards.reader()
    (found,) = reader
    assert found.response_mask.tolist() == [False, False, True, False, True]
    assert found.returns.tolist() == [0.0, 0.0, 1.0, 0.0, 3.0]
    assert found.values.tolist() == [0.0, 0.0, 4.0, 0.0, 6.0]
    said = [f"`{name}` is as long as the response: it is aligned to it" for name in sorted(aligned)]
    assert reader.notices == said


def test_a_response_mask_may_begin_with_a_zero(shards: Any) -> None:
    found = one(shards, response_mask=[0, 1, 0], returns=[1.0, 2.0, 3.0], values=[4.0, 5.0, 6.0])
    assert found.response_mask.tolist() == [False, False, False, True, False]
    assert found.returns.tolist() == [0.0, 0.0, 0.0, 2.0, 0.0]


def padded(**changes: Any) -> dict[str, Any]:
    """Two rollouts as verl keeps them: prompts padded on the left, responses on the right."""
    columns = {
        "prompts": [[0, 0, 5, 6], [0, 7, 8, 9]],
        "responses": [[11, 12, 13, 0, 0], [14, 15, 0, 0, 0]],
        "attention_mask": [[0, 0, 1, 1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1, 0, 0, 0]],
        "returns": [[1.0, 2.0, 3.0, NAN, NAN], [4.0, 5.0, NAN, NAN, NAN]],
        "values": [[1.5, 2.5, 3.5, 9.0, 9.0], [4.5, 5.5, 9.0, 9.0, 9.0]],
    }
    return {name: rows for name, rows in {**columns, **changes}.items() if rows is not None}


SHORT_MASK = [[1, 0, 1, 0, 0], [1, 1, 0, 0, 0]]
LONG_MASK = [[0] * 4 + row for row in SHORT_MASK]
EVERYWHERE = [[0] * 4 + [1] * 5] * 2


@pytest.mark.parametrize(
    ("mask", "gap"), [(None, False), (SHORT_MASK, True), (LONG_MASK, True), (EVERYWHERE, False)], ids=str
)
@pytest.mark.parametrize("full_returns", [False, True])
def test_prompts_and_padded_responses(shards: Any, mask: Any, gap: bool, full_returns: bool) -> None:
    columns = padded(response_mask=mask)
    if full_returns:
        columns["returns"] = [[NAN] * 4 + row for row in columns["returns"]]
    found = shards.read(columns)
    assert found.lengths.tolist() == [5, 5]
    assert found.input_ids.tolist() == [5, 6, 11, 12, 13, 7, 8, 9, 14, 15]
    kept = not gap
    assert found.response_mask.tolist() == [False, False, True, kept, True, False, False, False, True, True]
    assert found.returns.tolist() == [0, 0, 1, 2 * kept, 3, 0, 0, 0, 4, 5]
    assert found.values.tolist() == [0, 0, 1.5, 2.5 * kept, 3.5, 0, 0, 0, 4.5, 5.5]


def test_prompts_and_ragged_responses_without_masks(shards: Any) -> None:
    columns = {
        "prompts": [[5], [6, 7]],
        "responses": pa.array([[8, 9], [10]], pa.large_list(pa.uint16())),
        "returns": [[1.0, 2.0], [3.0]],
    }
    shards.write(columns)
    reader = shards.reader(needs=Needs(values=False))
    (found,) = reader
    assert found.input_ids.tolist() == [5, 8, 9, 6, 7, 10]
    assert found.response_mask.tolist() == [False, True, True, False, False, True]
    assert found.returns.tolist() == [0.0, 1.0, 2.0, 0.0, 0.0, 3.0]
    assert "there is no response_mask: all of `responses` counts as response" in reader.notices


def test_input_ids_with_an_attention_mask(shards: Any) -> None:
    found = one(shards, attention_mask=[1, 1, 1, 1, 0], response_mask=[0, 0, 1, 0, 1])
    assert found.input_ids.tolist() == [5, 6, 7, 8]
    assert found.response_mask.tolist() == [False, False, True, False]


def test_what_pads_a_row_may_be_anything(shards: Any) -> None:
    ids = {"prompts": [[-1, 2**40, 5, 6]], "responses": [[11, 12, 13, -100, -100]]}
    found = shards.read({name: rows[:1] for name, rows in padded().items()} | ids)
    assert found.input_ids.tolist() == [5, 6, 11, 12, 13]


def test_nulls_off_the_mask_are_passed_over_as_nan_is(shards: Any) -> None:
    found = one(shards, returns=[None, None, 1.0, None, 2.0], values=[None, None, 3.0, None, 4.0])
    assert found.returns.tolist() == [0.0, 0.0, 1.0, 0.0, 2.0]
    assert found.values.tolist() == [0.0, 0.0, 3.0, 0.0, 4.0]
    found = one(shards, response_mask=[1, 0, 1], returns=[1.0, None, 2.0])
    assert found.returns.tolist() == [0.0, 0.0, 1.0, 0.0, 2.0]
    with pytest.raises(DataError, match="column returns: found null, expected a number for every token"):
        one(shards, response_mask=[1, 0, 1], returns=[1.0, 5.0, None])
    with pytest.raises(DataError, match="column response_mask: found null"):
        one(shards, response_mask=[None, 0, 1, 0, 1])


def test_the_largest_number_has_a_square(shards: Any) -> None:
    largest = checking.LARGEST
    assert np.isfinite(np.float32(largest) * np.float32(largest))
    assert one(shards, returns=[0.0, 0.0, -largest, 0.0, largest]).returns[-1] == np.float32(largest)


def test_a_limit_is_told_by_its_name(shards: Any) -> None:
    context = RowLimits(max_length=6)
    assert context.at_most(None) is context.at_most(6) is context.at_most(9) is context
    with pytest.raises(DataError, match=r"1 with more tokens than --max-length[^$]*at most 4 \(--max-length\)"):
        shards.read({name: [row] for name, row in SOUND.items()}, limits=context.at_most(4))
    with pytest.raises(DataError, match=r"at most 131072 \(a model from scratch\)"):
        shards.read(
            {"input_ids": [[1] * 131073], "response_mask": [[1]], "returns": [[0.5]], "values": [[0.5]]},
            limits=FROM_SCRATCH,
        )
    with pytest.raises(DataError, match=r"token id 1048576, expected ids from 0 to 1048575 \(a model from scratch\)"):
        shards.read(
            {**{name: [row] for name, row in SOUND.items()}, "input_ids": [[5, 6, 7, 8, 2**20]]}, limits=FROM_SCRATCH
        )


def test_placeholders_of_images_make_a_row_bad(shards: Any) -> None:
    """In prompt and response; not in padding."""
    limits = RowLimits(placeholder_ids=(6, 90))
    rows = {name: [row] for name, row in SOUND.items()}
    assert 6 in SOUND["input_ids"]
    with pytest.raises(DataError, match=r"1 with placeholders of images, videos or sounds[^$]*token id 6"):
        shards.read(rows, limits=limits)
    assert len(shards.read(rows, limits=RowLimits(placeholder_ids=(90,)))) == 1
    shards.write(padded(response_mask=SHORT_MASK))
    reader = shards.reader(on_bad_rows="skip", limits=RowLimits(placeholder_ids=(14,)))
    assert [batch.input_ids.tolist() for batch in reader] == [[5, 6, 11, 12, 13]]
    (bad,) = reader.bad_rows.first
    assert (bad.row, bad.column, bad.actual) == (1, "responses", "token id 14")


def test_exact_copies_are_counted_and_said_once(shards: Any) -> None:
    other = {"returns": [0.0, 0.0, 1.0, 2.0, 3.5]}
    for name in ("a", "b"):
        shards.write(table([{}, other, {}, {"values": [9.0] * 5}]), f"{name}.parquet")
    reader = shards.reader()
    for _ in range(2):
        assert sum(len(batch) for batch in reader) == 8
        (said,) = reader.notices
        assert said.startswith("6 rollouts are exact copies of others")


def test_what_stands_off_the_mask_may_be_anything(shards: Any) -> None:
    found = one(shards, returns=[NAN, INF, 1.0, 1e300, 2.0], values=[NAN, -INF, 1.0, NAN, 2.0])
    assert found.returns.tolist() == found.values.tolist() == [0.0, 0.0, 1.0, 0.0, 2.0]


LIMITS = RowLimits(vocab_size=100, max_length=6)
OUTSIDE = ("token ids outside the vocabulary", "ids from 0 to 99 (the model's vocabulary)")
FINITE = ("NaN or infinite numbers", "a finite number")
SMALLER = ("numbers too large", "at most 1.84e+19, of which float32 holds the square")
ONES = ("mask entries other than 0 and 1", "0 or 1")
NO_ID = ("nulls", "a token id for every token")
NO_NUMBER = ("nulls", "a number for every token")
NOTHING = ("nothing to train on", "a 1 on at least one token")
FIT = ("lengths that disagree", "as many as the rollout or its response has tokens")
BAD: dict[str, tuple[dict[str, Any], str, str, str, str]] = {
    # changes, column, found, reason, expected
    "null ids": ({"input_ids": None}, "input_ids", "null", *NO_ID),
    "null id": ({"input_ids": [5, None, 7, 8, 9]}, "input_ids", "null", *NO_ID),
    "null mask": ({"response_mask": None}, "response_mask", "null", *NO_NUMBER),
    "null in mask": ({"response_mask": [0, 0, 1, 0, None]}, "response_mask", "null", *NO_NUMBER),
    "null returns": ({"returns": None}, "returns", "null", *NO_NUMBER),
    "null return": ({"returns": [0, 0, None, 0, 0]}, "returns", "null", *NO_NUMBER),
    "null values": ({"values": None}, "values", "null", *NO_NUMBER),
    "empty": ({"input_ids": []}, "input_ids", "an empty list", "no tokens", "at least two token ids"),
    "long mask": ({"response_mask": [0] * 5 + [1]}, "response_mask", "6 elements beside 5 tokens", *FIT),
    "empty mask": ({"response_mask": []}, "response_mask", "0 elements beside 5 tokens", *FIT),
    "short returns": ({"returns": [1.0] * 4}, "returns", "4 elements beside 5 tokens", *FIT),
    "long returns": ({"returns": [1.0] * 9}, "returns", "9 elements beside 5 tokens", *FIT),
    "short values": ({"values": [1.0]}, "values", "1 elements beside 5 tokens", *FIT),
    "empty values": ({"values": []}, "values", "0 elements beside 5 tokens", *FIT),
    "NaN": ({"returns": [0, 0, 1.0, 0, NAN]}, "returns", "nan on a response token", *FINITE),
    "Inf": ({"values": [0, 0, -INF, 0, NAN]}, "values", "-inf on a response token", *FINITE),
    "huge": ({"returns": [0, 0, 1.0, 0, 1e39]}, "returns", "1e+39 on a response token", *SMALLER),
    "large": ({"values": [0, 0, 1.0, 0, -1.9e19]}, "values", "-1.900000073262039e+19 on a response token", *SMALLER),
    "negative id": ({"input_ids": [5, 6, -7, 8, -9]}, "input_ids", "token id -7", *OUTSIDE),
    "large id": ({"input_ids": [5, 6, 7, 100, 9]}, "input_ids", "token id 100", *OUTSIDE),
    "huge id": ({"input_ids": [5, 6, 7, 2**40, 9]}, "input_ids", "token id 1099511627776", *OUTSIDE),
    "two": ({"response_mask": [0, 0, 1, 0, 2]}, "response_mask", "2", *ONES),
    "label": ({"response_mask": [-100, -100, 1, 1, 1]}, "response_mask", "-100", *ONES),
    "nothing": ({"response_mask": [0] * 5}, "response_mask", "no response token", *NOTHING),
    "first": (
        {"response_mask": [1] * 5},
        "response_mask",
        "a response token in first place",
        "no prompt",
        "at least one token before the response: its state carries the first value",
    ),
    "long": (
        {"input_ids": [5] * 7, "response_mask": [0, *[1] * 6], "returns": [0.0] * 7, "values": [0.0] * 7},
        "input_ids",
        "7 tokens",
        "more tokens than the model's context",
        "at most 6 (the model's context)",
    ),
}
SOUND = {"input_ids": [5, 6, 7, 8, 9], "response_mask": [0, 0, 1, 0, 1], "returns": [0.0] * 5, "values": [0.0] * 5}
KINDS = {
    "input_ids": pa.list_(pa.int64()),
    "response_mask": pa.list_(pa.int32()),
    "returns": pa.list_(pa.float64()),
    "values": pa.list_(pa.float32()),
}


def table(rows: list[dict[str, Any]]) -> pa.Table:
    return pa.table({n: pa.array([{**SOUND, **row}[n] for row in rows], kind) for n, kind in KINDS.items()})


@pytest.mark.parametrize("kind", BAD)
def test_every_kind_of_bad_row(shards: Any, kind: str) -> None:
    changes, column, found, reason, expected = BAD[kind]
    good: dict[str, Any] = {}
    path = shards.write(table([good, good, good, changes, good]), row_group_size=2)
    reader = shards.reader(limits=LIMITS)
    with pytest.raises(DataError) as caught:
        list(reader)
    (bad,) = reader.bad_rows.first
    assert (bad.file, bad.row_group, bad.row) == (str(path), 1, 1)
    assert (bad.column, bad.actual, bad.expected) == (column, found, expected)
    assert reader.bad_rows.reasons == {reason: 1}
    assert str(bad) in caught.value.message
    assert str(bad) == f"{path}, row group 1, row 1, column {column}: found {found}, expected {expected}"
    kept = shards.read(limits=LIMITS, on_bad_rows="skip")
    assert kept.row.tolist() == [0, 1, 2, 4]


def test_a_float_mask_of_halves(shards: Any) -> None:
    with pytest.raises(DataError, match=r"column response_mask: found 0\.5, expected 0 or 1"):
        one(shards, response_mask=[0.0, 0.0, 0.5, 1.0, 1.0])
    with pytest.raises(DataError, match="column response_mask: found nan, expected 0 or 1"):
        one(shards, response_mask=[NAN, 0.0, 0.0, 1.0, 1.0])


def test_ids_beyond_int32_without_a_vocabulary(shards: Any) -> None:
    assert one(shards, input_ids=[5, 6, 7, 8, 2**31 - 1]).input_ids[-1] == 2**31 - 1
    with pytest.raises(DataError, match="found token id 2147483648, expected ids from 0 to 2147483647"):
        one(shards, input_ids=[5, 6, 7, 8, 2**31])
    with pytest.raises(DataError, match="found token id 18446744073709551615"):
        one(shards, input_ids=pa.array([[5, 6, 7, 8, 2**64 - 1]], pa.list_(pa.uint64())))


PAIRED: dict[str, tuple[dict[str, Any], str, str]] = {
    "null prompt": ({"prompts": [None, [1]]}, "prompts", "null"),
    "null response": ({"responses": [None, [1]]}, "responses", "null"),
    "negative in prompt": ({"prompts": [[0, 0, -5, 6], [1]]}, "prompts", "token id -5"),
    "negative in response": ({"responses": [[11, 12, -13, 0, 0], [1]]}, "responses", "token id -13"),
    "no response": ({"responses": [[], [1]]}, "responses", "an empty list"),
    "prompt of padding": ({"attention_mask": [[0] * 4 + [1] * 5, [1]]}, "prompts", "a response token in first place"),
    "padding only": ({"attention_mask": [[0] * 9, [1]]}, "attention_mask", "padding only"),
    "short attention mask": ({"attention_mask": [[1] * 5, [1]]}, "attention_mask", "5 elements beside 9 tokens"),
    "long attention mask": ({"attention_mask": [[1] * 10, [1]]}, "attention_mask", "10 elements beside 9 tokens"),
    "null attention mask": ({"attention_mask": [None, [1]]}, "attention_mask", "null"),
    "odd attention mask": ({"attention_mask": [[1] * 8 + [7], [1]]}, "attention_mask", "7"),
    "mask of neither length": ({"response_mask": [[1] * 4, [1]]}, "response_mask", "4 elements beside 9 tokens"),
    "NaN on the response": ({"returns": [[1.0, NAN, NAN, NAN, NAN], [1.0]]}, "returns", "nan on a response token"),
}


@pytest.mark.parametrize("kind", PAIRED)
def test_bad_rows_of_prompts_and_responses(shards: Any, kind: str) -> None:
    changes, column, found = PAIRED[kind]
    sound = padded(response_mask=SHORT_MASK)
    shards.write({name: [changes.get(name, rows)[0], rows[1]] for name, rows in sound.items()})
    reader = shards.reader(on_bad_rows="skip")
    (kept,) = reader
    assert kept.input_ids.tolist() == [7, 8, 9, 14, 15]
    (bad,) = reader.bad_rows.first
    assert (bad.row, bad.column, bad.actual) == (0, column, found)


def test_a_row_with_everything_wrong_counts_once(shards: Any) -> None:
    wrecks = [
        {"input_ids": [-1, None, 10**9], "response_mask": [2, None], "returns": [NAN] * 7, "values": None},
        {"input_ids": [], "response_mask": [1] * 9, "returns": None, "values": [INF]},
        {"input_ids": None, "response_mask": None, "returns": None, "values": None},
        {"input_ids": [1], "response_mask": [1], "returns": [NAN], "values": [NAN]},
        {"input_ids": [-1] * 9, "response_mask": [5] * 3, "returns": [NAN] * 3, "values": [INF] * 9},
    ]
    shards.write(table([{}, *wrecks, {}]))
    reader = shards.reader(limits=LIMITS, on_bad_rows="skip")
    (kept,) = reader
    assert kept.row.tolist() == [0, 6]
    assert reader.bad_rows.count == sum(reader.bad_rows.reasons.values()) == 5
    assert [bad.row for bad in reader.bad_rows.first] == [1, 2, 3, 4, 5]


def test_all_bad_rows_are_counted_and_ten_shown(shards: Any) -> None:
    kinds = list(BAD)
    rows = [BAD[kinds[i % len(kinds)]][0] if i % 3 else {} for i in range(60)]
    for name in ("a", "b"):
        shards.write(table(rows), f"{name}.parquet", row_group_size=7)
    reader = shards.reader(limits=LIMITS)
    with pytest.raises(DataError) as caught:
        list(reader)
    assert reader.bad_rows.count == 80
    assert sum(reader.bad_rows.reasons.values()) == 80
    bad = [i for i in range(60) if i % 3][:10]
    assert [(b.row_group * 7 + b.row) for b in reader.bad_rows.first] == bad
    assert caught.value.message.startswith("80 rows cannot be used (")
    assert caught.value.message.endswith("... and 70 more")
    assert caught.value.hint == "--on-bad-rows skip leaves them out and counts them"
    summary = reader.bad_rows.summary()
    assert (summary["count"], len(summary["first"])) == (80, 10)
    kept = shards.read(limits=LIMITS, on_bad_rows="skip")
    assert kept.row.tolist() == [i for i in range(120) if i % 60 % 3 == 0]


@pytest.mark.parametrize("how", ["fail", "skip"])
def test_nothing_but_bad_rows_is_an_error(shards: Any, how: str) -> None:
    shards.write(table([{"values": None}] * 3))
    with pytest.raises(DataError, match=r"3 rows cannot be used .* and there are no others") as caught:
        list(shards.reader(on_bad_rows=how))
    assert "--column" in caught.value.hint


def test_rows_are_counted_within_the_row_group_over_batches(shards: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "FIRST_ROWS", 2)
    monkeypatch.setattr(decoding, "MOST_ROWS", 4)
    shards.write(table([{"values": None} if i in (5, 13, 19) else {} for i in range(20)]), row_group_size=10)
    reader = shards.reader(on_bad_rows="skip")
    assert [len(batch) for batch in reader] == [4, 3, 2, 3, 4, 1]
    assert [(bad.row_group, bad.row) for bad in reader.bad_rows.first] == [(0, 5), (1, 3), (1, 9)]
