"""DataProtos that are not finished."""

import dumps
import pytest

from critic_train.errors import DataError


def test_a_verl_batch_before_the_rewards_has_its_scores_for_them(tmp_path, converted):
    import pickle

    of = dumps.rollouts()
    batch = dumps.verl_batch(of)
    kept = ("prompts", "responses", "attention_mask", "response_mask", "token_level_scores")
    tensors = {
        name: (str(batch[name].dtype).removeprefix("torch."), tuple(batch[name].shape), batch[name].numpy().tobytes())
        for name in kept
    }
    state = pickle.dumps((((len(of),), None, tensors), {}, {}), protocol=4)
    head = b"\x80\x04\x8c\x0dverl.protocol\x8c\x09DataProto\x93)\x81"
    (tmp_path / "a.pkl").write_bytes(head + state[2:-1] + b"b.")
    table = converted(tmp_path / "a.pkl").table
    expected = sorted(of, key=lambda r: "pq".index(r.uid))
    assert table.column("rewards").to_pylist() == [r.rewards for r in expected]
    assert "uid" not in table.column_names


def test_an_instance_without_a_state_is_no_data_proto(tmp_path, converted):
    (tmp_path / "a.pkl").write_bytes(b"\x80\x02cverl.protocol\nDataProto\n)\x81.")
    with pytest.raises(DataError, match="in no known format"):
        converted(tmp_path / "a.pkl")
