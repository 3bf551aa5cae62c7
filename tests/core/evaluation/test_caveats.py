"""What an evaluation has to be taken with."""

import json
from dataclasses import replace

import numpy as np
import pytest
from support import branching_rollouts, readable_rollouts, write_shard

from critic_train.data.shards import find_shards, fingerprint
from critic_train.evaluation.caveats import PromptGroups, group_sentences, trained_on, trained_on_sentence
from critic_train.evaluation.evaluate import evaluate
from critic_train.settings import EvalSettings


def record_of(rollouts, parts=3):
    groups = PromptGroups()
    for index in np.array_split(np.arange(len(rollouts)), parts):
        groups.add(rollouts.take(index))
    return groups.record()


def test_groups_that_are_the_prompts():
    rollouts = readable_rollouts(12)
    record = record_of(rollouts)
    assert record == {
        "groups": 12,
        "prompts": 12,
        "groups_of_several_prompts": 0,
        "prompts_in_several_groups": 0,
        "groups_of_one_rollout": 0,
    }
    assert group_sentences(record, len(rollouts)) == []


def test_a_uid_that_is_one_a_rollout():
    rollouts = readable_rollouts(12)
    record = record_of(replace(rollouts, group=np.arange(48)))
    assert (record["groups"], record["prompts"], record["prompts_in_several_groups"]) == (48, 12, 12)
    [sentence] = group_sentences(record, 48)
    assert sentence.startswith("every rollout has a uid of its own, but 48 rollouts have 12 prompts")


def test_uids_that_begin_anew_in_each_file():
    rollouts = readable_rollouts(12)
    record = record_of(replace(rollouts, group=rollouts.group % 6))
    assert (record["groups"], record["groups_of_several_prompts"]) == (6, 6)
    [sentence] = group_sentences(record, 48)
    assert sentence.startswith("6 of 6 uids stand for several prompts, as where numbers begin anew in each file")


def test_prompts_that_are_sampled_again_under_another_uid():
    rollouts = readable_rollouts(12)
    again = replace(rollouts, group=np.where(rollouts.row % 4 < 2, rollouts.group, rollouts.group + 100))
    record = record_of(again)
    assert (record["groups"], record["prompts_in_several_groups"]) == (24, 12)
    [sentence] = group_sentences(record, 48)
    assert sentence.startswith("12 of 12 prompts stand under several uids")
    few = replace(rollouts, group=np.where(rollouts.row == 0, 999, rollouts.group))
    assert group_sentences(record_of(few), 48) == []


def test_nothing_was_taken_in():
    assert record_of(readable_rollouts(1).take(np.arange(0)), 1)["groups"] == 0


@pytest.mark.parametrize("named", ["run", "run/best", "run/checkpoints/step-1"])
def test_rollouts_that_the_run_was_trained_on_are_known_by_content(tmp_path, named):
    files = [write_shard(tmp_path / f"{name}.parquet", branching_rollouts(k)) for k, name in enumerate("ab")]
    run = tmp_path / "run"
    (run / "checkpoints" / "step-1").mkdir(parents=True)
    (run / "best").symlink_to("checkpoints/step-1")
    (run / "run.json").write_text(json.dumps({"data": fingerprint(find_shards([str(files[0])]))}))
    copied = tmp_path / "elsewhere" / "other.parquet"
    copied.parent.mkdir()
    copied.write_bytes(files[0].read_bytes())
    judged = fingerprint(find_shards([str(copied), str(files[1])]))["files"]
    seen = trained_on(tmp_path / named, judged)
    assert seen == {"files": 1, "rows": 21}
    sentence = trained_on_sentence("it", seen, 42)
    assert sentence.startswith("it was trained on the files of 21 of these 42 rollouts")
    assert trained_on(tmp_path / named, judged[1:] if judged[0]["rows"] == 0 else []) == {"files": 0, "rows": 0}
    assert trained_on_sentence("it", {"files": 0, "rows": 0}, 42) == ""


@pytest.mark.parametrize("content", [None, "no json", "[]", '{"data": 3}', '{"data": {"files": [1, {}]}}'])
def test_of_any_other_model_nothing_is_known(tmp_path, content):
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    files = fingerprint(find_shards([str(write_shard(tmp_path / "a.parquet", branching_rollouts()))]))["files"]
    assert trained_on(tmp_path, files) == {"files": 0, "rows": 0}


def test_eval_says_it_and_json_has_it(tmp_path):
    rollouts = readable_rollouts(12)
    shard = write_shard(tmp_path / "a.parquet", replace(rollouts, group=np.arange(48)))
    gate = ["baselines.group_mean.mse=1"]
    *_, ended = evaluate(EvalSettings(data=[str(shard)], group_by="uid", fail_over=gate))
    assert ended.result["groups"]["prompts"] == 12
    assert any("every rollout has a uid of its own" in sentence for sentence in ended.result["words"])
    assert any("every prompt has one rollout only" in sentence for sentence in ended.result["words"])
    [gate] = ended.result["gates"]
    assert (gate["passed"], gate["found"]) == (False, None)
