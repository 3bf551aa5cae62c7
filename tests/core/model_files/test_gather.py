"""Full tensors from shards, by collectives and through files; three ranks, some of which have no row of a tensor."""

from pathlib import Path

import pytest
import torch
from rank_work import gather_tensors
from ranks import on_ranks

from critic_train.model_files.gather import PartReader, PartWriter, full_tensor
from critic_train.run.storage import File


@pytest.fixture(scope="module")
def gathered(tmp_path_factory):
    """What each of three ranks has gathered, and the folder of the parts."""
    folder = tmp_path_factory.mktemp("parts")
    answers = on_ranks(3, gather_tensors, str(folder))
    assert not [answer for answer in answers if "fault" in answer]
    return answers, folder


def test_a_full_tensor_comes_from_all_ranks(gathered):
    answers, _ = gathered
    for answer in answers:
        assert answer["collective"] == answer["expected"]


def test_parts_written_to_files_are_read_back_as_the_full_tensors(gathered):
    (main, *others), _ = gathered
    assert main["from_files"] == main["expected"]
    assert [answer["from_files"] for answer in others] == [None, None]


def test_a_part_is_this_ranks_rows_end_to_end(gathered):
    """5 rows of 3 float32 over 3 ranks are 2, 2 and 1; 1 row of 4 bfloat16 is rank 0's; what is not sharded is left."""
    _, folder = gathered
    assert [(folder / f"part-{rank}").stat().st_size for rank in (1, 2)] == [2 * 3 * 4, 1 * 3 * 4]


def test_progress_is_reported_after_every_tensor(gathered):
    assert [answer["reports"] for answer in gathered[0][1:]] == [2, 2]


def test_what_is_written_goes_on_as_a_tensor_of_its_shape_on_this_rank_alone(gathered):
    """A sharded one would wait for the other ranks as soon as it is worked with."""
    for answer in gathered[0][1:]:
        assert answer["written"] == [(torch.Tensor, shape) for shape in ((5, 3), (1, 4), (2,))]


def test_a_file_that_ends_too_early_is_an_error(gathered):
    assert gathered[0][0]["too_short"].endswith("part-1 ends too early")


def test_numbers_of_all_ranks_are_concatenated_in_their_order(gathered):
    for answer in gathered[0]:
        assert answer["concatenated"] == [0.0, 10.0, 11.0, 12.0]  # 1, 3 and 0 numbers


def test_rows_of_this_rank_become_a_tensor_sharded_alike(gathered):
    for answer in gathered[0]:
        assert answer["doubled"] == (2 * torch.tensor(answer["expected"][0])).tolist()


def test_what_is_not_sharded_is_left_as_it_is(tmp_path):
    tensor = torch.arange(3.0)
    assert full_tensor(tensor) is tensor
    with PartReader([]) as reader:
        assert reader(tensor) is tensor
    path: Path = tmp_path / "part"
    with File(path, "create") as file:
        PartWriter(file, lambda: pytest.fail("nothing was written"))(tensor)
    assert path.read_bytes() == b""
