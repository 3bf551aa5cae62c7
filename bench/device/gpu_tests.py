"""The tests marked `gpu`, those first that fail likeliest and compile nothing."""

from pathlib import Path
from typing import Any

import pytest

from bench.device.telling import tell

TESTS = Path(__file__).parents[2] / "tests" / "core" / "training" / "test_fit_cuda.py"
COMPILING = "flex or run_trains or offloads or weights_on or fp32"
"""Of the tests' names: FlexAttention is compiled in them, or a process group is opened."""


def run(quick: bool) -> None:
    """Those that compile nothing."""
    run_tests(f"not ({COMPILING})")


def run_tests(expression: str) -> None:
    """Tell of each test as it ends."""
    options = ["-q", "-s", "-m", "gpu", "-k", expression, "--tb=short", "--no-header", "-p", "no:cacheprovider"]
    pytest.main([str(TESTS), *options], plugins=[_Teller()])


class _Teller:
    def __init__(self) -> None:
        self.counts: dict[str, int] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when != "call" and report.outcome == "passed":
            return
        self.counts[report.outcome] = self.counts.get(report.outcome, 0) + 1
        name = report.nodeid.rsplit("::", 1)[-1]
        crash = getattr(report.longrepr, "reprcrash", None)
        why = f": {crash.message.splitlines()[0][:200]}" if crash is not None else ""
        tell(f"{report.outcome}, {report.duration:.1f} s: {name}{why}", text=str(report.longrepr or "")[-3000:])

    def pytest_sessionfinish(self) -> None:
        tell(", ".join(f"{count} {outcome}" for outcome, count in sorted(self.counts.items())) or "no test ran")
