"""Runs and judgements on data of which a part cannot be used: refused, or gone on with and recorded."""

import json
from pathlib import Path

import pytest
from support import readable_rollouts, small_config, write_shard

from critic_train.errors import DataError
from critic_train.evaluation.evaluate import evaluate
from critic_train.events import Event, Notice, RunEnded
from critic_train.model.critic import Critic
from critic_train.settings import EvalSettings, FitSettings
from critic_train.stopping import StopRequest
from critic_train.training.fit import fit
from critic_train.weights.loading import build_critic
from critic_train.weights.saving import save_critic


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sound shard, one cut in half, one of another schema."""
    folder = tmp_path / "data"
    whole = write_shard(folder / "good.parquet", readable_rollouts(8, seed=3)).read_bytes()
    (folder / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    write_shard(folder / "lacking.parquet", readable_rollouts(2, seed=4), without=["returns"])
    return folder


def settings_for(folder: Path, out: Path, **changes: object) -> FitSettings:
    defaults = {"preset": "tiny", "batch_size": 16, "max_steps": 2, "device": "cpu", "eval_every": 2, "no_report": True}
    return FitSettings(data=[str(folder)], out=str(out), **(defaults | changes))  # type: ignore[arg-type]


def run(settings: FitSettings) -> list[Event]:
    return list(fit(settings, StopRequest()))


def test_bad_files_stop_a_run_with_all_their_names(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="2 files cannot be used") as caught:
        run(settings_for(folder, tmp_path / "out"))
    assert "cut.parquet" in caught.value.message
    assert "lacking.parquet" in caught.value.message


def test_a_run_without_its_bad_files_says_and_records_them(folder: Path, tmp_path: Path) -> None:
    settings = settings_for(folder, tmp_path / "out", on_bad_file="skip")
    events = run(settings)
    said = [event.message for event in events if isinstance(event, Notice) and event.level == "warning"]
    assert any(message.startswith("2 files are left out") for message in said)
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    left_out = result["files_left_out"]["train"]
    assert (left_out["count"], left_out["rows"]) == (2, 8)
    assert [Path(file["file"]).name for file in left_out["files"]] == ["cut.parquet", "lacking.parquet"]
    assert json.loads((tmp_path / "out" / "run.json").read_text())["resolved"]["files_left_out"] == 2


def test_a_resumed_run_still_knows_what_was_left_out(folder: Path, tmp_path: Path) -> None:
    settings = settings_for(folder, tmp_path / "out", on_bad_file="skip", checkpoint_every=1)
    for event in (going := fit(settings, StopRequest())):
        if type(event).__name__ == "CheckpointSaved":
            break
    going.close()  # type: ignore[attr-defined]
    ended = run(settings)[-1]
    assert isinstance(ended, RunEnded)
    assert ended.result["files_left_out"]["train"]["count"] == 2


def test_a_judgement_without_its_bad_files_says_and_records_them(folder: Path) -> None:
    with pytest.raises(DataError, match="2 files cannot be used"):
        list(evaluate(EvalSettings(data=[str(folder)]), StopRequest()))
    *events, ended = evaluate(EvalSettings(data=[str(folder)], on_bad_file="skip"), StopRequest())
    assert isinstance(ended, RunEnded)
    assert ended.result["rollouts"] == 32
    assert ended.result["files_left_out"]["count"] == 2
    assert any(isinstance(event, Notice) and "2 files are left out" in event.message for event in events)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        ({"input_ids": 128}, "found token id 128, expected ids from 0 to 127 (the model's vocabulary)"),
        ({"input_ids": -1}, "found token id -1, expected ids from 0 to 127 (the model's vocabulary)"),
        ({"returns": float("nan")}, "found nan on a response token"),
        ({"values": float("inf")}, "found inf on a response token"),
    ],
)
def test_no_model_runs_on_a_bad_row(
    harm: dict[str, float], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rollouts = readable_rollouts(6, seed=3)
    for name, number in harm.items():
        getattr(rollouts, name)[rollouts.offsets[9] - 1] = number
    folder = tmp_path / "data"
    write_shard(folder / "a.parquet", rollouts)
    model = tmp_path / "model"
    model.mkdir()
    save_critic(build_critic(small_config("Llama"), seed=0), model, None)

    def never(*_: object) -> None:
        raise AssertionError("the model ran")

    monkeypatch.setattr(Critic, "forward", never)
    for job in (
        fit(settings_for(folder, tmp_path / "out", model=str(model)), StopRequest()),
        evaluate(EvalSettings(data=[str(folder)], model=[str(model)]), StopRequest()),
    ):
        with pytest.raises(DataError) as caught:
            list(job)
        assert said in caught.value.message
        assert "row group 0, row 8" in caught.value.message


def test_a_run_from_scratch_has_limits_of_its_own(tmp_path: Path) -> None:
    rollouts = readable_rollouts(6, seed=3)
    rollouts.input_ids[3] = 2**31 - 1
    write_shard(tmp_path / "data" / "a.parquet", rollouts)
    with pytest.raises(DataError, match="expected ids from 0 to 1048575"):
        run(settings_for(tmp_path / "data", tmp_path / "out"))
    longest = int(rollouts.lengths.max())
    with pytest.raises(DataError, match="more tokens than --max-length"):
        run(settings_for(tmp_path / "data", tmp_path / "out", max_length=longest - 1))
