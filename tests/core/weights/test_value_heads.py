"""A value head is found under any name and used as it is; what a linear head cannot hold is refused by name."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import small_config
from transformers import AutoModelForCausalLM

from critic_train.errors import ModelError
from critic_train.weights.loading import load_critic, read_model
from critic_train.weights.saving import save_critic


def causal_lm(path: Path, tensors: dict[str, torch.Tensor] | None = None, **config: object) -> Path:
    """A directory of a small Llama, with further tensors in its file and further keys in its config.json."""
    AutoModelForCausalLM.from_config(small_config("Llama")).save_pretrained(path)
    held = load_file(path / "model.safetensors") | (tensors or {})
    save_file(held, path / "model.safetensors", metadata={"format": "pt"})
    raw = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(raw | config))
    return path


def row(value: float = 0.5) -> torch.Tensor:
    return torch.full((1, 64), value)


@pytest.mark.parametrize(
    "name", ["reward_head", "rm_head", "regression_head", "regression_layer", "model.score", "a.b.c", "lm_head"]
)
def test_any_row_that_nothing_else_takes_is_a_value_head(name, tmp_path):
    """An lm_head of one row too, as Megatron's value models have."""
    source = read_model(causal_lm(tmp_path, {f"{name}.weight": row()}))
    assert source.head == name
    critic = load_critic(source)
    assert torch.equal(critic.head.weight, row())
    assert critic.head.bias.item() == 0.0


@pytest.mark.parametrize("file", ["value_head.safetensors", "critic_head.safetensors"])
def test_a_head_in_a_file_beside_the_model_is_read(file, tmp_path):
    """LLaMA-Factory writes the first."""
    causal_lm(tmp_path)
    head = {"v_head.summary.weight": row(), "v_head.summary.bias": torch.tensor([2.0])}
    save_file(head, tmp_path / file, metadata={"format": "pt"})
    critic = load_critic(read_model(tmp_path))
    assert torch.equal(critic.head.weight, row())
    assert critic.head.bias.item() == 2.0


def test_a_pickled_head_is_refused_and_can_be_gone_without(tmp_path):
    causal_lm(tmp_path)
    (tmp_path / "value_head.bin").write_bytes(b"")
    with pytest.raises(ModelError, match="the value head is pickled"):
        read_model(tmp_path)
    assert read_model(tmp_path, new_head=True).head is None


TWO_LAYERS = {"score.0.weight": torch.ones(64, 64), "score.0.bias": torch.ones(64), "score.2.bias": torch.ones(1)}
NOT_LINEAR = {
    "Qwen2.5-Math-RM": TWO_LAYERS | {"score.2.weight": row()},
    "Qwen2.5-Math-PRM": TWO_LAYERS | {"score.2.weight": torch.ones(2, 64), "score.2.bias": torch.ones(2)},
    "GRM": {"v_head.summary.0.weight": torch.ones(32, 64), "v_head.summary.2.weight": torch.ones(1, 32)},
    "trlX": {"v_head.0.weight": torch.ones(128, 64), "v_head.2.weight": torch.ones(1, 128)},
    "ArmoRM": {"regression_layer.weight": torch.ones(19, 64), "gating.logit_scale": torch.ones(1)},
    "Open-Reasoner-Zero": {"value_head.weight": torch.ones(8, 8)},
    "several labels": {"score.weight": torch.ones(3, 64)},
}


@pytest.mark.parametrize("name", NOT_LINEAR)
def test_a_head_that_is_not_one_row_is_refused_by_name_or_left_out_where_that_is_asked_for(name, tmp_path):
    tensors = NOT_LINEAR[name]
    causal_lm(tmp_path, tensors)
    with pytest.raises(ModelError) as caught:
        read_model(tmp_path)
    assert all(key in caught.value.message for key in tensors)
    assert "--head-init exact" in caught.value.hint
    assert "quantized" not in caught.value.message
    source = read_model(tmp_path, new_head=True)
    assert source.head is None
    notices = " ".join(notice.message for notice in source.notices)
    assert all(key in notices for key in tensors)
    assert load_critic(source).head.weight.abs().max() == 0


def test_a_linear_head_in_whose_stead_a_new_one_is_made_is_known_by_its_name(tmp_path):
    """`fit` says so: --head-init exact on a directory that has a head."""
    source = read_model(causal_lm(tmp_path, {"score.weight": row()}), new_head=True)
    assert source.head == "score"
    assert source.notices == ()


def test_of_several_heads_the_one_that_the_configuration_names_is_not_taken_in_silence(tmp_path):
    heads = {"score.weight": row(1.0), "v_head.weight": row(2.0)}
    with pytest.raises(ModelError, match=r"has 2 value heads: score\.weight, v_head\.weight"):
        read_model(causal_lm(tmp_path / "a", heads))
    with pytest.raises(ModelError, match=r"score\.weight \[1, 64\], v_head\.weight"):
        read_model(causal_lm(tmp_path / "b", heads, value_head_prefix="v_head"))


def test_the_normalisation_of_openrlhf_is_folded_and_its_keys_are_gone(tmp_path):
    """(w x + b - mean) / std, from OpenRLHF's `_get_critic_model`."""
    base, out = tmp_path / "base", tmp_path / "out"
    out.mkdir()
    tensors = {"score.weight": row(1.5), "score.bias": torch.tensor([4.0])}
    source = read_model(causal_lm(base, tensors, mean=3.0, std=2.0, normalize_reward=True))
    critic = load_critic(source)
    assert torch.equal(critic.head.weight, row(0.75))
    assert critic.head.bias.item() == (4.0 - 3.0) / 2.0
    assert "mean 3 and std 2" in source.notices[0].message
    save_critic(critic, out, None)
    assert not {"mean", "std", "normalize_reward"} & json.loads((out / "config.json").read_text()).keys()
    assert torch.equal(load_critic(read_model(out)).head.weight, row(0.75))


def test_a_normalisation_that_is_turned_off_is_not_folded(tmp_path):
    source = read_model(causal_lm(tmp_path, {"score.weight": row()}, mean=3.0, std=2.0, normalize_reward=False))
    assert torch.equal(load_critic(source).head.weight, row())


@pytest.mark.parametrize("std", [0.0, -1.0, "wide"])
def test_a_normalisation_that_divides_by_nothing_is_refused(std, tmp_path):
    with pytest.raises(ModelError, match="do not normalise"):
        read_model(causal_lm(tmp_path, {"score.weight": row()}, mean=3.0, std=std))
