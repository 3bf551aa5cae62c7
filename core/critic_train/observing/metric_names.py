"""Our metrics under the names that the field's dashboards know: verl's `critic/vf_loss` and its kin."""

from typing import Any

from critic_train.events import EvaluationEnded, StepEnded

STEP_NAMES = {
    "value_loss": "critic/vf_loss",
    "clipfrac": "critic/vf_clipfrac",
    "saturation": "critic/vf_saturation",
    "vpred_mean": "critic/vpred_mean",
    "grad_norm": "critic/grad_norm",
    "lr": "critic/lr",
    "response_tokens": "critic/response_tokens",
    "rollouts": "critic/rollouts",
    "skipped_steps": "critic/skipped_steps",
}
"""metrics.jsonl's name -> the tracker's, for a step."""

TIMING_NAMES = {
    "step_seconds": "timing_s/update_critic",
    "rollout_tokens_per_second": "perf/throughput",
    "computed_tokens_per_second": "perf/computed_throughput",
    "memory_bytes": "perf/max_memory_bytes",
    "elapsed_seconds": "perf/elapsed_seconds",
}
"""timings.jsonl's name -> the tracker's. Throughput counts a shared token for each rollout."""

EVALUATION_NAMES = {
    "explained_variance": "critic/vf_explained_var",
    "explained_variance_within_group": "critic/vf_explained_var_within_group",
}
"""An evaluation's figures that the field has names for; the others stand as `val/` and our own name."""


def step_metrics(event: StepEnded) -> dict[str, float]:
    """The numbers of a step, as a tracker logs them."""
    named = {STEP_NAMES[name]: value for name, value in event.metrics.items() if name in STEP_NAMES}
    named |= {TIMING_NAMES[name]: value for name, value in event.timing.items() if name in TIMING_NAMES}
    return _numbers(named | {"training/epoch": event.epoch})


def evaluation_metrics(event: EvaluationEnded) -> dict[str, float]:
    """The numbers of an evaluation on held-out rollouts: the critic's own, and what its baselines explain."""
    named: dict[str, Any] = {}
    for name, value in event.metrics.items():
        known = EVALUATION_NAMES.get(name.removesuffix("_interval"), f"val/{name.removesuffix('_interval')}")
        if name.endswith("_interval") and isinstance(value, list):
            named |= {f"{known}_low": value[0], f"{known}_high": value[1]}
        else:
            named[known] = value
    for name, metrics in event.metrics.get("baselines", {}).items():
        named[f"val/baselines/{name}/explained_variance"] = metrics.get("explained_variance")
    return _numbers(named)


def _numbers(named: dict[str, Any]) -> dict[str, float]:
    """Without what does not exist, and without tables."""
    return {
        name: value for name, value in named.items() if isinstance(value, int | float) and not isinstance(value, bool)
    }
