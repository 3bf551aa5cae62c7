"""What ranks that have joined decide and compute together; how runs use it is in test_fit_on_ranks."""

import signal

from rank_work import exchange
from ranks import on_ranks


def test_ranks_sum_and_follow_rank_0_and_stop_together():
    answers = on_ranks(3, exchange)
    assert [answer["rank"] for answer in answers] == [0, 1, 2]
    for answer in answers:
        assert answer["sum"] == [0 + 1 + 2, 3.0]
        assert answer["broadcast"] == [{"seed": 0}, None]
        # Rank 1 alone was asked to stop: nobody, not even itself, sees it before all have looked.
        assert answer["stops"] == [(False, None), (True, signal.SIGTERM)]
    assert [answer["own"] for answer in answers] == [[0, 1], [1, 1], [2, 1]]  # sums leave their arguments alone
