"""What single ranks do in the tests: functions that a forked process can find by name."""

import contextlib
import os
import resource
import signal
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sequence_work import critic_of as small_critic
from sequence_work import small_ids
from support import branching_rollouts, small_config
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy
from torch.distributed.tensor import Shard, distribute_tensor

from critic_train.distributed import process_group
from critic_train.distributed.init import init_ranks
from critic_train.errors import DataError
from critic_train.model.compute import Compute
from critic_train.model.critic import Critic
from critic_train.model.memory import checkpoint_activations, compile_layers
from critic_train.model.microbatches import predict_values
from critic_train.model.selfcheck import use_stock_attention
from critic_train.model_files.gather import PartReader, PartWriter, as_rows_of, concat_over_ranks, full_tensor
from critic_train.run import storage
from critic_train.settings import FitSettings, Offload
from critic_train.stopping import StopRequest
from critic_train.training.build import to_device_or_shard
from critic_train.training.optimizer import build_optimizer, load_optimizer, save_optimizer
from critic_train.training.train_step import LossRecipe, accumulate_gradient, clip_gradient
from critic_train.weights.loading import build_critic, read_model
from critic_train.weights.lora import add_adapters, load_adapters
from critic_train.weights.sharded_checkpoint import ShardedCritic
from critic_train.weights.sharded_loading import load_critic_on_ranks

SETTINGS = FitSettings(data=["none"])
ONE = Compute(device=torch.device("cpu"), precision="fp32", max_tokens=70)
FAMILIES = {"Llama": {}, "Qwen2": {}, "GPTNeoX": {}, "Olmo2": {}, "Mixtral": {"num_local_experts": 4}}


def critic_of(family: str) -> Critic:
    critic = build_critic(small_config(family, **FAMILIES.get(family, {})), seed=3)
    with torch.no_grad():  # a head at 0 would make every value equal
        critic.head.weight.normal_(generator=torch.Generator().manual_seed(1))
        critic.head.bias.fill_(0.25)
    return critic


def gradients(critic: Critic, compute: Compute, *, rollouts: int, forest: bool, mode: str) -> dict[str, torch.Tensor]:
    """Whole gradients of a mini-batch by name, and the whole loss and norm."""
    critic.zero_grad(set_to_none=True)
    (critic.trunk.set_attn_implementation("critic_train_forest") if forest else use_stock_attention(critic))
    batch = branching_rollouts().take(np.arange(rollouts))
    recipe = LossRecipe(cliprange_value=0.5, mode=mode, scale_factor=7.0)
    result = accumulate_gradient(critic, batch, recipe, compute, forest=forest, stop=StopRequest())
    found = {name: full_tensor(p.grad).clone() for name, p in critic.named_parameters()}
    figures = [result.value_loss, result.clipfrac, result.saturation, result.vpred_mean, clip_gradient(critic, 0.0)]
    return found | {"figures": torch.tensor(figures, dtype=torch.float64)}


CASES = [
    {"rollouts": 21, "forest": True, "mode": "token-mean"},
    {"rollouts": 21, "forest": False, "mode": "seq-mean-token-mean"},
    {"rollouts": 5, "forest": True, "mode": "seq-mean-token-sum-norm"},
    {"rollouts": 1, "forest": True, "mode": "seq-mean-token-sum"},
]


def compare_gradients() -> list[float]:
    """On each rank: the largest relative difference between the sharded critic's gradients and its own, whole."""
    from critic_train.model.fsdp import cost_of, shard

    with init_ranks(SETTINGS, nproc=1, device="cpu") as ranks:
        alone = critic_of("Llama")
        spread = critic_of("Llama")
        compute = replace(ONE, ranks=ranks, pair_cost=cost_of(spread).pair)
        shard(spread, compute)
        worst = []
        for case in CASES:
            ours, theirs = gradients(spread, compute, **case), gradients(alone, ONE, **case)
            worst.append(max(float((ours[n] - theirs[n]).norm() / theirs[n].norm()) for n in theirs))
        assert sum(p.to_local().numel() for p in spread.parameters()) < 0.6 * sum(p.numel() for p in alone.parameters())
        rollouts = branching_rollouts()
        ours = predict_values(spread, rollouts, compute, forest=True)
        theirs = predict_values(alone, rollouts, ONE, forest=True)
        worst.append(float(np.abs(ours - theirs).max()))
        return worst


def compare_architectures(cases: list[tuple[str, dict[str, object]]]) -> dict[str, float]:
    """The largest difference of a value between a sharded critic and the whole one, for each architecture and what its
    configuration has otherwise."""
    with init_ranks(SETTINGS, nproc=1, device="cpu") as ranks:
        rollouts, worst = small_ids(branching_rollouts()), {}
        for name, changes in cases:
            alone, spread = (small_critic(name, changes) for _ in range(2))
            spread, compute = to_device_or_shard(spread, replace(ONE, ranks=ranks))
            for critic in (alone, spread):
                critic.eval()  # some have dropouts, or experts that draw
            ours = predict_values(spread, rollouts, compute, forest=True)
            theirs = predict_values(alone, rollouts, ONE, forest=True)
            worst[f"{name} {changes}"] = float(np.abs(ours - theirs).max())
        return worst


def compare_with_less_kept(activation_checkpointing: str, compiled: bool = False) -> dict[str, float]:
    """How far a sharded critic's gradient is from that without these settings; how often its first layer ran then,
    beside how often without; and how many graphs were compiled."""
    from torch._dynamo.utils import counters

    from critic_train.model.fsdp import shard

    with init_ranks(SETTINGS, nproc=1, device="cpu") as ranks:
        critic = critic_of("Llama").train()
        compute = replace(ONE, ranks=ranks)
        shard(critic, compute)
        runs: list[int] = []
        critic.trunk.layers[0].input_layernorm.register_forward_hook(torch.compiler.disable(lambda *_: runs.append(1)))
        case = {"rollouts": 21, "forest": True, "mode": "token-mean"}
        expected = gradients(critic, compute, **case)
        before = len(runs)
        checkpoint_activations(critic, activation_checkpointing)
        if compiled:
            compile_layers(critic)
        found = gradients(critic, compute, **case)
        worst = max(float((found[name] - expected[name]).norm() / expected[name].norm()) for name in expected)
        graphs = counters["stats"]["unique_graphs"]
        return {"worst": worst, "runs": (len(runs) - before) / before, "graphs": graphs}


def compare_in_tiles(kind: str, precision: str) -> dict[str, Any]:
    """How far a sharded critic's gradient, computed in tiles, is from that of one process; how often its first layer
    ran then, beside how often without; and how far rounding to this precision goes, on one process."""
    from critic_train.model import fsdp, tiles

    tiles.SMALLEST_TILE = 16
    with init_ranks(SETTINGS, nproc=1, device="cpu") as ranks:
        alone, spread = critic_of("Llama").train(), critic_of("Llama").train()
        one = replace(ONE, max_tokens=10_000, precision=precision)  # several tiles in a micro-batch
        compute = replace(one, ranks=ranks)
        fsdp.shard(spread, compute)
        runs: list[int] = []
        spread.trunk.layers[0].input_layernorm.register_forward_hook(lambda *_: runs.append(1))
        case = {"rollouts": 21, "forest": True, "mode": "token-mean"}
        expected = gradients(alone, one, **case)
        exact = gradients(alone, ONE, **case)
        gradients(spread, compute, **case)
        before = len(runs)
        checkpoint_activations(spread, kind)
        runs.clear()
        found = gradients(spread, compute, **case)

        def far(these: dict[str, torch.Tensor], those: dict[str, torch.Tensor]) -> float:
            return max(float((these[name] - those[name]).norm() / those[name].norm()) for name in those)

        return {
            "in_tiles": [name for name, module in spread.trunk.named_modules() if "forward" in vars(module)],
            "worst": far(found, expected),
            "rounding": far(expected, exact),
            "runs": len(runs) / before,
        }


def exchange() -> dict[str, Any]:
    """What this rank gets out of a sum, of broadcasts, and of a stop that only rank 1 was asked for."""
    with init_ranks(SETTINGS, nproc=1, device="cpu") as ranks:
        own = torch.tensor([float(ranks.rank), 1.0])
        total = ranks.all_reduce_sum(own)
        broadcast = [ranks.broadcast({"seed": ranks.rank}), ranks.broadcast(None)]
        request = StopRequest()
        stop = ranks.agreed_stop(request)
        stops = []
        stop.check_on_all_ranks()
        if ranks.rank == 1:
            request.signal_number = signal.SIGTERM
        stops.append((stop.requested, stop.signal_number))
        stop.look()
        stops.append((stop.requested, stop.signal_number))
        return {
            "rank": ranks.rank,
            "sum": total.tolist(),
            "own": own.tolist(),
            "broadcast": broadcast,
            "stops": stops,
        }


def fail_on_rank(rank: int) -> None:
    """One rank meets an error while the others wait for it."""
    with init_ranks(SETTINGS, nproc=1, device="cpu") as ranks:
        if ranks.rank == rank:
            raise DataError("row 7 has no tokens")
        ranks.all_reduce_sum(torch.ones(1))


def fail_before_groups() -> None:
    """Rank 1 is killed while rank 0 makes the groups of --sequence-parallel, with a short time limit."""
    with init_ranks(SETTINGS, nproc=1, device="cpu") as ranks:
        if ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        process_group.TIMEOUT = timedelta(seconds=8)
        ranks.adjacent(2)


def gather_tensors(folder: str) -> dict[str, Any]:
    """Full tensors of a sharded one with rows on every rank, one with a row on rank 0 alone, and one that is whole."""
    with init_ranks(SETTINGS, nproc=1, device="cpu") as ranks:
        mesh = init_device_mesh("cpu", (ranks.size,))
        expected = [torch.arange(15.0).view(5, 3), torch.arange(4.0).view(1, 4).bfloat16(), torch.ones(2)]
        sharded = [distribute_tensor(tensor, mesh, [Shard(0)]) for tensor in expected[:2]] + [expected[2]]
        path, reports = Path(folder) / f"part-{ranks.rank}", [0]

        def report_progress() -> None:
            reports[0] += 1

        answer: dict[str, Any] = {
            "expected": [tensor.tolist() for tensor in expected],
            "collective": [full_tensor(tensor).tolist() for tensor in sharded],
            "doubled": full_tensor(as_rows_of(sharded[0], 2 * sharded[0].to_local())).tolist(),
            "from_files": None,
        }
        numbers = [torch.tensor([0.0]), torch.tensor([10.0, 11.0, 12.0]), torch.empty(0)][ranks.rank]
        answer["concatenated"] = concat_over_ranks(sharded[0], numbers, [1, 3, 0], full_tensor).tolist()
        if not ranks.is_main:
            with storage.File(path, "create") as file:
                write = PartWriter(file, report_progress)
                written = [write(tensor) for tensor in sharded]
            answer |= {"written": [(type(tensor), tensor.shape) for tensor in written], "reports": reports[0]}
        ranks.all_reduce_sum(torch.zeros(1))  # all parts are written
        if ranks.is_main:
            paths = [Path(folder) / f"part-{rank}" for rank in range(1, ranks.size)]
            with PartReader(paths) as read:
                answer["from_files"] = [read(tensor).tolist() for tensor in sharded]
                try:
                    read(sharded[0])
                except OSError as error:
                    answer["too_short"] = str(error)
        return answer


def adapted(critic: Critic) -> None:
    """Adapters beside the trunk's layers, as `--train lora` puts them there."""
    add_adapters(critic, rank=4, alpha=6.0, seed=3)


def drawn_adapters(source: str) -> dict[str, np.ndarray]:
    """The adapters that ranks begin with, whole, and this rank's share of all that the critic is made of."""
    with init_ranks(SETTINGS, nproc=1, device="cpu") as ranks:
        critic = load_critic_on_ranks(read_model(Path(source)), replace(ONE, ranks=ranks), adapted)
        share = sum(p.to_local().numel() for p in critic.parameters()) / sum(p.numel() for p in critic.parameters())
        found = {name: full_tensor(p.detach()).numpy() for name, p in critic.named_parameters() if ".lora_" in name}
        return found | {"share": np.array(share)}


def load_and_save_new(base: str, target: str) -> None:
    """Every rank loads its part of a published model, and together they write it as a critic."""
    with init_ranks(SETTINGS, nproc=1, device="cpu") as ranks:
        source = read_model(Path(base))
        critic = load_critic_on_ranks(source, replace(ONE, ranks=ranks))
        ShardedCritic(critic).save_to(Path(target) if ranks.is_main else None, source.path)


def load_and_save_adapters(base: str, source: str, target: str) -> None:
    """Every rank loads its part of a base model and of adapters, and together they write the checkpoint anew."""
    with init_ranks(SETTINGS, nproc=1, device="cpu") as ranks:
        critic = load_critic_on_ranks(read_model(Path(base)), replace(ONE, ranks=ranks), adapted)
        load_adapters(critic, Path(source))
        ShardedCritic(critic).save_to(Path(target) if ranks.is_main else None, None)


def reset_before_the_head_has_run() -> list[float]:
    """The trunk's first pass fails, before the head has run; then a mini-batch is computed.

    Returns:
        The largest relative difference of a gradient to that of a critic that is not sharded.
    """
    from critic_train.model import fsdp

    with init_ranks(SETTINGS, nproc=1, device="cpu", sharded=True) as ranks:
        alone, sharded = critic_of("Llama"), critic_of("Llama")
        compute = replace(ONE, ranks=ranks)
        fsdp.shard(sharded, compute)
        fsdp.reset_after_error(sharded.parts)  # none of them has run

        def fail(*_: object) -> None:
            raise ValueError

        use_stock_attention(sharded)
        hook = sharded.trunk.layers[1].register_forward_pre_hook(fail)
        with contextlib.suppress(ValueError):
            sharded.trunk(input_ids=torch.ones(1, 3, dtype=torch.int64))
        hook.remove()
        fsdp.reset_after_error(sharded.parts)
        ours, theirs = gradients(sharded, compute, **CASES[0]), gradients(alone, ONE, **CASES[0])
        return [float((ours[name] - theirs[name]).norm() / theirs[name].norm()) for name in theirs]


def run_out_alone(kind: str) -> tuple[float, int]:
    """A single process whose critic is sharded runs out of memory in its second micro-batch, and begins again.

    Returns:
        (the largest relative difference of a gradient to that of one that is not sharded, max_tokens after it).
    """
    from critic_train.model.fsdp import shard

    with init_ranks(SETTINGS, nproc=1, device="cpu", sharded=True) as ranks:
        alone, sharded = critic_of("Llama"), critic_of("Llama")
        compute = replace(ONE, ranks=ranks)
        shard(sharded, compute)
        calls = 0

        def fail(*_: object) -> None:
            raise MemoryError

        def enter(_: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            nonlocal calls
            calls += 1
            if calls == 2:
                arguments[0].register_hook(fail) if kind == "backward" else fail()

        sharded.trunk.layers[1].register_forward_pre_hook(enter)
        ours, theirs = gradients(sharded, compute, **CASES[0]), gradients(alone, ONE, **CASES[0])
        return max(float((ours[n] - theirs[n]).norm() / theirs[n].norm()) for n in theirs), compute.max_tokens


def load_and_save(source: str, target: str) -> None:
    """Every rank loads its part of a directory, and together they write it anew, with moments."""
    with init_ranks(SETTINGS, nproc=1, device="cpu") as ranks:
        compute = replace(ONE, ranks=ranks)
        critic = load_critic_on_ranks(read_model(Path(source)), compute)
        optimizer = build_optimizer(critic, lr=1e-3, head_lr=1e-3, weight_decay=0.0)
        load_optimizer(optimizer, critic, Path(source))
        directory = Path(target) if ranks.is_main else None
        ShardedCritic(critic).save_to(directory, Path(source))
        save_optimizer(optimizer, dict(critic.named_parameters()), directory, full_tensor)


EXPERTS = {
    "Mixtral": {"num_local_experts": 4},
    "Qwen3Moe": {"num_experts": 4, "moe_intermediate_size": 32, "num_experts_per_tok": 2},
    "DeepseekV3": {
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 32,
    },
}


def expert_critic(family: str) -> Critic:
    return build_critic(small_config(family, **EXPERTS[family]), seed=3)


def save_layer_by_layer(family: str, target: str, file_bytes: int, agrees: bool = True) -> int:
    """Save a mixture of experts in files of some size; says how many numbers were converted at once at most."""
    import transformers.modeling_utils

    from critic_train.model import fsdp as sharding
    from critic_train.weights import sharded_checkpoint as sharded_saving
    from critic_train.weights import sharded_checkpoint as stored_form

    real = stored_form.revert_weight_conversion
    most = 0

    def counted(model: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        nonlocal most
        most = max(most, sum(t.numel() for t in tensors.values() if t.device.type != "meta"))
        return real(model, tensors)

    stored_form.revert_weight_conversion = transformers.modeling_utils.revert_weight_conversion = counted
    sharded_saving.MAX_SHARD_BYTES = file_bytes
    if not agrees:
        stored_form.StoredForm.layer_by_layer = property(lambda self: False)
    with init_ranks(SETTINGS, nproc=1, device="cpu") as ranks:
        critic = sharding.shard(expert_critic(family), replace(ONE, ranks=ranks))
        ShardedCritic(critic).save_to(Path(target) if ranks.is_main else None, None)
    return most


def step_on_ranks(target: str, offload: Offload, source: str | None = None) -> None:
    """Three steps on gradients of real rollouts, and the checkpoint that they lead to.

    With a `source` the critic is loaded from there in parts, and every micro-batch sums gradients, as on a GPU where
    these wait on the host.
    """
    from critic_train.model import fsdp as sharding

    if source is not None:
        sharding._full_gradient_fits = lambda modules: False
    with init_ranks(SETTINGS, nproc=1, device="cpu", sharded=True) as ranks:
        compute = replace(ONE, ranks=ranks, offload=offload)
        critic = critic_of("Llama") if source is None else load_critic_on_ranks(read_model(Path(source)), compute)
        compute.pair_cost = sharding.cost_of(critic).pair
        sharding.shard(critic.train(), compute)
        units = [module for module in critic.modules() if isinstance(module, FSDPModule)]
        policies = {type(group.offload_policy) for unit in units for group in sharding.parameter_groups(unit)}
        assert policies == {CPUOffloadPolicy if offload == "all" else OffloadPolicy}
        optimizer = build_optimizer(critic, lr=1e-3, head_lr=1e-2, weight_decay=0.1, offload=offload)
        for _ in range(3):
            gradients(critic, compute, rollouts=21, forest=True, mode="token-mean")
            optimizer.step()
        directory = Path(target) if ranks.is_main else None
        ShardedCritic(critic).save_to(directory, None)
        save_optimizer(optimizer, dict(critic.named_parameters()), directory, full_tensor)


def fill_the_disk(target: str) -> str:
    """Rank 0's disk is full at the first tensor; all ranks must still come to the end together."""
    from critic_train.model.fsdp import shard
    from critic_train.weights import sharded_checkpoint as sharded_saving

    def full(operation: storage.Operation) -> None:
        if operation.kind == "write":
            raise OSError(28, "No space left on device", str(operation.path))

    sharded_saving.MAX_SHARD_BYTES = 20_000  # several files: the first is where it happens
    with init_ranks(SETTINGS, nproc=1, device="cpu") as ranks:
        critic = critic_of("Llama")
        shard(critic, replace(ONE, ranks=ranks))
        said = ""
        try:
            with storage.watched(full):
                ShardedCritic(critic).save_to(Path(target) if ranks.is_main else None, None)
        except OSError as error:
            said = error.strerror
        return ranks.broadcast(said)


def load_and_save_measured(base: str, target: str) -> tuple[int, int]:
    """(bytes of this rank's parts, most bytes newly resident while a critic with adapters is loaded and saved)."""
    with init_ranks(SETTINGS, nproc=1, device="cpu") as ranks:
        read = read_model(Path(base))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        critic = load_critic_on_ranks(read, replace(ONE, ranks=ranks), adapted)
        ShardedCritic(critic).save_to(Path(target) if ranks.is_main else None, None)
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return sum(p.to_local().numel() * 4 for p in critic.parameters()), 1024 * (after - before)


def load_and_measure(source: str) -> tuple[int, int]:
    """(bytes of this rank's parts, most bytes of tensors newly resident while loading)."""
    with init_ranks(SETTINGS, nproc=1, device="cpu") as ranks:
        read = read_model(Path(source))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        critic = load_critic_on_ranks(read, replace(ONE, ranks=ranks))
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return sum(p.to_local().numel() * 4 for p in critic.parameters()), 1024 * (after - before)
