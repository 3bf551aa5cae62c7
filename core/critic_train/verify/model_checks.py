"""Whether a checkpoint is what was written, loads, and predicts."""

from pathlib import Path

import numpy as np
import torch

from critic_train.errors import ModelError
from critic_train.model.compute import Compute
from critic_train.model.microbatches import predict_values
from critic_train.model.selfcheck import choose_packing
from critic_train.rollouts import Rollouts
from critic_train.run.manifest import MANIFEST, condition
from critic_train.verify.outcome import Finding
from critic_train.weights.loading import load_critic, read_model

TOKENS = 8


def verify_model(path: Path) -> Finding:
    """Compare digests where there is a manifest; load the weights, and predict values of a tiny rollout.

    Args:
        path: a checkpoint or a model directory.
    """
    with_manifest = (path / MANIFEST).exists()
    if with_manifest:
        state = condition(path)
        if state.kind != "complete":
            return Finding(path.name, "unsound", f"{state.kind}: {state.fault}")
    try:
        problem = _numeric_problem(path)
    except ModelError as error:
        problem = error.message
    if problem:
        return Finding(path.name, "unsound", problem)
    digests = "digests hold, " if with_manifest else "no manifest to hold it against; "
    return Finding(path.name, "sound", f"{digests}loads, predicts finite values")


def _numeric_problem(path: Path) -> str:
    """Predicted values that are not finite, as text, else empty; weights that are not are refused when loaded."""
    source = read_model(path)
    critic = load_critic(source).eval()
    rollouts = _tiny_rollout(source.vocab_size)
    forest = choose_packing(critic, rollouts, "auto").forest
    compute = Compute(device=torch.device("cpu"), precision="fp32", max_tokens=4 * TOKENS)
    values = predict_values(critic, rollouts, compute, forest=forest)
    assert values is not None, "no StopRequest is passed"
    return "" if np.isfinite(values).all() else "it predicts NaN or infinite values"


def _tiny_rollout(vocab_size: int) -> Rollouts:
    """One rollout of TOKENS tokens, two of them prompt."""
    return Rollouts(
        input_ids=(np.arange(TOKENS) % vocab_size).astype(np.int32),
        offsets=np.asarray([0, TOKENS], dtype=np.int64),
        response_mask=np.arange(TOKENS) >= 2,
        returns=np.zeros(TOKENS, dtype=np.float32),
        values=None,
        group=np.zeros(1, dtype=np.int64),
        row=np.zeros(1, dtype=np.int64),
    )
