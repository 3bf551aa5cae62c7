"""What people name by mistake for a model directory, and what they are told to do."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import small_config
from transformers import AutoModelForCausalLM

from critic_train.errors import ModelError
from critic_train.weights.loading import load_critic, read_model


def put(path: Path, *names: str) -> Path:
    """Make files, and folders where a name ends in a slash."""
    for name in names:
        target = path / name
        if name.endswith("/"):
            target.mkdir(parents=True, exist_ok=True)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text("{}")
    return path


VERL = ("model_world_size_2_rank_0.pt", "model_world_size_2_rank_1.pt", "fsdp_config.json", "huggingface/config.json")
CASES: dict[str, tuple[Callable[[Path], Path], str, str]] = {
    "hub id": (lambda path: Path("org/name-1.5B"), "no model directory at org/name-1.5B", "hf download org/name-1.5B"),
    "no such": (lambda path: path / "no" / "such", "no model directory at", "--model takes a run"),
    "gguf file": (lambda path: put(path, "m.gguf") / "m.gguf", "is a file", "--model takes"),
    "hub cache": (
        lambda path: put(path / "models--org--name", "snapshots/abc/config.json", "blobs/"),
        "the hub's cache",
        "models--org--name/snapshots/abc",
    ),
    "adapter": (
        lambda path: put(path, "adapter_config.json", "adapter_model.safetensors"),
        "a PEFT adapter without its base",
        "merge_and_unload()",
    ),
    "adapter with a configuration": (
        lambda path: put(path, "adapter_config.json", "adapter_model.safetensors", "config.json"),
        "a PEFT adapter without its base",
        "merge_and_unload()",
    ),
    "verl critic": (lambda path: put(path / "critic", *VERL), "FSDP checkpoint of verl", "--local_dir {path}/critic "),
    "verl critic's huggingface": (
        lambda path: put(path / "critic", *VERL) / "huggingface",
        "FSDP checkpoint of verl",
        "--local_dir {path}/critic ",
    ),
    "verl step": (
        lambda path: put(path, *(f"critic/{name}" for name in VERL), "actor/config.json"),
        "a training step of verl",
        "{path}/critic",
    ),
    "verl run": (
        lambda path: put(path, "global_step_10/critic/", "latest_checkpointed_iteration.txt"),
        "training steps of verl",
        "global_step_N/critic",
    ),
    "distcp": (lambda path: put(path, ".metadata", "__0_0.distcp"), "distributed.checkpoint", "dcp_to_torch {path}"),
    "ZeRO": (lambda path: put(path, "zero_to_fp32.py", "latest", "global_step5/"), "ZeRO", "zero_to_fp32.py {path}"),
    "ZeRO states": (lambda path: put(path, "mp_rank_00_model_states.pt"), "ZeRO", "zero_to_fp32.py"),
    "Megatron": (
        lambda path: put(path, "latest_checkpointed_iteration.txt", "iter_0000100/mp_rank_00/"),
        "a Megatron checkpoint",
        "Megatron-Bridge",
    ),
    "GGUF": (lambda path: put(path, "model-Q4_K_M.gguf"), "GGUF files", "safetensors weights"),
    "GGUF with a configuration": (lambda path: put(path, "model.gguf", "config.json"), "GGUF files", "safetensors"),
    "maker's format": (
        lambda path: put(path, "consolidated.safetensors", "params.json"),
        "the format of the model's maker",
        "config.json and model.safetensors",
    ),
    "folder of models": (lambda path: put(path, "checkpoint-10/config.json"), "has no config.json", "checkpoint-10"),
    "pickled": (
        lambda path: put(path, "config.json", "pytorch_model.bin"),
        "has no model.safetensors (found pytorch_model.bin)",
        "safetensors only",
    ),
    "no index": (
        lambda path: put(path, "config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
        "has 2 parts",
        "copy the index",
    ),
    "configuration alone": (lambda path: put(path, "config.json"), "has no model.safetensors", "incomplete"),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_no_model_directory_is_named_with_what_to_do(name, tmp_path):
    make, what, remedy = CASES[name]
    path = make(tmp_path)
    with pytest.raises(ModelError) as caught:
        read_model(path)
    assert what in caught.value.message
    assert remedy.format(path=tmp_path) in caught.value.hint


def model(path: Path) -> Path:
    AutoModelForCausalLM.from_config(small_config("Llama")).save_pretrained(path)
    return path


def test_a_git_lfs_pointer_is_told_from_damage(tmp_path):
    model(tmp_path)
    (tmp_path / "model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 988097824\n"
    )
    with pytest.raises(ModelError, match="is a git-lfs pointer") as caught:
        read_model(tmp_path)
    assert "git lfs pull" in caught.value.hint


def test_an_adapter_beside_the_weights_is_not_put_into_them(tmp_path):
    """transformers puts it in without a word where peft is installed, and freezes the rest."""
    pytest.importorskip("peft")
    model(tmp_path)
    layers = [f"base_model.model.model.layers.{layer}.self_attn.q_proj" for layer in (0, 1)]
    adapter = {f"{layer}.lora_A.weight": torch.ones(4, 64) for layer in layers}
    adapter |= {f"{layer}.lora_B.weight": torch.ones(64, 4) for layer in layers}
    save_file(adapter, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    raw = {"peft_type": "LORA", "base_model_name_or_path": str(tmp_path), "r": 4, "target_modules": ["q_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(raw))
    source = read_model(tmp_path)
    assert [(notice.level, "PEFT adapter" in notice.message) for notice in source.notices] == [("warning", True)]
    critic = load_critic(source)
    assert all(parameter.requires_grad for parameter in critic.parameters())
    stored = load_file(tmp_path / "model.safetensors")
    for name, tensor in critic.trunk.state_dict().items():
        assert torch.equal(tensor, stored[f"model.{name}"])


def test_other_files_of_tensors_are_not_passed_over_in_silence(tmp_path):
    model(tmp_path)
    save_file({"x": torch.ones(3, 2)}, tmp_path / "projector.safetensors")
    save_file({"x": torch.ones(1)}, tmp_path / "optimizer.safetensors")
    put(tmp_path, "v_head.pt", "training_args.bin", "pytorch_model.bin", "rng_state_0.pth")
    (notice,) = read_model(tmp_path).notices
    assert notice.message.endswith("not read: projector.safetensors, v_head.pt")
