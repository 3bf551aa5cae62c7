"""Model directories from anywhere: what they may not ask for, and what is refused before it is allocated."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import text_config
from support import small_config
from transformers import Gemma3nTextConfig, GPT2Config, LlamaConfig, Mamba2Config, MixtralConfig, PreTrainedConfig

from critic_train.errors import ModelError
from critic_train.model_files.config import attention_width, config_size
from critic_train.weights.loading import build_critic, load_critic, read_model
from critic_train.weights.saving import copy_tokenizer, save_critic


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sound")
    save_critic(build_critic(small_config("Llama"), seed=0), path, None)
    return path


@pytest.fixture
def model(sound: Path, tmp_path: Path) -> Path:
    for file in sound.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def configured(model: Path, **changes: Any) -> Path:
    raw = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**raw, **changes}))
    return model


@pytest.mark.parametrize("key", ["_attn_implementation_internal", "_attn_implementation", "attn_implementation"])
def test_a_kernel_that_a_configuration_names_is_never_fetched(model: Path, key: str) -> None:
    source = read_model(configured(model, **{key: "somebody/kernel"}))
    assert "somebody" not in json.dumps(source.config.to_dict())
    assert load_critic(source).trunk.config._attn_implementation == "critic_train_forest"


def test_code_beside_a_known_model_is_not_run(model: Path) -> None:
    (model / "evil.py").write_text(f"open({str(model / 'ran')!r}, 'w')\nclass Config: ...\nclass Model: ...")
    configured(model, auto_map={"AutoConfig": "evil.Config", "AutoModel": "evil.Model"})
    load_critic(read_model(model))
    assert not (model / "ran").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_size": 2**31}, "describes hidden_size 2,147,483,648, its weights hold"),
        ({"vocab_size": 2**40}, "describes vocab_size 1,099,511,627,776, its weights hold"),
        ({"intermediate_size": 10**12}, "describes intermediate_size 1,000,000,000,000, its weights hold"),
        ({"num_hidden_layers": 10**9}, "describes num_hidden_layers 1,000,000,000, its weights hold 22 tensors"),
        ({"intermediate_size": 60_000, "num_hidden_layers": 40}, "describes a model of"),
        ({"hidden_size": 0}, "found hidden_size 0, expected a whole number above 0"),
        ({"vocab_size": -5}, "found vocab_size -5, expected a whole number above 0"),
        ({"vocab_size": "many"}, "vocab_size"),
        ({"hidden_size": [64]}, "hidden_size"),
        ({"max_position_embeddings": -1}, "max_position_embeddings"),
        ({"num_attention_heads": 0}, "config.json"),
        ({"rope_parameters": "x" * 100}, "config.json"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "its weights are quantized"),
        ({"model_type": 7}, "config.json"),
    ],
    ids=str,
)
def test_a_configuration_is_held_against_the_weights(model: Path, changes: dict[str, Any], said: str) -> None:
    configured(model, **changes)
    with pytest.raises(ModelError) as caught:
        read_model(model)
    assert said in caught.value.message


def test_a_rotary_base_that_rope_scaling_puts_out_of_force_is_refused(model: Path) -> None:
    """The edit that model cards name for a longer context, on what transformers 5 wrote; what transformers 4 wrote has
    the base beside it, and is read."""
    rope = {"rope_type": "default", "rope_theta": 1e6}
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    configured(model, rope_parameters=rope, rope_theta=1e6, rope_scaling=yarn)
    assert read_model(model).config.rope_parameters["rope_theta"] == 1e6
    raw = json.loads((model / "config.json").read_text())
    del raw["rope_theta"]
    (model / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ModelError, match=r"pass over rope_theta 1e\+06") as caught:
        read_model(model)
    assert "into rope_parameters" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("config", "width"),
    [
        (LlamaConfig(hidden_size=96, num_attention_heads=6), 96),
        (LlamaConfig(hidden_size=96, num_attention_heads=6, head_dim=32), 192),
        (MixtralConfig(hidden_size=96, num_attention_heads=6, head_dim=None), 96),  # as Mixtral is published
        (GPT2Config(n_embd=96, n_head=6), 96),
        (text_config("Gemma 4 (text)"), 4 * 32),  # 16 in its layers of sliding attention
        (Mamba2Config(), 0),
    ],
    ids=lambda value: value.model_type if isinstance(value, PreTrainedConfig) else None,
)
def test_the_width_of_attention_is_that_of_its_widest_layer(config: PreTrainedConfig, width: int) -> None:
    assert attention_width(config) == width


def test_a_size_may_be_missing_or_differ_between_layers() -> None:
    assert config_size(GPT2Config(n_inner=None), "n_inner") == 0
    assert config_size(Mamba2Config(), "num_key_value_heads") == 0
    assert config_size(Gemma3nTextConfig(intermediate_size=[64, 128], num_hidden_layers=2), "intermediate_size") == 128
    assert config_size(text_config("Gemma 4 (text)"), "num_key_value_heads") == 2


def test_architectures_that_are_no_list_are_passed_over_or_refused(model: Path) -> None:
    """transformers 5.17 looks at them and refuses; 5.23 does not."""
    configured(model, architectures=7)
    try:
        found = read_model(model).architecture
    except ModelError as error:
        found = error.message
    assert found == "" or "architectures" in found


def spoil(content: bytes, name: str = "model.safetensors") -> Callable[[Path], None]:
    return lambda model: (model / name).write_bytes(content) and None  # type: ignore[func-returns-value]


def header(text: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text


TENSOR = '{"x": {"dtype": "F32", "shape": %s, "data_offsets": [0, %d]}}'


@pytest.mark.parametrize(
    "harm",
    [
        spoil(b""),
        spoil((2**63).to_bytes(8, "little") + b"{}"),
        spoil((10**8 + 1).to_bytes(8, "little") + b"{}" * 50),
        spoil(header(b"{" * 5000)),
        spoil(header((TENSOR % ("[1000000000000]", 4)).encode()) + bytes(4)),
        spoil(header((TENSOR % ("[-1]", 4)).encode()) + bytes(4)),
        spoil(header((TENSOR % ("[1]", 2**62)).encode()) + bytes(4)),
        spoil(header(b'{"x": 3}')),
        spoil(b'{"a":' * 100_000, "config.json"),
        spoil(b"[]", "config.json"),
        spoil(b"\xff\xfe", "config.json"),
        spoil(b" " * (2**26 + 1), "config.json"),
    ],
    ids=range(12),
)
def test_headers_and_json_that_lie(model: Path, harm: Callable[[Path], None]) -> None:
    harm(model)
    with pytest.raises(ModelError):
        read_model(model)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", 7, None, ["x"]])
def test_an_index_stays_in_its_directory(model: Path, name: object) -> None:
    (model / "model.safetensors").rename(model / "elsewhere.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": name}}))
    with pytest.raises(ModelError):
        read_model(model)


def test_only_a_directory_s_own_files_are_copied_into_a_checkpoint(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("of this machine")
    model, cache, target = tmp_path / "model", tmp_path / "hub" / "snapshots" / "abc", tmp_path / "out"
    for folder in (model, cache, target, tmp_path / "hub" / "blobs"):
        folder.mkdir(parents=True)
    (model / "vocab.json").write_text("{}")
    (model / "tokenizer.json").symlink_to(secret)
    (model / "tokenizer_config.json").symlink_to(os.path.relpath(secret, model))
    copy_tokenizer(model, target)
    assert [p.name for p in target.iterdir()] == ["vocab.json"]
    (tmp_path / "hub" / "blobs" / "123").write_text("[]")
    (cache / "tokenizer.json").symlink_to("../../blobs/123")
    copy_tokenizer(cache, target)
    assert (target / "tokenizer.json").read_text() == "[]"


def test_half_the_weights_are_told_by_name_and_not_by_number(model: Path) -> None:
    configured(model, num_hidden_layers=3)
    with pytest.raises(ModelError, match=r"layers\.2\.[\w.]+: missing"):
        load_critic(read_model(model))


def test_a_sound_directory_is_read_as_ever(model: Path) -> None:
    assert torch.equal(load_critic(read_model(model)).head.weight, torch.zeros(1, 64))
