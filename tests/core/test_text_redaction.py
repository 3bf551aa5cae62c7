"""Secrets are hidden wherever they could be written."""

import json
import os
from pathlib import Path

import pytest
from warm import program

from critic_train.run.storage import write_json
from critic_train.text import without_secrets

TOKEN = "hf_" + "aB3" * 12
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://AKKEY:se/../cret@bucket/a", "s3://AKKEY:se/../cret@bucket/a"),  # no address: what ends at / is a host
        ("s3://key:secret@bucket/a.parquet", "s3://***@bucket/a.parquet"),
        ("cannot read https://u:p@h:99/x?y=1.", "cannot read https://***@h:99/x?y=1."),
        ("https://h/x?X-Amz-Signature=abc&v=1", "https://h/x?X-Amz-Signature=***&v=1"),
        ("https://h/x?access_token=abc", "https://h/x?access_token=***"),
        ("https://h/x?sig=a%2Fb&se=2", "https://h/x?sig=***&se=2"),
        (f"the token {TOKEN}.", "the token ***."),
        ("AKIAABCDEFGHIJKLMNOP is a key", "*** is a key"),
        ("hf://datasets/a/b@main", "hf://datasets/a/b@main"),
        ("mail a@b.example, /data/run@2/a.parquet", "mail a@b.example, /data/run@2/a.parquet"),
    ],
)
def test_secrets_by_their_shape(text: str, shown: str) -> None:
    assert without_secrets(text, {}) == shown


def test_secrets_of_the_environment() -> None:
    environment = {"MY_API_KEY": 'correct "horse', "WANDB_API_KEY": "short", "HOME": "/home/somebody", "X_TOKEN": ""}
    environment |= {"TOKENIZERS_HOME": "/tokenizers"}
    text = 'correct "horse, short, /home/somebody/tokenizers'
    assert without_secrets(text, environment) == "***, short, /home/somebody/tokenizers"
    assert without_secrets(json.dumps([text]), environment) == '["***, short, /home/somebody/tokenizers"]'


def test_records_hold_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_SECRET", "battery staple")
    write_json(tmp_path / "run.json", {"data": ["s3://k:s@b/x", "battery staple", 'q"u\\ote'], "n": 1})
    assert json.loads((tmp_path / "run.json").read_text()) == {"data": ["s3://***@b/x", "***", 'q"u\\ote'], "n": 1}


@pytest.mark.parametrize("as_json", [False, True])
def test_errors_hold_none(as_json: bool, tmp_path: Path) -> None:
    flags = ["--json"] if as_json else []
    for arguments in (
        ["fit", "s3://key:secret@b/x"],
        ["fit", "--data", "/none?token=secret"],
        ["fit", "--batch-size", TOKEN],
    ):
        environment = os.environ | {"HF_TOKEN": "secret-of-mine", "CRITIC_TRAIN_EPOCHS": "secret-of-mine"}
        shown = program(*arguments, *flags, cwd=tmp_path, environment=environment)
        assert shown.returncode in (2, 3)
        said = shown.stdout + shown.stderr
        assert "***" in said
        assert "secret" not in said.replace("secrets", "")
        assert TOKEN not in said
