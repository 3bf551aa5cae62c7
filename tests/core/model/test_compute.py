"""Where a command computes, and the token budget that a run may lower."""

import os
from pathlib import Path

import pytest
import torch

from critic_train.distributed.ranks import SingleProcess
from critic_train.errors import ConfigError, MachineError
from critic_train.model.compute import Compute, resolve_compute, resolve_device, resolve_offload
from critic_train.settings import EvalSettings, FitSettings


def ranks_of(rank, size=2):
    """A rank among others, as far as a device is concerned."""
    ranks = SingleProcess()
    ranks.rank = ranks.local_rank = rank
    ranks.size = size
    return ranks


@pytest.fixture
def gpus(monkeypatch):
    """A machine with so many CUDA devices, as torch counts them; `present` of it lists what became the present one."""
    present = []

    def set_count(count):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: present.append(device.index))

    set_count.present = present
    yield set_count
    torch.backends.cuda.enable_cudnn_sdp(True)


def compute_of(**changes):
    return Compute(**{"device": torch.device("cpu"), "precision": "fp32", "max_tokens": 4096} | changes)


def test_a_lowered_budget_is_reported_once():
    compute = compute_of()
    assert compute.lowered() == ""
    compute.max_tokens = 2048
    compute.max_tokens = 1024
    message = compute.lowered()
    assert message.startswith("memory ran out with 4,096 tokens at once: from now on 1,024; the result is the same.")
    assert message.endswith("--max-tokens 1024 starts there")
    assert compute.lowered() == ""
    compute.max_tokens = 512
    assert compute.lowered().startswith("memory ran out with 1,024 tokens at once: from now on 512")


def test_a_budget_that_a_run_begins_with_is_not_reported():
    compute = compute_of()
    compute.start_at(512)
    assert (compute.max_tokens, compute.lowered()) == (512, "")


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_the_precision_is_that_of_matrix_products(precision, dtype):
    weight = torch.ones(2, 2)
    with compute_of(precision=precision).autocast():
        assert (weight @ weight).dtype == dtype
    assert (weight @ weight).dtype == torch.float32


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_peak_memory_on_a_cpu_is_the_processes_in_bytes():
    peak = compute_of().peak_memory_bytes()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    # Not equal: the kernel counts in batches, and what was there before an exec counts for one of the two only.
    assert peak >= 0.95 * 1024 * int(status["VmRSS"].split()[0])
    assert peak <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_auto_is_cuda_where_there_is_one(gpus):
    gpus(0)
    assert resolve_device("auto") == torch.device("cpu")
    gpus(1)
    assert resolve_device("auto") == torch.device("cuda", 0)


def test_a_cuda_device_has_its_index_and_is_the_present_one(gpus):
    gpus(3)
    # torch.cuda.set_device refuses a device without an index, and FSDP2 and Triton take the present one.
    assert [resolve_device(name).index for name in ("cuda", "cuda:2", "auto")] == [0, 2, 0]
    assert gpus.present == [0, 2, 0]


def test_cudnn_computes_no_attention(gpus):
    gpus(1)
    torch.backends.cuda.enable_cudnn_sdp(True)
    resolve_device("cpu")
    assert torch.backends.cuda.cudnn_sdp_enabled()
    resolve_device("cuda")
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_each_rank_gets_a_cuda_device_of_its_own(gpus):
    gpus(2)
    for name in ("auto", "cuda"):
        assert [resolve_device(name, ranks_of(rank)).index for rank in (0, 1)] == [0, 1]
    assert resolve_device("cpu", ranks_of(1)) == torch.device("cpu")
    assert resolve_device("cuda:1") == torch.device("cuda:1")


@pytest.mark.parametrize(
    ("name", "count", "ranks", "kind", "message"),
    [
        ("gpu", 1, None, ConfigError, "--device 'gpu' is no device"),
        ("mps", 1, None, ConfigError, "--device 'mps' is not supported"),
        ("cuda", 0, None, MachineError, "--device cuda: this machine has 0 CUDA devices"),
        ("cuda:1", 1, None, MachineError, "--device cuda:1: this machine has 1 CUDA devices"),
        ("cuda:1", 2, ranks_of(0), ConfigError, "--device cuda:1 cannot be shared by 2 ranks"),
        ("cuda", 1, ranks_of(1), MachineError, "--device cuda:1: this machine has 1 CUDA devices"),
    ],
)
def test_a_device_that_cannot_be_used_is_refused(gpus, name, count, ranks, kind, message):
    gpus(count)
    with pytest.raises(kind, match=message) as caught:
        resolve_device(name, *filter(None, [ranks]))
    assert caught.value.hint


def test_a_commands_settings_are_what_is_computed_with():
    settings = FitSettings(data=["none"], device="cpu", precision="bf16", max_tokens=77)
    ranks = ranks_of(1)
    compute = resolve_compute(settings.compute, ranks)
    assert (compute.device.type, compute.precision, compute.max_tokens, compute.ranks) == ("cpu", "bf16", 77, ranks)
    assert (compute.attention, compute.offload, compute.checked_rollouts, compute.states) == (
        "sdpa",
        "none",
        None,
        None,
    )


def test_attention_that_the_device_lacks_is_refused_at_once():
    with pytest.raises(ConfigError, match="--attention flex"):
        resolve_compute(FitSettings(data=["none"], device="cpu", attention="flex").compute)


def test_only_training_on_cuda_offloads(gpus):
    gpus(1)
    for device, offload in (("cuda", "all"), ("auto", "all"), ("cpu", "none")):
        assert resolve_offload(FitSettings(data=["none"], device=device, offload="all").compute) == offload
    assert resolve_offload(FitSettings(data=["none"], device="cuda").compute) == "none"
    assert resolve_offload(EvalSettings(data=["none"], device="cuda").compute) == "none"
