"""Going on with a run: longer, from damage, without room, without its directory."""

import json
import shutil
from pathlib import Path

import pytest
from support import readable_rollouts, small_config, write_shard

from critic_train.errors import ConfigError, MachineError, ModelError
from critic_train.events import Notice, StepEnded
from critic_train.run.checkpoint import checkpoints
from critic_train.run.run_directory import RunDirectory
from critic_train.settings import FitSettings
from critic_train.stopping import StopRequest
from critic_train.training.fit import fit
from critic_train.training.run_record import resumed_settings
from critic_train.weights.loading import build_critic
from critic_train.weights.saving import save_critic


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("resuming")
    write_shard(folder / "data" / "a.parquet", readable_rollouts(10, seed=1))
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = small_config("Llama", **shape, num_attention_heads=1, num_key_value_heads=1)
    (folder / "model").mkdir()
    save_critic(build_critic(config, seed=0), folder / "model", None)
    return folder


def settings_for(folder: Path, out: Path, **changes: object) -> FitSettings:
    chosen: dict[str, object] = {
        "data": [str(folder / "data")],
        "model": str(folder / "model"),
        "out": str(out),
        "batch_size": 8,
        "max_steps": 3,
        "checkpoint_every": 1,
        "eval_every": 1,
        "lr_schedule": "constant",
        "warmup_steps": 0,
        "val_fraction": 0.4,
        "device": "cpu",
        "no_report": True,
    }
    return FitSettings(**(chosen | changes))  # type: ignore[arg-type]


def run(settings: FitSettings) -> list:
    return list(fit(settings, StopRequest()))


def notices(events: list) -> list[str]:
    return [event.message for event in events if isinstance(event, Notice)]


def end_of(out: Path) -> dict[str, bytes]:
    last = checkpoints(out / "checkpoints")[-1]
    files = [last / "model.safetensors", last / "optimizer.safetensors", out / "metrics.jsonl"]
    return {path.name: path.read_bytes() for path in files} | {"step": last.name.encode()}


def test_a_finished_run_made_longer_ends_where_the_long_one_does(folder, tmp_path):
    run(settings_for(folder, tmp_path / "a"))
    events = run(settings_for(folder, tmp_path / "a", max_steps=5))
    assert any("--max-steps was 3, is now 5" in said for said in notices(events))
    assert events[-1].status == "finished"
    run(settings_for(folder, tmp_path / "b", max_steps=5))
    assert end_of(tmp_path / "a") == end_of(tmp_path / "b")
    assert json.loads((tmp_path / "a" / "run.json").read_text())["settings"]["max_steps"] == 5
    assert run(settings_for(folder, tmp_path / "a", max_steps=5))[-1].status == "already finished"


def unfinished(folder: Path, out: Path) -> FitSettings:
    """A run that was killed after its second step."""
    settings = settings_for(folder, out, keep=3)
    going = fit(settings, StopRequest())
    next(event for event in going if isinstance(event, StepEnded) and event.step == 3)
    going.close()
    return settings


def spoil(path: Path, how: str) -> None:
    if how == "incomplete":
        (path / "manifest.json").unlink()
        return
    weights = path / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(bytes(len(content)) if how == "zeroed" else content)


@pytest.mark.parametrize("how", ["flipped", "zeroed", "incomplete"])
def test_one_that_is_not_whole_is_told_and_the_one_before_taken(how, folder, tmp_path):
    """Scenarios 2, 3 and 4."""
    run(settings_for(folder, tmp_path / "undisturbed", keep=3))
    settings = unfinished(folder, tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / "step-00000002"
    spoil(newest, how)
    said = notices(run(settings))
    if how == "incomplete":
        assert "step-00000002 is incomplete (manifest.json is missing) and ignored" in said
    else:
        assert any(s.startswith("step-00000002 is damaged (the content of model.safetensors has changed") for s in said)
    assert "resuming from step-00000001" in said
    assert end_of(tmp_path / "run") == end_of(tmp_path / "undisturbed")
    assert (tmp_path / "run" / "checkpoints" / "damaged-step-00000002-0" / "model.safetensors").exists()


def test_where_none_is_whole_nothing_is_touched(folder, tmp_path):
    """Scenario 2: exit code 4. Starting anew by itself would bury what is left."""
    settings = unfinished(folder, tmp_path)
    for path in checkpoints(tmp_path / "checkpoints"):
        spoil(path, "flipped")
    before = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    with pytest.raises(ModelError) as told:
        run(settings)
    assert told.value.message.startswith(
        f"none of the checkpoints of {tmp_path} is complete\n  step-00000002: the content"
    )
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == before


@pytest.mark.parametrize(("free", "what"), [(0, "the cache of"), (60_000, "4 checkpoints of")])
def test_too_little_room_is_said_before_the_first_step(free, what, folder, tmp_path, monkeypatch):
    """Scenario 6."""
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": free})())
    going = fit(settings_for(folder, tmp_path), StopRequest())
    with pytest.raises(MachineError, match=f"not enough room at .* for {what}"):
        next(event for event in going if isinstance(event, StepEnded))


def test_a_directory_that_vanishes_ends_the_run_and_is_not_made_again(folder, tmp_path):
    """Scenario 7."""
    out = tmp_path / "run"
    going = fit(settings_for(folder, out, checkpoint_every=2, eval_every=9), StopRequest())
    next(event for event in going if isinstance(event, StepEnded))
    shutil.rmtree(out)
    with pytest.raises(MachineError, match=r"No such file or directory|vanished"):
        list(going)
    assert not (out / "checkpoints").exists()


def test_a_cache_that_cannot_be_cleared_away_is_a_warning(folder, tmp_path, monkeypatch):
    """Scenario 7."""
    settings = settings_for(folder, tmp_path)
    monkeypatch.setattr(
        "critic_train.run.run_directory.remove_tree", lambda path: PermissionError(13, "Permission denied")
    )
    events = run(settings)
    assert events[-1].status == "finished"
    assert f"{tmp_path / 'cache'} cannot be removed: Permission denied; it is no longer needed" in notices(events)


def test_a_log_torn_by_a_kill_is_mended(folder, tmp_path):
    settings = unfinished(folder, tmp_path)
    for name in ("metrics.jsonl", "timings.jsonl"):
        with (tmp_path / name).open("ab") as file:
            file.write(b'{"event": "ste')
    run(settings)
    for name in ("metrics.jsonl", "timings.jsonl"):
        for line in (tmp_path / name).read_text().splitlines():
            json.loads(line)


def test_a_flag_that_came_later_had_its_default(folder, tmp_path):
    run(settings_for(folder, tmp_path / "run"))
    file = tmp_path / "run" / "run.json"
    record = json.loads(file.read_text())
    del record["settings"]["optimizer"]
    file.write_text(json.dumps(record))
    assert run(settings_for(folder, tmp_path / "run"))[-1].status == "already finished"
    with pytest.raises(ConfigError, match="--optimizer was adamw, is now adamw-8bit"):
        run(settings_for(folder, tmp_path / "run", optimizer="adamw-8bit"))


def test_what_chose_itself_stands_in_run_json_and_a_run_goes_on_with_it(folder, tmp_path):
    out = tmp_path / "run"
    run(settings_for(folder, out, max_steps=2))
    record = json.loads((out / "run.json").read_text())
    chosen = {"precision": "fp32", "max_tokens": 4096, "activation_checkpointing": "none", "offload": "none"}
    chosen |= {"sequence_parallel": 1, "compile": False}
    assert record["chosen"] == chosen
    # As if it had chosen otherwise: the longer run takes what the record says, and does not choose anew.
    record["chosen"]["max_tokens"] = 64
    (out / "run.json").write_text(json.dumps(record))
    events = run(settings_for(folder, out, max_steps=3))
    assert json.loads((out / "run.json").read_text())["chosen"] == chosen | {"max_tokens": 64}
    assert not [message for message in notices(events) if "--max-tokens" in message]
    events = run(settings_for(folder, out, max_steps=4, max_tokens=128))
    assert any(message.startswith("--max-tokens was 64, is now 128") for message in notices(events))


@pytest.mark.parametrize(
    ("record", "given", "expected"),
    [
        ({"chosen": {"compile": True}}, {}, (True, False)),
        ({"chosen": {"compile": False}}, {}, (False, True)),
        ({"settings": {"compile": True}, "chosen": {}}, {}, (True, False)),  # of a version that never chose it
        ({"settings": {}, "chosen": {}}, {}, (False, True)),
        ({"chosen": {"compile": True}}, {"no_compile": True}, (False, True)),
        ({"chosen": {"compile": False}}, {"compile": True}, (True, False)),
    ],
)
def test_a_resumed_run_is_compiled_as_it_was(record, given, expected, tmp_path):
    (tmp_path / "run.json").write_text(json.dumps(record))
    settings = resumed_settings(settings_for(tmp_path, tmp_path, **given), RunDirectory(tmp_path), ranks=1).compute
    assert (settings.compile, settings.no_compile) == expected


def test_what_a_run_chose_may_be_given_when_it_goes_on_and_stays_chosen(folder, tmp_path):
    """It is the same run; what differs from the choice is refused, and the next start without a flag has the choice."""
    flags = {"head_init": "exact", "max_steps": None, "epochs": None, "train": "full"}
    stop = StopRequest()
    for event in fit(settings_for(folder, tmp_path, **flags), stop):
        if isinstance(event, StepEnded):
            stop.signal_number = 15
    chosen = RunDirectory(tmp_path).read_json("run.json")["recipe"]
    lr = chosen["lr"]["value"]
    assert (chosen["epochs"]["value"], chosen["patience"]["value"]) == (3, 3)
    with pytest.raises(ConfigError, match=f"--lr was {lr}, is now 0.5"):
        run(settings_for(folder, tmp_path, **flags, lr=0.5))
    stop = StopRequest()
    for event in fit(settings_for(folder, tmp_path, **(flags | {"epochs": 3}), lr=lr, patience=9), stop):
        if isinstance(event, StepEnded):
            assert event.step == 2
            stop.signal_number = 15
    assert RunDirectory(tmp_path).read_json("run.json")["recipe"] == chosen
