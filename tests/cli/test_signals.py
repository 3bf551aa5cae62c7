"""The first signal asks, the second leaves, and what was ignored stays so."""

import os
import signal
import subprocess
import time

import pytest

from critic_train.stopping import StopRequest
from critic_train_cli.signals import STOP_SIGNALS, stop_on_signals


def started(fake_command, environment, tmp_path, job, *, command="fit", before=None):
    """The program, at the point where its job runs."""
    process = subprocess.Popen(
        [*fake_command, command, "--data", "x"],
        env=environment | {"FAKE_JOB": job},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        preexec_fn=before,
    )
    for line in process.stderr:
        if line == "running\n":
            return process
    pytest.fail("the job did not start")


def ended(process):
    try:
        out, err = process.communicate(timeout=300)
    finally:
        process.kill()
    return process.returncode, out, err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_first_signal_ends_the_job_in_order(fake_command, clean_environment, tmp_path, number, code):
    process = started(fake_command, clean_environment, tmp_path, "wait")
    process.send_signal(number)
    assert ended(process)[0] == code


def test_a_signal_that_a_launcher_hands_on_is_no_second_one(fake_command, clean_environment, tmp_path):
    rank = clean_environment | {"WORLD_SIZE": "2", "RANK": "0"}
    process = started(fake_command, rank, tmp_path, "deaf")
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1.0)
    process.kill()


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("fit", "stopping after this micro-batch; a checkpoint will be written (again to leave at once)\n"),
        ("eval", "stopping (again to leave at once)\n"),
    ],
)
def test_it_is_said_once_what_happens(fake_command, clean_environment, tmp_path, command, words):
    process = started(fake_command, clean_environment, tmp_path, "wait", command=command)
    process.send_signal(signal.SIGINT)
    _, _, err = ended(process)
    assert err.count("stopping") == 1
    assert words in err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_before_the_first_step_nothing_is_waited_for_and_nothing_promised(
    fake_command, clean_environment, tmp_path, number
):
    process = started(fake_command, clean_environment, tmp_path, "start")
    process.send_signal(number)
    code, out, err = ended(process)  # by itself the job would go on for longer than is waited for here
    assert code == 128 + number
    assert "stopping: no step has been taken since the start, so there is no checkpoint to write\n" in err
    assert out == "Interrupted before the first step.\n"


def test_a_job_that_keeps_nothing_ends_at_once(fake_command, clean_environment, tmp_path):
    process = started(fake_command, clean_environment, tmp_path, "start", command="eval")
    process.send_signal(signal.SIGINT)
    code, _, err = ended(process)
    assert (code, err.count("stopping\n")) == (130, 1)


def test_one_of_several_ranks_does_not_leave_the_others(fake_command, clean_environment, tmp_path):
    rank = clean_environment | {"WORLD_SIZE": "2", "RANK": "0"}
    process = started(fake_command, rank, tmp_path, "start")
    process.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1.0)
    process.kill()


def test_an_interrupted_run_says_how_to_go_on(fake_command, clean_environment, tmp_path):
    process = started(fake_command, clean_environment, tmp_path, "wait")
    process.send_signal(signal.SIGTERM)
    _, out, _ = ended(process)
    assert "Interrupted after step 1." in out
    assert "The same command goes on from there." in out


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_second_signal_leaves_at_once(fake_command, clean_environment, tmp_path, number, code):
    process = started(fake_command, clean_environment, tmp_path, "deaf")
    process.send_signal(number)
    assert "stopping" in process.stderr.readline()
    process.send_signal(number)
    assert ended(process)[0] == code  # by itself the job would go on for longer than is waited for here


def test_a_background_job_keeps_ignoring_sigint_but_hears_sigterm(fake_command, clean_environment, tmp_path):
    """A shell without job control starts `command &` with SIGINT ignored."""

    def ignore():
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    process = started(fake_command, clean_environment, tmp_path, "wait", before=ignore)
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert ended(process)[0] == 143


def test_handlers_come_back():
    before = {number: signal.getsignal(number) for number in (*STOP_SIGNALS, signal.SIGPIPE)}
    told = []
    stop = StopRequest()
    with stop_on_signals(stop, lambda: told.append("asked"), lambda: None):
        assert signal.getsignal(signal.SIGPIPE) is signal.SIG_IGN
        os.kill(os.getpid(), signal.SIGTERM)
        assert (stop.signal_number, told) == (signal.SIGTERM, ["asked"])
    assert {number: signal.getsignal(number) for number in before} == before


def test_handlers_come_back_after_an_error():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ValueError, match="words"), stop_on_signals(StopRequest(), lambda: None, lambda: None):
        raise ValueError("words")
    assert signal.getsignal(signal.SIGTERM) is before
