"""The command: what it writes, tells and refuses; nothing stands under the name that was not compared."""

import importlib.metadata
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from small_critics import critic_of, tensors_of, token_ids, values_of
from support import branching_rollouts, write_shard

from critic_train.errors import ConfigError, ModelError
from critic_train.events import run_to_end
from critic_train.export import export as exporting
from critic_train.export.systems import SYSTEMS
from critic_train.settings import ExportSettings
from critic_train.stopping import StopRequest
from critic_train.weights.loading import load_critic, read_model
from critic_train.weights.saving import save_critic


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_critic(critic_of("Llama"), folder, None)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_shard(tmp_path_factory.mktemp("data") / "a.parquet", branching_rollouts())


def export(model, folder, to, **more):
    settings = ExportSettings(paths=[str(model), str(folder)], to=to, device="cpu", **more)
    return run_to_end(exporting.export(settings)).result


@pytest.mark.parametrize("to", [name for name in SYSTEMS if name not in ("openrlhf", "nemo-rl")])
def test_what_is_written_is_read_by_model_again(to, model, tmp_path):
    """Both directions: --model takes what an export wrote, with the same values."""
    result = export(model, tmp_path / "out", to)
    assert (result["status"], result["bias"]["value"]) == ("finished", 0.25)
    assert result["compared"]["largest_difference"] <= 1e-5
    assert result["compared"]["values"] == 8 * 47
    critic = load_critic(read_model(tmp_path / "out")).eval()
    torch.testing.assert_close(values_of(critic), values_of(critic_of("Llama")), rtol=0, atol=1e-5)


def test_a_head_without_a_bias_is_fitted_to_the_states(model, data, tmp_path):
    result = export(model, tmp_path / "out", "openrlhf", data=[str(data)])
    assert result["bias"]["value"] == 0.25
    assert result["bias"]["fitted_to_response_tokens"] == int(branching_rollouts().response_mask.sum())
    assert {name for name in tensors_of(tmp_path / "out") if not name.startswith("model.")} == {"score.weight"}
    # The change that is told is that of the rollouts' own values.
    rollouts = branching_rollouts()
    ids, mask = rollouts.input_ids.astype(np.int64), rollouts.response_mask
    old, new = critic_of("Llama"), load_critic(read_model(tmp_path / "out")).eval()
    values_of(old), values_of(new)  # which give both transformers' own attention
    largest = 0.0
    with torch.no_grad():
        for start, stop in zip(rollouts.offsets[:-1].tolist(), rollouts.offsets[1:].tolist(), strict=True):
            alone = torch.from_numpy(ids[start:stop])[None]
            change = [c.head(c.trunk(input_ids=alone).last_hidden_state)[0, :-1] for c in (old, new)]
            read = torch.from_numpy(mask[start + 1 : stop])
            largest = max(largest, float((change[0] - change[1])[read].abs().max()))
    assert result["bias"]["largest_change"] == pytest.approx(largest, rel=1e-3)


def test_a_bias_is_never_dropped_in_silence(model, tmp_path):
    with pytest.raises(ConfigError, match=r"OpenRLHF's value head has no bias, and this critic's is 0\.25") as caught:
        export(model, tmp_path / "out", "openrlhf")
    assert "--data" in caught.value.hint
    assert not (tmp_path / "out").exists()


def test_where_it_is_kept_it_is_told_where(model, tmp_path):
    result = export(model, tmp_path / "out", "openrlhf", bias="keep")
    assert result["bias"] == {"value": 0.25, "where": "mean -0.25 and std 1 in config.json"}
    assert result["compared"]["largest_difference"] <= 1e-5


def test_values_that_differ_leave_nothing_behind(model, tmp_path, monkeypatch):
    def spoilt(folder, critic):
        written = SYSTEMS["vllm"].adapt(folder, critic)
        tensors = tensors_of(folder)
        tensors["score.weight"] = tensors["score.weight"] * 1.01
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return written

    monkeypatch.setitem(exporting.SYSTEMS, "trl", replace(SYSTEMS["trl"], adapt=spoilt))
    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(ModelError, match=r"values differ by .* from this critic's"):
        export(model, tmp_path / "out", "trl")
    assert list(tmp_path.iterdir()) == []


def missing(package):
    raise importlib.metadata.PackageNotFoundError(package)


def test_a_directory_that_stands_is_not_touched(model, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a").write_text("b")
    with pytest.raises(ConfigError, match="exists already"):
        export(model, tmp_path / "out", "vllm")
    assert (tmp_path / "out" / "a").read_text() == "b"


@pytest.mark.parametrize(("to", "family"), [("verl", "Gemma3Text"), ("slime", "GPT2")])
def test_an_architecture_that_the_system_cannot_load_is_refused(to, family, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    save_critic(critic_of(family), folder, None)
    with pytest.raises(ModelError, match=r"lacks for gemma3_text|converts no gpt2"):
        export(folder, tmp_path / "out", to)


def test_sequences_of_the_data_are_compared(model, data, tmp_path):
    rollouts = branching_rollouts()
    result = export(model, tmp_path / "out", "transformers", data=[str(data)])
    assert result["compared"]["values"] == int(rollouts.lengths[:8].sum()) - 8


def test_a_stop_writes_nothing(model, data, tmp_path):
    settings = ExportSettings(paths=[str(model), str(tmp_path / "out")], to="openrlhf", data=[str(data)], device="cpu")
    ended = run_to_end(exporting.export(settings, StopRequest(signal_number=2)))
    assert (ended.status, ended.signal_number) == ("interrupted", 2)
    assert not (tmp_path / "out").exists()


def test_token_ids_are_within_the_vocabulary():
    assert int(token_ids().max()) < 128
