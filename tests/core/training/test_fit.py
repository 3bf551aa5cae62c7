"""Whole runs on small shards: what they leave, how they resume, what they refuse."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from support import VOCABULARY, StopAfter, readable_rollouts, small_config, write_shard
from transformers import AutoModelForCausalLM

from critic_train.errors import ConfigError, DataError, DivergedError, MachineError, ModelError
from critic_train.events import EvaluationEnded, Event, Notice, RunEnded, RunStarted, StepEnded
from critic_train.rollouts import Rollouts
from critic_train.run.checkpoint import checkpoint_name, checkpoints, newest_checkpoint
from critic_train.settings import FitSettings
from critic_train.stopping import StopRequest
from critic_train.training.fit import fit, run_path

SIGTERM = 15


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("rollouts")
    write_shard(folder / "a.parquet", readable_rollouts(20, seed=1))
    write_shard(folder / "b.parquet", readable_rollouts(12, seed=2))
    return folder


def settings_for(shards: Path, out: Path, **changes: object) -> FitSettings:
    defaults: dict[str, object] = {
        "data": [str(shards)],
        "out": str(out),
        "preset": "tiny",
        "batch_size": 16,
        "max_tokens": 120,
        "epochs": 2,
        "eval_every": 4,
        "checkpoint_every": 3,
        "lr": 3e-3,
        "device": "cpu",
        "no_report": True,
    }
    return FitSettings(**(defaults | changes))  # type: ignore[arg-type]


def run(settings: FitSettings, stop: StopRequest | None = None) -> list[Event]:
    return list(fit(settings, stop or StopRequest()))


def final_state(out: Path) -> dict[str, bytes]:
    """What must be bit-identical: weights, optimizer, metrics, what is told of them."""
    last = checkpoints(out / "checkpoints")[-1]
    files = (last / "model.safetensors", last / "optimizer.safetensors", out / "metrics.jsonl")
    result = json.loads((out / "result.json").read_text())
    told = {name: result[name] for name in ("steps", "best_step", "explained_variance", "baselines", "training")}
    return {file.name: file.read_bytes() for file in files} | {
        "checkpoint": last.name.encode(),
        "best": (out / "best").readlink().name.encode(),
        "result": json.dumps(told).encode(),
    }


def test_a_run_without_a_report_leaves_no_page(shards, tmp_path):
    events = run(settings_for(shards, tmp_path, no_report=True, max_steps=1, epochs=None))
    assert isinstance(events[-1], RunEnded)
    assert events[-1].result["report"] is None
    assert not (tmp_path / "report.html").exists()


def test_where_no_step_is_better_than_the_critic_before_training_that_one_is_the_best(shards, tmp_path):
    events = run(settings_for(shards, tmp_path, max_steps=3, epochs=None, eval_every=1, lr=0.5, head_lr=5.0))
    evaluations = {event.step: event for event in events if isinstance(event, EvaluationEnded)}
    assert all(evaluations[step].metrics["explained_variance"] < 0 for step in (1, 2, 3))
    assert [step for step, event in evaluations.items() if event.best] == [0]
    assert (tmp_path / "best").resolve().name == checkpoint_name(0)
    assert events[-1].result["best_step"] == 0
    assert [e.message for e in events if isinstance(e, Notice) and e.message.startswith("no step is better")]
    bias = load_file(tmp_path / "best" / "model.safetensors")["score.bias"]
    assert bias == pytest.approx(next(e for e in events if isinstance(e, RunStarted)).summary["mean_return"], rel=1e-6)


def test_a_run_with_a_checkpoint_of_step_0_alone_has_nothing_to_lose(shards, tmp_path):
    stop = StopRequest()
    for event in fit(settings_for(shards, tmp_path), stop):
        if isinstance(event, EvaluationEnded):
            stop.signal_number = SIGTERM
    assert [path.name for path in checkpoints(tmp_path / "checkpoints")] == [checkpoint_name(0)]
    events = run(settings_for(shards, tmp_path, lr=1e-3, max_steps=2, epochs=None))
    assert events[-1].status == "finished"


def test_a_run_leaves_what_the_design_says(shards, tmp_path):
    events = run(settings_for(shards, tmp_path, no_report=False))
    assert isinstance(events[-1], RunEnded)
    assert events[-1].status == "finished"
    assert {p.name for p in tmp_path.iterdir() if p.name[0] != "."} == {
        "best",
        "checkpoints",
        "evaluation.json",
        "metrics.jsonl",
        "report.html",
        "result.json",
        "run.json",
        "timings.jsonl",
    }
    last = checkpoints(tmp_path / "checkpoints")[-1]
    assert {p.name for p in last.iterdir()} == {
        "config.json",
        "manifest.json",
        "model.safetensors",
        "optimizer.safetensors",
        "optimizer_weights.safetensors",
        "trainer.json",
    }
    config = json.loads((last / "config.json").read_text())
    assert config["architectures"] == ["LlamaForTokenClassification"]
    assert (config["tie_word_embeddings"], config["value_head_prefix"]) == (False, "score")
    tensors = load_file(last / "model.safetensors")
    assert tensors["score.weight"].shape == (1, 64)
    assert tensors["score.bias"].shape == (1,)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if r["event"] == "step"] == list(range(1, events[-1].result["steps"] + 1))
    assert [r["step"] for r in records if r["event"] == "evaluation"][:2] == [0, 4]
    assert (tmp_path / "best").resolve() in checkpoints(tmp_path / "checkpoints")


def test_an_untrained_critic_explains_nothing_and_a_trained_one_does(shards, tmp_path):
    events = run(settings_for(shards, tmp_path, epochs=12, eval_every=20))
    evaluations = [e for e in events if isinstance(e, EvaluationEnded)]
    assert evaluations[0].step == 0
    assert evaluations[0].metrics["explained_variance"] == 0.0
    assert evaluations[-1].metrics["explained_variance"] > 0.8
    assert evaluations[-1].metrics["baselines"]["stored"]["explained_variance"] == pytest.approx(0.0, abs=1e-6)


@pytest.fixture(scope="module", params=["column", "epoch"])
def undisturbed(request, shards, tmp_path_factory) -> tuple[str, dict[str, bytes]]:
    out = tmp_path_factory.mktemp("undisturbed")
    run(settings_for(shards, out, old_values=request.param))
    return request.param, final_state(out)


MORE_LOOKS = [pytest.param(looks, marks=pytest.mark.slow) for looks in (1, 3, 5, 14, 22, 31, 56, 58)]


@pytest.mark.parametrize("looks", [0, 9, 47, 59, *MORE_LOOKS])
def test_a_run_stopped_anywhere_resumes_bit_identical(looks, undisturbed, shards, tmp_path):
    old_values, expected = undisturbed
    settings = settings_for(shards, tmp_path, old_values=old_values)
    first = run(settings, StopAfter(looks=looks))[-1]
    assert isinstance(first, RunEnded)
    assert (first.status, first.signal_number) == ("interrupted", SIGTERM)
    assert run(settings)[-1].status == "finished"
    assert final_state(tmp_path) == expected


@pytest.mark.parametrize("steps", [pytest.param(1, marks=pytest.mark.slow), 4, 8])
def test_a_run_that_was_killed_resumes_bit_identical(steps, undisturbed, shards, tmp_path):
    old_values, expected = undisturbed
    settings = settings_for(shards, tmp_path, old_values=old_values)
    going = fit(settings, StopRequest())
    for event in going:
        if isinstance(event, StepEnded) and event.step == steps:
            break
    going.close()  # as after SIGKILL: no checkpoint is written, logs are ahead of the last one
    assert run(settings)[-1].status == "finished"
    assert final_state(tmp_path) == expected


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_taken(shards, tmp_path, undisturbed):
    old_values, expected = undisturbed
    settings = settings_for(shards, tmp_path, old_values=old_values)
    run(settings, StopAfter(looks=40))
    newest, _ = newest_checkpoint(tmp_path / "checkpoints")
    weights = newest / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    events = run(settings)
    assert any(isinstance(e, Notice) and "is damaged" in e.message and newest.name in e.message for e in events)
    assert list((tmp_path / "checkpoints").glob(f"damaged-{newest.name}*"))
    assert final_state(tmp_path) == expected


def test_stopped_while_reading_leaves_no_half_cache(shards, tmp_path):
    first = run(settings_for(shards, tmp_path), StopAfter(looks=0))[-1]
    assert first.status == "interrupted"
    assert not any((tmp_path / "cache").iterdir())


def test_a_finished_run_says_so_and_does_nothing(shards, tmp_path):
    settings = settings_for(shards, tmp_path, epochs=1)
    first = run(settings)[-1]
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.safetensors")}
    again = run(settings)
    assert again[-1].status == "already finished"
    assert again[-1].result["explained_variance"] == first.result["explained_variance"]
    assert not any(isinstance(e, StepEnded) for e in again)
    assert before == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.safetensors")}


def test_changed_settings_are_refused_by_name(shards, tmp_path):
    run(settings_for(shards, tmp_path, max_steps=2))
    with pytest.raises(ConfigError) as refused:
        run(settings_for(shards, tmp_path, max_steps=2, lr=1e-4, batch_size=8, log_every=3))
    assert "--lr was 0.003, is now 0.0001" in refused.value.message
    assert "--batch-size was 16, is now 8" in refused.value.message
    assert "--log-every" not in refused.value.message


def test_a_run_without_a_checkpoint_may_be_started_anew_with_other_settings(shards, tmp_path):
    going = fit(settings_for(shards, tmp_path), StopRequest())
    next(event for event in going if isinstance(event, RunStarted))
    going.close()
    assert run(settings_for(shards, tmp_path, lr=1e-3, max_steps=2))[-1].status == "finished"


def test_run_json_says_what_the_defaults_came_to(shards, tmp_path):
    run(settings_for(shards, tmp_path, max_steps=2, lr=None))
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["settings"]["lr"] is None
    assert record["resolved"]["lr"] > 0
    assert record["resolved"]["packing"] == "forest"
    assert set(record["versions"]) >= {"critic-train", "torch", "transformers"}


def test_a_fresh_start_takes_nothing_of_an_earlier_one(shards, tmp_path):
    """Old values, results and timings of a run that left no checkpoint are another critic's."""
    first = settings_for(
        shards, tmp_path, old_values="epoch", lr=0.1, eval_every=100, checkpoint_every=100, val_fraction=0
    )
    going = fit(first, StopRequest())
    next(event for event in going if isinstance(event, StepEnded) and event.epoch == 1)
    going.close()
    (tmp_path / "result.json").write_text(json.dumps({"steps": 2}))
    again = first.replace(lr=1e-3)
    assert run(again)[-1].status == "finished"
    run(again.replace(out=str(tmp_path / "other")))
    assert (tmp_path / "metrics.jsonl").read_bytes() == (tmp_path / "other" / "metrics.jsonl").read_bytes()


def test_old_values_lost_in_mid_epoch_are_not_made_up(shards, tmp_path):
    settings = settings_for(shards, tmp_path, old_values="epoch")
    going = fit(settings, StopRequest())
    next(event for event in going if isinstance(event, StepEnded) and event.step == 4)
    going.close()
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(MachineError, match="old_values-epoch-0 is gone"):
        run(settings)


def test_a_clip_is_never_lost_because_an_earlier_start_had_none(shards, tmp_path):
    rollouts = readable_rollouts(12, seed=5)
    data = [str(write_shard(tmp_path / "d.parquet", rollouts, without=["values"]))]
    out = tmp_path / "out"
    going = fit(settings_for(shards, out, data=data, no_clip=True), StopRequest())
    next(event for event in going if isinstance(event, RunStarted))
    going.close()
    events = run(settings_for(shards, out, data=data))
    told = [event.message for event in events if isinstance(event, Notice)]
    assert any(message.startswith("there are no values of a critic to clip around") for message in told)
    write_shard(tmp_path / "e.parquet", rollouts)
    going = fit(
        settings_for(shards, tmp_path / "other", data=[str(tmp_path / "e.parquet")], no_clip=True), StopRequest()
    )
    next(event for event in going if isinstance(event, RunStarted))
    going.close()
    run(settings_for(shards, tmp_path / "other", data=[str(tmp_path / "e.parquet")], cliprange_value=1e-3))
    steps = [json.loads(line) for line in (tmp_path / "other" / "metrics.jsonl").read_text().splitlines()]
    assert max(record.get("clipfrac") or 0 for record in steps) > 0


def test_checkpoints_without_run_json_are_refused(shards, tmp_path):
    run(settings_for(shards, tmp_path, max_steps=3))
    (tmp_path / "run.json").unlink()
    with pytest.raises(ConfigError, match=r"no readable run\.json"):
        run(settings_for(shards, tmp_path, max_steps=3))


def test_the_same_data_by_another_path_resumes(shards, tmp_path, monkeypatch):
    settings = settings_for(shards, tmp_path / "out", max_steps=5)
    run(settings, StopAfter(looks=20))
    monkeypatch.chdir(shards.parent)
    ended = run(settings.replace(data=[shards.name]))[-1]
    assert ended.status == "finished"
    monkeypatch.chdir(tmp_path)
    again = run(settings.replace(out="out"))[-1]
    assert (again.status, again.result["out"], again.result["best"]) == ("already finished", "out", "out/best")


def test_a_best_that_leads_nowhere_is_no_crash(shards, tmp_path):
    settings = settings_for(shards, tmp_path, checkpoint_every=1)
    run(settings, StopAfter(looks=40))
    best = (tmp_path / "best").resolve()
    shutil.rmtree(best)
    assert run(settings)[-1].status == "finished"


def test_what_a_model_cannot_do_is_no_divergence_of_a_run_that_goes_on(shards, tmp_path, monkeypatch):
    settings = settings_for(shards, tmp_path, checkpoint_every=1)
    run(settings, StopAfter(looks=40))
    monkeypatch.setattr("critic_train.model.memory.compute_in_tiles", lambda critic: [])
    with pytest.raises(ModelError, match="has no part that can be computed in tiles"):
        run(settings.replace(activation_checkpointing="tiles"))


@pytest.mark.parametrize("rate", [1e6, 1e38])
def test_divergence_ends_a_run_and_leaves_its_last_checkpoint(rate, shards, tmp_path):
    settings = settings_for(shards, tmp_path, lr=rate, head_lr=rate, eval_every=1, grad_clip=0, epochs=20)
    with pytest.raises(DivergedError, match=r"training (diverged|cannot begin)"):
        run(settings)
    with pytest.raises(DivergedError):
        run(settings)
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda word: pytest.fail(word))


@pytest.mark.parametrize(
    ("data", "name"),
    [
        ("a/rollouts", "rollouts"),
        ("a/data-v1.1", "data-v1.1"),
        ("a/part.parquet", "part"),
        ("a/run/*.parquet", "run"),
        (".", Path.cwd().name),
    ],
)
def test_a_run_is_named_after_its_data(data, name):
    assert run_path(FitSettings(data=[data])) == Path("runs") / name


def test_a_run_cannot_start_from_itself(shards, tmp_path):
    with pytest.raises(ConfigError, match="--model and --out are both"):
        run(settings_for(shards, tmp_path, model=str(tmp_path)))


def test_changed_rollouts_are_refused(shards, tmp_path):
    copy = tmp_path / "data"
    shutil.copytree(shards, copy)
    out = tmp_path / "out"
    run(settings_for(copy, out, max_steps=1))
    write_shard(copy / "b.parquet", readable_rollouts(12, seed=9))
    with pytest.raises(ConfigError, match="the rollouts changed since the run began"):
        run(settings_for(copy, out, max_steps=1))


def test_a_second_process_is_turned_away(shards, tmp_path):
    settings = settings_for(shards, tmp_path)
    going = fit(settings, StopRequest())
    next(event for event in going if isinstance(event, RunStarted))
    with pytest.raises(MachineError, match="is in use by process"):
        run(settings)
    going.close()


def test_the_order_does_not_depend_on_global_random_state(shards, tmp_path):
    run(settings_for(shards, tmp_path / "a", max_steps=3))
    np.random.seed(123)
    np.random.rand(7)
    run(settings_for(shards, tmp_path / "b", max_steps=3))
    assert final_state(tmp_path / "a") == final_state(tmp_path / "b")


def test_bad_rows_stop_a_run_or_are_left_out_and_counted(shards, tmp_path):
    rollouts = readable_rollouts(3, seed=4)
    rollouts.returns[rollouts.offsets[5] + 8 :][:1] = np.nan
    rollouts.response_mask[rollouts.offsets[5] + 8] = True
    folder = tmp_path / "data"
    write_shard(folder / "good.parquet", readable_rollouts(8, seed=3))
    bad = write_shard(folder / "odd.parquet", rollouts)
    with pytest.raises(DataError) as refused:
        run(settings_for(folder, tmp_path / "out", max_steps=1))
    assert f"{bad}, row group 0, row 5, column returns: found nan" in refused.value.message
    ended = run(settings_for(folder, tmp_path / "out2", max_steps=1, on_bad_rows="skip"))[-1]
    assert ended.result["rows_left_out"]["train"]["count"] == 1


def test_held_out_prompts_that_are_trained_on_are_said(shards, tmp_path):
    leaking = settings_for(shards, tmp_path / "a", val_data=[str(shards / "b.parquet")], max_steps=1)
    said = [e.message for e in run(leaking) if isinstance(e, Notice)]
    assert any(message.startswith("12 of 12 held-out prompt groups are also in --data") for message in said)
    apart = {
        "data": [str(shards / "a.parquet")],
        "val_data": [str(write_shard(tmp_path / "v.parquet", other_prompts()))],
    }
    said = [e.message for e in run(settings_for(shards, tmp_path / "b", max_steps=1, **apart)) if isinstance(e, Notice)]
    assert not any("held-out prompt groups" in message for message in said)


def other_prompts() -> Rollouts:
    """Rollouts of prompt groups, and with prompts, that no other shard here has."""
    rollouts = readable_rollouts(4, seed=7)
    input_ids = rollouts.input_ids.copy()
    input_ids[rollouts.offsets[:-1]] = VOCABULARY - 1
    return replace(rollouts, group=rollouts.group + 1000, input_ids=input_ids)


def test_the_same_prompt_under_another_uid_is_a_leak(shards, tmp_path):
    rollouts = readable_rollouts(12, seed=2)
    renamed = write_shard(tmp_path / "v.parquet", replace(rollouts, group=rollouts.group + 1000))
    settings = settings_for(shards, tmp_path / "run", val_data=[str(renamed)], max_steps=1)
    said = [e.message for e in run(settings) if isinstance(e, Notice)]
    assert any(message.startswith("12 of 12 held-out prompt groups are also in --data") for message in said)


def test_the_best_is_the_highest_held_out_figure_and_told_with_its_own_metrics(shards, tmp_path):
    ended = run(settings_for(shards, tmp_path, epochs=4, eval_every=2, lr=2e-3))[-1]
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    judged = [r for r in records if r["event"] == "evaluation" and r["step"] > 0]
    best = max(judged, key=lambda r: r["explained_variance"])
    # On the machines seen the best is in mid-run (step 12 of 32), so that neither the first nor the last will do.
    assert best is not judged[0]
    assert ended.result["best_step"] == best["step"]
    assert ended.result["mse"] == best["mse"]
    assert (tmp_path / "best").resolve().name == checkpoint_name(best["step"])


def test_keep_prunes_all_but_the_newest_and_the_best(shards, tmp_path):
    run(settings_for(shards, tmp_path, checkpoint_every=1, keep=2))
    standing = checkpoints(tmp_path / "checkpoints")
    best = (tmp_path / "best").resolve()
    assert best in standing
    assert len(standing) == (2 if best in standing[-2:] else 3)


def test_what_is_found_of_a_model_is_reported_before_a_check_refuses_it(shards, tmp_path, monkeypatch):
    AutoModelForCausalLM.from_config(small_config("Olmoe", vocab_size=VOCABULARY)).save_pretrained(tmp_path / "model")

    def refuse(*_: object, **__: object) -> None:
        raise ModelError("it looks ahead")

    monkeypatch.setattr("critic_train.training.fit.prepare_critic", refuse)
    events: list[Event] = []
    with pytest.raises(ModelError, match="it looks ahead"):
        events.extend(fit(settings_for(shards, tmp_path / "run", model=str(tmp_path / "model"))))
    messages = [event.message for event in events if isinstance(event, Notice)]
    head, export = messages[-2:]
    assert "has no value head: a new one is solved by least squares" in head
    assert "transformers has no token-classification class for olmoe" in export
