"""Whole commands on a pretended GPU: what would end or mislead them on a real one, but for what kernels compute.

Run in an environment that build.py made: `ENV/pretend-gpu python -m pytest -m pretend_gpu tests/pretend_gpu`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers
from pretend_gpu_work import ON_THE_PRETENDED_GPU, PATCHED, accept_values
from warm import PRELOADED, context, program

PROJECT = Path(__file__).parents[2]
DATA = PROJECT / "sample_data" / "train"


# peft loads bitsandbytes, which asks for the device: after that no process can be forked that uses it.
context.set_forkserver_preload([name for name in PRELOADED if name != "peft"])


pytestmark = ON_THE_PRETENDED_GPU

MODELS = {
    "Qwen3": {},
    "Llama": {},
    "Llama with heads of 320": {"head_dim": 320},
    "Llama with heads of 20": {"head_dim": 20},
    "Gemma2": {},
    "Gemma2 with a window that cuts": {"sliding_window": 32},
    "GptOss": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen3Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
    "DeepseekV3": {
        "q_lora_rank": 32,
        "kv_lora_rank": 32,
        "qk_rope_head_dim": 32,
        "qk_nope_head_dim": 64,
        "v_head_dim": 64,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 64,
        "first_k_dense_replace": 1,
    },
}

ATTENTION = dict.fromkeys(("Gemma2", "Gemma2 with a window that cuts", "GptOss", "Llama with heads of 20"), ("flex",))
ATTENTION["Llama with heads of 320"] = ("flex", "sdpa")
"""Of soft caps and sinks, and of heads that varlen does not take; varlen for the others. For heads of 320, torch 2.11's
inductor has no template of FlexAttention that fits; that of 2.13 has."""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Makes the directory of a small model of a family, once."""
    folder = tmp_path_factory.mktemp("models")

    def directory(family: str) -> Path:
        path = folder / family
        if not path.exists():
            shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
            latent = {"num_key_value_heads": 2}
            heads = latent if family == "DeepseekV3" else {"num_key_value_heads": 1, "head_dim": 64}
            given = {"vocab_size": 50_000, "max_position_embeddings": 4096} | shape | heads | MODELS[family]
            config = getattr(transformers, f"{family.split()[0]}Config")(**given)
            transformers.AutoModelForCausalLM.from_config(config).save_pretrained(path)
        return path

    return directory


def walk(*arguments: object, cwd: Path = PROJECT, code: int = 0, **machine: object) -> subprocess.CompletedProcess[str]:
    """Run a command of critic-train; it must end with an exit code, without a warning of Python's or a bad launch.

    `machine` is what the device is: `devices=2` for PRETEND_GPU_DEVICES.
    """
    environment = {**os.environ, **{f"PRETEND_GPU_{name.upper()}": str(value) for name, value in machine.items()}}
    ended = program(*map(str, arguments), cwd=cwd, environment=environment, before=accept_values)
    assert ended.returncode == 0, ended.stderr[-3000:] + ended.stdout[-1000:]
    assert "Warning:" not in ended.stderr, ended.stderr
    assert "pretended CUDA:" not in ended.stderr, ended.stderr
    return ended


def fit(out: Path, *arguments: object, **machine: Any) -> dict:
    """Two steps of training; returns run.json."""
    few = ("--max-steps", 2, "--eval-every", 2, "--batch-size", 16, "--no-report", "--val-fraction", 0.05)
    walk("fit", "--data", DATA, "--out", out, *few, *arguments, **machine)
    return json.loads((out / "run.json").read_text())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("packing", ["forest", "rows"])
def test_packings_and_precisions(precision, packing, models, tmp_path):
    record = fit(tmp_path / "run", "--model", models("Qwen3"), "--precision", precision, "--packing", packing)
    attention = {("forest", "bf16"): "varlen", ("forest", "fp32"): "flex"}
    assert record["resolved"]["attention"] == attention.get((packing, precision), "as transformers has it")


@pytest.mark.parametrize("attention", ["sdpa", "flex", "varlen"])
def test_every_kernel(attention, models, tmp_path):
    record = fit(tmp_path / "run", "--model", models("Qwen3"), "--precision", "bf16", "--attention", attention)
    assert record["resolved"]["attention"] == attention


@pytest.mark.parametrize("family", [name for name in MODELS if name != "Qwen3"])
def test_architectures(family, models, tmp_path):
    record = fit(tmp_path / "run", "--model", models(family))
    assert record["resolved"]["attention"] in ATTENTION.get(family, ("varlen",))


@pytest.mark.parametrize(
    "flags",
    [
        ("--activation-checkpointing", "layer"),
        ("--activation-checkpointing", "selective"),
        ("--offload", "optimizer"),
        ("--offload", "all"),
        ("--offload", "activations", "--activation-checkpointing", "layer-tiles"),
        ("--optimizer", "adamw-8bit"),
        ("--compile",),
        ("--compile", "--activation-checkpointing", "layer"),
        ("--train", "head"),
        ("--train", "last-1"),
        ("--train", "lora"),
        ("--old-values", "epoch"),
        ("--lm-loss-weight", 0.1),
    ],
    ids=lambda flags: " ".join(map(str, flags)),
)
def test_what_is_trained_and_kept(flags, models, tmp_path):
    fit(tmp_path / "run", "--model", models("Qwen3"), *flags)


def test_what_a_run_chooses_for_a_gpu(models, tmp_path):
    record = fit(tmp_path / "run", "--model", models("Qwen3"))
    assert record["chosen"] == {
        "precision": "bf16",
        "max_tokens": 65_536,
        "activation_checkpointing": "none",
        "offload": "none",
        "sequence_parallel": 1,
        "compile": False,
    }
    assert "too few to pay for it" in record["recipe"]["compile"]["reason"]


def test_a_long_run_compiles_by_itself_and_goes_on_so(models, tmp_path, monkeypatch):
    monkeypatch.setenv("LONG_RUN_SECONDS", "0")  # see patched/sitecustomize.py
    run, flags = tmp_path / "run", ("--lr-schedule", "constant", "--warmup-steps", 0, "--activation-checkpointing")
    began = fit(run, "--model", models("Qwen3"), *flags, "none")
    assert "compiled and" in began["recipe"]["compile"]["reason"]
    monkeypatch.delenv("LONG_RUN_SECONDS")
    assert fit(run, "--model", models("Qwen3"), *flags, "none", "--max-steps", 3)["chosen"] == began["chosen"]


def test_a_run_that_was_stopped_goes_on_and_is_judged_and_predicts(models, tmp_path):
    run, flags = tmp_path / "run", ("--checkpoint-every", 1, "--lr-schedule", "constant", "--warmup-steps", 0)
    fit(run, "--model", models("Qwen3"), *flags)
    fit(run, "--model", models("Qwen3"), *flags, "--max-steps", 3)
    walk("eval", "--model", run, "--data", DATA)
    walk("predict", "--model", run, "--data", DATA, "--to", tmp_path / "predicted")
    assert list((tmp_path / "predicted").glob("*.parquet"))


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--offload", "optimizer"),
        ("--offload", "all"),
        ("--optimizer", "adamw-8bit"),
        ("--train", "lora"),
        ("--train", "head"),
        ("--sequence-parallel", "2"),
    ],
    ids=" ".join,
)
def test_two_ranks(flags, models, tmp_path):
    fit(tmp_path / "run", "--model", models("Qwen3"), "--nproc", 2, *flags, devices=2)


def test_two_ranks_evaluate(models, tmp_path):
    fit(tmp_path / "run", "--model", models("Qwen3"), "--nproc", 2, "--checkpoint-every", 1, devices=2)
    walk("eval", "--model", tmp_path / "run", "--data", DATA, "--nproc", 2, devices=2)


def test_a_dry_run(models, tmp_path):
    ended = walk("fit", "--dry-run", "--data", DATA, "--model", models("Qwen3"), "--out", tmp_path / "run", "--json")
    assert json.loads(ended.stdout)["memory"]["device"] == pytest.approx(79.1 * 2**30)


def test_expandable_segments(models, tmp_path):
    allocator = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    fit(tmp_path / "run", "--model", models("Qwen3"), environment=allocator)


def test_a_rollout_beyond_the_budget_is_cut_over_two_of_four_ranks(models, tmp_path):
    record = fit(tmp_path / "run", "--model", models("Qwen3"), "--nproc", 4, "--max-tokens", 80, devices=4)
    assert record["chosen"]["sequence_parallel"] == 2


def test_memory_that_runs_out_lowers_the_budget(models, tmp_path):
    run = tmp_path / "run"
    few = ("--max-steps", 2, "--eval-every", 2, "--no-report", "--max-tokens", 60_000, "--batch-size", 512)
    ended = walk("fit", "--data", DATA, "--out", run, "--model", models("Qwen3"), *few, gib=0.3)
    assert "memory ran out with 60,000 tokens at once" in ended.stderr


def of_python(*arguments: object) -> str:
    """What a Python program prints on the pretended GPU; its comparisons of values pass."""
    path = os.pathsep.join([str(PATCHED), str(PROJECT / "tests" / "pretend_gpu"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, *map(str, arguments)]
    ended = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, cwd=PROJECT, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr[-3000:] + ended.stdout[-1000:]
    return ended.stdout


def test_long_rollouts_are_checked_within_the_memory_of_a_step():
    """Heads that share keys have no operator in float32 that does not write the scores out: 48 GiB a layer here."""
    table = "tests/pretend_gpu/memory_table.py"
    found = of_python(table, "--model", "1.5B", "--layers", 2, "--length", 32_768, "--kinds", "auto", "--json")
    row = json.loads(found.splitlines()[-1])
    assert row["self_check"] <= 1.1 * row["peak"] < 30


def test_attention_with_a_mask_is_not_left_to_cudnn():
    """Gradients that are not finite have been reported of it (pytorch/pytorch#196678)."""
    code = """
import torch
from critic_train.model.compute import resolve_device
device = resolve_device("cuda")
query, key, value = torch.randn(3, 1, 4, 640, 64, device=device, dtype=torch.bfloat16)
mask = torch.ones(640, 640, dtype=torch.bool, device=device).tril()[None, None]
print(torch.nn.attention.SDPBackend(torch._fused_sdp_choice(query, key, value, mask)).name)
"""
    assert of_python("-c", code).split() == ["EFFICIENT_ATTENTION"]


def test_moments_on_the_host_lock_no_more_memory_than_they_have():
    """torch's own pinned memory comes in powers of two."""
    code = """
import torch
from counts import Watch
from critic_train.training.host_adamw import HostAdamW
parameter = torch.nn.Parameter(torch.empty(9_000_000, device="cuda"))
with Watch() as watch:
    state = HostAdamW([{"params": [parameter]}]).new_state(parameter)
print(watch.sizes["hostalloc"] / (8 * parameter.numel()))
"""
    assert 1 <= float(of_python("-c", code)) < 1.01


@pytest.mark.parametrize("name", ["gpu", "device"])
def test_the_benchmarks_end(name, tmp_path):
    kept = tmp_path / "found.json"
    more = ("--size", "quick", "--rounds", 1, "--minutes", 120, "--json", kept)
    of_python("-m", "bench", name, *more)
    rows = json.loads(kept.read_text())["benchmarks"][0]["rows"]
    if name == "device":
        assert {row["how"] for row in rows} == {"ended"}
