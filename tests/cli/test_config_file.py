"""Configuration files: strict when read, whole when written."""

import tomllib

import pytest

from critic_train.errors import ConfigError
from critic_train.settings import EvalSettings, FitSettings
from critic_train_cli.config_file import config_text, read_config
from critic_train_cli.options import Chosen, options_of, resolve

OPTIONS = {"fit": options_of(FitSettings), "eval": options_of(EvalSettings)}


def read(tmp_path, text, command="fit"):
    path = tmp_path / "a.toml"
    path.write_text(text, encoding="utf-8")
    return {name: value.value for name, value in read_config(str(path), command, OPTIONS).items()}


def faults(tmp_path, text, command="fit"):
    with pytest.raises(ConfigError) as raised:
        read(tmp_path, text, command)
    return raised.value.message.replace(str(tmp_path) + "/", "").splitlines()


def test_keys_may_have_dashes_or_underscores(tmp_path):
    assert read(tmp_path, "batch-size = 8\nmax_steps = 3\n") == {"batch_size": 8, "max_steps": 3}


def test_own_table_wins_and_the_other_commands_is_left_to_it(tmp_path):
    text = "seed = 1\n[fit]\nseed = 2\nlr = 1\n[eval]\nseed = 3\nresamples = 9\n"
    assert read(tmp_path, text) == {"seed": 2, "lr": 1.0}
    assert read(tmp_path, text, "eval") == {"seed": 3, "resamples": 9}


def test_one_path_is_a_list_of_one(tmp_path):
    assert read(tmp_path, 'data = "x"\nval_data = ["y", "z"]\n') == {"data": ["x"], "val_data": ["y", "z"]}


def test_whole_number_does_for_a_float_and_becomes_one(tmp_path):
    assert isinstance(read(tmp_path, "lr = 1\n")["lr"], float)


def test_every_fault_is_named_at_once(tmp_path):
    text = (
        'epoch = 3\nbatch_size = "8"\nlr = true\nno_clip = 1\npreset = "huge"\ndata = [1]\nkeep = 2.0\n'
        "grad-clip = 1\ngrad_clip = 2\nresamples = 5\n[evl]\nseed = 1\n[eval]\nbatch_size = 3\n"
    )
    assert faults(tmp_path, text) == [
        "a.toml: [eval] unknown key batch_size",
        "a.toml: unknown key epoch; did you mean epochs?",
        'a.toml: batch_size must be a whole number, not "8"',
        "a.toml: lr must be a number, not true",
        "a.toml: no_clip must be true or false, not 1",
        'a.toml: preset must be one of tiny, small, base, not "huge"',
        "a.toml: data must be text or a list of such, not [1]",
        "a.toml: keep must be a whole number, not 2.0",
        "a.toml: grad_clip is given twice, once with - and once with _",
        "a.toml: resamples is a setting of eval, not of fit; put it under [eval]",
        "a.toml: unknown key evl; did you mean eval?",
    ]


def test_command_must_be_a_table(tmp_path):
    assert faults(tmp_path, "fit = 3\n") == ["a.toml: fit must be a table, written [fit]"]


def test_broken_toml_says_where(tmp_path):
    (message,) = faults(tmp_path, "lr = \n")
    assert message.startswith("a.toml is no valid TOML: ")
    assert "line 1" in message


@pytest.mark.parametrize(("path", "words"), [("none.toml", "no file none.toml"), (".", ". is a folder")])
def test_file_that_cannot_be_read(program, path, words):
    shown = program("fit", "--data", "x", "--config", path)
    assert shown.returncode == 2
    assert f"error: --config: {words}" in shown.stderr


def test_file_by_environment(program, tmp_path):
    (tmp_path / "b.toml").write_text("keep = 7\n")
    assert "keep = 7" in program("fit", "--print-config", CRITIC_TRAIN_CONFIG="b.toml").stdout


STRANGE = {"data": ['a "b" \\ c', "é\t\x7f😀", ""], "lr": "1e-05", "no_clip": True, "model": "m#1", "column": ["a=b"]}


@pytest.mark.parametrize("escape", [False, True])
def test_what_is_written_is_read_back(tmp_path, escape):
    chosen = resolve(OPTIONS["fit"], STRANGE, {}, {})
    text = config_text("fit", OPTIONS["fit"], chosen, escape=escape)
    assert not escape or text.isascii()
    values = {name: value.value for name, value in chosen.items() if value.value is not None}
    assert read(tmp_path, text) == values
    assert tomllib.loads(text) == {"fit": values}


def test_a_source_cannot_break_out_of_its_comment():
    chosen = resolve(OPTIONS["fit"], {}, {}, {"seed": Chosen(1, "file a\nlr = 3\n.toml")})
    assert "lr" not in tomllib.loads(config_text("fit", OPTIONS["fit"], chosen))["fit"]


def test_print_config_round_trip_through_the_program(program, tmp_path):
    first = program("fit", "--data", "a b", "--data", "é", "--lr", "2e-4", "--no-clip", "--print-config")
    (tmp_path / "again.toml").write_text(first.stdout, encoding="utf-8")
    again = program("fit", "--config", "again.toml", "--print-config")
    assert (first.returncode, again.returncode) == (0, 0)
    assert tomllib.loads(again.stdout) == tomllib.loads(first.stdout)
    assert "# file again.toml" in again.stdout


def test_print_config_as_json(program):
    import json

    shown = program("eval", "--seed", "3", "--print-config", "--json")
    told = json.loads(shown.stdout)
    assert told["seed"] == {"value": 3, "source": "flag --seed"}
    assert told["model"] == {"value": [], "source": "default"}
