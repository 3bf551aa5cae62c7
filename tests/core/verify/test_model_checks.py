"""Whether a model directory loads and predicts finite values."""

from dataclasses import astuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import small_config

from critic_train.run.manifest import write_manifest
from critic_train.verify import model_checks
from critic_train.weights.loading import build_critic
from critic_train.weights.saving import save_critic


def verify_model(path):
    """(what, state, message) of the finding."""
    return astuple(model_checks.verify_model(path))


@pytest.fixture
def directory(tmp_path):
    save_critic(build_critic(small_config("Qwen2"), seed=0), tmp_path, None)
    return tmp_path


def test_a_sound_model_with_and_without_a_manifest(directory):
    message = "no manifest to hold it against; loads, predicts finite values"
    assert verify_model(directory) == (directory.name, "sound", message)
    write_manifest(directory, 1)
    assert verify_model(directory) == (directory.name, "sound", "digests hold, loads, predicts finite values")


def test_content_that_changed_after_the_manifest(directory):
    write_manifest(directory, 1)
    (directory / "config.json").write_text("{}")
    _, state, message = verify_model(directory)
    assert state == "unsound"
    assert message.startswith("damaged: config.json has ")


def test_numbers_that_are_not_finite_are_counted_and_the_first_is_named(directory):
    weights = load_file(directory / "model.safetensors")
    name = next(name for name in weights if "layers.1.mlp" in name)
    for changed in (name, "score.weight"):
        weights[changed] = torch.full_like(weights[changed], torch.nan)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    _, state, message = verify_model(directory)
    assert state == "unsound"
    assert "2 tensors hold NaN or infinite numbers: " in message


def test_finite_weights_may_predict_values_that_are_not(directory):
    weights = load_file(directory / "model.safetensors")
    weights["score.weight"] = torch.full_like(weights["score.weight"], 3e38)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    assert verify_model(directory)[1:] == ("unsound", "it predicts NaN or infinite values")


def test_what_cannot_be_loaded_is_unsound(directory):
    (directory / "model.safetensors").write_bytes(b"PK")
    assert verify_model(directory)[1] == "unsound"
