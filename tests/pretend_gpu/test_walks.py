"""Whole commands on a pretended GPU: what would end or mislead them on a real one, but for what kernels compute.

Run in an environment that build.py made: `ENV/pretend-gpu python -m pytest -m pretend_gpu tests/pretend_gpu`.
"""

import ctypes
import json
import os
import subprocess
from pathlib import Path

import pytest
import transformers
from pretend_gpu_work import accept_values
from warm import PRELOADED, context, program

PROJECT = Path(__file__).parents[2]
DATA = PROJECT / "sample_data" / "train"


# peft loads bitsandbytes, which asks for the device: after that no process can be forked that uses it.
context.set_forkserver_preload([name for name in PRELOADED if name != "peft"])


def is_pretended() -> bool:
    """Whether this process's CUDA is the stand-in."""
    try:
        return hasattr(ctypes.CDLL("libcudart.so.13"), "pretended_name")
    except OSError:
        return False


pytestmark = [
    pytest.mark.pretend_gpu,
    pytest.mark.skipif(not is_pretended(), reason="needs an environment made by tests/pretend_gpu/build.py"),
]

MODELS = {
    "Qwen3": {},
    "Llama": {},
    "Gemma2": {},
    "GptOss": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen3Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
    "DeepseekV3": {
        "q_lora_rank": 32,
        "kv_lora_rank": 32,
        "qk_rope_head_dim": 32,
        "qk_nope_head_dim": 32,
        "v_head_dim": 64,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 64,
        "first_k_dense_replace": 1,
    },
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Makes the directory of a small model of a family, once."""
    folder = tmp_path_factory.mktemp("models")

    def directory(family: str) -> Path:
        path = folder / family
        if not path.exists():
            shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
            heads = {"num_key_value_heads": 2 if family == "DeepseekV3" else 1}
            if family != "DeepseekV3":
                heads["head_dim"] = 64
            config = getattr(transformers, f"{family}Config")(
                vocab_size=50_000, max_position_embeddings=4096, **shape, **heads, **MODELS[family]
            )
            transformers.AutoModelForCausalLM.from_config(config).save_pretrained(path)
        return path

    return directory


def walk(*arguments: object, cwd: Path = PROJECT, code: int = 0, **machine: object) -> subprocess.CompletedProcess[str]:
    """Run a command of critic-train; it must end with an exit code, without a warning of Python's or a bad launch.

    `machine` is what the device is: `devices=2` for PRETEND_GPU_DEVICES.
    """
    environment = {**os.environ, **{f"PRETEND_GPU_{name.upper()}": str(value) for name, value in machine.items()}}
    ended = program(*map(str, arguments), cwd=cwd, environment=environment, before=accept_values)
    assert ended.returncode == code, ended.stderr[-3000:] + ended.stdout[-1000:]
    assert "Warning:" not in ended.stderr, ended.stderr
    assert "pretended CUDA:" not in ended.stderr, ended.stderr
    return ended


def fit(out: Path, *arguments: object, **machine: object) -> dict:
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
    fit(tmp_path / "run", "--model", models(family))


@pytest.mark.parametrize(
    "flags",
    [
        ("--activation-checkpointing", "layer"),
        ("--activation-checkpointing", "selective"),
        ("--offload", "optimizer"),
        ("--offload", "all"),
        ("--optimizer", "adamw-8bit"),
        ("--compile",),
        ("--compile", "--activation-checkpointing", "layer"),
        ("--train", "head"),
        ("--train", "last-1"),
        ("--train", "lora"),
        ("--old-values", "epoch"),
    ],
    ids=" ".join,
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
    }


def test_a_run_that_was_stopped_goes_on_and_is_judged_and_predicts(models, tmp_path):
    run, flags = tmp_path / "run", ("--checkpoint-every", 1, "--lr-schedule", "constant", "--warmup-steps", 0)
    fit(run, "--model", models("Qwen3"), *flags)
    fit(run, "--model", models("Qwen3"), *flags, "--max-steps", 3)
    walk("eval", "--model", run, "--data", DATA)
    walk("predict", "--model", run, "--data", DATA, "--to", tmp_path / "predicted")
    assert list((tmp_path / "predicted").glob("*.parquet"))


@pytest.mark.parametrize(
    "flags",
    [(), ("--offload", "optimizer"), ("--train", "lora"), ("--sequence-parallel", 2)],
    ids=lambda flags: " ".join(map(str, flags)),
)
def test_two_ranks(flags, models, tmp_path):
    fit(tmp_path / "run", "--model", models("Qwen3"), "--nproc", 2, *flags, devices=2)


def test_a_rollout_beyond_the_budget_is_cut_over_two_of_four_ranks(models, tmp_path):
    record = fit(tmp_path / "run", "--model", models("Qwen3"), "--nproc", 4, "--max-tokens", 80, devices=4)
    assert record["chosen"]["sequence_parallel"] == 2


def test_memory_that_runs_out_lowers_the_budget(models, tmp_path):
    run = tmp_path / "run"
    few = ("--max-steps", 2, "--eval-every", 2, "--no-report", "--max-tokens", 60_000, "--batch-size", 512)
    ended = walk("fit", "--data", DATA, "--out", run, "--model", models("Qwen3"), *few, gib=0.45)
    assert "memory ran out with 60,000 tokens at once" in ended.stderr
