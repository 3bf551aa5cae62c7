"""NeMo-RL's lines."""

import json

import dumps


def test_nemo_rl_leaves_out_what_it_does_not_train_on(tmp_path, converted):
    path = tmp_path / "train_data_step12.jsonl"
    dumps.nemo_rl(dumps.rollouts(), path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for place, line in enumerate(lines):
        line["sample_loss_mask"] = [float(place % 2)]
        line["filtered_rewards"] = [line["rewards"][0] + 1]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = converted(path)
    assert done.table.column("step").to_pylist() == [12] * 4
    assert done.table.column("reward").to_pylist() == [r.reward + 1 for r in dumps.rollouts()[1::2]]
    assert "sample_loss_mask is 0" in done.said
