"""A dry run says what the run then is, and leaves nothing behind."""

import time
from collections.abc import Iterable
from itertools import takewhile
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors import safe_open
from support import readable_rollouts, small_config, write_shard
from transformers import AutoModelForCausalLM

from critic_train.errors import ConfigError, DataError
from critic_train.events import Event, Notice, Progress, RunEnded, RunStarted, StepEnded
from critic_train.settings import FitSettings
from critic_train.stopping import StopRequest
from critic_train.training import recipe
from critic_train.training.dry_run import dry_run
from critic_train.training.fit import fit, run_path


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("rollouts")
    write_shard(folder / "a.parquet", readable_rollouts(30, seed=1))
    return folder


def settings_for(shards: Path, out: Path, **changes: object) -> FitSettings:
    defaults = {"data": [str(shards)], "out": str(out), "preset": "tiny", "batch_size": 16, "device": "cpu"}
    defaults |= {"no_report": True}
    return FitSettings(**(defaults | changes))  # type: ignore[arg-type]


def estimated(settings: FitSettings, stop: StopRequest | None = None) -> RunEnded:
    ended = list(dry_run(settings, run_path(settings), stop or StopRequest()))[-1]
    assert isinstance(ended, RunEnded)
    return ended


@pytest.mark.parametrize(
    "changes", [{}, {"max_steps": 5}, {"epochs": 4, "eval_every": 3}, {"packing": "rows"}, {"val_fraction": 0.3}]
)
def test_it_says_what_the_run_then_is(shards, tmp_path, changes):
    settings = settings_for(shards, tmp_path / "run", **changes)
    found = estimated(settings).result
    assert not (tmp_path / "run").exists()
    events = list(fit(settings, StopRequest()))
    (started,) = [event for event in events if isinstance(event, RunStarted)]
    for name in ("rollouts", "held_out_rollouts", "parameters", "packing"):
        assert found[name] == started.summary[name], name
    assert found["steps"] == started.total_steps
    tensors = (tmp_path / "run" / "best").resolve().glob("*.safetensors")
    written = sum(path.stat().st_size for path in tensors)
    assert written < found["disk"]["checkpoint"] < written + 2**21


def test_its_figures_add_up(shards, tmp_path):
    found = estimated(settings_for(shards, tmp_path / "run")).result
    weights = 4 * found["parameters"]
    assert (found["memory"]["weights"], found["memory"]["moments"]) == (weights, 2 * weights)
    held = found["memory"]["activations"]
    assert held["none"] > held["tiles"] > held["layer-tiles"] >= held["layer-tiles, --offload activations"] > 0
    assert found["memory"]["keeping"] == "none"
    seconds = found["seconds"]
    assert seconds["total"] == seconds["training"] + seconds["evaluating"] > 0
    assert (seconds["keeping_states"], found["disk"]["states"]) == (0, 0)
    assert found["computed_tokens"] == found["tokens"], "of rollouts that are shuffled apart no prefix is shared"
    assert found["disk"]["needed"] > 4 * found["disk"]["checkpoint"]


def test_prompt_groups_that_stay_together_share_their_prefixes(shards, tmp_path):
    found = estimated(settings_for(shards, tmp_path / "run", shuffle="groups")).result
    assert 0 < found["computed_tokens"] < found["tokens"]


def test_it_finds_what_would_stop_the_run(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError):
        estimated(settings_for(tmp_path, tmp_path / "run"))


def test_it_can_be_stopped(shards, tmp_path):
    stop = StopRequest()
    stop.signal_number = 15
    assert estimated(settings_for(shards, tmp_path / "run"), stop).status == "interrupted"


def base_of(folder: Path, **shape: int) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(small_config("Llama", **shape)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return base_of(tmp_path_factory.mktemp("base"), num_hidden_layers=3)


def bytes_in(file: Path, of: str = "") -> int:
    """Bytes of the tensors of a safetensors file whose names begin so."""
    with safe_open(file, framework="np") as tensors:
        return sum(tensors.get_tensor(n).nbytes for n in tensors.keys() if n.startswith(of))  # noqa: SIM118


@pytest.mark.parametrize("packing", ["forest", "rows"])
@pytest.mark.parametrize("train", ["head", "last-1", "lora"])
def test_what_it_says_of_a_partly_trained_critic_is_what_the_run_then_holds(shards, base, tmp_path, train, packing):
    if train == "lora":
        pytest.importorskip("peft")
    settings = settings_for(
        shards, tmp_path / "run", model=str(base), train=train, packing=packing, max_steps=4, checkpoint_every=2
    )
    found = estimated(settings).result
    cache, kept = tmp_path / "run" / "cache" / "train", 0
    for event in fit(settings, StopRequest()):
        if isinstance(event, StepEnded) and train != "lora":
            kept = sum(file.stat().st_size for file in cache.glob("state*"))
    assert found["disk"]["states"] == pytest.approx(kept, rel=0.01)
    assert (found["seconds"]["keeping_states"] > 0) == (train != "lora")
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000004"
    moments = sum(bytes_in(checkpoint / "optimizer.safetensors", of) for of in ("exp_avg.", "exp_avg_sq."))
    assert found["memory"]["moments"] == moments == 2 * found["memory"]["gradients"]
    assert found["trained_parameters"] == moments // 8
    weights = 4 * found["parameters"]
    assert found["memory"]["weights"] == weights
    files = sum(bytes_in(file) for file in checkpoint.glob("*.safetensors"))
    assert files <= found["disk"]["checkpoint"] < files + 2**21
    assert found["disk"]["needed"] > 4 * found["disk"]["checkpoint"] + kept


def test_a_run_that_solves_the_head_and_takes_no_step(shards, base, tmp_path):
    settings = settings_for(shards, tmp_path / "run", model=str(base), train="head")
    found = estimated(settings).result
    assert (found["steps"], found["epochs"], found["seconds"]["training"]) == (0, 0, 0)
    assert found["seconds"]["total"] >= found["seconds"]["solving_head"] > 0
    ended = list(fit(settings, StopRequest()))[-1]
    assert isinstance(ended, RunEnded)
    assert ended.result["steps"] == 0


def choices_told(events: Iterable[Event]) -> list[str]:
    """What a job tells of its choices before its first step."""
    told = [event.message for event in events if isinstance(event, Notice)]
    return [message for message in told if message.startswith("--")]


@pytest.mark.parametrize("starts", ["a model", "a model that is fine-tuned", "as verl trains", "from scratch"])
def test_it_tells_what_is_chosen_and_chooses_by_what_is_trained_on(shards, base, tmp_path, monkeypatch, starts):
    """Some are held out: fewer response tokens than all of them are what choices go by, in the run and here."""
    masks = pq.read_table(shards, columns=["response_mask"])["response_mask"].to_pylist()
    monkeypatch.setattr(recipe, "FEW_TOKENS", sum(map(sum, masks)))
    changes = {
        "a model": {"model": str(base), "train": "head"},
        "a model that is fine-tuned": {"model": str(base), "lr": 1e-3},
        "as verl trains": {"model": str(base), "recipe": "verl", "lm_loss_weight": 1.0, "ema_decay": 0.9},
        "from scratch": {"preset": None, "max_steps": 1},
    }[starts]
    settings = settings_for(shards, tmp_path / "run", **changes)
    told = choices_told(dry_run(settings, run_path(settings), StopRequest()))
    assert told == choices_told(takewhile(lambda event: not isinstance(event, StepEnded), fit(settings, StopRequest())))
    said = {"a model": "--epochs 0", "as verl trains": "--lr 1e-05", "from scratch": "are few: mini-batches"}
    said = said.get(starts, "--ema-decay")
    assert any(said in message for message in told)


def test_the_mean_return_and_the_average_are_those_of_the_run(shards, base, tmp_path):
    """The mean of what is trained on, and the average of the critic, to which the next-token head does not belong."""
    settings = settings_for(
        shards, tmp_path / "run", model=str(base), recipe="verl", lm_loss_weight=1.0, ema_decay=0.9, max_steps=1
    )
    told = [list(dry_run(settings, run_path(settings), StopRequest())), list(fit(settings, StopRequest()))]
    means = [
        event.message for job in told for event in job if isinstance(event, Notice) and "(the mean" in event.message
    ]
    assert means[0] == means[1]
    estimate = told[0][-1].result["memory"]["average"]
    (kept,) = (tmp_path / "run" / "checkpoints").glob("*/optimizer_weights.safetensors")
    assert estimate == bytes_in(kept)


@pytest.mark.slow
@pytest.mark.parametrize("train", ["head", "last-1", "lora", "full"])
def test_its_times_are_those_of_the_run(shards, tmp_path, train, monkeypatch):
    """Within a factor of two; of a step of the head alone, whose log costs as much as itself, within three.

    All of it in CPU time, which does not count what else the machine does.
    """
    for clock in ("perf_counter", "monotonic"):
        monkeypatch.setattr(time, clock, time.process_time)
    base = base_of(tmp_path / "base", num_hidden_layers=6, hidden_size=256, intermediate_size=1024)
    settings = settings_for(
        shards, tmp_path / "run", model=str(base), train=train, max_tokens=1024, max_steps=12, eval_every=100
    )
    found = estimated(settings).result["seconds"]
    began, marks = time.perf_counter(), []
    for event in fit(settings, StopRequest()):
        if isinstance(event, StepEnded):
            marks.append(event.timing["step_seconds"])
        if isinstance(event, Progress) and event.stage.startswith("caching"):
            began, kept = (began, time.perf_counter() - began) if event.done else (time.perf_counter(), 0.0)
    assert (0.33 if train == "head" else 0.5) < found["training"] / (12 * sorted(marks)[6]) < 2.0
    if train in ("head", "last-1"):
        assert 0.5 < found["keeping_states"] / kept < 2.0


def test_it_knows_how_many_ranks_cut_a_rollout_and_which_number_one_needs(shards, tmp_path):
    """Given, chosen by the budget, and what no rank count of the run holds; a refused one is refused here as well."""
    longest = int(readable_rollouts(30, seed=1).lengths.max())
    budget = -(-longest // 3)
    of = {"max_tokens": budget, "nproc": 2}

    def memory(**changes: object) -> dict[str, object]:
        return estimated(settings_for(shards, tmp_path / "run", **changes)).result["memory"]  # type: ignore[no-any-return]

    alone, given = memory(max_tokens=budget), memory(**of, sequence_parallel=2)
    assert (alone["sequence_parallel"], given["sequence_parallel"], given["ranks"]) == (1, 2, 2)
    # The attention's output is held by head and by position: more than half.
    for kind, held in given["activations"].items():  # type: ignore[attr-defined]
        assert 0.5 < held / alone["activations"][kind] < 0.7  # type: ignore[index]
    by_number = given["by_sequence_parallel"]
    assert by_number == {"1": alone["activations"]["none"], "2": given["activations"]["none"]}  # type: ignore[index]
    chosen = memory(**of)
    assert chosen["activations"] == given["activations"]
    assert f"the longest rollout has {longest:,} tokens" in str(chosen["sequence_parallel_reason"])
    # A third of it fits one rank: four are needed, and both of two take what they get.
    assert (alone["sequence_parallel_needed"], chosen["sequence_parallel_needed"]) == (4, 4)
    assert "sequence_parallel_needed" not in memory(max_tokens=longest)
    with pytest.raises(ConfigError, match="over 3 ranks, and this is a run on 2"):
        memory(**of, sequence_parallel=3)
    with pytest.raises(ConfigError, match="not padded rows: --packing rows"):
        memory(**of, sequence_parallel=2, packing="rows")
