"""A critic in parts: gradients, files and memory are those of one process."""

import json

import pytest
import ranks
from architectures import ROWS_ALONE, TEXT
from rank_work import (
    compare_architectures,
    compare_gradients,
    compare_in_tiles,
    compare_with_less_kept,
    critic_of,
    fill_the_disk,
    reset_before_the_head_has_run,
)
from ranks import on_ranks
from torch.distributed.fsdp import FSDPModule

from critic_train.weights import sharded_checkpoint as sharded_saving


def test_gradients_and_values_are_those_of_one_process_for_any_layout_and_number_of_rollouts():
    found = on_ranks(3, compare_gradients)
    assert [worst for worst in found if isinstance(worst, dict) or max(worst) > 1e-5] == []


@pytest.mark.slow
def test_every_architecture_is_sharded_and_its_work_shared_out():
    cases = [(name, {}) for name in TEXT if name not in ROWS_ALONE]
    cases.append(("Mixtral", {"head_dim": None}))  # as Mixtral is published
    for found in on_ranks(2, compare_architectures, cases):
        assert len(found) == len(cases), found
        assert {name: worst for name, worst in found.items() if not worst <= 1e-5} == {}


@pytest.mark.parametrize("kind", ["layer", "selective"])
def test_activations_are_computed_again_on_every_rank_and_the_gradient_is_the_same(kind):
    for found in on_ranks(2, compare_with_less_kept, kind):
        assert found["worst"] <= 1e-6
        assert found["runs"] == 2.0


@pytest.mark.parametrize(("kind", "runs", "precision"), [("tiles", 1, "fp32"), ("layer-tiles", 2, "bf16")])
def test_tiles_within_sharded_layers_give_the_gradient_of_one_process(kind, runs, precision):
    for found in on_ranks(2, compare_in_tiles, kind, precision):
        assert {"layers.0.mlp", "layers.1.mlp", "norm"} <= set(found["in_tiles"])
        assert found["worst"] <= 1e-5 + found["rounding"]
        assert found["runs"] == runs


@pytest.mark.skipif(not hasattr(FSDPModule, "reset_iter_state"), reason="torch 2.13 and newer")
def test_the_trunk_may_fail_before_the_head_has_run():
    (far,) = on_ranks(1, reset_before_the_head_has_run)
    assert max(far) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["none", "layer"])
def test_compiled_layers_give_the_same_gradient_on_every_rank(kind, monkeypatch):
    monkeypatch.setattr(ranks, "PATIENCE_SECONDS", 600.0)  # each rank compiles for half a minute of its own
    for found in on_ranks(2, compare_with_less_kept, kind, True):
        assert found["worst"] <= 1e-5
        assert found["graphs"] > 0


def test_a_full_disk_on_rank_0_leaves_no_rank_behind(tmp_path):
    assert on_ranks(2, fill_the_disk, str(tmp_path)) == ["No space left on device"] * 2


def test_large_models_are_split_into_files_as_transformers_splits_them(tmp_path, monkeypatch):
    critic = critic_of("Llama")
    tensors = dict(critic.trunk.state_dict())
    size = sum(t.numel() * 4 for t in tensors.values()) // 3
    critic.trunk.save_pretrained(tmp_path, max_shard_size=size)
    monkeypatch.setattr(sharded_saving, "MAX_SHARD_BYTES", size)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    ours = {name: file for file, names in sharded_saving.split(tensors).items() for name in names}
    assert ours == index["weight_map"]
