"""Every tensor of a directory has its place in the model, or is named: by headers alone, before anything is loaded."""

import json
from pathlib import Path

import pytest
import torch
from architectures import text_config
from safetensors.torch import load_file, save_file
from support import small_config
from transformers import AutoModelForCausalLM

from critic_train.errors import ModelError
from critic_train.weights.loading import load_critic, read_model

PROJECTION = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    AutoModelForCausalLM.from_config(small_config("Llama")).save_pretrained(tmp_path)
    return tmp_path


def changed(model: Path, tensors: dict[str, torch.Tensor], **config: object) -> Path:
    held = load_file(model / "model.safetensors") | tensors
    save_file(held, model / "model.safetensors", metadata={"format": "pt"})
    raw = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(raw | config))
    return model


def refusal(model: Path) -> ModelError:
    with pytest.raises(ModelError) as caught:
        read_model(model)
    return caught.value


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8, torch.int32])
def test_numbers_that_mean_nothing_without_scales_are_refused_whatever_else_says_so(kind, model):
    """Neither config.json nor another file needs to tell that weights are quantized."""
    error = refusal(changed(model, {PROJECTION: torch.zeros(128, 64).to(kind)}))
    assert f"its weights are quantized: {PROJECTION} is stored as" in error.message


def test_packed_weights_of_a_large_model_are_quantized_and_not_too_few(model):
    """Several weights in one number: the files hold fewer numbers than config.json describes."""
    held = load_file(model / "model.safetensors")
    packed = {name: torch.zeros(tensor.numel() // 64, 1, dtype=torch.int32) for name, tensor in held.items()}
    save_file(packed, model / "model.safetensors", metadata={"format": "pt"})
    raw = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(raw | {"intermediate_size": 2**20}))
    assert "its weights are quantized" in refusal(model).message


@pytest.mark.parametrize("suffix", ["weight_scale", "weight_scale_inv", "input_scale", "scales", "biases", "qzeros"])
def test_scales_beside_weights_are_refused(suffix, model):
    error = refusal(changed(model, {PROJECTION.replace("weight", suffix): torch.ones(1)}))
    assert "its weights are quantized, with scales beside them" in error.message
    assert suffix in error.message


def test_packed_weights_without_their_names_are_refused_as_quantized(model):
    tensors = {k: v for k, v in load_file(model / "model.safetensors").items() if k != PROJECTION}
    tensors[PROJECTION.replace("weight", "qweight")] = torch.zeros(8, 128, dtype=torch.int32)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    error = refusal(model)
    assert "layers.1.mlp.up_proj.weight: missing" in error.message
    assert "not quantized" in error.hint


def test_adapters_that_are_not_merged_are_refused(model):
    held = load_file(model / "model.safetensors")
    held[PROJECTION.replace(".weight", ".base_layer.weight")] = held.pop(PROJECTION)
    held[PROJECTION.replace(".weight", ".lora_A.default.weight")] = torch.zeros(4, 64)
    save_file(held, model / "model.safetensors", metadata={"format": "pt"})
    assert "merge" in refusal(model).hint


@pytest.mark.parametrize("rows", [120, 136])
def test_a_vocabulary_of_another_size_names_the_tensor_and_both_sizes(rows, model):
    error = refusal(changed(model, {"model.embed_tokens.weight": torch.zeros(rows, 64)}))
    assert f"model.embed_tokens.weight has [{rows}, 64], config.json says [128, 64] (vocab_size 128)" in error.message
    assert "vocab_size" in error.hint


def test_a_vocabulary_head_of_another_size_does_not_matter(model):
    load_critic(read_model(changed(model, {"lm_head.weight": torch.zeros(136, 64), "lm_head.bias": torch.zeros(136)})))


def test_more_layers_than_the_configuration_has_are_refused(model):
    error = refusal(changed(model, {}, num_hidden_layers=1))
    assert "model.layers.1." in error.message
    assert "llama as config.json describes it has no such part" in error.message


def test_a_name_before_every_name_is_told(model):
    held = {f"_orig_mod.{name}": tensor for name, tensor in load_file(model / "model.safetensors").items()}
    save_file(held, model / "model.safetensors", metadata={"format": "pt"})
    assert "begin with '_orig_mod'" in refusal(model).hint


def test_layers_that_predict_ahead_and_old_constants_are_no_part_of_a_critic(model):
    more = {
        "model.layers.2.eh_proj.weight": torch.zeros(64, 128),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8),
        "mtp.layers.0.mlp.up_proj.weight": torch.zeros(96, 64),
    }
    source = read_model(changed(model, more, num_nextn_predict_layers=1))
    assert source.head is None
    changed(model, {}, num_nextn_predict_layers=0)
    assert "model.layers.2.eh_proj.weight" in refusal(model).message


@pytest.mark.parametrize("name", ["Qwen3-MoE", "DeepSeek-V3, Kimi-K2, Moonlight", "GPT-OSS", "Qwen3.5 (text)", "GPT-2"])
def test_other_forms_of_storage_have_their_place(name, tmp_path):
    """Experts stored one by one, a name before the names, tied embeddings: what transformers loads is loaded."""
    model = AutoModelForCausalLM.from_config(text_config(name))
    model.save_pretrained(tmp_path)
    source = read_model(tmp_path)
    assert not source.placement.left_over
    trunk = load_critic(source).trunk.state_dict()
    theirs = model.base_model.state_dict()
    assert trunk.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in trunk.items())
