"""Every test computes on one thread and draws the same examples, so that results repeat and runs do not thrash.

Runs sync each of their writes. Where there is room in memory, tests write there and wait for no disk; a folder of their
own (`--basetemp`, TMPDIR) holds.
"""

import os
import shutil
import signal
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent))

import pytest
from hypothesis import HealthCheck, settings

# A busy machine is slow at drawing examples too, and that is no fault of the test.
settings.register_profile("repeatable", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("repeatable")

# Started in the background of a shell or by nohup, the tests and all that they start would ignore these.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)

MEMORY, ROOM_BYTES = Path("/dev/shm"), 4 * 2**30
if "TMPDIR" not in os.environ and os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > ROOM_BYTES:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))

BEGAN = time.monotonic()


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--slow-budget MINUTES`, so that CI runs the slow tests for as long as it has the time."""
    parser.addoption(
        "--slow-budget",
        type=float,
        metavar="MINUTES",
        help="start no test marked slow after this time; those that are left are skipped and counted",
    )


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a slow test where the time for them is spent. One that has begun runs to its end."""
    minutes = item.config.getoption("--slow-budget")
    if minutes is not None and item.get_closest_marker("slow") and time.monotonic() - BEGAN > 60 * minutes:
        pytest.skip(_spent(minutes))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say how many tests were left out for want of time."""
    reason = _spent(config.getoption("--slow-budget") or 0)
    count = sum(reason in str(report.longrepr) for report in terminalreporter.stats.get("skipped", []))
    if count:
        terminalreporter.write_line(f"{count} slow tests were not started: {reason}")


def _spent(minutes: float) -> str:
    return f"the {minutes:g} minutes of --slow-budget are spent"
