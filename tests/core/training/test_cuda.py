"""On a GPU: the same values and gradients as on the CPU, and a run that trains. Skipped where there is none."""

import numpy as np
import pytest
import torch
from support import branching_rollouts, readable_rollouts, small_config, write_shard

from critic_train.events import RunEnded
from critic_train.model.compute import Compute
from critic_train.model.loading import build_critic
from critic_train.model.predicting import predict_values
from critic_train.model.selfcheck import choose_packing
from critic_train.settings import FitSettings
from critic_train.stopping import StopRequest
from critic_train.training.fit import fit
from critic_train.training.step import LossRecipe, accumulate_gradient

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def compute_on(device: str, precision: str = "fp32") -> Compute:
    return Compute(device=torch.device(device), precision=precision, max_tokens=10_000)


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
