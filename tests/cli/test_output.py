"""Results on stdout, all else on stderr, whatever the streams are."""

import json
import os
import pty
import subprocess
import sys

import pytest

from critic_train_cli.output import Output, as_json_text
from critic_train_cli.terminal import can_redraw, is_unicode, wants_colour


@pytest.mark.parametrize("command", ["fit", "eval"])
def test_json_is_one_object_and_nothing_else(program, command):
    shown = program(command, "--data", "x", "--json")
    assert shown.returncode == 0
    assert len(shown.stdout.splitlines()) == 1
    told = json.loads(shown.stdout, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert told["value_loss"] is None
    assert told["explained_variance"] == 0.41
    assert shown.stdout.isascii()


@pytest.mark.parametrize(
    ("arguments", "job", "code"),
    [
        (["fit", "--data", "x", "--json"], "DivergedError", 5),
        (["fit", "--data", "x", "--json"], "ZeroDivisionError", 70),
        (["fit", "--json", "--epoch"], "finish", 2),
        (["eval", "--json"], "finish", 2),
    ],
)
def test_an_error_in_json_is_one_object_on_stderr(program, arguments, job, code):
    shown = program(*arguments, FAKE_JOB=job)
    assert (shown.returncode, shown.stdout) == (code, "")
    told = json.loads(shown.stderr.splitlines()[-1])
    assert told["error"]["exit_code"] == code
    assert set(told["error"]) == {"message", "hint", "exit_code"}


@pytest.mark.parametrize("form", [["--json"], []])
def test_a_gate_that_failed_is_exit_1_after_the_verdict(program, form):
    shown = program("eval", "--data", "x", *form, FAKE_JOB="refuse")
    assert shown.returncode == 1
    assert "0.41" in shown.stdout
    assert shown.stderr.splitlines()[-1] == "failed: mse is 0.0708, below 1 (--fail-under)"
    assert shown.stderr.count("--fail-under") == 1
    if form:
        assert json.loads(shown.stdout)["gates"][1]["passed"] is False


def test_json_has_no_figure_that_is_not_finite():
    class Scalar:
        def item(self):
            return float("inf")

    value = {"a": float("nan"), "b": [float("-inf"), 1.5, (2,)], "c": Scalar(), 3: None}
    assert json.loads(as_json_text(value)) == {"a": None, "b": [None, 1.5, [2]], "c": None, "3": None}


def test_quiet_leaves_warnings_and_the_result(program):
    shown = program("fit", "--data", "x", "--quiet")
    assert shown.stderr == "warning: rows were left out\n"
    assert "Finished: 2 steps" in shown.stdout


def test_progress_goes_to_stderr_in_plain_lines(program):
    shown = program("fit", "--data", "x")
    assert "\x1b" not in shown.stdout + shown.stderr
    assert "\r" not in shown.stdout + shown.stderr
    assert shown.stderr.splitlines()[:5] == [
        "note: a head was created",
        "warning: rows were left out",
        "run: runs/é   model: tiny é",
        # What the first step takes, which warms up, says nothing of those to come.
        "step 1/2  epoch 1/1  loss 0.1  clipfrac -  saturation -  grad norm -  lr -  "
        "- tokens/s (- computed)  memory -  left -",
        "step 2/2  epoch 1/1  loss 0.05  clipfrac -  saturation -  grad norm -  lr -  "
        "- tokens/s (- computed)  memory -  left 0:00",
    ]
    assert "step 2 held out: explained variance 0.410 [0.370, 0.440]" in shown.stderr
    assert "runs/é/checkpoints/step-00000002 (5.1 MB)" in shown.stderr


@pytest.mark.parametrize("command", ["fit", "eval"])
def test_ascii_streams_get_ascii(fresh_program, command):
    shown = fresh_program(command, "--data", "x", PYTHONIOENCODING="ascii")
    assert shown.returncode == 0
    assert (shown.stdout + shown.stderr).isascii()
    assert "runs/\\xe9/best" in shown.stdout


def test_the_c_locale_is_no_trouble(fresh_program):
    assert fresh_program("fit", "--data", "x", LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0").returncode == 0


@pytest.mark.parametrize("command", ["fit", "eval"])
@pytest.mark.parametrize("columns", ["20", "60", "100", "200"])
def test_any_width_will_do(program, command, columns):
    shown = program(command, "--data", "x", COLUMNS=columns)
    assert shown.returncode == 0
    assert "0.410" in shown.stdout


def shell(fake_command, environment, rest, tmp_path):
    """The exit code that a shell sees of `critic-train fit` with its streams redirected."""
    line = " ".join(fake_command) + " " + rest
    return subprocess.run(["bash", "-c", line], env=environment, capture_output=True, text=True, cwd=tmp_path)


@pytest.mark.parametrize(
    "arguments", ["fit --data x", "eval --data x --json", "fit --help", "fit --data x --print-config"]
)
def test_reader_that_leaves_early(fake_command, clean_environment, arguments, tmp_path):
    shown = shell(fake_command, clean_environment, f"{arguments} | head -c 1; echo; echo ${{PIPESTATUS[0]}}", tmp_path)
    assert shown.stdout.splitlines()[-1] in ("141", "0")
    assert "Traceback" not in shown.stderr
    assert "Broken" not in shown.stderr


def test_reader_that_was_never_there(fake_command, clean_environment, tmp_path):
    """The pipe's other end is closed before the program starts; the shell calls the end by SIGPIPE 141."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = subprocess.run(
        [*fake_command, "eval", "--data", "x", "-q"],
        env=clean_environment,
        stdout=write_end,
        stderr=subprocess.PIPE,
        cwd=tmp_path,
        text=True,
    )
    os.close(write_end)
    assert done.returncode in (-13, 141)
    assert "Traceback" not in done.stderr


def test_a_run_outlives_the_reader_of_its_progress(fake_command, clean_environment, tmp_path):
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = subprocess.run(
        [*fake_command, "fit", "--data", "x", "--json"],
        env=clean_environment,
        stderr=write_end,
        stdout=subprocess.PIPE,
        cwd=tmp_path,
        text=True,
    )
    os.close(write_end)
    assert done.returncode == 0
    assert json.loads(done.stdout)["status"] == "finished"


def test_closed_streams(fake_command, clean_environment, tmp_path):
    shown = shell(fake_command, clean_environment, "fit --data x >&- 2>&-; echo $?", tmp_path)
    assert shown.stdout.strip() == "0"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_full_disk_behind_stdout(fake_command, clean_environment, tmp_path):
    shown = shell(fake_command, clean_environment, "eval --data x -q >/dev/full; echo $? >&2", tmp_path)
    assert shown.stderr.splitlines()[-1] == "6"
    assert "error: no space left on device" in shown.stderr
    assert "Traceback" not in shown.stderr
    assert "Exception ignored" not in shown.stderr


def on_a_terminal(command, environment, tmp_path):
    """What the program writes with both streams on a terminal of its own."""
    primary, secondary = pty.openpty()
    process = subprocess.Popen(
        command, env=environment, stdin=secondary, stdout=secondary, stderr=secondary, cwd=tmp_path
    )
    os.close(secondary)
    written = b""
    while True:
        try:
            chunk = os.read(primary, 65536)
        except OSError:
            break
        if not chunk:
            break
        written += chunk
    os.close(primary)
    return process.wait(), written.decode()


def test_a_terminal_gets_the_live_view_and_its_cursor_back(fake_command, clean_environment, tmp_path):
    environment = clean_environment | {"TERM": "xterm-256color", "FAKE_PACE": "0.4", "COLUMNS": "80"}
    code, written = on_a_terminal([*fake_command, "fit", "--data", "x"], environment, tmp_path)
    assert code == 0
    assert "━" in written
    assert written.rindex("\x1b[?25h") > written.rindex("\x1b[?25l")
    assert "Finished: 2 steps" in written


def test_no_color_on_a_terminal(fake_command, clean_environment, tmp_path):
    environment = clean_environment | {"TERM": "xterm-256color", "NO_COLOR": "1", "FORCE_COLOR": "1"}
    for arguments in (["fit", "--data", "x"], ["fit", "--epoch"], ["fit", "--help"], ["eval", "--data", "x"]):
        _, written = on_a_terminal([*fake_command, *arguments], environment, tmp_path)
        assert [part for part in written.split("\x1b[")[1:] if part.split("m")[0].replace(";", "").isdigit()] == []


@pytest.mark.parametrize("term", ["dumb", "unknown", ""])
def test_a_dumb_terminal_gets_plain_lines(fake_command, clean_environment, tmp_path, term):
    code, written = on_a_terminal([*fake_command, "fit", "--data", "x"], clean_environment | {"TERM": term}, tmp_path)
    assert code == 0
    assert "\x1b" not in written


def test_force_color_off_a_terminal_colours_but_never_redraws(program):
    shown = program("fit", "--data", "x", FORCE_COLOR="1")
    assert "\x1b[1;33mwarning:\x1b[0m" in shown.stderr
    assert "\x1b[?25l" not in shown.stderr
    assert "\x1b[2K" not in shown.stderr


class Stream:
    encoding = "utf-8"

    def __init__(self, terminal):
        self.terminal = terminal

    def isatty(self):
        if self.terminal is None:
            raise ValueError("closed")
        return self.terminal


@pytest.mark.parametrize(
    ("terminal", "environment", "colour", "redraw"),
    [
        (True, {"TERM": "xterm"}, True, True),
        (True, {"TERM": "dumb"}, False, False),
        (True, {}, False, False),
        (True, {"TERM": "xterm", "NO_COLOR": "1"}, False, True),
        (True, {"TERM": "xterm", "NO_COLOR": ""}, True, True),
        (False, {"TERM": "xterm"}, False, False),
        (False, {"TERM": "xterm", "FORCE_COLOR": "1"}, True, False),
        (False, {"TERM": "xterm", "FORCE_COLOR": "0"}, False, False),
        (False, {"NO_COLOR": "1", "FORCE_COLOR": "1"}, False, False),
        (None, {"TERM": "xterm"}, False, False),
    ],
)
def test_what_a_stream_can_show(monkeypatch, terminal, environment, colour, redraw):
    for name in ("TERM", "NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert (wants_colour(Stream(terminal)), can_redraw(Stream(terminal))) == (colour, redraw)


def test_what_an_encoding_can_show():
    stream = Stream(False)
    assert is_unicode(stream)
    stream.encoding = "ANSI_X3.4-1968"
    assert not is_unicode(stream)
    assert not is_unicode(None)


def test_an_error_of_many_lines_is_aligned(capsys):
    from critic_train.errors import ConfigError

    assert Output().error(ConfigError("one\ntwo")) == 2
    assert capsys.readouterr().err == "error: one\n       two\n"


def test_missing_streams_are_no_trouble(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    monkeypatch.setattr(sys, "stdout", None)
    output = Output()
    output.notice("words")
    output.result({"a": 1}, lambda console: console.print("words"))
