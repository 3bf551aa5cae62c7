"""Sections about training and computing: the model, the loss, the optimizer, the device, and what a run writes."""

import re
from dataclasses import dataclass
from typing import Any, Literal

from critic_train.settings.base import Section, minimum_errors, seed_errors, setting

Preset = Literal["tiny", "small", "base"]
RecipeKind = Literal["auto", "verl"]
HeadInit = Literal["exact", "mean"]
HeadInputs = Literal["last", "last+mean"]
OldValues = Literal["column", "epoch", "none"]
LossAggMode = Literal["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]
OptimizerKind = Literal["adamw", "adamw-8bit"]
Schedule = Literal["constant", "linear", "cosine"]
Shuffle = Literal["groups", "rollouts"]
OnNonFinite = Literal["stop", "skip"]
Packing = Literal["auto", "forest", "rows"]
Attention = Literal["auto", "sdpa", "flex", "varlen"]
Precision = Literal["auto", "fp32", "bf16"]
ActivationCheckpointing = Literal["auto", "none", "layer", "selective", "tiles", "layer-tiles"]
Offload = Literal["auto", "none", "optimizer", "all", "activations", "optimizer+activations", "all+activations"]
# The metrics of evaluation.metrics with `best_by`; settings import nothing above them, so a test holds the two equal.
BestBy = Literal["explained_variance", "explained_variance_within_group", "mse", "value_loss"]
Tracker = Literal["tensorboard", "wandb", "trackio"]

KEEPS_LAYER_INPUTS: tuple[ActivationCheckpointing, ...] = ("layer", "layer-tiles")
"""Kinds of activation checkpointing that keep the input of each layer, which can wait in host memory."""

CPU_MAX_TOKENS = 4096
"""--max-tokens where it is not given, on a CPU."""


def offloads(offload: Offload, what: Literal["optimizer", "all", "activations"]) -> bool:
    """Whether this is among what waits in host memory."""
    return what in offload.split("+")


LAST = re.compile(r"last-([1-9]\d*)")


@dataclass(frozen=True, kw_only=True)
class ModelSettings(Section):
    """What training starts from, and which part of it is trained."""

    model: str | None = setting(
        None,
        "Model to start from: a Hugging Face directory, a checkpoint or a run. Without it, --preset.",
        panel="Model",
        metavar="DIR",
    )
    preset: Preset | None = setting(
        None,
        "Size of the transformer trained from scratch without --model. "
        "[default: tiny below a million response tokens, else small]",
        panel="Model",
    )
    train: str | None = setting(
        None,
        "What is trained: all of it, the value head, the head and the last K layers, or LoRA adapters and the head. "
        "A frozen trunk's hidden states are computed once, and kept on disk where training steps follow. "
        "[default: full]",
        panel="Model",
        metavar="full|head|last-K|lora",
    )
    head_init: HeadInit | None = setting(
        None,
        "Where the value head starts: solved by least squares on the model's hidden states, or predicting the mean "
        "return. [default: exact for a model without a value head; a head that is there is kept]",
        panel="Model",
    )
    head_inputs: HeadInputs | None = setting(
        None,
        "What the value head reads: the last hidden state, or beside it the mean of the response's last hidden states "
        "so far, which no other system loads. [default: last; a head that is there is kept]",
        panel="Model",
    )
    lora_rank: int = setting(16, "Rank of the LoRA adapters.", panel="Model")
    lora_alpha: float = setting(32.0, "Scale of the LoRA adapters: their product counts alpha / rank.", panel="Model")

    def validate(self) -> list[str]:
        """See Section."""
        errors = [*minimum_errors(self, 1, "lora_rank"), *minimum_errors(self, 0, "lora_alpha")]
        if self.train not in (None, "full", "head", "lora") and not LAST.fullmatch(self.train):
            errors.append(f"--train must be full, head, lora or last-K, as in last-2, not {self.train!r}")
        if self.train != "lora" and (self.lora_rank != 16 or self.lora_alpha != 32.0):
            errors.append("--lora-rank and --lora-alpha belong to --train lora")
        if self.head_init == "exact" and self.model is None:
            errors.append("--head-init exact needs --model: the states of a new transformer know nothing")
        if self.train not in (None, "full") and self.model is None:
            errors.append(f"--train {self.train} needs --model: in a new transformer there is nothing worth freezing")
        return errors


def trained_layers(train: str | None) -> int | None:
    """How many of the last layers are trained with the head: 0 for the head alone, None where no layer is frozen."""
    if train == "head":
        return 0
    last = LAST.fullmatch(train or "full")
    return int(last[1]) if last else None


@dataclass(frozen=True, kw_only=True)
class LossSettings(Section):
    """How the loss is computed."""

    old_values: OldValues = setting(
        "column",
        "V_old for the clip: the shard's values, this critic's own at each epoch's start, or none.",
        panel="Loss",
    )
    cliprange_value: float = setting(
        0.5, "The clip's half-width eps around V_old, in the unit of the returns.", panel="Loss"
    )
    no_clip: bool = setting(False, "Turn the clip off: plain squared error.", panel="Loss")
    loss_agg_mode: LossAggMode = setting(
        "token-mean",
        "How token losses become one number, as in verl: token-mean, token-sum, seq-mean-token-sum, "
        "seq-mean-token-mean or seq-mean-token-sum-norm.",
        panel="Loss",
        metavar="MODE",
    )
    loss_scale_factor: float | None = setting(
        None, "Divisor of seq-mean-token-sum-norm; that mode needs it.", panel="Loss"
    )
    lm_loss_weight: float | None = setting(
        None,
        "Weight of a next-token loss on the responses, beside the value loss; its head is no part of the critic. "
        "[default: 1 for a new transformer where the responses have 200 tokens for each id that occurs, else 0]",
        panel="Loss",
    )
    lm_loss_ahead: int | None = setting(
        None,
        "How many of the response tokens that follow a state it predicts, all by one distribution. "
        "[default: 8 for a new transformer, else 1: the next token]",
        panel="Loss",
    )

    def validate(self) -> list[str]:
        """See Section."""
        errors = cliprange_errors(self.cliprange_value, "; --no-clip turns the clip off")
        errors += [*minimum_errors(self, 0, "lm_loss_weight"), *minimum_errors(self, 1, "lm_loss_ahead")]
        if self.lm_loss_ahead and self.lm_loss_weight == 0:
            errors.append("--lm-loss-ahead belongs to a next-token loss, which --lm-loss-weight 0 turns off")
        norm = self.loss_agg_mode == "seq-mean-token-sum-norm"
        factor = self.loss_scale_factor
        if norm and (factor is None or not 0 < factor < float("inf")):
            errors.append(
                "--loss-agg-mode seq-mean-token-sum-norm needs --loss-scale-factor above 0 "
                "(verl divides by the padded response length there; a forest has none)"
            )
        if not norm and factor is not None:
            errors.append("--loss-scale-factor belongs to --loss-agg-mode seq-mean-token-sum-norm only")
        return errors


def cliprange_errors(cliprange_value: float, advice: str = "") -> list[str]:
    """A line where the clip's half-width is not a positive number."""
    if 0 < cliprange_value < float("inf"):
        return []
    return [f"--cliprange-value must be above 0, not {cliprange_value:g}{advice}"]


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings(Section):
    """How long and how fast to train."""

    recipe: RecipeKind = setting(
        "auto",
        "How what is not given is chosen: by the model and the rollouts, each choice told with its reason, or as verl "
        "trains (head at the mean return, no next-token loss, no average of the weights, a --model of any width at "
        "1e-5, small, 3 epochs).",
        panel="Training",
    )
    epochs: int | None = setting(
        None,
        "Passes over the rollouts; 0 ends with the exact value head. "
        "[default: 3, or as many as --max-steps needs; for a new transformer and less than a million response "
        "tokens 6, or 12 with the next-token loss; 0 where the exact head alone is trained and no --lr or --head-lr is "
        "given]",
        panel="Training",
    )
    max_steps: int | None = setting(None, "Stop after this many steps, whatever --epochs says.", panel="Training")
    batch_size: int = setting(64, "Rollouts a step.", panel="Training")
    shuffle: Shuffle | None = setting(
        None,
        "What an epoch puts in random order: whole prompt groups, which share the computation of their prefixes, or "
        "single rollouts. [default: groups; rollouts for a new transformer and less than a million response tokens]",
        panel="Training",
    )
    lr: float | None = setting(
        None,
        "Peak learning rate of the transformer. "
        "[default: 1e-5 with --model, more by as much as it is narrower than 2048, and ten times as much with --train "
        "lora; 2e-3, 1e-3, 3e-4 for tiny, small, base]",
        panel="Training",
    )
    head_lr: float | None = setting(
        None,
        "Peak learning rate of the value head. [default: --lr, and at least 1e-3 for a new head]",
        panel="Training",
    )
    optimizer: OptimizerKind = setting(
        "adamw", "AdamW with float32 moments, or with 8-bit ones (bitsandbytes).", panel="Training"
    )
    weight_decay: float = setting(0.01, "AdamW weight decay, on matrices only.", panel="Training")
    warmup_steps: int | None = setting(
        None, "Steps over which the learning rate rises. [default: 3 % of the run]", panel="Training"
    )
    lr_schedule: Schedule = setting("cosine", "How the learning rate falls after the warm-up.", panel="Training")
    ema_decay: float | None = setting(
        None,
        "Decay of an exponential moving average of the trained weights, which is evaluated and saved while training "
        "goes on with the weights themselves; 0 for none. [default: 0.99; 0 where all of a model of more than 2 "
        "billion parameters is trained]",
        panel="Training",
    )
    grad_clip: float = setting(1.0, "Largest gradient norm; 0 turns the clip off.", panel="Training")
    on_non_finite: OnNonFinite = setting(
        "stop", "Where a loss or gradient is not finite: end the run, or go on without the step.", panel="Training"
    )
    max_skips: int = setting(10, "Steps that --on-non-finite skip may leave out in a run.", panel="Training")
    seed: int = setting(0, "Seed of the split, the order and the initial weights.", panel="Training")

    def validate(self) -> list[str]:
        """See Section."""
        return [
            *minimum_errors(self, 1, "batch_size", "max_steps"),
            *seed_errors(self.seed),
            *(
                []
                if 0 <= (self.ema_decay or 0.0) < 1
                else [f"--ema-decay must be from 0 to below 1, not {self.ema_decay:g}"]
            ),
            *minimum_errors(
                self, 0, "epochs", "weight_decay", "grad_clip", "lr", "head_lr", "warmup_steps", "max_skips"
            ),
        ]


def _nproc_setting() -> Any:
    """--nproc, for every command that can run on several processes."""
    return setting(
        1, "Processes on this machine, one a GPU; the gradient stays the same. Not under torchrun.", panel="Compute"
    )


def _sequence_parallel_setting() -> Any:
    """--sequence-parallel, for the same commands."""
    return setting(
        None,
        "Cut the positions of each micro-batch over so many adjacent ranks, for rollouts that one cannot hold; "
        "--max-tokens stays what one of them takes, and the result the same. "
        "[default: 1, or the fewest ranks whose --max-tokens hold the longest rollout]",
        panel="Compute",
    )


@dataclass(frozen=True, kw_only=True)
class ComputeSettings(Section):
    """Where and how a model computes: for every command that runs one."""

    device: str = setting("auto", "Where to compute: auto, cpu, cuda, cuda:1, ...", panel="Compute")
    precision: Precision = setting(
        "auto",
        "Compute precision; weights, head and loss stay in float32. auto: bf16 on a GPU that has it, else fp32.",
        panel="Compute",
    )
    packing: Packing = setting(
        "auto", "Lay rollouts out as a forest of shared prefixes, or as padded rows.", panel="Compute"
    )
    attention: Attention = setting(
        "auto",
        "How attention is computed on a forest: torch's scaled-dot-product attention, FlexAttention or "
        "variable-length attention (both CUDA); auto takes the best that is right on the device.",
        panel="Compute",
    )
    max_tokens: int | None = setting(
        None,
        "Tokens through the model at once; bounds memory, never changes the result. "
        "[default: 4096 on a CPU, what its memory holds on a GPU]",
        panel="Compute",
    )

    def validate(self) -> list[str]:
        """See Section."""
        return minimum_errors(self, 1, "max_tokens")


@dataclass(frozen=True, kw_only=True)
class EvalComputeSettings(ComputeSettings):
    """Where and how `eval` computes: on one process or several."""

    nproc: int = _nproc_setting()
    sequence_parallel: int | None = _sequence_parallel_setting()

    def validate(self) -> list[str]:
        """See Section."""
        return super().validate() + minimum_errors(self, 1, "nproc", "sequence_parallel")


@dataclass(frozen=True, kw_only=True)
class TrainComputeSettings(ComputeSettings):
    """Where and how `fit` computes: also what it trades for memory, and on how many processes."""

    activation_checkpointing: ActivationCheckpointing = setting(
        "auto",
        "Less memory, more time: keep only each layer's input and compute the rest again (layer); attention and half "
        "of the matrix products (selective); all but the inside of MLPs and norms, which are computed in tiles of "
        "positions (tiles); or layer inputs, with tiles inside (layer-tiles). "
        "auto: none on a CPU, what memory asks for on a GPU.",
        panel="Compute",
    )
    offload: Offload = setting(
        "auto",
        "What waits in host memory instead of the GPU's: AdamW's two moments, updated on the GPU (optimizer), or "
        "weights and gradients as well, updated on the host (all); the layer inputs that activation checkpointing "
        "keeps (activations), alone or with one of those. auto: the moments where the GPU does not hold them, and the "
        "layer inputs where nothing else lets the largest prompt fit.",
        panel="Compute",
    )
    compile: bool = setting(
        False,
        "Compile the layers with torch.compile: slow to start, faster on a GPU. A long run on one GPU tries it by "
        "itself, and takes what is faster.",
        panel="Compute",
    )
    no_compile: bool = setting(False, "Leave the layers as they are, however long the run is.", panel="Compute")
    nproc: int = _nproc_setting()
    sequence_parallel: int | None = _sequence_parallel_setting()

    def validate(self) -> list[str]:
        """See Section."""
        errors = super().validate()
        if self.compile and self.no_compile:
            errors.append("--compile and --no-compile contradict each other")
        if self.compile and self.activation_checkpointing not in ("auto", "none", "layer"):
            errors.append(
                f"--compile does not go with --activation-checkpointing {self.activation_checkpointing}, which changes "
                "what happens inside a layer, which is compiled as one: none or layer"
            )
        if offloads(self.offload, "activations") and self.activation_checkpointing not in ("auto", *KEEPS_LAYER_INPUTS):
            errors.append(
                "--offload activations moves the layer inputs that --activation-checkpointing layer or layer-tiles "
                f"keeps: not with {self.activation_checkpointing}"
            )
        return errors + minimum_errors(self, 1, "nproc", "sequence_parallel")


@dataclass(frozen=True, kw_only=True)
class RunSettings(Section):
    """What a run writes, how often, and to which trackers."""

    out: str | None = setting(
        None, "Run directory. [default: runs/ and the data folder's name]", panel="Run", metavar="DIR"
    )
    dry_run: bool = setting(False, "Say what the run would take, and train nothing.", panel="Run")
    eval_every: int | None = setting(
        None, "Steps between evaluations on held-out rollouts. [default: a tenth of the run]", panel="Run"
    )
    best_by: BestBy = setting("explained_variance", "Held-out figure that chooses the best checkpoint.", panel="Run")
    patience: int | None = setting(
        None,
        "Stop after so many evaluations in a row that get no further. [default: never; 3 where a model is fine-tuned "
        "from its exact head and neither --epochs nor --max-steps is given]",
        panel="Run",
    )
    checkpoint_every: int = setting(200, "Steps between checkpoints; the last step always writes one.", panel="Run")
    keep: int = setting(2, "Newest checkpoints kept, besides the best.", panel="Run")
    log_every: int = setting(10, "Steps between plain progress lines when not on a terminal.", panel="Run")
    no_report: bool = setting(False, "Write no report.html.", panel="Run")
    log_to: list[Tracker] = setting(
        [], "Also log to this tracker; repeatable. metrics.jsonl is always written.", panel="Run"
    )
    log_project: str = setting("critic-train", "Project of wandb and trackio.", panel="Run", metavar="NAME")

    def validate(self) -> list[str]:
        """See Section."""
        return minimum_errors(self, 1, "checkpoint_every", "keep", "log_every", "eval_every", "patience")
