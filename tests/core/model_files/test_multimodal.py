"""Multimodal directories give their text trunk: the values of transformers alone, and what else they hold as it was."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch
from architectures import MULTIMODAL, PLACEHOLDER_IDS, save_multimodal
from safetensors.torch import load_file, save_file
from support import branching_rollouts
from transformers import AutoModelForImageTextToText, AutoModelForTokenClassification, Qwen3_5Config

from critic_train.data.row_checks import RowLimits
from critic_train.model.compute import Compute
from critic_train.model.critic import Critic
from critic_train.model.microbatches import predict_values
from critic_train.model.selfcheck import use_stock_attention
from critic_train.model_files.multimodal import placeholder_ids
from critic_train.rollouts import Rollouts
from critic_train.weights.first_pass import limits_of
from critic_train.weights.loading import load_critic, read_model
from critic_train.weights.saving import exported_class, save_critic

CPU = Compute(device=torch.device("cpu"), precision="fp32", max_tokens=10_000)
WRITTEN_AS = {
    "Qwen3.5": "Qwen3_5ForTokenClassification",
    "Gemma 3": "Gemma3TextModel",
    "Mistral-Small 3": "MistralForTokenClassification",
    "InternVL 3": "Qwen2ForTokenClassification",
    "Qwen2.5-VL": "Qwen2_5_VLTextModel",
}


def text_rollouts() -> Rollouts:
    rollouts = branching_rollouts()
    return dataclasses.replace(rollouts, input_ids=rollouts.input_ids % 100)


def with_head(critic: Critic) -> Critic:
    with torch.no_grad():
        critic.head.weight.normal_(generator=torch.Generator().manual_seed(1))
        critic.head.bias.fill_(0.25)
    return critic.eval()


def rows(critic: Critic) -> np.ndarray:
    use_stock_attention(critic)
    values = predict_values(critic, text_rollouts(), CPU, forest=False)
    assert values is not None
    return values[text_rollouts().response_mask]


def alone(model: torch.nn.Module, kind: str) -> list[torch.Tensor]:
    """What another program's model gives for each rollout by itself: float32 [tokens, ...]."""
    rollouts, states = text_rollouts(), []
    for start, stop in zip(rollouts.offsets[:-1].tolist(), rollouts.offsets[1:].tolist(), strict=True):
        ids = torch.from_numpy(rollouts.input_ids[start:stop].astype(np.int64))[None]
        with torch.no_grad():
            states.append(getattr(model(input_ids=ids, use_cache=False), kind)[0])
    return states


def paired(per_token: list[torch.Tensor]) -> np.ndarray:
    """[M]: of each rollout's [tokens], those from which a response token is chosen."""
    mask, offsets = text_rollouts().response_mask, text_rollouts().offsets
    parts = [mask[a:b] for a, b in itertools.pairwise(offsets)]
    return np.concatenate([v.numpy()[np.flatnonzero(m) - 1] for v, m in zip(per_token, parts, strict=True)])


@pytest.mark.parametrize("name", ["Qwen2.5-VL", "Qwen3.5", "Gemma 3", "Mistral-Small 3", "Llama 4", "InternVL 3"])
def test_the_text_trunk_gives_what_the_whole_model_gives_for_text(name, tmp_path):
    save_multimodal(name, tmp_path)
    source = read_model(tmp_path)
    critic = with_head(load_critic(source))
    assert source.head is None
    assert source.placeholder_ids in (PLACEHOLDER_IDS, PLACEHOLDER_IDS[:1])
    whole = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32).eval()
    base = whole.language_model.model if name == "Llama 4" else whole.model  # Llama 4's gives logits alone
    states = alone(base, "last_hidden_state")
    expected = paired([(s @ critic.head.weight.T + critic.head.bias)[:, 0].detach() for s in states])
    assert np.abs(rows(critic) - expected).max() <= 1e-5 * np.abs(expected).max()


def test_a_token_classifier_of_the_multimodal_type_is_written_where_the_text_type_has_none(tmp_path):
    """So for Qwen3.5. Its other parts are those of the published directory, byte for byte."""
    base, out = tmp_path / "base", tmp_path / "out"
    save_multimodal("Qwen3.5", base)
    (base / "preprocessor_config.json").write_text("{}")
    out.mkdir()
    critic = with_head(load_critic(read_model(base)))
    with torch.no_grad():
        critic.trunk.norm.weight.add_(0.5)
    save_critic(critic, out, base)
    assert (out / "preprocessor_config.json").exists()
    model, report = AutoModelForTokenClassification.from_pretrained(out, output_loading_info=True)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert type(model).__name__ == "Qwen3_5ForTokenClassification"
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected = paired([logits[:, 0] for logits in alone(model.eval(), "logits")])
    assert np.abs(rows(critic) - expected).max() <= 1e-5 * np.abs(expected).max()
    before, after = load_file(base / "model.safetensors"), load_file(out / "model.safetensors")
    visual = [name for name in before if "visual" in name]
    assert len(visual) > 10
    assert all(after[name].dtype == torch.bfloat16 and torch.equal(after[name], before[name]) for name in visual)
    again = read_model(out)
    assert (again.head, again.placeholder_ids) == ("score", PLACEHOLDER_IDS)
    assert np.array_equal(rows(load_critic(again).eval()), rows(critic))


@pytest.mark.parametrize("name", WRITTEN_AS)
def test_what_is_written_loads_again_and_knows_the_placeholders(name, tmp_path):
    base, out = tmp_path / "base", tmp_path / "out"
    save_multimodal(name, base)
    out.mkdir()
    source = read_model(base)
    critic = with_head(load_critic(source))
    assert exported_class(critic) == WRITTEN_AS[name]
    save_critic(critic, out, base)
    assert json.loads((out / "config.json").read_text())["architectures"] == [WRITTEN_AS[name]]
    again = read_model(out)
    assert again.placeholder_ids == source.placeholder_ids
    assert np.array_equal(rows(load_critic(again).eval()), rows(critic))
    if WRITTEN_AS[name].endswith("ForTokenClassification"):
        _, report = AutoModelForTokenClassification.from_pretrained(out, output_loading_info=True)
        assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_without_the_other_parts_the_text_trunk_is_written(tmp_path):
    """Fine-tuning on text may have dropped them: then there is nothing to pass on."""
    save_multimodal("Qwen3.5", tmp_path)
    tensors = {k: v for k, v in load_file(tmp_path / "model.safetensors").items() if "visual" not in k}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert exported_class(load_critic(read_model(tmp_path))) == "Qwen3_5TextModel"


def test_rows_are_held_against_the_placeholders_of_all_models(tmp_path):
    save_multimodal("InternVL 3", tmp_path / "a")
    save_multimodal("LLaVA-OneVision", tmp_path / "b")
    limits = limits_of([read_model(tmp_path / "a"), read_model(tmp_path / "b")])
    assert isinstance(limits, RowLimits)
    assert sorted(limits.placeholder_ids) == [120, 121]


def test_ids_that_begin_or_end_an_image_are_text():
    config = Qwen3_5Config(image_token_id=7, video_token_id=8, vision_start_token_id=9, vision_end_token_id=10)
    assert placeholder_ids(config) == [7, 8]


def test_every_multimodal_architecture_is_read(tmp_path):
    for name in MULTIMODAL.keys() - WRITTEN_AS.keys() - {"Llama 4"}:
        source = read_model(save_multimodal(name, tmp_path / name))
        assert source.multimodal is not None
        assert "is multimodal" in source.notices[0].message
