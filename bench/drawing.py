"""Random rollouts to measure on."""

from dataclasses import dataclass

import numpy as np

from critic_train.rollouts import Rollouts, offsets_from_lengths

VOCABULARY = 4096


@dataclass(frozen=True)
class Shape:
    """`groups` prompts of `prompt` tokens with `responses` each, whose lengths are even between two bounds."""

    name: str
    prompt: int
    shortest: int
    longest: int
    responses: int = 8
    groups: int = 1


def draw(shape: Shape, seed: int = 0, vocabulary: int = VOCABULARY) -> Rollouts:
    """Random rollouts of a shape."""
    rng = np.random.default_rng(seed)
    sequences = []
    for _ in range(shape.groups):
        prompt = rng.integers(1, vocabulary, shape.prompt)
        for _ in range(shape.responses):
            length = int(rng.integers(shape.shortest, shape.longest + 1))
            sequences.append(np.concatenate([prompt, rng.integers(1, vocabulary, length)]))
    offsets = offsets_from_lengths(np.asarray([len(s) for s in sequences]))
    total = int(offsets[-1])
    place = np.arange(total) - np.repeat(offsets[:-1], np.diff(offsets))
    return Rollouts(
        input_ids=np.concatenate(sequences).astype(np.int32),
        offsets=offsets,
        response_mask=place >= shape.prompt,
        returns=rng.normal(size=total).astype(np.float32),
        values=rng.normal(size=total).astype(np.float32),
        group=np.repeat(np.arange(shape.groups), shape.responses).astype(np.int64),
        row=np.arange(len(sequences), dtype=np.int64),
    )


def draw_dump(
    groups: int, *, responses: int = 8, seed: int = 0, prompt: float = 200, response: float = 500
) -> Rollouts:
    """Rollouts as a dump has them: log-normal lengths with these medians, ids by Zipf's law, noisy floats."""
    rng = np.random.default_rng(seed)
    prompts = np.clip(rng.lognormal(np.log(prompt), 0.5, groups), 16, 10 * prompt).astype(np.int64)
    lengths = np.clip(rng.lognormal(np.log(response), 0.7, (groups, responses)), 8, 8 * response).astype(np.int64)
    pieces = []
    for group in range(groups):
        start = _zipf(rng, int(prompts[group]))
        for length in lengths[group].tolist():
            pieces += [start, _zipf(rng, length)]
    offsets = offsets_from_lengths((prompts[:, None] + lengths).ravel())
    total = int(offsets[-1])
    place = np.arange(total) - np.repeat(offsets[:-1], np.diff(offsets))
    return Rollouts(
        input_ids=np.concatenate(pieces),
        offsets=offsets,
        response_mask=place >= np.repeat(np.repeat(prompts, responses), np.diff(offsets)),
        returns=rng.normal(size=total).astype(np.float32),
        values=rng.normal(size=total).astype(np.float32),
        group=np.repeat(np.arange(groups), responses).astype(np.int64),
        row=np.arange(groups * responses, dtype=np.int64),
    )


def _zipf(rng: np.random.Generator, count: int) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    return (rng.zipf(1.2, count) % 50_000).astype(np.int32)
