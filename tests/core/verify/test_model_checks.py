"""Whether a model directory loads and predicts finite values."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import small_config

from critic_train.model.loading import build_critic
from critic_train.model.saving import save_critic
from critic_train.run.manifest import write_manifest
from critic_train.verify.model_checks import verify_model


@pytest.fixture
def directory(tmp_path):
    save_critic(build_critic(small_config("Qwen2"), seed=0), tmp_path, None)
    return tmp_path


def test_a_sound_model_with_and_without_a_manifest(directory):
    finding = verify_model(directory)
    assert (finding.what, finding.state) == (directory.name, "sound")
    assert finding.said == "no manifest to hold it against; loads, predicts finite values"
    write_manifest(directory, 1)
    assert verify_model(directory).said == "digests hold, loads, predicts finite values"


def test_content_that_changed_after_the_manifest(directory):
    write_manifest(directory, 1)
    (directory / "config.json").write_text("{}")
    finding = verify_model(directory)
    assert finding.state == "unsound"
    assert finding.said.startswith("damaged: config.json has ")


def test_numbers_that_are_not_finite_are_counted_and_the_first_is_named(directory):
    weights = load_file(directory / "model.safetensors")
    name = next(name for name in weights if "layers.1.mlp" in name)
    for changed in (name, "score.weight"):
        weights[changed] = torch.full_like(weights[changed], torch.nan)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    finding = verify_model(directory)
    assert finding.state == "unsound"
    assert finding.said.startswith("2 tensors hold NaN or infinite numbers, ")


def test_finite_weights_may_predict_values_that_are_not(directory):
    weights = load_file(directory / "model.safetensors")
    weights["score.weight"] = torch.full_like(weights["score.weight"], 3e38)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    finding = verify_model(directory)
    assert (finding.state, finding.said) == ("unsound", "it predicts NaN or infinite values")


def test_what_cannot_be_loaded_is_unsound(directory):
    (directory / "model.safetensors").write_bytes(b"PK")
    assert verify_model(directory).state == "unsound"
