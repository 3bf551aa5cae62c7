"""Every setting of every command, once: its name, type, default, help and place in the help.

The flags, the configuration file, the environment variables, `run.json` and the documentation are all
derived from these dataclasses. Nothing heavy is imported here, so that `--help` stays instant.
"""

from dataclasses import dataclass, field, fields
from typing import Any, Literal

from critic_train.errors import ConfigError

OnBadRows = Literal["fail", "skip"]
Preset = Literal["tiny", "small", "base"]
OldValues = Literal["column", "epoch", "none"]
Packing = Literal["auto", "forest", "rows"]
Precision = Literal["fp32", "bf16"]
Schedule = Literal["constant", "linear", "cosine"]
LossAggMode = Literal["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]


SEEDS = 2**63
"""Seeds are below it: what torch and numpy both take."""


def setting(default: Any, help: str, *, panel: str, metavar: str | None = None, flag: str | None = None) -> Any:
    """A dataclass field that carries its own help.

    Args:
        default: the value when nothing is said; a list makes the flag repeatable.
        help: one sentence for the help page and the docs.
        panel: the group under which the help page shows it.
        metavar: what the help shows in place of the type.
        flag: the flag's name where it is not `--` + the field's name with dashes.
    """
    metadata = {"help": help, "panel": panel, "metavar": metavar, "flag": flag}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True, kw_only=True)
class FitSettings:
    """Settings of `critic-train fit`. Cross-field rules raise ConfigError, all of them at once."""

    data: list[str] = setting(
        [],
        "Rollouts to train on: a folder, a Parquet file or a glob; repeatable.",
        panel="Data",
        metavar="PATH",
    )
    val_data: list[str] = setting(
        [], "Held-out rollouts: a folder, a file or a glob; repeatable.", panel="Data", metavar="PATH"
    )
    val_fraction: float = setting(
        0.1,
        "Share of the prompt groups held out when there is no --val-data; 0 holds out none.",
        panel="Data",
    )
    column: list[str] = setting(
        [],
        "Read a column under another name, as in returns=my_returns; repeatable.",
        panel="Data",
        metavar="NAME=COLUMN",
    )
    on_bad_rows: OnBadRows = setting("fail", "Stop at rows that cannot be used, or leave them out.", panel="Data")

    model: str | None = setting(
        None,
        "Model to start from: a Hugging Face directory, a checkpoint or a run. Without it, --preset.",
        panel="Model",
        metavar="DIR",
    )
    preset: Preset = setting("small", "Size of the transformer trained from scratch without --model.", panel="Model")
    packing: Packing = setting(
        "auto", "Lay rollouts out as a forest of shared prefixes, or as padded rows.", panel="Model"
    )
    precision: Precision = setting("fp32", "Compute precision; weights, head and loss stay in float32.", panel="Model")
    device: str = setting("auto", "Where to compute: auto, cpu, cuda, cuda:1, ...", panel="Model")

    old_values: OldValues = setting(
        "column",
        "V_old for the clip: the shard's values, this critic's own at each epoch's start, or none.",
        panel="Loss",
    )
    cliprange_value: float = setting(0.5, "The clip's half-width eps around V_old.", panel="Loss")
    no_clip: bool = setting(False, "Turn the clip off: plain squared error.", panel="Loss")
    loss_agg_mode: LossAggMode = setting("token-mean", "How token losses become one number.", panel="Loss")
    loss_scale_factor: float | None = setting(
        None, "Divisor of seq-mean-token-sum-norm; that mode needs it.", panel="Loss"
    )

    epochs: int | None = setting(
        None, "Passes over the rollouts. [default: 3, or as many as --max-steps needs]", panel="Training"
    )
    max_steps: int | None = setting(None, "Stop after this many steps, whatever --epochs says.", panel="Training")
    batch_size: int = setting(64, "Rollouts a step; prompt groups stay together.", panel="Training")
    max_tokens: int = setting(
        4096, "Tokens through the model at once; bounds memory, never changes the result.", panel="Training"
    )
    lr: float | None = setting(
        None,
        "Peak learning rate of the transformer. [default: 1e-5 with --model; 2e-3, 1e-3, 3e-4 for tiny, small, base]",
        panel="Training",
    )
    head_lr: float | None = setting(
        None,
        "Peak learning rate of the value head. [default: --lr, and at least 1e-3 for a new head]",
        panel="Training",
    )
    weight_decay: float = setting(0.01, "AdamW weight decay, on matrices only.", panel="Training")
    warmup_steps: int | None = setting(
        None, "Steps over which the learning rate rises. [default: 3 % of the run]", panel="Training"
    )
    lr_schedule: Schedule = setting("cosine", "How the learning rate falls after the warm-up.", panel="Training")
    grad_clip: float = setting(1.0, "Largest gradient norm; 0 turns the clip off.", panel="Training")
    seed: int = setting(0, "Seed of the split, the order and the initial weights.", panel="Training")

    out: str | None = setting(
        None, "Run directory. [default: runs/ and the data folder's name]", panel="Run", metavar="DIR"
    )
    eval_every: int | None = setting(
        None, "Steps between evaluations on held-out rollouts. [default: a tenth of the run]", panel="Run"
    )
    checkpoint_every: int = setting(200, "Steps between checkpoints; the last step always writes one.", panel="Run")
    keep: int = setting(2, "Newest checkpoints kept, besides the best.", panel="Run")
    log_every: int = setting(10, "Steps between plain progress lines when not on a terminal.", panel="Run")

    def __post_init__(self) -> None:
        wrong: list[str] = []

        def require(held: bool, rule: str) -> None:
            if not held:
                wrong.append(rule)

        require(bool(self.data), "--data is needed: a folder, a Parquet file or a glob")
        require(0.0 <= self.val_fraction < 1.0, f"--val-fraction must be in [0, 1), not {self.val_fraction:g}")
        wrong += column_faults(self.column)
        for name in ("batch_size", "max_tokens", "checkpoint_every", "keep", "log_every"):
            require(getattr(self, name) >= 1, f"{flag_of(name)} must be at least 1, not {getattr(self, name)}")
        for name in ("epochs", "max_steps", "eval_every"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{flag_of(name)} must be at least 1, not {value}")
        require(0 <= self.seed < SEEDS, f"--seed must be from 0 to 2^63 - 1, not {self.seed}")
        for name in ("weight_decay", "grad_clip"):
            value = getattr(self, name)
            require(
                0 <= value < float("inf"),
                f"{flag_of(name)} must be a finite number, at least 0, not {value:g}",
            )
        for name in ("lr", "head_lr"):
            value = getattr(self, name)
            require(value is None or 0 <= value < float("inf"), f"{flag_of(name)} must be at least 0, not {value}")
        require(
            self.warmup_steps is None or self.warmup_steps >= 0,
            f"--warmup-steps must be at least 0, not {self.warmup_steps}",
        )
        require(
            0 < self.cliprange_value < float("inf"),
            f"--cliprange-value must be above 0, not {self.cliprange_value:g}; --no-clip turns the clip off",
        )
        norm = self.loss_agg_mode == "seq-mean-token-sum-norm"
        factor = self.loss_scale_factor
        require(
            not norm or (factor is not None and 0 < factor < float("inf")),
            "--loss-agg-mode seq-mean-token-sum-norm needs --loss-scale-factor above 0 "
            "(verl divides by the padded response length there; a forest has none)",
        )
        require(
            norm or factor is None,
            "--loss-scale-factor belongs to --loss-agg-mode seq-mean-token-sum-norm only",
        )
        if wrong:
            raise ConfigError("\n".join(wrong), hint="critic-train fit --help lists every flag")


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalSettings:
    """Settings of `critic-train eval`."""

    data: list[str] = setting(
        [],
        "Rollouts to judge on: a folder, a Parquet file or a glob; repeatable.",
        panel="Data",
        metavar="PATH",
    )
    model: list[str] = setting(
        [],
        "Critic to judge: a run, a checkpoint or a Hugging Face directory; repeat to compare. "
        "Without it, the stored values are judged.",
        panel="Model",
        metavar="DIR",
    )
    by: list[str] = setting([], "Also judge per value of this column; repeatable.", panel="Judgement", metavar="COLUMN")
    column: list[str] = setting(
        [],
        "Read a column under another name, as in returns=my_returns; repeatable.",
        panel="Data",
        metavar="NAME=COLUMN",
    )
    on_bad_rows: OnBadRows = setting("fail", "Stop at rows that cannot be used, or leave them out.", panel="Data")
    cliprange_value: float = setting(
        0.5,
        "The clip's half-width eps around the stored values, for value_loss and clipfrac.",
        panel="Judgement",
    )
    resamples: int = setting(1000, "Bootstrap resamples of the prompt groups.", panel="Judgement")
    seed: int = setting(0, "Seed of the bootstrap.", panel="Judgement")
    packing: Packing = setting(
        "auto", "Lay rollouts out as a forest of shared prefixes, or as padded rows.", panel="Compute"
    )
    precision: Precision = setting("fp32", "Compute precision; the head stays in float32.", panel="Compute")
    device: str = setting("auto", "Where to compute: auto, cpu, cuda, cuda:1, ...", panel="Compute")
    max_tokens: int = setting(
        4096, "Tokens through the model at once; bounds memory, never changes the result.", panel="Compute"
    )

    def __post_init__(self) -> None:
        wrong: list[str] = []
        if not self.data:
            wrong.append("--data is needed: a folder, a Parquet file or a glob")
        wrong += column_faults(self.column)
        if not 0 < self.cliprange_value < float("inf"):
            wrong.append(f"--cliprange-value must be above 0, not {self.cliprange_value:g}")
        for name in ("resamples", "max_tokens"):
            if getattr(self, name) < 1:
                wrong.append(f"{flag_of(name)} must be at least 1, not {getattr(self, name)}")
        if not 0 <= self.seed < SEEDS:
            wrong.append(f"--seed must be from 0 to 2^63 - 1, not {self.seed}")
        if wrong:
            raise ConfigError("\n".join(wrong), hint="critic-train eval --help lists every flag")


def column_faults(pairs: list[str]) -> list[str]:
    """What is wrong with the values of --column, one line each."""
    return [
        f"--column takes NAME=COLUMN, as in returns=my_returns, not {pair!r}"
        for pair in pairs
        if not all(pair.partition("=")[::2])
    ]


def flag_of(name: str) -> str:
    """The flag of a settings field: `batch_size` -> `--batch-size`."""
    return "--" + name.replace("_", "-")


def column_renames(pairs: list[str]) -> dict[str, str]:
    """`["returns=my_returns"]` -> `{"returns": "my_returns"}` (canonical name -> the shard's column)."""
    return dict(tuple(pair.split("=", 1)) for pair in pairs)  # type: ignore[misc]


def as_dict(settings: FitSettings | EvalSettings) -> dict[str, Any]:
    """Field name -> value, in the order of the class."""
    return {f.name: getattr(settings, f.name) for f in fields(settings)}
