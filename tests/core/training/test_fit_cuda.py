"""On a GPU: the same values and gradients as on the CPU, and a run that trains. Skipped where there is none."""

import json

import numpy as np
import pytest
import torch
from support import branching_rollouts, readable_rollouts, small_config, write_shard

from critic_train.distributed.init import init_ranks
from critic_train.events import RunEnded
from critic_train.layers.attention_kernel import AttentionCall
from critic_train.layers.kernel_choice import choose_attention
from critic_train.layers.prefix_tree import build_tree_layout, prefix_order
from critic_train.model.compute import Compute, resolve_compute, resolve_device
from critic_train.model.microbatches import predict_values
from critic_train.model.selfcheck import choose_packing, select_packing
from critic_train.settings import FitSettings
from critic_train.stopping import StopRequest
from critic_train.training.build import to_device_or_shard
from critic_train.training.fit import fit
from critic_train.training.host_adamw import HostAdamW
from critic_train.training.optimizer import build_optimizer
from critic_train.training.state_files import StateFiles
from critic_train.training.train_step import LossRecipe, accumulate_gradient, clip_gradient
from critic_train.weights.loading import build_critic

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def compute_on(device: str, precision: str = "fp32") -> Compute:
    return Compute(device=resolve_device(device), precision=precision, max_tokens=10_000)


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3", "Mistral"])
def test_values_and_gradients_are_those_of_the_cpu(family):
    rollouts = branching_rollouts()
    recipe = LossRecipe(cliprange_value=0.5, mode="token-mean", scale_factor=None)
    values, gradients = {}, {}
    for device in ("cpu", "cuda"):
        critic = build_critic(small_config(family), seed=0)
        with torch.no_grad():
            critic.head.weight.normal_(generator=torch.Generator().manual_seed(1))
        critic.to(device)
        assert choose_packing(critic, rollouts, "auto").forest
        values[device] = predict_values(critic, rollouts, compute_on(device), forest=True)
        accumulate_gradient(critic, rollouts, recipe, compute_on(device), forest=True, stop=StopRequest())
        gradients[device] = torch.cat([p.grad.flatten().cpu().double() for p in critic.parameters()])
    assert np.abs(values["cpu"] - values["cuda"]).max() <= 1e-4
    assert float((gradients["cpu"] - gradients["cuda"]).norm() / gradients["cpu"].norm()) <= 1e-4


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("packing", ["forest", "rows"])
def test_a_run_trains_and_resumes(precision, packing, tmp_path):
    shard = write_shard(tmp_path / "data" / "a.parquet", readable_rollouts(24))
    settings = FitSettings(
        data=[str(shard)],
        out=str(tmp_path / "out"),
        preset="tiny",
        device="cuda",
        precision=precision,
        packing=packing,
        epochs=12,
        batch_size=16,
        lr=3e-3,
    )
    going = fit(settings, StopRequest())
    for _ in range(30):
        next(going)
    going.close()
    *_, last = fit(settings, StopRequest())
    assert isinstance(last, RunEnded)
    assert last.result["explained_variance"] > 0.5


@pytest.mark.parametrize(("kernel", "precision"), [("flex", "fp32"), ("flex", "bf16"), ("varlen", "bf16")])
def test_every_kernel_agrees_with_scaled_dot_product_attention(kernel, precision):
    rollouts = branching_rollouts()
    forest = build_tree_layout(rollouts, prefix_order(rollouts))
    call = AttentionCall(heads=4, kv_heads=2, key_size=64, value_size=64)
    chosen, passed = choose_attention(kernel, [call], forest, torch.device("cuda"), precision)
    assert (chosen, passed) == (kernel, [])


@pytest.mark.parametrize("kernel", ["flex", "varlen"])
def test_gradients_by_any_kernel_are_those_of_scaled_dot_product_attention(kernel):
    """A whole critic, its last layer narrowed, in bf16."""
    rollouts = branching_rollouts()
    recipe = LossRecipe(cliprange_value=0.5, mode="token-mean", scale_factor=None)
    gradients = []
    for attention in ("sdpa", kernel):
        critic = build_critic(small_config("Llama", head_dim=32), seed=0).cuda()
        choose_packing(critic, rollouts, "forest")
        with torch.no_grad():
            critic.head.weight.normal_(generator=torch.Generator(device="cuda").manual_seed(1))
        compute = compute_on("cuda", "bf16")
        compute.attention = attention
        accumulate_gradient(critic, rollouts, recipe, compute, forest=True, stop=StopRequest())
        gradients.append(torch.cat([p.grad.flatten().double() for p in critic.parameters()]))
    assert float((gradients[0] - gradients[1]).norm() / gradients[0].norm()) <= 0.05


def test_memory_that_runs_out_is_gone_on_with_in_halves():
    rollouts = branching_rollouts()
    recipe = LossRecipe(cliprange_value=0.5, mode="token-mean", scale_factor=None)
    critic = build_critic(small_config("Llama"), seed=0).cuda()
    choose_packing(critic, rollouts, "forest")
    compute = compute_on("cuda")
    hog = []
    whole = type(critic).hidden

    def hidden(self, batch):
        if batch.computed_tokens > 120:
            hog.append(torch.empty(2**45, dtype=torch.uint8, device="cuda"))
        return whole(self, batch)

    type(critic).hidden = hidden
    try:
        accumulate_gradient(critic, rollouts, recipe, compute, forest=True, stop=StopRequest())
    finally:
        type(critic).hidden = whole
    assert compute.max_tokens < 10_000
    assert not hog


def test_moments_on_the_host_change_nothing_but_the_memory_held():
    """8 bytes a parameter leave the device between steps; parameters and moments are the same to the bit."""
    config = small_config("Llama", hidden_size=1024, intermediate_size=4096, num_hidden_layers=8)
    found, held = [], []
    for offload in ("none", "optimizer"):
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        critic = build_critic(config, seed=0).cuda()
        optimizer = build_optimizer(critic, lr=1e-3, head_lr=1e-2, weight_decay=0.1, offload=offload)
        draw = torch.Generator(device="cuda").manual_seed(2)
        for _ in range(3):
            for parameter in critic.parameters():
                parameter.grad = torch.randn(parameter.shape, device="cuda", generator=draw)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        held.append(torch.cuda.memory_allocated() - before)
        parameters = list(critic.parameters())
        moments = [optimizer.state[p][key] for p in parameters for key in ("exp_avg", "exp_avg_sq")]
        if offload == "optimizer":
            assert all(moment.is_pinned() for moment in moments)
        found.append([tensor.detach().cpu() for tensor in (*parameters, *moments)])
        del critic, optimizer, parameters, moments, parameter
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    promised = 8 * sum(p.numel() for p in build_critic(config, seed=0).parameters())
    assert held[0] - held[1] == pytest.approx(promised, rel=0.02)


def test_pieces_in_flight_do_not_overtake_each_other():
    """Many more pieces than buffers, each way on a stream of its own."""
    made = [torch.randn(rows, 1000, device="cuda") for rows in (1, 999, 3000, 20)]
    gradients = [torch.randn_like(parameter) for parameter in made]
    found = []
    for build in (lambda p: torch.optim.AdamW(p, fused=True), lambda p: HostAdamW([{"params": p}], piece=10_000)):
        parameters = [parameter.clone() for parameter in made]
        optimizer = build(parameters)
        for step in range(5):
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient * (step - 2.5)
            optimizer.step()
        found.append([t.cpu() for p in parameters for t in (p, *optimizer.state[p].values())])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_weights_on_the_host_leave_the_device_to_one_layer(tmp_path):
    """A group of one: between steps the device holds buffers alone, and the steps are those of one process."""
    from torch.distributed.tensor import DTensor

    config = small_config("Llama", hidden_size=1024, intermediate_size=4096, num_hidden_layers=8)
    rollouts = branching_rollouts()
    recipe = LossRecipe(cliprange_value=None, mode="token-mean", scale_factor=None)
    whole = 4 * sum(p.numel() for p in build_critic(config, seed=0).parameters())
    found = {}
    for offload in ("none", "all"):
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        settings = FitSettings(data=["none"], device="cuda", offload=offload)
        with init_ranks(settings, nproc=1, device="cuda", sharded=offload == "all") as ranks:
            critic, compute = to_device_or_shard(build_critic(config, seed=0), resolve_compute(settings.compute, ranks))
            select_packing(critic, rollouts, settings.compute, compute)
            optimizer = build_optimizer(critic, lr=1e-3, head_lr=1e-2, weight_decay=0.1, offload=offload)
            losses = []
            for _ in range(4):
                result = accumulate_gradient(critic, rollouts, recipe, compute, forest=True, stop=StopRequest())
                losses.append(result.value_loss)
                clip_gradient(critic, 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            predict_values(critic, rollouts, compute, forest=True)
            held = torch.cuda.memory_allocated() - before
            parts = [p.to_local() if isinstance(p, DTensor) else p for p in critic.parameters()]
            assert {part.device.type for part in parts} == {"cpu" if offload == "all" else "cuda"}
            (tmp_path / offload).mkdir()
            StateFiles(critic, optimizer, None, ranks).write(tmp_path / offload)
            found[offload] = losses, held
            del critic, optimizer, parts
    assert found["all"][0] == pytest.approx(found["none"][0], rel=1e-3)
    assert found["none"][1] >= 3 * whole  # weights and two moments
    assert found["all"][1] <= 0.25 * whole


@pytest.mark.parametrize("offload", ["optimizer", "all"])
def test_a_run_that_offloads_gives_the_loss_curve_of_one_that_does_not_and_resumes(offload, tmp_path):
    shard = write_shard(tmp_path / "data" / "a.parquet", readable_rollouts(24))
    curves = {}
    for name in ("none", offload):
        settings = FitSettings(
            data=[str(shard)], out=str(tmp_path / name), preset="tiny", device="cuda", epochs=6, batch_size=16,
            offload=name,
        )  # fmt: skip
        going = fit(settings, StopRequest())
        for _ in range(20 if name == offload else 0):
            next(going)
        going.close()
        list(fit(settings, StopRequest()))
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        curves[name] = [r["value_loss"] for r in map(json.loads, lines) if r["event"] == "step"]
    assert curves[offload] == pytest.approx(curves["none"], rel=1e-3)
