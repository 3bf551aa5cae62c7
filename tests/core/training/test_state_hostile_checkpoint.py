"""A checkpoint whose digests hold and whose content is somebody else's: refused in words, nothing else touched."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support import readable_rollouts, write_shard

from critic_train.errors import CriticTrainError, ModelError
from critic_train.events import CheckpointSaved
from critic_train.run.manifest import write_manifest
from critic_train.run.storage import remove_tree
from critic_train.settings import FitSettings
from critic_train.stopping import StopRequest
from critic_train.training.fit import fit


def settings_for(where: Path) -> FitSettings:
    return FitSettings(
        data=[str(where / "data")],
        out=str(where / "out"),
        preset="tiny",
        batch_size=16,
        max_steps=2,
        checkpoint_every=1,
        device="cpu",
        no_report=True,
    )


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run after its first checkpoint."""
    where = tmp_path_factory.mktemp("stopped")
    write_shard(where / "data" / "a.parquet", readable_rollouts(8, seed=1))
    going = fit(settings_for(where), StopRequest())
    next(event for event in going if isinstance(event, CheckpointSaved))
    going.close()  # type: ignore[attr-defined]
    return where


def state(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def harm(checkpoint: Path) -> None:
        told = json.loads((checkpoint / "trainer.json").read_text())
        (checkpoint / "trainer.json").write_text(json.dumps(change(told) or told))

    return harm


def text(content: str) -> Callable[[Path], None]:
    return lambda checkpoint: (checkpoint / "trainer.json").write_text(content) and None  # type: ignore[func-returns-value]


def moments(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[Path], None]:
    def harm(checkpoint: Path) -> None:
        file = checkpoint / "optimizer.safetensors"
        save_file(change(load_file(file)), file)

    return harm


@pytest.mark.parametrize(
    "harm",
    [
        state(lambda told: told["position"].update(step=-1)),
        state(lambda told: told["position"].update(step=10**9)),
        state(lambda told: told["position"].update(step="1")),
        state(lambda told: told["position"].update(metrics_bytes=-(2**70))),
        state(lambda told: told["position"].update(best_step="../../elsewhere")),
        state(lambda told: told["position"].update(__class__="evil")),
        state(lambda told: told.update(position=[])),
        state(lambda told: told.update(last_metrics=7)),
        state(lambda told: told.update(token_budget=7)),
        state(lambda told: told["token_budget"].update(max_tokens=-1)),
        state(lambda told: told.pop("last_metrics") and None),
        text("[]"),
        text('{"a":' * 100_000),
        text("{"),
        moments(lambda tensors: {name: np.zeros((3, 5), dtype=np.float32) for name in tensors}),
        moments(lambda tensors: {name: tensor for name, tensor in tensors.items() if "exp_avg_sq" not in name}),
    ],
    ids=range(16),
)
def test_a_state_that_is_not_ours_is_refused(stopped: Path, tmp_path: Path, harm: Callable[[Path], None]) -> None:
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True, symlinks=True)
    checkpoint = tmp_path / "out" / "checkpoints" / "step-00000001"
    harm(checkpoint)
    (checkpoint / "manifest.json").unlink()
    write_manifest(checkpoint, 1)
    with pytest.raises(CriticTrainError) as caught:
        list(fit(settings_for(tmp_path), StopRequest()))
    assert isinstance(caught.value, ModelError)


def test_a_link_is_removed_and_not_what_it_leads_to(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    (precious / "inner").mkdir(parents=True)
    (precious / "inner" / "file").write_text("x")
    (tmp_path / "link").symlink_to(precious)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "link").symlink_to(precious)
    assert remove_tree(tmp_path / "link") is None
    assert remove_tree(folder) is None
    assert (precious / "inner" / "file").read_text() == "x"
    assert not folder.exists()
    assert not (tmp_path / "link").is_symlink()
