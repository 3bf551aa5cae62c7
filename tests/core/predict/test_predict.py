"""`predict`: what it writes is what `eval` judges, everything else is as it was, and it goes on where it stopped."""

import itertools
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from support import StopAfter, branching_rollouts, small_config, write_shard

from critic_train.data import decoding
from critic_train.data import scanning as blocks
from critic_train.data.reading import Needs, RolloutReader
from critic_train.data.shards import find_shards
from critic_train.errors import ConfigError, DataError, MachineError
from critic_train.evaluation import evaluate as evaluation
from critic_train.evaluation import judged_critics
from critic_train.events import RunEnded
from critic_train.predict import predict as job
from critic_train.predict import predict as predicting
from critic_train.rollouts import Rollouts
from critic_train.settings import EvalSettings, PredictSettings
from critic_train.stopping import Stopped, StopRequest
from critic_train.weights.loading import build_critic
from critic_train.weights.saving import save_critic


@pytest.fixture(scope="module")
def critic(tmp_path_factory) -> Path:
    made = build_critic(small_config("Qwen2"), seed=0)
    with torch.no_grad():
        made.head.weight.normal_(generator=torch.Generator().manual_seed(1))
    path = tmp_path_factory.mktemp("critic")
    save_critic(made, path, None)
    return path


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks and several pieces a file."""
    monkeypatch.setattr(blocks.blocks, "__defaults__", (150,))
    monkeypatch.setattr(decoding, "FIRST_ROWS", 3)
    monkeypatch.setattr(decoding, "MOST_ROWS", 5)


def with_rewards(rollouts: Rollouts) -> Rollouts:
    rewards = np.random.default_rng(5).normal(size=len(rollouts.input_ids)).astype(np.float32)
    return replace(rollouts, rewards=np.where(rollouts.response_mask, rewards, np.float32(0)))


@pytest.fixture
def shards(tmp_path) -> Path:
    """Two files of several row groups in folders of their own, with columns of all kinds beside the canonical ones."""
    folder = tmp_path / "rollouts"
    for number, name in enumerate(("one/a", "two/b")):
        rollouts = with_rewards(branching_rollouts(number))
        path = write_shard(folder / f"{name}.parquet", rollouts)
        table = pq.read_table(path)
        n = len(rollouts)
        odd = np.arange(n) % 3 == 0
        more = {
            "rewards": rows(rollouts, rollouts.rewards),
            "truncated": pa.array(odd),
            "text": pa.array([f"täxt {i}" if i % 4 else None for i in range(n)]),
            "task": pa.array(["arith", "prose", "arith"] * (n // 3)).dictionary_encode(),
            "nested": pa.array([{"a": i, "b": [float(i)] * (i % 3)} for i in range(n)]),
            "when": pa.array(range(n), pa.timestamp("us", tz="UTC")),
        }
        for column, values in more.items():
            table = table.append_column(column, values if isinstance(values, pa.Array) else pa.array(values))
        pq.write_table(table, path, row_group_size=8)
    return folder


def rows(rollouts: Rollouts, column: np.ndarray) -> list[list[float]]:
    return [column[a:b].tolist() for a, b in itertools.pairwise(rollouts.offsets.tolist())]


def predict(shards: Path, critic: Path, to: Path, stop: StopRequest | None = None, **changes: object) -> RunEnded:
    defaults: dict[str, object] = {"data": [str(shards)], "model": str(critic), "to": str(to), "device": "cpu"}
    settings = PredictSettings(**(defaults | {"max_tokens": 64} | changes))  # type: ignore[arg-type]
    *_, last = predicting.predict(settings, stop or StopRequest())
    assert isinstance(last, RunEnded)
    return last


def read(path: Path) -> pa.Table:
    return pq.read_table(path)


FILES = ("one/a.parquet", "two/b.parquet")
GAE = {"returns": "gae", "lam": 0.9, "gamma": 0.95, "write": ["values", "returns", "advantages"]}


def test_everything_else_is_as_it_was(shards, critic, tmp_path):
    ended = predict(shards, critic, tmp_path / "to", **GAE)
    assert (ended.status, ended.result["files"], ended.result["rows"]) == ("finished", 2, 42)
    written = sorted(p.relative_to(tmp_path / "to").as_posix() for p in (tmp_path / "to").rglob("*") if p.is_file())
    assert written == sorted([*FILES, "_predict.json"])
    for name in FILES:
        before, after = read(shards / name), read(tmp_path / "to" / name)
        assert after.column_names == [*before.column_names, "advantages"]
        others = [column for column in before.column_names if column not in ("values", "returns")]
        assert after.select(others) == before.select(others)
        assert after.select(others).schema == before.select(others).schema
        groups = [pq.ParquetFile(folder / name).metadata for folder in (shards, tmp_path / "to")]
        sizes = [[meta.row_group(i).num_rows for i in range(meta.num_row_groups)] for meta in groups]
        assert sizes[0] == sizes[1] == [8, 8, 5]


@pytest.mark.parametrize("packing", ["forest", "rows"])
def test_the_values_are_those_that_eval_judges_to_the_bit(packing, shards, critic, tmp_path, monkeypatch):
    seen: list[tuple[Rollouts, np.ndarray]] = []
    real = judged_critics.predict_values

    def spying(critic, rollouts, *args, **more):
        values = real(critic, rollouts, *args, **more)
        seen.append((rollouts, values))
        return values

    monkeypatch.setattr(judged_critics, "predict_values", spying)
    settings = EvalSettings(data=[str(shards)], model=[str(critic)], device="cpu", max_tokens=64, packing=packing)
    *_, judged = evaluation.evaluate(settings, StopRequest())
    assert len(seen) > 4
    # Other columns are decoded beside, in other batches; the values must not notice.
    predict(shards, critic, tmp_path / "to", packing=packing, returns="mc")
    written = np.concatenate([np.concatenate(read(tmp_path / "to" / name)["values"].to_pylist()) for name in FILES])
    assert written.astype(np.float32).tobytes() == np.concatenate([values for _, values in seen]).tobytes()
    # And so they are judged alike when they are the stored ones.
    predict(shards, critic, tmp_path / "values", packing=packing)
    again = EvalSettings(data=[str(tmp_path / "values")], device="cpu")
    *_, stored = evaluation.evaluate(again, StopRequest())
    for figure in ("mse", "bias", "explained_variance", "pearson"):
        assert stored.result[figure] == judged.result[figure]


def test_returns_and_advantages_are_gaes_over_these_values(shards, critic, tmp_path):
    predict(shards, critic, tmp_path / "to", lam_policy="0.5", truncated="bootstrap", **GAE)
    for name in FILES:
        table = read(tmp_path / "to" / name).to_pydict()
        for i in range(len(table["values"])):
            mask = np.asarray(table["response_mask"][i])
            values, rewards = (np.asarray(table[column][i])[mask] for column in ("values", "rewards"))
            following = values[-1] if table["truncated"][i] else 0.0
            for lam, column, add in ((0.9, "returns", values), (0.5, "advantages", 0.0)):
                expected, advantage, next_value = [], 0.0, following
                for reward, value in zip(rewards[::-1], values[::-1], strict=True):
                    advantage = reward + 0.95 * next_value - value + 0.95 * lam * advantage
                    next_value = value
                    expected.insert(0, advantage)
                found = np.asarray(table[column][i])
                np.testing.assert_allclose(found[mask], np.asarray(expected) + add, atol=1e-5)
                assert not found[~mask].any()


def test_rows_that_cannot_be_used_have_nulls(shards, critic, tmp_path):
    path = shards / FILES[0]
    table = read(path)
    ids = table["input_ids"].to_pylist()
    ids[3][0], ids[9] = 10**6, None
    pq.write_table(table.set_column(1, "input_ids", pa.array(ids, pa.list_(pa.int32()))), path, row_group_size=8)
    with pytest.raises(DataError, match="2 rows cannot be used"):
        predict(shards, critic, tmp_path / "no")
    ended = predict(shards, critic, tmp_path / "to", on_bad_rows="skip", **GAE)
    assert ended.result["rows_left_out"]["count"] == 2
    after = read(tmp_path / "to" / FILES[0])
    for column in ("values", "returns", "advantages"):
        assert [i for i, entry in enumerate(after[column].to_pylist()) if entry is None] == [3, 9]
    assert after["text"] == table["text"]
    good = list(RolloutReader(find_shards([str(tmp_path / "to")]), on_bad_rows="skip"))
    assert sum(len(batch) for batch in good) == 40


def test_a_file_without_a_row_that_can_be_used(shards, critic, tmp_path):
    path = shards / FILES[0]
    table = read(path)
    nulls = pa.nulls(len(table), table.schema.field("input_ids").type)
    pq.write_table(table.set_column(1, "input_ids", nulls), path)
    predict(shards, critic, tmp_path / "to", on_bad_rows="skip")
    assert read(tmp_path / "to" / FILES[0])["values"].null_count == len(table)
    assert read(tmp_path / "to" / FILES[1])["values"].null_count == 0


def padded_pair(rollouts: Rollouts, path: Path, *, values: bool) -> None:
    """As verl keeps them: prompts padded on the left, responses on the right, values as long as the response."""
    first = [int(np.flatnonzero(rollouts.response_mask[a:b])[0]) for a, b in itertools.pairwise(rollouts.offsets)]
    prompt, response = max(first), int((rollouts.lengths - first).max())
    columns: dict[str, list] = {
        "prompts": [],
        "responses": [],
        "attention_mask": [],
        "response_mask": [],
        "returns": [],
    }
    columns |= {"values": []} if values else {}
    for (a, b), cut in zip(itertools.pairwise(rollouts.offsets.tolist()), first, strict=True):
        ids, own = rollouts.input_ids[a:b].tolist(), b - a - cut
        left, right = [0] * (prompt - cut), [0] * (response - own)
        columns["prompts"].append(left + ids[:cut])
        columns["responses"].append(ids[cut:] + right)
        columns["attention_mask"].append([0] * len(left) + [1] * (b - a) + [0] * len(right))
        columns["response_mask"].append(rollouts.response_mask[a + cut : b].astype(int).tolist() + right)
        columns["returns"].append(rollouts.returns[a + cut : b].tolist() + right)
        if values:
            columns["values"].append(rollouts.values[a + cut : b].tolist() + right)
    columns["uid"] = rollouts.group.tolist()
    path.parent.mkdir(parents=True)
    pq.write_table(pa.table(columns), path)


@pytest.mark.parametrize("values", [True, False])
def test_padded_pairs_get_values_as_long_as_their_response(values, critic, tmp_path):
    rollouts = branching_rollouts(4)
    plain = write_shard(tmp_path / "plain" / "a.parquet", rollouts)
    padded_pair(rollouts, tmp_path / "pair" / "a.parquet", values=values)
    predict(plain, critic, tmp_path / "one")
    predict(tmp_path / "pair", critic, tmp_path / "two")
    after = read(tmp_path / "two" / "a.parquet")
    assert {len(row) for row in after["values"].to_pylist()} == {len(after["responses"][0].as_py())}
    one, two = (
        np.concatenate([batch.values for batch in RolloutReader(find_shards([str(tmp_path / name)]))])
        for name in ("one", "two")
    )
    np.testing.assert_allclose(one, two, atol=1e-6)
    assert one.any()


@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("looks", [0, 18, 45, *(pytest.param(looks, marks=pytest.mark.slow) for looks in (7, 30, 52))])
def test_stopped_anywhere_it_goes_on_and_ends_alike(looks, whiten, shards, critic, tmp_path, monkeypatch):
    flags = GAE | {"whiten_advantages": whiten}
    predict(shards, critic, tmp_path / "whole", **flags)
    calls: list[int] = []
    real = job.predict_with_progress

    def counting(critic, rollouts, *args, **more):
        try:
            values = yield from real(critic, rollouts, *args, **more)
        except Stopped:
            calls.append(-1)
            raise
        calls.append(int(rollouts.row[0]))
        return values

    monkeypatch.setattr(job, "predict_with_progress", counting)
    first = predict(shards, critic, tmp_path / "to", StopAfter(looks=looks), **flags)
    assert (first.status, first.signal_number) == ("interrupted", 15)
    assert predict(shards, critic, tmp_path / "to", **flags).status == "finished"
    # Nothing is computed twice: block by block, each file's rows rise.
    done = [row for row in calls if row >= 0]
    assert len(done) == len(calls) - calls.count(-1) == len(blocks_of(shards))
    assert same_files(tmp_path / "whole", tmp_path / "to")
    assert predict(shards, critic, tmp_path / "to", **flags).status == "already finished"


def blocks_of(shards: Path) -> list[Rollouts]:
    return list(blocks.blocks(RolloutReader(find_shards([str(shards)]), needs=Needs(values=False))))


def same_files(one: Path, other: Path) -> bool:
    names = [p.relative_to(one) for p in sorted(one.rglob("*.parquet"))]
    assert names == [p.relative_to(other) for p in sorted(other.rglob("*.parquet"))]
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


def test_a_log_with_part_of_a_block_is_cut_back(shards, critic, tmp_path):
    predict(shards, critic, tmp_path / "whole")
    predict(shards, critic, tmp_path / "to", StopAfter(looks=45))
    (log,) = (tmp_path / "to" / ".predict").rglob("*.values")
    log.write_bytes(log.read_bytes() + b"\x00" * 10)
    predict(shards, critic, tmp_path / "to")
    assert same_files(tmp_path / "whole", tmp_path / "to")


def test_parts_write_what_one_process_does(shards, critic, tmp_path, monkeypatch):
    predict(shards, critic, tmp_path / "whole")
    assert predict(shards, critic, tmp_path / "to", part="2/2").result["files"] == 1
    assert (tmp_path / "to" / ".predict").is_dir()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert predict(shards, critic, tmp_path / "to").result["part"] == "1/2"
    assert same_files(tmp_path / "whole", tmp_path / "to")
    assert not (tmp_path / "to" / ".predict").exists()
    with pytest.raises(ConfigError, match="--whiten-advantages needs all files in one process"):
        predict(shards, critic, tmp_path / "no", **(GAE | {"whiten_advantages": True}))


def test_the_same_part_is_written_by_one_process(shards, critic, tmp_path):
    going = predicting.predict(
        PredictSettings(data=[str(shards)], model=str(critic), to=str(tmp_path / "to"), device="cpu"), StopRequest()
    )
    next(going)
    with pytest.raises(MachineError, match=f"is in use by process {os.getpid()}"):
        predict(shards, critic, tmp_path / "to", max_tokens=4096)
    going.close()


def test_whitened_advantages_have_mean_0_and_variance_1(shards, critic, tmp_path):
    predict(shards, critic, tmp_path / "plain", **GAE)
    predict(shards, critic, tmp_path / "white", whiten_advantages=True, **GAE)
    columns = {}
    for name in ("plain", "white"):
        tables = [read(tmp_path / name / file).to_pydict() for file in FILES]
        flat = [np.concatenate([np.concatenate(t[c]) for t in tables]) for c in ("advantages", "response_mask")]
        columns[name] = flat[0][flat[1].astype(bool)]
    assert columns["white"].mean() == pytest.approx(0.0, abs=1e-6)
    assert columns["white"].var(ddof=1) == pytest.approx(1.0, abs=1e-6)
    assert np.corrcoef(columns["plain"], columns["white"])[0, 1] == pytest.approx(1.0)


def test_cut_rollouts_that_are_dropped_keep_their_values(shards, critic, tmp_path):
    predict(shards, critic, tmp_path / "to", truncated="drop", **GAE)
    table = read(tmp_path / "to" / FILES[0])
    cut = np.flatnonzero(table["truncated"].to_numpy(zero_copy_only=False)).tolist()
    for column in ("returns", "advantages"):
        assert [i for i, entry in enumerate(table[column].to_pylist()) if entry is None] == cut
    assert table["values"].null_count == 0
    # The next iteration leaves them out the same way, and finds no bad row.
    reader = RolloutReader(find_shards([str(tmp_path / "to")]), needs=Needs(truncated=True), drop_truncated=True)
    assert sum(len(batch) for batch in reader) == 28


def test_a_column_read_under_another_name_is_the_one_replaced(shards, critic, tmp_path):
    path = shards / FILES[0]
    table = read(path)
    renamed = table.rename_columns(["vpreds" if name == "values" else name for name in table.column_names])
    pq.write_table(renamed, path)
    (shards / FILES[1]).unlink()
    predict(shards, critic, tmp_path / "alias")
    alias = read(tmp_path / "alias" / "a.parquet")
    assert alias.column_names == [*renamed.column_names, "values"]
    assert alias["vpreds"] == renamed["vpreds"]
    predict(shards, critic, tmp_path / "said", column=["values=vpreds"])
    said = read(tmp_path / "said" / "a.parquet")
    assert said.column_names == renamed.column_names
    assert said["vpreds"] == alias["values"]


def test_what_datasets_said_of_the_columns_is_not_kept(shards, critic, tmp_path):
    path = shards / FILES[0]
    metadata = {b"huggingface": b'{"info": {}}', b"made by": b"somebody"}
    pq.write_table(read(path).replace_schema_metadata(metadata), path)
    predict(path, critic, tmp_path / "to")
    assert read(tmp_path / "to" / "a.parquet").schema.metadata == {b"made by": b"somebody"}


def test_folders_that_would_be_mixed_up_are_refused(shards, critic, tmp_path):
    with pytest.raises(ConfigError, match="would then read its own output"):
        predict(shards, critic, shards / "next")
    with pytest.raises(ConfigError, match=r"a\.parquet would be overwritten"):
        predict(shards / "one" / "*.parquet", critic, shards / "one")
    (tmp_path / "to" / "one").mkdir(parents=True)
    (tmp_path / "to" / FILES[0]).write_text("mine")
    with pytest.raises(ConfigError, match="holds other data"):
        predict(shards, critic, tmp_path / "to")


def test_another_command_does_not_go_on_with_it(shards, critic, tmp_path):
    predict(shards, critic, tmp_path / "to", StopAfter(looks=40))
    with pytest.raises(ConfigError, match=r"--returns was column, is now mc"):
        predict(shards, critic, tmp_path / "to", returns="mc")


def test_the_folder_reads_as_one_table(shards, critic, tmp_path):
    """By whoever reads folders of Parquet files: what else stands there begins with an underscore."""
    predict(shards, critic, tmp_path / "to")
    assert pq.read_table(tmp_path / "to").num_rows == 42
