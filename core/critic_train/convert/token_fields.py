"""Which fields hold token ids: those of whole rollouts, or of prompts and of responses."""

from critic_train.convert.field_values import (
    IDS,
    NUMBER,
    NUMBERS,
    Fields,
    UnclearError,
    are_equal,
    leaf,
    listed,
    word_list,
)
from critic_train.data.schema import ALIASES

PROMPTS = frozenset({"prompt", "question", "problem", "instruction", "query", "input", "context"})
RESPONSES = frozenset({
    "response", "completion", "generation", "output", "rollout", "reply", "generated", "trajectory",
})  # fmt: skip
ID_PARTS: tuple[str, ...] = ("input_ids", "prompts", "responses")
ROLLOUTS = ("input_ids", *ALIASES["input_ids"])


def token_parts(kinds: dict[str, str], samples: list[Fields], renames: dict[str, str]) -> dict[str, str] | None:
    """The parts of token ids; None where there are none, or not all."""
    given: dict[str, str] = {name: renames[name] for name in ID_PARTS if name in renames}
    if given:
        return given if "input_ids" in given or len(given) == 2 else None
    ids = [name for name, kind in kinds.items() if kind == IDS and _is_ids_name(name)]
    wholes = [name for name in ids if name in ROLLOUTS] or [name for name in ids if _role_of_ids(name) == "input_ids"]
    prompts, responses = ([name for name in ids if _role_of_ids(name) == role] for role in ("prompts", "responses"))
    has_mask = any(is_mask(name) and kind in (IDS, NUMBERS) for name, kind in kinds.items())
    length = _length_field(kinds)
    for role, names in (("input_ids", wholes), ("prompts", prompts), ("responses", responses)):
        canonical = [name for name in names if name == role or name in ALIASES[role]]
        if len(names) > 1 and len(canonical) != 1 and not are_equal(samples, names):
            raise UnclearError(f"{listed(names)} could each be {role}", hint=f"say which: --column {role}={names[0]}")
        if len(names) > 1:
            names[:] = canonical[:1] or names[:1]
    if wholes and (has_mask or (length is not None and not (prompts and responses))):
        return {"input_ids": wholes[0], **({} if has_mask or length is None else {"response_length": length})}
    if prompts and responses:
        return {"prompts": prompts[0], "responses": responses[0]}
    if wholes and responses and not prompts:
        return (
            {"prompts": wholes[0], "responses": responses[0]} if not _begin(samples, responses[0], wholes[0]) else None
        )
    return None


def _is_ids_name(name: str) -> bool:
    name_words = word_list(name)
    if is_mask(name):
        return False
    if name in (*ID_PARTS, *ALIASES["prompts"], *ALIASES["responses"], *ROLLOUTS):
        return True
    return bool({"id", "token", "sequence"} & set(name_words)) and not {"position", "type", "logprob"} & set(name_words)


def _role_of_ids(name: str) -> str:
    name_words = (set(word_list(leaf(name))) - {"id", "token"}) or set(word_list(name))
    if name in ROLLOUTS:
        return "input_ids"
    if name_words & RESPONSES or name_words & {"action", "choice"}:
        return "responses"
    return "prompts" if name_words & (PROMPTS | {"observation", "ob"}) else "input_ids"


def is_mask(name: str) -> bool:
    """Whether a field is a mask of the response by its name."""
    return name.rpartition(".")[2] in ("response_mask", *ALIASES["response_mask"])


def _length_field(kinds: dict[str, str]) -> str | None:
    names = ("response_length", "response_len", "response_lengths", "completion_length", "output_length")
    return next((name for name in names if kinds.get(name) == NUMBER), None)


def _begin(samples: list[Fields], longer: str, shorter: str) -> bool:
    """Whether the lists of one field begin with those of the other."""
    pairs = [(sample.get(longer) or [], sample.get(shorter) or []) for sample in samples]
    return all(long[: len(short)] == short for long, short in pairs)
