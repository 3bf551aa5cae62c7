"""Whether the layers of a run are compiled, where that chooses itself: by what it gains on the device at hand.

A run on a GPU that is long enough is tried both ways before its first step, on the largest prompt: what computes the
same and takes less time is used to the end, and by whatever resumes the run.
"""

import time
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from critic_train.errors import first_line
from critic_train.events import Notice
from critic_train.model.automatic import Choice, try_largest
from critic_train.model.compute import Compute, Keeping
from critic_train.model.critic import Critic
from critic_train.model.memory import compile_layers, leave_uncompiled, set_keeping
from critic_train.model.memory_use import some_loss
from critic_train.model.microbatches import micro_batches
from critic_train.model.oom import release_memory
from critic_train.model.rounding import Rounding
from critic_train.rollouts import Rollouts
from critic_train.settings import TrainComputeSettings

LONG_RUN_SECONDS = 1800.0
"""Compiling takes one to three minutes of one core, the trial included. A run of half an hour has it back where
a compiled step takes a tenth less; a shorter one may not."""
WARMING, TIMED = 2, 3
"""Passes over the largest prompt: before the clock, which compile, and with it; their median counts."""
WORTHWHILE = 0.95
"""Of the time without."""
GRADIENT_ERROR = 0.1
"""Norm of the difference of the first layer's gradient, which has come through all others, relative to its norm:
rounding in bf16 makes about a hundredth of it."""


@dataclass(frozen=True, kw_only=True)
class _Passes:
    """Forward and backward passes over a prompt's rollouts, as a run will make them.

    Attributes:
        critic, compute, forest: of the run.
        rollouts: of the prompt.
    """

    critic: Critic
    compute: Compute
    forest: bool
    rollouts: Rollouts

    def states(self) -> Tensor:
        """float32 [N, hidden_size], what the head reads, by the passes that are made for a gradient."""
        read = []
        with torch.enable_grad():
            for batch in micro_batches(self.rollouts, self.compute, forest=self.forest):
                with self.compute.autocast():
                    read.append(self.critic.hidden(batch).detach().float())
        return torch.cat([states.reshape(-1, states.shape[-1]) for states in read])

    def seconds(self) -> float:
        """What one pass takes. The gradient of the last one is left."""
        taken = []
        for _ in range(WARMING + TIMED):
            self.critic.zero_grad(set_to_none=True)
            _wait(self.compute.device)
            began = time.perf_counter()
            for batch in micro_batches(self.rollouts, self.compute, forest=self.forest):
                with self.compute.autocast():
                    loss = some_loss(self.critic, batch)
                loss.backward()
            _wait(self.compute.device)
            taken.append(time.perf_counter() - began)
        return median(taken[WARMING:])

    def first_gradient(self) -> Tensor:
        """The gradient of the layer that is the first to compute and the last to get one; a copy."""
        layer = next(module for name, module in self.critic.trunk.named_modules() if name.endswith(".0"))
        gradients = [p.grad.flatten() for p in layer.parameters() if p.grad is not None]
        return torch.cat(gradients) if gradients else torch.zeros(0)


class Compiling(NamedTuple):
    """What came of compiling.

    Attributes:
        value: whether the layers are compiled.
        choice: where that chose itself.
        notices: about the token budget.
    """

    value: bool
    choice: Choice | None
    notices: list[Notice]


def compile_or_not(
    critic: Critic,
    compute: Compute,
    settings: TrainComputeSettings,
    train: str | None,
    largest: Rollouts,
    *,
    forest: bool,
    run_tokens: int,
) -> Compiling:
    """Compile the layers where that is asked for or pays, and lower a token budget that is too much for a prompt.

    Args:
        critic: in training mode, on its device, its memory options set.
        compute: of the run.
        settings, train: what was given; --train.
        largest: the rollouts of the largest prompt.
        forest: how rollouts are laid out.
        run_tokens: of all rollouts that are trained on, as often as they are.
    """
    notices, choice = [], None
    if settings.compile:
        compile_layers(critic)
    if settings.max_tokens is None and compute.device.type == "cuda" and compute.ranks.size == 1:
        lowered = try_largest(critic, compute, largest, forest=forest)
        notices += [Notice(message=lowered, level="warning")] if lowered else []
    if chooses_to_compile(settings, compute, train):
        choice = choose_compiled(critic, compute, largest, forest=forest, tokens=run_tokens)
    return Compiling(settings.compile if choice is None else choice.value, choice, notices)


def chooses_to_compile(settings: TrainComputeSettings, compute: Compute, train: str | None) -> bool:
    """Whether compiling chooses itself: on one GPU, where nothing says otherwise and the whole model is trained.

    Adapters take several times as long to compile as the layers themselves, and of a model that is frozen but for its
    last layers little is left to gain.
    """
    asked = settings.compile or settings.no_compile
    return not asked and train in (None, "full") and compute.device.type == "cuda" and not compute.ranks.sharded


def choose_compiled(critic: Critic, compute: Compute, rollouts: Rollouts, *, forest: bool, tokens: int) -> Choice:
    """Compile the layers if that pays; `compute` then no longer keeps less while the run goes on.

    Args:
        critic: on a CUDA device, in training mode, its memory options set.
        compute: of the run.
        rollouts: those of the largest prompt.
        forest: how rollouts are laid out.
        tokens: rollout tokens of the whole run.

    Returns:
        The choice. Where half of a layer was to be kept (`selective`), a compiled one keeps its input alone.
    """

    def choice(value: bool, reason: str) -> Choice:
        return Choice(name="compile", value=value, reason=reason)

    before = compute.keeping
    if before.kind.endswith("tiles"):
        return choice(False, f"--activation-checkpointing {before.kind} changes what happens inside of a layer")
    passes = _Passes(critic=critic, compute=compute, forest=forest, rollouts=rollouts)
    eager = passes.seconds()
    run = eager * tokens / len(rollouts.input_ids)
    if run < LONG_RUN_SECONDS:
        critic.zero_grad(set_to_none=True)
        return choice(False, f"passes of {run:,.0f} s in all are too few to pay for it")
    gradient = passes.first_gradient()
    rounding = Rounding(critic.trunk, passes.states)
    rounding.explains(rounding.expected)  # measures it, while no layer is compiled
    compiled, failed = _tried(passes, rounding, gradient)
    if not failed and compiled <= WORTHWHILE * eager:
        compute.keep_less = ()
        # A length that cannot be compiled later is computed without.
        torch._dynamo.config.suppress_errors = True
    else:
        leave_uncompiled(critic)
        set_keeping(critic, compute, before)
    critic.zero_grad(set_to_none=True)
    release_memory(compute.device)
    if failed:
        return choice(False, f"compiled layers {failed}")
    figures = f"the largest prompt takes {compiled:.3g} s compiled and {eager:.3g} s as it is"
    return choice(compiled <= WORTHWHILE * eager, f"{figures}; the run about {run / 60:,.0f} min as it is")


def _tried(passes: _Passes, rounding: Rounding, gradient: Tensor) -> tuple[float, str]:
    """(seconds of a pass with compiled layers, what is wrong with them if anything is)."""
    critic, keeping = passes.critic, passes.compute.keeping
    try:
        set_keeping(
            critic, passes.compute, Keeping("layer", keeping.on_host) if keeping.kind == "selective" else keeping
        )
        compile_layers(critic)
        seconds = passes.seconds()
        off = float((passes.first_gradient() - gradient).norm())
        if not rounding.explains(passes.states()):
            return seconds, "compute other states"
        if not off <= GRADIENT_ERROR * float(gradient.norm()):
            return seconds, "compute another gradient"
    except Exception as error:  # a compiler that does not work here raises anything, and memory may run out
        return 0.0, f"fail on {passes.compute.device}: {first_line(error)}"
    return seconds, ""


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
