#!/usr/bin/env bash
# torch 2.13.0, numpy 2.3.5, Linux x86-64.
#
# A client of TCPStore is one connection behind one lock. While one thread waits in get() for a key that is not there, every
# call of another thread on the same client waits as well, check() too, which asks and never waits by itself. Before its first
# NCCL collective a rank waits so for the id that rank 0 writes, on the store that init_process_group was given. A watchdog
# thread on that store is blind for as long, ten minutes by default, in just the case that it watches for: rank 0 has failed.
# store.clone() opens a connection of its own.
#
# Output seen:
#   check() while another thread waits in get(), same client:   3.5 s
#   check() while another thread waits in get(), clone():       0.0 s
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.3.5
"$folder/env/bin/python" - 2>"$folder/log" <<'PYTHON'
import threading
import time
from datetime import timedelta

from torch.distributed import TCPStore

store = TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=4), wait_for_workers=False)


def wait(client):
    try:
        client.get("id")
    except Exception:  # it gives up after its timeout
        pass


def seconds_of_check(waiting):
    thread = threading.Thread(target=wait, args=(waiting,))
    thread.start()
    time.sleep(0.5)
    began = time.monotonic()
    store.check(["error"])
    taken = time.monotonic() - began
    thread.join()
    return taken


same, other = seconds_of_check(store), seconds_of_check(store.clone())
print(f"check() while another thread waits in get(), same client:   {same:.1f} s")
print(f"check() while another thread waits in get(), clone():       {other:.1f} s")
assert same > 2.0 and other < 1.0
PYTHON
