import pytest

from critic_train.run.run_directory import RunDirectory


def test_best_is_none_where_its_link_leads_nowhere(tmp_path):
    with RunDirectory(tmp_path) as run:
        assert run.best is None
        checkpoint = run.checkpoints / "step-00000003"
        checkpoint.mkdir()
        run.point_best_at(checkpoint)
        assert run.best == checkpoint
        checkpoint.rmdir()
        assert run.best is None


@pytest.mark.parametrize(("kept", "left"), [(4, b"one\n"), (99, b"one\ntwo\n")])
def test_the_log_is_cut_back_and_never_lengthened(kept, left, tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b"one\ntwo\n")
    with RunDirectory(tmp_path) as run:
        run.open_logs(kept)
    assert (tmp_path / "metrics.jsonl").read_bytes() == left
