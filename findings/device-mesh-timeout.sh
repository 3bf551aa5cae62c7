#!/usr/bin/env bash
# torch 2.13.0.
#
# The process groups that a DeviceMesh of two dimensions makes do not take over the time limit that was given to
# init_process_group: with gloo they wait half an hour, whatever the default group waits, and nothing says so. A rank
# that hangs in a collective of such a group (tensor, sequence or expert parallelism) is noticed that much later than
# one that hangs in a collective of all. `init_device_mesh` has no argument for it; `new_subgroups` has.
#
# Output seen:
#   init_process_group(timeout=60 s): the default group waits 0:01:00
#   init_device_mesh(2 x 2):          a group of a dimension waits 0:30:00
#   new_subgroups(timeout=60 s):      the group waits 0:01:00
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy
cat >"$folder/ranks.py" <<'PYTHON'
import os
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh

MINUTE = timedelta(minutes=1)


def limit(group):
    return group._get_backend(torch.device("cpu")).options._timeout


def work(rank, file):
    os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=4, timeout=MINUTE)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "sequence"))
    adjacent, _ = dist.new_subgroups(2, timeout=MINUTE)
    found = [limit(dist.group.WORLD), limit(mesh.get_group("sequence")), limit(adjacent)]
    if rank == 0:
        print(f"init_process_group(timeout=60 s): the default group waits {found[0]}")
        print(f"init_device_mesh(2 x 2):          a group of a dimension waits {found[1]}")
        print(f"new_subgroups(timeout=60 s):      the group waits {found[2]}")
    assert found == [MINUTE, timedelta(minutes=30), MINUTE], found
    dist.destroy_process_group()


if __name__ == "__main__":
    import sys

    mp.spawn(work, args=(sys.argv[1],), nprocs=4)
PYTHON
"$folder/env/bin/python" "$folder/ranks.py" "$folder/store"
