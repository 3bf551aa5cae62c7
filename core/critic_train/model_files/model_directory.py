"""What lies in a model directory: its weight files; and what else people name by mistake, each with its remedy."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from critic_train.errors import ModelError, first_line
from critic_train.jsonio import read_json_object
from critic_train.model_files.tensor_file import read_headers

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
PICKLED_HEAD_FILE = "value_head.bin"
"""Where LLaMA-Factory writes the value head of a reward model, without safetensors."""
TRAINING_STATE = ("pytorch_model", "training_args", "optimizer", "scheduler", "scaler", "rng_state", "adapter_")
"""How pickled files beside safetensors weights begin that hold the same weights again, or no weights."""
OWN_FILES = (
    "optimizer.safetensors",
    "optimizer_weights.safetensors",
    "adapter.safetensors",
    "next_token_head.safetensors",
)
"""What a checkpoint of ours has beside its weights."""
TAKES = "--model takes a run, a checkpoint or a Hugging Face directory with safetensors weights"


@dataclass(frozen=True, slots=True, kw_only=True)
class OtherForm:
    """A form of checkpoint that is no Hugging Face directory.

    Attributes:
        matches: whether a directory without config.json or without weights is one.
        what: what it is, as in "{path} holds {what}".
        remedy: what to do about it; {path} stands for the directory.
    """

    matches: Callable[[Path], bool]
    what: str
    remedy: str


def _holds(*patterns: str) -> Callable[[Path], bool]:
    return lambda path: any(next(path.glob(pattern), None) is not None for pattern in patterns)


VERL_SHARDS = "model_world_size_*_rank_*.pt"
OTHER_FORMS = (
    OtherForm(
        matches=_holds("snapshots/*/"),
        what="the hub's cache of a model, not the model's directory",
        remedy="name its snapshot: --model {snapshot}",
    ),
    OtherForm(
        matches=_holds("adapter_config.json"),
        what="a PEFT adapter without its base model",
        remedy="merge it into its base first: PeftModel.from_pretrained(base, {path!r}).merge_and_unload()"
        ".save_pretrained(OUT), then --model OUT",
    ),
    OtherForm(
        matches=_holds(VERL_SHARDS, f"../{VERL_SHARDS}"),
        what="a sharded FSDP checkpoint of verl",
        remedy="merge its shards first: python -m verl.model_merger merge --backend fsdp --local_dir {shards} "
        "--target_dir OUT, then --model OUT",
    ),
    OtherForm(
        matches=_holds(f"critic/{VERL_SHARDS}", "critic/dist_ckpt"),
        what="a training step of verl: its critic is in the folder critic",
        remedy="merge that first: python -m verl.model_merger merge --backend fsdp (or megatron) --local_dir "
        "{path}/critic --target_dir OUT, then --model OUT",
    ),
    OtherForm(
        matches=_holds("global_step_*/"),
        what="training steps of verl (global_step_N)",
        remedy="merge the critic of one of them: python -m verl.model_merger merge --backend fsdp --local_dir "
        "{path}/global_step_N/critic --target_dir OUT, then --model OUT",
    ),
    OtherForm(
        matches=_holds("zero_to_fp32.py", "*_model_states.pt", "*/*_model_states.pt"),
        what="a DeepSpeed ZeRO checkpoint",
        remedy="python {path}/zero_to_fp32.py {path} OUT --safe_serialization, put config.json and the tokenizer's "
        "files beside, then --model OUT",
    ),
    OtherForm(
        matches=_holds("latest_checkpointed_iteration.txt", "iter_*/", "mp_rank_*/", "dist_ckpt/"),
        what="a Megatron checkpoint",
        remedy="convert it to a Hugging Face directory first, with Megatron-Bridge or with the script of the system "
        "that wrote it (verl: python -m verl.model_merger merge --backend megatron)",
    ),
    OtherForm(
        matches=_holds("*.distcp", "*/*.distcp", ".metadata"),
        what="a torch.distributed.checkpoint (.distcp)",
        remedy="python -m torch.distributed.checkpoint.format_utils dcp_to_torch {path} weights.pt, then load "
        "weights.pt into the model in transformers and save it with save_pretrained",
    ),
    OtherForm(
        matches=_holds("*.gguf"),
        what="GGUF files, which are quantized for llama.cpp",
        remedy="take the model's Hugging Face directory with safetensors weights, from which they were made",
    ),
    OtherForm(
        matches=_holds("params.json"),
        what="weights in the format of the model's maker (params.json)",
        remedy="take the model's Hugging Face directory, with config.json and model.safetensors",
    ),
)


def require_directory(path: Path) -> None:
    """Refuse what is no model directory, with what to do about it; looks at names of files alone.

    Raises:
        ModelError: it does not exist, is a file, or a checkpoint in another form.
    """
    if path.is_file():
        quantized = " GGUF holds quantized weights for llama.cpp." if path.suffix == ".gguf" else ""
        raise ModelError(f"{path} is a file, not a model directory.{quantized}", hint=TAKES)
    if not path.is_dir():
        hint = "--model takes a run, a checkpoint or a Hugging Face directory"
        if HUB_ID.fullmatch(str(path)):
            hint = (
                f"nothing is downloaded here; if it is a model on the Hugging Face hub: hf download {path} "
                f"--local-dir {path.name}, then --model {path.name}"
            )
        raise ModelError(f"no model directory at {path}", hint=hint)
    if (path / "config.json").is_file() and next(_weights(path), None) is not None:
        return
    for form in OTHER_FORMS:
        if form.matches(path):
            raise ModelError(f"{path} holds {form.what}", hint=form.remedy.format(**_names(path)))
    if not (path / "config.json").is_file():
        inner = sorted(child.parent for child in path.glob("*/config.json"))
        hint = f"is it {inner[-1]}?" if inner else TAKES
        raise ModelError(f"{path} has no config.json", hint=hint)


def _weights(path: Path) -> Iterator[Path]:
    """Files that may hold the model's weights."""
    yield from path.glob("model*.safetensors")
    yield from path.glob("*.safetensors.index.json")


def _names(path: Path) -> dict[str, str]:
    """What the remedies name."""
    snapshots = sorted(path.glob("snapshots/*/"), key=lambda folder: folder.stat().st_mtime)
    main = path / "refs" / "main"
    named = path / "snapshots" / main.read_text().strip() if main.is_file() else None
    if named is None or not named.is_dir():
        named = snapshots[-1] if snapshots else path
    shards = path if next(path.glob(VERL_SHARDS), None) else path.parent
    return {"path": str(path), "snapshot": str(named), "shards": str(shards)}


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a directory, by its index where there is one.

    Raises:
        ModelError: a file is missing, or the index cannot be read or names a file outside the directory.
    """
    index = path / "model.safetensors.index.json"
    # Where there are both, transformers takes the single file.
    if index.exists() and not (path / "model.safetensors").exists():
        try:
            named = set(read_json_object(index)["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise ModelError(f"{index} cannot be read: {first_line(error)}") from error
        escaping = [name for name in named if not isinstance(name, str) or Path(name).name != name]
        if escaping or not named:
            raise ModelError(f"{index} names a file outside its directory: {(escaping or [''])[0]!r}")
        names = sorted(named)
    else:
        names = ["model.safetensors"]
    missing = [name for name in names if not (path / name).is_file()]
    if missing:
        raise _missing(path, missing[0])
    return [path / name for name in names]


def _missing(path: Path, name: str) -> ModelError:
    parts = sorted(p.name for p in path.glob("model-*.safetensors"))
    if parts and name == "model.safetensors":
        return ModelError(
            f"{path} has {len(parts)} parts ({parts[0]}, ...) and no model.safetensors.index.json, which says what is "
            "in each",
            hint="copy the index from where the parts came from, or load and save the model again",
        )
    others = [p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack") for p in path.glob(pattern)]
    if others:
        return ModelError(
            f"{path} has no {name} (found {', '.join(sorted(others)[:3])})",
            hint="weights are read from safetensors only: pickled files can run code. "
            "Load the model in transformers and save it again with save_pretrained",
        )
    return ModelError(f"{path} has no {name}", hint="the directory is incomplete: copy or download it again")


def head_files(path: Path, weights: list[Path]) -> list[Path]:
    """Files beside the weights that hold a value head, rows alone, as LLaMA-Factory's value_head.safetensors.

    Args:
        path: the directory.
        weights: from `weight_files`.

    Raises:
        ModelError: the head is pickled.
    """
    heads = [file for file in _beside(path, weights) if _holds_rows_alone(file)]
    if not heads and (path / PICKLED_HEAD_FILE).is_file():
        raise ModelError(
            f"{path / PICKLED_HEAD_FILE}: the value head is pickled, and pickled files can run code",
            hint="save its tensors as value_head.safetensors with safetensors.torch.save_file; fit --head-init exact "
            "goes without it",
        )
    return heads


def _beside(path: Path, read: list[Path]) -> list[Path]:
    """Safetensors files of a directory that are none of those that are read, nor a checkpoint's own."""
    names = {file.name for file in read} | set(OWN_FILES)
    others = [file for file in sorted(path.glob("*.safetensors")) if file.name not in names]
    return [file for file in others if not file.name.startswith(("adapter_", "consolidated"))]


def _holds_rows_alone(file: Path) -> bool:
    try:
        shapes = [tensor.shape for tensor in read_headers([file]).values()]
    except ModelError:
        return False
    return 0 < len(shapes) <= 2 and all(len(shape) <= 2 and shape[:1] in ((1,), ()) for shape in shapes)


def unread_files(path: Path, read: list[Path]) -> Iterator[str]:
    """A sentence about the files beside the weights that look like a part of the model and are not read.

    Args:
        path: the directory.
        read: the files that are.
    """
    if (path / "adapter_config.json").is_file():
        yield (
            f"{path} has a PEFT adapter beside its weights (adapter_config.json): it is not put into them. If it is "
            "not merged yet, merge it first (merge_and_unload, save_pretrained)"
        )
    pickled = [file for pattern in ("*.bin", "*.pt", "*.pth") for file in sorted(path.glob(pattern))]
    others = [file.name for file in _beside(path, read)]
    others += [file.name for file in pickled if not file.name.startswith(TRAINING_STATE)]
    if others:
        yield f"{path}: not read: {', '.join(others[:3])}" + (f" and {len(others) - 3} more" if others[3:] else "")
