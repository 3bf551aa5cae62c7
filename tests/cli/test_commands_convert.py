"""`critic-train convert` as a user meets it."""

import json
import os
import pickle
import subprocess
from pathlib import Path

import pytest
from warm import program

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "core" / "convert" / "fixtures"


@pytest.fixture
def critic_train(clean_environment, tmp_path):
    def run(*arguments: object) -> "subprocess.CompletedProcess[str]":
        return program("convert", *map(str, arguments), cwd=tmp_path, environment=clean_environment)

    return run


def test_shards_a_summary_and_what_to_run_next(critic_train, tmp_path):
    shown = critic_train(FIXTURES / "verl_dataproto.pkl", "--to", "shards")
    assert shown.returncode == 0
    assert shown.stdout.startswith("Converted: 8 rollouts.")
    assert "critic-train fit --data shards --returns column" in shown.stdout
    assert "is read as verl DataProto" in shown.stderr
    again = critic_train(FIXTURES / "verl_dataproto.pkl", "--to", "shards", "--json")
    assert (again.returncode, again.stderr) == (0, "")
    result = json.loads(again.stdout)
    assert (result["status"], result["rollouts"], result["shards"]) == ("already finished", 8, 1)


class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_a_malicious_pickle_is_exit_3_and_did_not_run(critic_train, tmp_path):
    marker = tmp_path / "it ran"
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"samples": [Evil(marker)]}))
    shown = critic_train("a.pkl", "--to", "shards")
    assert shown.returncode == 3
    assert shown.stdout == ""
    assert (
        "a.pkl: it refers to posix.system, which is no tensor, array or plain container; nothing was run"
        in shown.stderr
    )
    assert "Traceback" not in shown.stderr
    assert not marker.exists()


def test_a_huge_allocation_is_exit_3(critic_train, tmp_path):
    (tmp_path / "a.pkl").write_bytes(b"\x80\x05\x96" + (2**60).to_bytes(8, "little") + b".")
    shown = critic_train("a.pkl", "--to", "shards")
    assert (shown.returncode, "too early" in shown.stderr) == (3, True)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--to", "shards"], 2, "SOURCE is needed"),
        (["a.pt"], 2, "--to is needed"),
        (["a.pt", "--to", "x", "--from", "verls"], 2, "did you mean verl?"),
        (["none.pt", "--to", "shards"], 3, "none.pt: there is no such file or folder"),
        ([FIXTURES / "verl_rollout_data_dir", "--to", "shards"], 2, "holds no token ids"),
        ([FIXTURES / "verl_dataproto.pkl", "--to", "."], 2, "did not make"),
    ],
)
def test_wrong_command_lines(critic_train, tmp_path, arguments, code, words):
    (tmp_path / "mine.txt").write_text("mine")
    shown = critic_train(*arguments)
    assert (shown.returncode, shown.stdout) == (code, "")
    assert words in shown.stderr
    assert "Traceback" not in shown.stderr
