"""What slime's dumps have beside tokens."""

import dumps


def test_slimes_own_fields(tmp_path, converted):
    dumps.slime_rollout(dumps.rollouts(), tmp_path / "a.pt")
    table = converted(tmp_path / "a.pt").table
    assert table.column("uid").to_pylist() == ["0"] * 4 + ["1"] * 4
    assert set(table.column("policy_version").to_pylist()) == {"4"}
    assert table.column("status").to_pylist().count("truncated") == 2
    assert {"prompt", "response", "metadata", "rollout_log_probs"}.isdisjoint(table.column_names)


def test_samples_that_slime_removed_and_rewards_under_names(tmp_path, converted):
    import torch

    dumps.slime_rollout(dumps.rollouts(), tmp_path / "a.pt")
    content = torch.load(tmp_path / "a.pt")
    for place, sample in enumerate(content["samples"]):
        sample["reward"] = {"accuracy": float(place), "format": 0.5}
        sample["remove_sample"] = place < 2
    torch.save(content, tmp_path / "a.pt")
    done = converted(tmp_path / "a.pt", column=["reward=reward_accuracy"])
    assert sorted(done.table.column("reward").to_pylist()) == [2, 3, 4, 5, 6, 7]
    assert set(done.table.column("reward_format").to_pylist()) == {0.5}
    assert "2 samples are left out" in done.said
