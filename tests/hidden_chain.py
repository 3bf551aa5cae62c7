"""A world whose values are known: a hidden Markov chain emits tokens, and a coin at the end is the return.

The value of a prefix, E[return | prefix], is the forward filter's belief times the payoff to be expected from each
state. No critic can do better than these values, and where they stand they are calibrated.
"""

from dataclasses import dataclass

import numpy as np

from critic_train.rollouts import Rollouts

STATES, SYMBOLS, PROMPT, LONGEST, STOP = 4, 12, 4, 16, 0.12
PEERS = 6


@dataclass(frozen=True)
class Chain:
    """Transition [S, S], emission [S, K] and payoff [S]; `ahead[t]` [S] is the payoff to expect before token t."""

    move: np.ndarray
    emit: np.ndarray
    payoff: np.ndarray
    ahead: np.ndarray


def make_chain(seed: int = 0) -> Chain:
    """A slow chain whose states look different and pay differently."""
    draw = np.random.default_rng(seed)
    move = 0.92 * np.eye(STATES) + 0.08 * draw.dirichlet(np.ones(STATES), STATES)
    emit = draw.dirichlet(0.2 * np.ones(SYMBOLS), STATES)
    payoff = np.array([0.05, 0.3, 0.7, 0.95])
    # After each response token the response stops with probability STOP, after the last one surely.
    ahead = np.empty((LONGEST, STATES))
    after = payoff
    for t in reversed(range(LONGEST)):
        ahead[t] = move @ after
        after = STOP * payoff + (1 - STOP) * ahead[t]
    return Chain(move, emit, payoff, ahead)


def pick(draw: np.random.Generator, chances: np.ndarray) -> np.ndarray:
    """One index a row, with the row's chances."""
    return np.minimum((chances.cumsum(axis=1) < draw.random(len(chances))[:, None]).sum(axis=1), chances.shape[1] - 1)


def rollouts_of(chain: Chain, groups: int, seed: int) -> tuple[Rollouts, np.ndarray]:
    """`groups` prompts with PEERS rollouts each, and the true value of every token, float32 [T].

    The stored values are the true ones shrunk, shifted and with noise: a stale critic.
    """
    draw = np.random.default_rng(seed)
    belief = np.full((groups, STATES), 1 / STATES)
    state = pick(draw, belief)
    tokens = []
    for _ in range(PROMPT):
        state = pick(draw, chain.move[state])
        tokens.append(pick(draw, chain.emit[state]))
        belief = filtered(chain, belief, tokens[-1])
    prompt, belief = np.repeat(np.stack(tokens, axis=1), PEERS, axis=0), np.repeat(belief, PEERS, axis=0)
    n = groups * PEERS
    state = pick(draw, belief)  # what the prompt leaves open
    length = np.minimum(draw.geometric(STOP, n), LONGEST)
    words, values, last = [], [], state
    for t in range(LONGEST):
        values.append(belief @ chain.ahead[t])
        state = pick(draw, chain.move[state])
        words.append(pick(draw, chain.emit[state]))
        belief = filtered(chain, belief, words[-1])
        last = np.where(length == t + 1, state, last)
    outcome = draw.random(n) < chain.payoff[last]
    ids = np.concatenate([prompt, np.stack(words, axis=1)], axis=1)
    true = np.concatenate([np.zeros_like(prompt, dtype=float), np.stack(values, axis=1)], axis=1)
    there = np.arange(PROMPT + LONGEST) < (PROMPT + length)[:, None]
    mask = np.broadcast_to(np.arange(PROMPT + LONGEST) >= PROMPT, there.shape)
    value = true[there].astype(np.float32)
    stale = 0.5 * value + 0.3 + draw.normal(0, 0.1, len(value))
    rollouts = Rollouts(
        input_ids=ids[there].astype(np.int32),
        offsets=np.append(0, np.cumsum(PROMPT + length)).astype(np.int64),
        response_mask=mask[there],
        returns=np.repeat(outcome.astype(np.float32), PROMPT + length),
        values=stale.astype(np.float32),
        group=np.repeat(np.arange(groups), PEERS),
        row=np.arange(n),
    )
    return rollouts, value


def filtered(chain: Chain, belief: np.ndarray, token: np.ndarray) -> np.ndarray:
    """The belief after one more token: [n, S]."""
    joint = (belief @ chain.move) * chain.emit[:, token].T
    return joint / joint.sum(axis=1, keepdims=True)
