"""Ranks part and meet again where memory ran out on one of them, so that the same weights can go on.

A rank that runs out in the middle of a layer leaves the others in a collective that it will never join, and those
cannot be called off one by one. So the process group is ended as a whole, which wakes all of them, and they meet in a
new one. Weights, moments and whatever else lies in parts on the ranks stay where they are: only what leads to the
group is exchanged.
"""

import gc
import json
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import Store
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState

from critic_train.model.fsdp import gathered_groups


class Shortage:
    """What ranks tell each other through the store about their attempts, and about memory that ran out in one.

    All ranks go through the same attempts. Each ends with an exchange of all, so that no rank can be done with one
    that another has failed in.

    Attributes:
        round: how many times the ranks have met again.

    Args:
        store: of the run.
        rank: this process's.
        size: how many ranks there are.
    """

    def __init__(self, store: Store, rank: int, size: int) -> None:
        self.round = 0
        self._store, self._rank, self._size = store, rank, size
        self._attempt = 0

    def begin(self) -> None:
        """Say that this rank is through with all that came before, and begins the next attempt."""
        self._attempt += 1
        self._store.set(f"attempt/{self._rank}", str(self._attempt))

    def tell(self, words: str) -> None:
        """Tell that memory ran out on this rank in this attempt; the first rank to tell stands."""
        whose = f"rank {self._rank}: " if self._size > 1 else ""
        told = json.dumps({"attempt": self._attempt, "words": whose + words})
        self._store.compare_set(f"short/{self.round}", "", told)

    def told(self) -> str | None:
        """The words of the rank that ran out in the attempt that this one is in, if one did."""
        said = self._said()
        return str(said["words"]) if said is not None and said["attempt"] == self._attempt else None

    def may_part(self) -> bool:
        """Whether a rank ran out and all are in that attempt: nothing that came before is cut off on any."""
        said = self._said()
        return said is not None and all(self.has_begun(rank, int(said["attempt"])) for rank in range(self._size))

    def has_begun(self, rank: int, attempt: int | None = None) -> bool:
        """Whether a rank has begun an attempt, by default the one that this rank is in."""
        key = f"attempt/{rank}"
        return self._store.check([key]) and int(self._store.get(key)) >= (attempt or self._attempt)

    def _said(self) -> dict[str, Any] | None:
        key = f"short/{self.round}"
        return json.loads(self._store.get(key)) if self._store.check([key]) else None


class Spread:
    """The critics that lie in parts on the ranks of a group, and the meshes through which they find it."""

    def __init__(self) -> None:
        # Meshes are kept for good: all ranks must make the same new ones, whenever a critic is let go of on each.
        self._held: list[tuple[weakref.ref[nn.Module], DeviceMesh]] = []

    def add(self, critic: nn.Module, mesh: DeviceMesh) -> None:
        """Remember a critic that was sharded over a mesh."""
        self._held.append((weakref.ref(critic), mesh))

    def let_go(self, device: torch.device | None) -> None:
        """Forget the pass that was cut off, and the group: gloo closes its connections when nothing holds it.

        Args:
            device: whose queued work is waited for before memory of it is freed; None on a CPU.
        """
        if device is not None:
            torch.cuda.synchronize(device)
        for critic, mesh in self._alive():
            forget_pass(critic)
            _lead_to(None, critic, mesh)
        gc.collect()

    def meet(self) -> None:
        """Lead everything to the default group, which is a new one."""
        for ref, mesh in self._held:
            fresh = init_device_mesh(mesh.device_type, (mesh.size(),))
            critic = ref()
            if critic is not None:
                _lead_to(fresh, critic, mesh)

    def _alive(self) -> Iterator[tuple[nn.Module, DeviceMesh]]:
        return ((critic, mesh) for ref, mesh in self._held if (critic := ref()) is not None)


def forget_pass(critic: nn.Module) -> None:
    """Bring a sharded critic back to where it stands between passes, from anywhere within one.

    Weights are in parts again, and the gradients that this rank had not yet summed with the others are gone; those of
    the parts are the caller's to clear. FSDP2's own `reset_iter_state` waits for collectives, which here have no end.
    """
    for module in critic.modules():
        if not isinstance(module, FSDPModule):
            continue
        state: Any = module._get_fsdp_state()
        state._comm_ctx.lazy_init(state._device)  # makes all of it anew
        state._state_ctx.iter_forward_root = None
        state._state_ctx.post_backward_final_callback_queued = False
        state._modules_to_run_forward.clear()
        state._training_state = TrainingState.IDLE
        for group in gathered_groups(module):
            _forget_pass_of(group)


def _forget_pass_of(group: Any) -> None:
    """The same for the weights that FSDP2 gathers together."""
    group._all_gather_result = group._post_reduce_event = group._reshard_after_forward_event = None
    group._all_reduce_state = group._partial_reduce_output = None
    group._post_forward_indices.clear()
    group._training_state = TrainingState.IDLE
    group._to_sharded()
    for parameter in group.fsdp_params:
        parameter.unsharded_accumulated_grad = parameter.grad_offload_event = None
        if hasattr(parameter, "_unsharded_param"):
            parameter._unsharded_param.grad = None
        parameter.free_unsharded_param()  # what was allocated before the group was whole


def _lead_to(fresh: DeviceMesh | None, critic: nn.Module, mesh: DeviceMesh) -> None:
    """Put a fresh mesh's process group, or none, in the place of a mesh's, wherever FSDP2 and DTensor look for it."""
    for name in ("_dim_group_names", "_pg_registry"):
        if fresh is not None and hasattr(fresh, name):
            setattr(mesh, name, getattr(fresh, name))
    if fresh is None and hasattr(mesh, "_pg_registry"):
        mesh._pg_registry.clear()
    group = None if fresh is None else fresh.get_group()
    for info in _mesh_infos(critic):
        info.shard_process_group = group


def _mesh_infos(critic: nn.Module) -> Iterator[Any]:
    for module in critic.modules():
        if isinstance(module, FSDPModule):
            for group in gathered_groups(module):
                for one in (group, *group.fsdp_params):
                    yield from filter(None, (one.mesh_info, one.post_forward_mesh_info))
