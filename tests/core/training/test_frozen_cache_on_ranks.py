"""A frozen trunk on several ranks: each keeps its share of the states, all use them, whatever stops in between."""

import json
from pathlib import Path

import pytest
import ranks
import torch
from ranks import on_ranks
from safetensors.numpy import load_file
from support import readable_rollouts, small_config, write_shard
from transformers import AutoModelForCausalLM

from critic_train.settings import FitSettings
from critic_train.stopping import StopRequest
from critic_train.training.fit import fit

STEPS = 12


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> FitSettings:
    folder = tmp_path_factory.mktemp("kept")
    write_shard(folder / "data" / "a.parquet", readable_rollouts(24, seed=1))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = small_config("Llama", num_hidden_layers=3)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / "base")
    return FitSettings(
        data=[str(folder / "data")],
        out=str(folder / "unused"),
        model=str(folder / "base"),
        batch_size=16,
        max_tokens=120,
        max_steps=STEPS,
        eval_every=6,
        checkpoint_every=4,
        lr=1e-3,
        no_clip=True,
        no_report=True,
        device="cpu",
    )


def curve(out: str, name: str = "value_loss") -> list[float]:
    found = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return [record[name] for record in found if record["event"] == "step"]


SLOW = pytest.mark.slow
CASES = [
    ("head", "forest", 2),
    pytest.param("last-2", "forest", 2, marks=SLOW),
    pytest.param("last-1", "rows", 3, marks=SLOW),
    pytest.param("head", "rows", 3, marks=SLOW),
]


def run_alone(settings: FitSettings, out: Path, **changes: object) -> FitSettings:
    alone = settings.replace(out=str(out), **changes)
    assert list(fit(alone, StopRequest()))[-1].status == "finished"
    return alone


@pytest.mark.parametrize(("train", "packing", "size"), CASES)
def test_ranks_that_keep_states_give_the_curve_of_one(settings, tmp_path, train, packing, size):
    alone = run_alone(settings, tmp_path / "alone", train=train, packing=packing)
    ours = alone.replace(out=str(tmp_path / "ours"))
    ended = on_ranks(size, ranks.kept_run, ours)
    assert [end.get("status", end) for end in ended] == ["finished"] * size
    assert all(end["kept"] >= STEPS > end["whole"] for end in ended)
    assert [end["gathered"] for end in ended] == [0] * size, "of the frozen part nothing is put together"
    for name in ("value_loss", "grad_norm", "vpred_mean"):
        assert curve(ours.run.out, name) == pytest.approx(curve(alone.run.out, name), rel=1e-5), name
    moments = [
        load_file(Path(run.run.out) / "checkpoints/step-00000012/optimizer.safetensors") for run in (ours, alone)
    ]
    assert moments[0].keys() == moments[1].keys()


def test_states_of_two_ranks_serve_three_and_one(settings, tmp_path):
    """Nothing goes through the frozen trunk again, however many go on."""
    alone = run_alone(settings, tmp_path / "alone", train="head")
    ours = alone.replace(out=str(tmp_path / "ours"))
    first, _ = on_ranks(2, ranks.kept_run, ours, (1, 4))
    for size, stop_at in ((3, (0, 8)), (1, None)):
        for later in on_ranks(size, ranks.kept_run, ours, stop_at):
            assert later["kept"] > 0
            assert later["whole"] == 3 < first["whole"], "only the self-check's"
    assert later["status"] == "finished"
    assert curve(ours.run.out) == pytest.approx(curve(alone.run.out), rel=1e-5)


@pytest.mark.parametrize("file", [pytest.param("states-00001", marks=SLOW), "state-rows"])
def test_a_rank_whose_disk_is_full_ends_all_and_leaves_nothing_half_trusted(settings, tmp_path, file):
    ours = settings.replace(out=str(tmp_path / "ours"), train="head")
    leader, _ = on_ranks(2, ranks.full_disk_run, ours, file)
    assert leader["fault"] in ("OSError", "MachineError")
    assert "No space left on device" in leader["message"]
    left = {path.name for path in (tmp_path / "ours" / "cache" / "train").glob("*state*")}
    assert "state-rows" not in left
    assert not [name for name in left if name.startswith(".")]
    ended = on_ranks(2, ranks.kept_run, ours)
    assert [end.get("status", end) for end in ended] == ["finished"] * 2


def test_a_kill_in_the_midst_leaves_nothing_half_trusted(settings, tmp_path):
    alone = run_alone(settings, tmp_path / "alone", train="last-1")
    ours = alone.replace(out=str(tmp_path / "ours"))
    leader, _ = on_ranks(2, ranks.full_disk_run, ours, "states.json", "SIGKILL", rank_0_is_enough=True)
    assert leader == {"fault": "gone", "message": "-9"}
    cache = tmp_path / "ours" / "cache" / "train"
    assert not (cache / "state-rows").exists()
    (cache / "states-00007").write_bytes(b"of more ranks than now")
    assert [end.get("status", end) for end in on_ranks(3, ranks.kept_run, ours)] == ["finished"] * 3
    assert curve(ours.run.out) == pytest.approx(curve(alone.run.out), rel=1e-5)


def test_memory_that_runs_out_on_one_rank_while_states_are_kept(settings, tmp_path):
    alone = run_alone(settings, tmp_path / "alone", train="head")
    ours = alone.replace(out=str(tmp_path / "ours"), max_tokens=1000)
    leader, _ = on_ranks(2, ranks.short_run, ours, [(1, "values", 0)])
    assert leader["message"].startswith("memory ran out with 1,000 tokens at once; the run has no checkpoint yet")
    for ended in on_ranks(2, ranks.short_run, ours, []):
        assert ended["status"] == "finished"
        assert ended["told"][0].startswith("memory ran out with 1,000 tokens at once before: starting with ")
    assert curve(ours.run.out) == pytest.approx(curve(alone.run.out), rel=1e-5)


@SLOW
@pytest.mark.parametrize("train", ["head", "last-1"])
def test_more_ranks_than_rollouts(settings, tmp_path, train):
    """A rank without work writes no states, and none over another's."""
    write_shard(tmp_path / "data" / "a.parquet", readable_rollouts(1, responses=2))
    few = settings.replace(data=[str(tmp_path / "data")], val_fraction=0.0, max_steps=3, train=train)
    alone = run_alone(few, tmp_path / "alone")
    ours = few.replace(out=str(tmp_path / "ours"))
    assert [end.get("status", end) for end in on_ranks(3, ranks.kept_run, ours)] == ["finished"] * 3
    assert curve(ours.run.out) == pytest.approx(curve(alone.run.out), rel=1e-5)


@SLOW
@pytest.mark.parametrize(
    "changes",
    [
        {"precision": "bf16", "head_init": "mean"},  # one solved on the states would make their rounding larger
        {"activation_checkpointing": "layer"},
        {"offload": "all"},
    ],
)
def test_kept_states_go_with_what_trades_memory(settings, tmp_path, changes):
    """bf16 rounds a layer's norm weights on ranks and not on one process: the losses agree to its rounding."""
    alone = run_alone(settings, tmp_path / "alone", train="last-2", **changes)
    ours = alone.replace(out=str(tmp_path / "ours"))
    ended = on_ranks(2, ranks.kept_run, ours)
    assert [end.get("status", end) for end in ended] == ["finished"] * 2
    assert all(end["kept"] >= STEPS for end in ended)
    assert curve(ours.run.out) == pytest.approx(curve(alone.run.out), rel=1e-2 if "precision" in changes else 1e-5)
