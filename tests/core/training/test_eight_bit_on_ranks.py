"""8-bit moments on several ranks: each updates its part, and what any number of ranks left is taken up by any other."""

import json
from pathlib import Path

import pytest
import ranks
import torch
from ranks import on_ranks
from safetensors import safe_open
from safetensors.torch import load_file
from support import readable_rollouts, write_shard

from critic_train.run.checkpoint import checkpoints
from critic_train.settings import FitSettings
from critic_train.stopping import StopRequest
from critic_train.training.eight_bit import Cut, in_own_blocks
from critic_train.training.fit import fit

bitsandbytes = pytest.importorskip("bitsandbytes")
from bitsandbytes.functional import create_dynamic_map, quantize_blockwise  # noqa: E402

STEPS = 10
MEANING = create_dynamic_map(signed=True)


def rows_of(rows: int, part: int, parts: int) -> tuple[int, int]:
    """As torch.chunk cuts."""
    ends = torch.tensor([len(chunk) for chunk in torch.arange(rows).chunk(parts)] + [0] * parts).cumsum(0)
    return (0 if part == 0 else int(ends[part - 1])), int(ends[part])


def quantised(values: torch.Tensor, parts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales as that many ranks leave them, by the package's own function."""
    found = []
    for part in range(parts):
        first, last = rows_of(len(values), part, parts)
        if first < last:
            found.append(quantize_blockwise(values[first:last].contiguous(), code=MEANING, blocksize=256))
    return torch.cat([codes for codes, _ in found]), torch.cat([kind.absmax for _, kind in found])


def largest_of_blocks(values: torch.Tensor, parts: int) -> torch.Tensor:
    """The largest number of the block that each number is in."""
    found = torch.zeros_like(values)
    for part in range(parts):
        first, last = rows_of(len(values), part, parts)
        for block in range(0, values[first:last].numel(), 256):
            cut = slice(block, block + 256)
            found[first:last].view(-1)[cut] = values[first:last].reshape(-1)[cut].abs().max()
    return found


def meant(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The numbers of a part, one after the other."""
    flat = MEANING[codes.flatten().long()]
    return torch.stack([value * scales[place // 256] for place, value in enumerate(flat)]).view(codes.shape)


@pytest.mark.parametrize("width", [100, 256])
@pytest.mark.parametrize(("before", "now"), [(1, 1), (3, 3), (1, 2), (2, 3), (3, 2), (3, 1), (9, 2)])
def test_moments_are_cut_anew(width, before, now):
    values = torch.randn(8, width, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 0, 8)[:, None]
    codes, scales = quantised(values, before)
    cut = Cut.of(values, before)
    for part in range(now):
        first, last = rows_of(8, part, now)
        ours, own = in_own_blocks(codes[first:last], scales, MEANING, cut, first * width)
        assert len(own) == -(-(last - first) * width // 256)
        if before == now or width == 256:  # the same blocks: to the bit
            theirs = quantize_blockwise(values[first:last].contiguous(), code=MEANING, blocksize=256)
            assert torch.equal(ours, theirs[0])
            assert torch.equal(own, theirs[1].absmax)
        # Codes lie at most 0.014 of a block's largest number apart; these were rounded twice, in two blocks.
        allowed = 0.007 * (largest_of_blocks(values, before)[first:last] + largest_of_blocks(values[first:last], 1))
        assert bool(((meant(ours, own) - values[first:last]).abs() <= 1.02 * allowed).all())


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> FitSettings:
    """A run with 8-bit moments on one process, done; the others differ in `out`."""
    folder = tmp_path_factory.mktemp("8bit")
    write_shard(folder / "data" / "a.parquet", readable_rollouts(32, seed=1))
    alone = FitSettings(
        data=[str(folder / "data")],
        out=str(folder / "alone"),
        preset="tiny",
        optimizer="adamw-8bit",
        batch_size=16,
        max_steps=STEPS,
        checkpoint_every=100,
        eval_every=100,
        lr=5e-4,
        no_clip=True,
        no_report=True,
        device="cpu",
    )
    assert list(fit(alone, StopRequest()))[-1].status == "finished"
    return alone


def losses(out: str) -> list[float]:
    found = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return [record["value_loss"] for record in found if record["event"] == "step"]


def last_files(out: str) -> dict[str, Path]:
    last = checkpoints(Path(out) / "checkpoints")[-1]
    return {name: last / name for name in ("model.safetensors", "optimizer.safetensors")}


def run_on(size: int, settings: FitSettings, stop_at: int | None = None) -> None:
    ended = on_ranks(size, ranks.fit_run, settings, None if stop_at is None else (0, stop_at))
    assert [end.get("status", end) for end in ended] == ["finished" if stop_at is None else "interrupted"] * size


def test_two_ranks_give_the_loss_curve_of_one_and_moments_of_its_kind(settings, tmp_path):
    ours = settings.replace(out=str(tmp_path / "two"))
    run_on(2, ours)
    assert losses(ours.run.out) == pytest.approx(losses(settings.run.out), rel=1e-3)
    mine, theirs = (load_file(last_files(run.run.out)["optimizer.safetensors"]) for run in (ours, settings))
    kinds = [{name: (t.shape, t.dtype) for name, t in tensors.items()} for tensors in (mine, theirs)]
    assert kinds[0] == kinds[1]  # on two ranks the rows of this model make whole blocks
    assert {t.dtype for name, t in mine.items() if name.startswith("state1.trunk.layers.0.mlp")} == {torch.uint8}


def test_three_ranks_resume_their_own_to_the_bit(settings, tmp_path):
    """A third of 64 rows of 64 is five blocks and a half: theirs are not the blocks of the whole."""
    whole, parts = (settings.replace(out=str(tmp_path / name), max_steps=6) for name in ("whole", "parts"))
    run_on(3, whole)
    run_on(3, parts, stop_at=3)
    run_on(3, parts)
    for name, file in last_files(whole.run.out).items():
        assert last_files(parts.run.out)[name].read_bytes() == file.read_bytes(), name


@pytest.mark.slow
def test_three_ranks_and_then_one_go_on_with_what_two_began(settings, tmp_path):
    ours = settings.replace(out=str(tmp_path / "elastic"))
    run_on(2, ours, stop_at=3)
    run_on(3, ours, stop_at=6)
    file = checkpoints(Path(ours.run.out) / "checkpoints")[-1] / "optimizer.safetensors"
    with safe_open(file, framework="pt") as stored:
        assert stored.metadata() == {"parts": "3"}
    assert list(fit(ours, StopRequest()))[-1].status == "finished"
    assert losses(ours.run.out) == pytest.approx(losses(settings.run.out), rel=1e-2)
