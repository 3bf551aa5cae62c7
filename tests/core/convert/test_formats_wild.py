"""Files as people have them: the policy's part, decoded, is what the policy wrote, or the file is refused."""

import re

import pytest
import wild
from conftest import WORDS, run

from critic_train.errors import DataError


@pytest.mark.parametrize("name", wild.CASES)
def test_the_policys_part_is_what_it_wrote(tmp_path, tokenizer, name):
    case = wild.CASES[name]
    (tmp_path / "dump").mkdir()
    case.write(case.records, tmp_path / "dump" / case.name)
    flags = {"tokenizer": str(tokenizer), "allow_retokenize": True, **case.flags}
    if case.policy is None:
        with pytest.raises(DataError) as caught:
            run(tmp_path / "shards", tmp_path / "dump", **flags)
        assert re.search(case.refusal, f"{caught.value.message} {caught.value.hint}", re.DOTALL), str(caught.value)
        return
    done = run(tmp_path / "shards", tmp_path / "dump", **flags)
    table = done.table.to_pylist()
    policy = [
        " ".join(WORDS[i] for i, one in zip(row["input_ids"], row["response_mask"], strict=True) if one)
        for row in table
    ]
    assert policy == case.policy
    if case.reward is not None:
        assert [row["reward"] for row in table] == case.reward
    if name == "a reward a turn":
        assert [[r for r in row["rewards"] if r] for row in table] == [[0.25, 1]] * 3
    (read_as,) = [source["read_as"] for source in done.result["sources"]]
    assert {"prompt", "response", "reward", "mask", "group"} <= set(read_as)
    assert f"prompt = {read_as['prompt']}" in done.said
