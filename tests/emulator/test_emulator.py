"""The emulator itself: every primitive against a known answer, and every mistake it is meant to notice."""

from pathlib import Path

import emulate
import numpy as np
import pytest
import torch
from support import child

SOURCE = Path(__file__).with_name("selftest.cu")
ORDERS = ("forward", "reverse")
DTYPES = {torch.bfloat16: 0, torch.float16: 1}


@pytest.fixture(scope="module")
def run():
    return emulate.Library(SOURCE)


@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_mma(run, dtype, depth):
    torch.manual_seed(0)
    a, b, d = torch.randn(16, depth).to(dtype), torch.randn(depth, 8).to(dtype), torch.randn(16, 8)
    expected = a.double() @ b.double() + d.double()
    counters = run("run_multiply", DTYPES[dtype], depth, a, b, d)
    torch.testing.assert_close(d.double(), expected, rtol=1e-5, atol=1e-5)
    assert counters["mma"] == counters["launches"] == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_conversions_round_as_torch_does(run, dtype):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).float()  # each 16-bit value
    ties = torch.stack([every, every.nextafter(torch.tensor(1e38)), every.nextafter(torch.tensor(-1e38))])
    halfway = (every[:-1].double() + every[1:].double()).div(2).float()
    x = torch.cat([ties.flatten(), halfway, torch.randn(5000) * torch.logspace(-12, 12, 5000)])
    out, back = torch.empty(x.shape, dtype=dtype), torch.full(x.shape, -1.0)
    run("run_convert", DTYPES[dtype], x, out, back, len(x))
    finite = ~x.isnan()
    assert torch.equal(out[finite].view(torch.int16), x[finite].to(dtype).view(torch.int16))
    assert torch.equal(back[finite], out[finite].float())
    assert out[~finite].isnan().all() and back[~finite].isnan().all()


@pytest.mark.parametrize("order", ORDERS)
def test_shuffles(run, order):
    x = np.random.default_rng(0).random(32, dtype=np.float32)
    out = np.full((6, 32), np.nan, np.float32)
    run("run_shuffles", x, out, order=order)
    lane = np.arange(32)
    assert np.array_equal(out[0], x[5] + np.where(lane < 16, x[lane ^ 1], np.float32(0)))
    assert np.array_equal(out[1], x[lane ^ 12])
    assert np.array_equal(out[2], x[np.where(lane + 3 < 32, lane + 3, lane)])
    assert np.array_equal(out[3], x[np.where(lane % 8 + 3 < 8, lane + 3, lane)])
    assert np.array_equal(out[4], x[np.where(lane >= 2, lane - 2, lane)])
    assert np.array_equal(out[5], (x > 0.5).astype(np.float32))


def ring(run, order="forward", fault=0, blocks=3, slabs=8):
    x = np.random.default_rng(1).integers(-8, 8, (blocks, slabs * 256)).astype(np.float32)
    sums, total, ticket = np.full(blocks, np.nan, np.float32), np.full(1, np.nan, np.float32), np.zeros(1, np.uint32)
    counters = run("run_ring", x, sums, total, ticket, blocks, slabs, fault, order=order)
    assert counters["bulk_copies"] == x.nbytes
    assert ticket[0] == 0
    return np.array_equal(sums, x.sum(1)) and total[0] == x.sum()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("slabs", [1, 3, 8])
def test_ring_of_bulk_copies_and_ticket(run, order, slabs):
    assert ring(run, order, slabs=slabs)


@pytest.mark.parametrize(
    "fault, error",
    [
        (2, r"deadlock: .*mbarrier_wait_parity \(phase 0, 4 arrivals and 0 bytes to come\).* and 124 more"),
        (4, "bulk_copy_to_shared: mbarrier_fence_init is missing"),
    ],
)
def test_faults_of_the_ring_that_are_errors(run, fault, error):
    with pytest.raises(RuntimeError, match=error):
        ring(run, fault=fault)


def test_without_a_wait_for_the_copy_the_ring_breaks(run):
    with pytest.raises(RuntimeError, match="deadlock"):  # warps run ahead of the phases
        ring(run, fault=1)
    assert not ring(run, fault=1, slabs=3)  # where no stage is used twice: the sum of what is not there yet


@pytest.mark.parametrize("fault", [3, 5], ids=["no wait for empty", "no barrier"])
def test_faults_of_the_ring_that_show_in_the_result(run, fault):
    assert not all(ring(run, order, fault) for order in ORDERS)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("size", [1, 2, 8])
def test_cluster(run, order, size):
    out = np.full(16, np.nan, np.float32)
    counters = run("run_cluster", out, 16, size, 0, order=order)
    assert [counters[x] for x in ("blocks", "threads", "cluster", "shared_bytes")] == [16, 64, size, 32]
    assert np.array_equal(out, (np.arange(16) - 1) % size + 1)


@pytest.mark.parametrize(
    "fault, error",
    [
        (1, "push_16B: mbarrier_fence_init is missing"),
        (2, "push_16B on what is no initialised mbarrier of the block"),
        (3, "exits between cluster_arrive and cluster_wait"),
        (4, "the block ends while a copy into it is under way|push_16B to block . of the cluster, which has exited"),
    ],
    ids=["no fence", "no barrier", "no wait", "early exit"],
)
def test_faults_of_a_cluster_that_are_errors(run, fault, error):
    with pytest.raises(RuntimeError, match=error):
        run("run_cluster", np.zeros(2, np.float32), 2, 2, fault)


def test_what_was_pushed_is_not_there_before_the_wait(run):
    out = np.zeros(1, np.float32)
    with pytest.raises(RuntimeError, match="the block ends while a copy into it is under way"):
        run("run_cluster", out, 1, 1, 5)
    assert np.isnan(out).all()


def staged(run, order="forward", fault=0):
    x = np.random.default_rng(2).integers(0, 2**31, (2, 96, 4)).astype(np.uint32)
    out = np.zeros_like(x)
    counters = run("run_staged", x, out, fault, order=order)
    assert counters["cp_async_copies"] == counters["streamed_stores"] == x.nbytes
    return np.array_equal(out, x[:, ::-1])


def test_staged_copies(run):
    assert all(staged(run, order) for order in ORDERS)


@pytest.mark.parametrize("fault", [1, 2], ids=["no wait", "no barrier"])
def test_faults_of_staged_copies(run, fault):
    assert not all(staged(run, order, fault) for order in ORDERS)


def test_a_copy_that_nobody_waits_for(run):
    with pytest.raises(RuntimeError, match="exits while a cp.async of its is under way"):
        staged(run, fault=3)


@pytest.mark.parametrize(
    "fault, error",
    [
        (1, "store_16B_streaming: address .* is no multiple of 16"),
        (3, "the block wrote behind its 128 bytes of shared memory"),
        (4, "deadlock: .* waits for __syncwarp|lanes .* have exited"),
        (5, "lanes of one warp meet in __shfl_sync .* and __ballot_sync"),
        (6, "mbarrier_wait_parity on what is no initialised mbarrier"),
        (8, "store_16B_streaming before wait_for_previous, in a launch that may start early"),
        (9, "the end of the kernel before wait_for_previous"),
        (7, "cp_async_16B: 16 bytes at offset 128 are not within the block's 128 bytes"),
    ],
)
def test_mistakes_are_errors_and_the_next_launch_is_sound(run, fault, error):
    x, out = np.arange(128, dtype=np.uint32), np.zeros(32, np.uint32)
    with pytest.raises(RuntimeError, match=error):
        run("run_odd", x, out, fault)
    run("run_odd", x, out, 0)
    assert np.array_equal(out, x[1::4])


def test_before_sm_90_there_is_no_bulk_copy_and_no_cluster():
    run = emulate.Library(SOURCE, sm80=True)
    with pytest.raises(RuntimeError, match="mbarrier_arrive_expect_tx before sm_90"):
        ring(run)
    with pytest.raises(RuntimeError, match="clusters before sm_90"):
        run("run_cluster", np.zeros(2, np.float32), 2, 2, 0)
    assert all(staged(run, order) for order in ORDERS)


OUT_OF_BOUNDS = """
import numpy as np
import emulate
run = emulate.Library(emulate.HERE / "selftest.cu")
x, out = np.arange(1024, dtype=np.uint32)[-128:].copy(), np.zeros(32, np.uint32)
run("run_odd", x, out, 0)
assert np.array_equal(out, x[1::4])
print("sound", flush=True)
run("run_odd", x, out, 2)
"""


def test_asan_sees_what_lies_outside_of_global_memory():
    result = child.run("-c", OUT_OF_BOUNDS, cwd=emulate.HERE, **emulate.asan_variables())
    assert result.stdout == "sound\n", result.stderr
    assert result.returncode and "heap-buffer-overflow" in result.stderr, result.stderr
    assert "store_16B_streaming" in result.stderr
