"""A checkpoint's manifest, and the fingerprints of models and tokenizers."""

import hashlib
import json
import os

import pytest

from critic_train.run import manifest
from critic_train.run.manifest import condition, model_digest, recorded_step, tokenizer_digest, write_manifest


@pytest.fixture
def directory(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "optimizer.safetensors").write_bytes(b"moments")
    (tmp_path / "trainer.json").write_text("{}")
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "vocab.txt").write_text("a b")
    write_manifest(tmp_path, 7)
    return tmp_path


def test_every_file_is_written_down(directory):
    record = json.loads((directory / "manifest.json").read_text())
    assert record["step"] == recorded_step(directory) == 7
    contents = {"model.safetensors": b"weights", "optimizer.safetensors": b"moments", "trainer.json": b"{}"}
    contents["tokenizer/vocab.txt"] = b"a b"
    assert record["files"] == {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in contents.items()
    }
    assert condition(directory).fault == ""


def test_who_only_asks_for_values_needs_no_optimizer_state(directory):
    (directory / "optimizer.safetensors").unlink()
    (directory / "trainer.json").write_text("[]")
    assert condition(directory, state=False).fault == ""
    assert condition(directory).kind == "damaged"


def test_without_digests_the_sizes_have_to_do(directory):
    (directory / "model.safetensors").write_bytes(b"Weights")
    assert condition(directory, digests=False).fault == ""
    assert condition(directory).fault == "the content of model.safetensors has changed since it was written"
    (directory / "model.safetensors").write_bytes(b"weight")
    assert condition(directory, digests=False).kind == "damaged"


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format_version": 1, "files": {}, "step": "7"}'])
def test_a_manifest_that_names_no_step_has_none(content, directory):
    (directory / "manifest.json").write_text(content)
    assert recorded_step(directory) is None


def test_a_directory_without_a_manifest_has_no_step(tmp_path):
    assert recorded_step(tmp_path) is None
    assert condition(tmp_path).kind == "incomplete"


def test_a_model_is_known_by_samples_of_its_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "SAMPLES", 4)
    monkeypatch.setattr(manifest, "SAMPLE_BYTES", 10)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(os.urandom(100))
    for name in ("config.json", "optimizer.safetensors", "notes.txt"):
        (tmp_path / name).write_text("{}")
    before = model_digest(tmp_path)
    assert {name: entry["bytes"] for name, entry in before["files"].items()} == {
        "model.safetensors": 100,
        "config.json": 2,
    }
    content = bytearray(weights.read_bytes())

    def changed(at: int) -> bool:
        weights.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        return model_digest(tmp_path) != before

    # Four samples of ten bytes each, evenly spaced: the first and the last bytes are in one.
    assert [at for at in range(100) if changed(at)] == [
        k for start in (0, 30, 60, 90) for k in range(start, start + 10)
    ]
    (tmp_path / "optimizer.safetensors").write_text("[]")
    weights.write_bytes(content)
    assert model_digest(tmp_path) == before


def test_a_tokenizer_is_known_by_those_of_its_files_that_are_there(tmp_path):
    (tmp_path / "vocab.txt").write_text("a")
    assert tokenizer_digest(tmp_path, ["vocab.txt", "merges.txt"]) == {"vocab.txt": hashlib.sha256(b"a").hexdigest()}
