"""What verify says of runs, checkpoints and rollouts, sound and spoilt in every way that a disk or a hand can."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file, save_file
from support import readable_rollouts, small_config, write_shard

from critic_train.run.manifest import write_manifest
from critic_train.settings import FitSettings, VerifySettings
from critic_train.stopping import StopRequest
from critic_train.training.fit import fit
from critic_train.verify.verify import verify
from critic_train.weights.loading import build_critic
from critic_train.weights.saving import save_critic


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A folder with data, a base model and the run made of them, two checkpoints kept."""
    folder = tmp_path_factory.mktemp("finished")
    write_shard(folder / "data" / "a.parquet", readable_rollouts(6, seed=1))
    write_shard(folder / "data" / "b.parquet", readable_rollouts(4, seed=2))
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = small_config("Llama", **shape, num_attention_heads=1, num_key_value_heads=1)
    (folder / "model").mkdir()
    save_critic(build_critic(config, seed=0), folder / "model", None)
    settings = FitSettings(
        data=[str(folder / "data")],
        model=str(folder / "model"),
        out=str(folder / "run"),
        max_steps=3,
        batch_size=8,
        val_fraction=0.4,
        checkpoint_every=1,
        device="cpu",
        no_report=True,
    )
    list(fit(settings, StopRequest()))
    return folder


@pytest.fixture
def folder(finished, tmp_path) -> Path:
    """A copy of it to be spoilt; its run.json names the copy's data and model."""
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy, symlinks=True)
    record = copy / "run" / "run.json"
    record.write_text(record.read_text().replace(str(finished), str(copy)))
    return copy


def verified(*targets: Path, **settings: object) -> dict:
    events = list(verify(VerifySettings(target=[str(t) for t in targets], **settings), StopRequest()))
    return events[-1].result


def states(result: dict) -> dict[str, str]:
    return {f["what"]: f["state"] for target in result["targets"] for f in target["findings"]}


def bad(result: dict) -> list[tuple[str, str]]:
    found = [f for target in result["targets"] for f in target["findings"]]
    return [(f["what"], f["said"]) for f in found if f["state"] == "unsound"]


def test_a_finished_run_its_model_and_its_rollouts_are_sound(folder):
    run = folder / "run"
    result = verified(run, run / "best", run / "checkpoints" / "step-00000003", folder / "model", folder / "data")
    assert result["sound"], bad(result)
    assert [target["kind"] for target in result["targets"]] == ["run", "checkpoint", "checkpoint", "model", "rollouts"]
    assert {"run.json", "metrics.jsonl", "result.json", "step-00000003", "rollouts", "base model", "best"} <= set(
        states(verified(run))
    )


def not_a_number(path: Path, manifest: bool) -> None:
    weights = path / "model.safetensors"
    tensors = load_file(weights)
    tensors["score.weight"] = np.full_like(tensors["score.weight"], np.nan)
    save_file(tensors, weights, metadata={"format": "pt"})
    if manifest:
        (path / "manifest.json").unlink()
        write_manifest(path, 3)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("spoil", "what", "said"),
    [
        (lambda f: flip(f / "run/checkpoints/step-00000003/model.safetensors"), "step-00000003", "has changed since"),
        (lambda f: flip(f / "run/checkpoints/step-00000002/optimizer.safetensors"), "step-00000002", "has changed"),
        (lambda f: (f / "run/checkpoints/step-00000002/manifest.json").unlink(), "step-00000002", "incomplete"),
        (lambda f: not_a_number(f / "run/checkpoints/step-00000003", True), "step-00000003", "hold NaN or infinite"),
        (lambda f: shutil.rmtree(f / "run/checkpoints"), "checkpoints", "no complete checkpoint"),
        (lambda f: (f / "run/run.json").write_text("{"), "run.json", "cannot be read"),
        (lambda f: (f / "run/result.json").write_text("[]"), "result.json", "no JSON object"),
        (lambda f: (f / "run/metrics.jsonl").open("a").write("{half"), "metrics.jsonl", "is no JSON"),
        (lambda f: write_shard(f / "data/b.parquet", readable_rollouts(4, seed=9)), "rollouts", "changed: b.parquet"),
        (lambda f: flip(f / "model/model.safetensors"), "base model", "changed since"),
    ],
)
def test_what_is_wrong_with_a_run_is_found(spoil, what, said, folder):
    spoil(folder)
    found = dict(bad(verified(folder / "run")))
    assert said.replace("changed: ", "changed since the run began: ") in found[what]


def test_data_and_model_that_are_gone_are_unknown_not_wrong(folder):
    shutil.rmtree(folder / "data")
    shutil.rmtree(folder / "model")
    result = verified(folder / "run")
    assert result["sound"]
    assert {states(result)[name] for name in ("rollouts", "base model")} == {"unknown"}


def test_a_model_without_a_manifest_is_loaded_and_asked(folder):
    not_a_number(folder / "model", False)
    assert "hold NaN" in bad(verified(folder / "model"))[0][1]
    (folder / "model" / "model.safetensors").write_bytes(b"PK")
    assert not verified(folder / "model")["sound"]


def test_rollouts_are_read_to_their_end_checksums_included(folder):
    checked = folder / "checked.parquet"
    pq.write_table(pq.read_table(folder / "data" / "a.parquet"), checked, write_page_checksum=True, compression="none")
    assert verified(checked)["sound"]
    flip(checked)
    (folder / "empty.parquet").touch()
    rollouts = readable_rollouts(3, seed=4)
    rollouts.returns[rollouts.response_mask] = np.nan
    write_shard(folder / "odd.parquet", rollouts)
    result = verified(checked, folder / "empty.parquet", folder / "odd.parquet", folder / "nothing")
    assert [target["sound"] for target in result["targets"]] == [False] * 4
    assert "rows cannot be used" in bad(result)[2][1]
    assert json.dumps(result, allow_nan=False)


def test_it_changes_nothing(folder):
    before = {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in folder.rglob("*")}
    verified(folder / "run", folder / "data")
    assert before == {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in folder.rglob("*")}


def test_it_stops_when_asked(folder):
    ended = list(verify(VerifySettings(target=[str(folder / "run")]), StopRequest(signal_number=15)))[-1]
    assert (ended.status, ended.signal_number) == ("interrupted", 15)
