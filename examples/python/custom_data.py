"""Write rollouts of your own as shards, check them, train on them, and ask the critic for values.

    python examples/python/custom_data.py [FOLDER] [STEPS]

The rollouts here are made up: the prompt is a number, and a response is right if it repeats it.
"""

import random
import sys
from pathlib import Path

import numpy as np

from critic_train import CheckSettings, FitSettings, ShardWriter, check, fit, load_critic, rollout_table, run_to_end


def rollout(number: int, draw: random.Random) -> tuple[list[int], list[int], float]:
    """(prompt, response, reward) of one attempt."""
    response = [number if draw.random() < 0.85 else number + 1 for _ in range(4)]
    return [0, number], response, float(response == [number] * 4)


def write_shards(folder: Path, prompts: int = 128, attempts: int = 4) -> None:
    """Flat arrays with offsets become a table; the writer keeps the attempts of a prompt together."""
    draw = random.Random(0)
    uids, prompt_lengths, sequences, rewards = [], [], [], []
    for prompt_number in range(prompts):
        for _ in range(attempts):
            prompt, response, reward = rollout(1 + prompt_number % 8, draw)
            uids.append(f"prompt-{prompt_number}")
            prompt_lengths.append(len(prompt))
            sequences.append(prompt + response)
            rewards.append(reward)
    lengths = np.array([len(sequence) for sequence in sequences])
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    position = np.concatenate([np.arange(length) for length in lengths])
    table = rollout_table(
        offsets,
        {"input_ids": np.concatenate(sequences), "response_mask": position >= np.repeat(prompt_lengths, lengths)},
        {"uid": uids, "reward": rewards},
    )
    with ShardWriter(folder, table.schema, keep_together="uid") as shards:
        shards.write(table)


def main(folder: str = "runs/custom", steps: str = "100") -> None:
    data, run = Path(folder) / "rollouts", Path(folder) / "run"
    write_shards(data)

    found = run_to_end(check(CheckSettings(data=[str(data)]))).result
    print(f"{found['rollouts']} rollouts, {found['bad_rows']['count']} of them cannot be used; try: {found['command']}")

    settings = FitSettings(
        data=[str(data)],
        out=str(run),
        preset="tiny",
        returns="mc",
        old_values="none",
        epochs=10,
        batch_size=32,
        max_steps=int(steps),
    )
    ended = run_to_end(fit(settings))
    print(ended.status)

    # Not `best`: the prompts held out repeat a number that no other prompt has, so held-out figures say nothing here.
    critic = load_critic(ended.result["checkpoint"])
    prompt, right, wrong = [0, 3], [3, 3, 3, 3], [3, 4, 3, 3]
    for values in critic.values([prompt + right, prompt + wrong], [len(prompt), len(prompt)]):
        print(" ".join(f"{value:.2f}" for value in values))


if __name__ == "__main__":
    main(*sys.argv[1:])
