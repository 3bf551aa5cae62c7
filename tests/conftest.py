"""Every test computes on one thread and draws the same examples, so that results repeat and runs do not thrash.

Runs sync each of their writes. Where there is room in memory, tests write there and wait for no disk; a folder of their
own (`--basetemp`, TMPDIR) holds.
"""

import os
import shutil
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent))

from hypothesis import HealthCheck, settings

# A busy machine is slow at drawing examples too, and that is no fault of the test.
settings.register_profile("repeatable", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("repeatable")

MEMORY, ROOM_BYTES = Path("/dev/shm"), 4 * 2**30
if "TMPDIR" not in os.environ and os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > ROOM_BYTES:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))
