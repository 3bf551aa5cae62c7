"""What is loaded again gives the values of the critic, and a difference is found."""

import importlib.metadata

import pytest
from small_critics import critic_of, token_ids, values_of

from critic_train.errors import ModelError
from critic_train.export.reloading import largest_difference, reload
from critic_train.export.systems import SYSTEMS
from critic_train.export.written_form import edit_config, rename_tensors
from critic_train.weights.saving import save_critic


def exported(to, folder, family="Llama"):
    critic = critic_of(family)
    folder.mkdir(exist_ok=True)
    save_critic(critic, folder, None)
    return critic, SYSTEMS[to].adapt(folder, critic)


@pytest.mark.parametrize("to", SYSTEMS)
def test_values_are_those_of_the_critic(to, tmp_path):
    critic, written = exported(to, tmp_path)
    reloaded = reload(to, tmp_path, written)
    assert largest_difference(reloaded, list(token_ids()), list(values_of(critic))) < 1e-6


def test_a_system_that_is_not_installed_is_named(tmp_path, monkeypatch):
    def missing(package):
        raise importlib.metadata.PackageNotFoundError(package)

    _, written = exported("trl", tmp_path)
    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert reload("trl", tmp_path, written).by == "the names of its source (trl is not installed here)"


def test_a_lost_bias_is_a_difference(tmp_path):
    critic, written = exported("openrlhf", tmp_path)
    edit_config(tmp_path, mean=None, std=None)
    values = list(values_of(critic))
    scale = max(float(each.abs().max()) for each in values)
    found = largest_difference(reload("openrlhf", tmp_path, written), list(token_ids()), values)
    assert found == pytest.approx(0.25 / scale, rel=1e-3)


def test_a_tensor_that_is_not_taken_is_refused(tmp_path):
    _, written = exported("transformers", tmp_path)
    rename_tensors(tmp_path, lambda name: "scored.bias" if name == "score.bias" else name)
    with pytest.raises(ModelError, match=r"missing: score\.bias; unexpected: scored\.bias"):
        reload("transformers", tmp_path, written)


def test_the_difference_is_relative_to_values_above_1(tmp_path):
    critic, written = exported("vllm", tmp_path)
    off = [each + 0.5 for each in values_of(critic)]
    largest = max(float(each.abs().max()) for each in off)
    assert largest > 10
    found = largest_difference(reload("vllm", tmp_path, written), list(token_ids()), off)
    assert found == pytest.approx(0.5 / largest, rel=1e-3)
