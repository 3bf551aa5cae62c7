"""Whole runs from directories as people have them: what is trained, written and read again is what was there."""

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from architectures import save_multimodal, text_config
from safetensors.torch import load_file, save_file
from support import readable_rollouts, small_config, write_shard
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

from critic_train.errors import DataError
from critic_train.events import Event, Notice, RunEnded
from critic_train.predict.predict import predict
from critic_train.rollouts import Rollouts
from critic_train.settings import FitSettings, PredictSettings, VerifySettings
from critic_train.stopping import StopRequest
from critic_train.training.fit import fit
from critic_train.verify.verify import verify


def rollouts() -> Rollouts:
    made = readable_rollouts(6, seed=1)
    return dataclasses.replace(made, input_ids=made.input_ids % 100)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shard(tmp_path_factory.mktemp("rollouts") / "a.parquet", rollouts()).parent


def run(shards: Path, model: Path, out: Path, **flags: object) -> list[Event]:
    common = {"batch_size": 12, "max_steps": 2, "device": "cpu", "no_report": True, "val_fraction": 0.0, "lr": 1e-3}
    settings = FitSettings(data=[str(shards)], model=str(model), out=str(out), **(common | flags))  # type: ignore[arg-type]
    return list(fit(settings, StopRequest()))


def told(events: list[Event]) -> str:
    return "\n".join(event.message for event in events if isinstance(event, Notice))


def predicted(shards: Path, model: Path, to: Path) -> np.ndarray:
    """float32 [M]: what `predict` writes for the response tokens."""
    (*_, last) = predict(PredictSettings(data=[str(shards)], model=str(model), to=str(to)), StopRequest())
    assert isinstance(last, RunEnded)
    values = pq.read_table(to / "a.parquet")["values"].to_pylist()
    return np.concatenate([np.asarray(v, dtype=np.float32) for v in values])[rollouts().response_mask]


def alone(directory: Path) -> np.ndarray:
    """float32 [M]: transformers' token classifier on each rollout by itself; nothing of it is missing."""
    model, report = AutoModelForTokenClassification.from_pretrained(directory, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    data, values = rollouts(), []
    for start, stop in itertools.pairwise(data.offsets.tolist()):
        ids = torch.from_numpy(data.input_ids[start:stop].astype(np.int64))[None]
        with torch.no_grad():
            logits = model.eval()(input_ids=ids, use_cache=False).logits[0, :, 0].numpy()
        values.append(logits[np.flatnonzero(data.response_mask[start:stop]) - 1])
    return np.concatenate(values)


@pytest.mark.parametrize(
    "name",
    ["Qwen3-MoE", pytest.param("Mixtral", marks=pytest.mark.slow), pytest.param("GPT-OSS", marks=pytest.mark.slow)],
)
def test_adapters_on_a_mixture_of_experts_end_in_checkpoints_that_all_load(name, shards, tmp_path):
    pytest.importorskip("peft")
    base, out = tmp_path / "base", tmp_path / "out"
    AutoModelForCausalLM.from_config(text_config(name)).save_pretrained(base)
    events = run(shards, base, out, train="lora", lora_rank=4)
    assert "without any, and not trained: " in told(events)
    assert "mlp.experts" in told(events)
    (*_, verdict) = verify(VerifySettings(target=[str(out)]))
    assert verdict.result["sound"], verdict.result
    checkpoint = next((out / "checkpoints").iterdir())
    expected = alone(checkpoint)
    assert np.abs(predicted(shards, out, tmp_path / "predicted") - expected).max() <= 1e-5 * np.abs(expected).max()


def test_full_training_trains_all_of_a_model_beside_which_an_adapter_lies(shards, tmp_path):
    pytest.importorskip("peft")
    base, out = tmp_path / "base", tmp_path / "out"
    AutoModelForCausalLM.from_config(small_config("Llama")).save_pretrained(base)
    place = "base_model.model.model.layers.0.self_attn.q_proj"
    adapter = {f"{place}.lora_A.weight": torch.ones(4, 64), f"{place}.lora_B.weight": torch.ones(64, 4)}
    save_file(adapter, base / "adapter_model.safetensors")
    raw = {"peft_type": "LORA", "base_model_name_or_path": str(base), "r": 4, "target_modules": ["q_proj"]}
    (base / "adapter_config.json").write_text(json.dumps(raw))
    assert "PEFT adapter beside its weights" in told(run(shards, base, out))
    before = load_file(base / "model.safetensors")
    after = load_file(next((out / "checkpoints").iterdir()) / "model.safetensors")
    moved = {name: float((after[name] - before[name]).abs().max()) for name in before if name in after}
    assert len(moved) == 20  # the trunk of two layers
    assert all(0 < step < 0.01 for step in moved.values()), moved


def test_a_multimodal_directory_is_trained_resumed_and_read_by_transformers(shards, tmp_path):
    base, out, again = tmp_path / "base", tmp_path / "out", tmp_path / "again"
    save_multimodal("Qwen3.5", base)
    (base / "tokenizer.json").write_text("{}")
    assert "is multimodal (qwen3_5)" in told(run(shards, base, out, checkpoint_every=1))
    run(shards, base, again, lr_schedule="constant", warmup_steps=0, eval_every=5, checkpoint_every=1)
    long = {"lr_schedule": "constant", "warmup_steps": 0, "eval_every": 5, "max_steps": 4}
    run(shards, base, again, **long)
    run(shards, base, tmp_path / "undisturbed", **long)
    last = [path / "checkpoints" / "step-00000004" for path in (again, tmp_path / "undisturbed")]
    assert (last[0] / "model.safetensors").read_bytes() == (last[1] / "model.safetensors").read_bytes()
    assert (last[0] / "tokenizer.json").exists()
    expected = alone(last[0])
    assert np.abs(predicted(shards, last[0], tmp_path / "p") - expected).max() <= 1e-5 * np.abs(expected).max()


def test_rollouts_with_placeholders_are_bad_rows(tmp_path):
    base = save_multimodal("InternVL 3", tmp_path / "base")
    data = rollouts()
    data.input_ids[2] = 120
    shards = write_shard(tmp_path / "data" / "a.parquet", data).parent
    with pytest.raises(DataError, match=r"1 with placeholders of images, videos or sounds[\s\S]*token id 120"):
        run(shards, base, tmp_path / "out")
    events = run(shards, base, tmp_path / "out", on_bad_rows="skip", max_steps=1)
    assert events[-1].status == "finished"
    with pytest.raises(DataError, match="placeholders"):  # the checkpoint knows them as well
        predicted(shards, tmp_path / "out", tmp_path / "p")
