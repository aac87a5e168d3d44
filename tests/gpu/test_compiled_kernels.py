"""What only a GPU can show: the compiled kernels themselves, streams, graphs, devices, large tensors, launches.

The helpers that need none are tried on a CPU at the end of this file.
"""

import pytest
import torch
from support import child, oracle
from support.agreement import check_labels_out_of_range, run
from support.backends import BACKENDS, GPU, Backend
from support.cases import case
from support.tolerances import ROUNDING
from support.upstreams import signed_upstreams

import rebalfer_kernels as rk
from bench.clocks import CudaClock

#: Launches of forward and backward under "mean", features, weight and bias with a gradient, at the paper's batch.
LAUNCHES = {"triton": (2, 1), "cuda": (1, 1)}

PAPER = dict(n=32, c=512, h=7, w=7, classes=7)


def check_against_eager(backend: Backend, dtype, layout, channels=PAPER["c"], **options):
    """error(ours) <= 2 error(PyTorch in the same dtype on the same device) + rounding, for outputs and gradients."""
    data = case(**PAPER | {"c": channels}, dtype=dtype, layout=layout, device=backend.device)
    ups = signed_upstreams(PAPER["n"], PAPER["classes"], backend.device)
    ours = run(backend.name, data, ups, reduction="none", **options)
    eager = run("reference", data, ups, reduction="none", **options)
    truth = oracle.head(
        *(x.cpu() for x in data), mean=False, g_loss=ups[0].cpu(), g_cls=ups[1].cpu(), g_cons=ups[2].cpu(),
        g_logits=ups[3].cpu(), detach=options.get("detach_cam_weight", True), p=options.get("p", 2),
    )  # fmt: skip
    kept = oracle.settled(truth["residual"], torch.float32).reshape(PAPER["n"], 1, PAPER["h"], PAPER["w"])
    both = torch.cat([kept, kept.flip(-1)])
    for name, got in ours.items():
        if options.get("p") == 1 and not options.get("detach_cam_weight", True) and name == "d_weight":
            continue  # a sum over all positions, the doubtful ones too
        keep = both if options.get("p") == 1 and name == "d_features" else torch.ones((), dtype=torch.bool)
        error = oracle.relative_error(got.cpu() * keep, truth[name] * keep)
        of_eager = oracle.relative_error(eager[name].cpu() * keep, truth[name] * keep)
        rounding = ROUNDING[got.dtype] if name.startswith("d_") else 3e-6
        assert error <= 2 * of_eager + rounding, f"{name}: relative L2 error {error:.3g}, PyTorch's {of_eager:.3g}"


@pytest.mark.parametrize("backend", GPU)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels", [PAPER["c"], 384, 768])  # more than a block holds at once, with 1, 2, 4 blocks
@pytest.mark.parametrize("options", [{}, {"detach_cam_weight": False}, {"p": 1}], ids=str)
def test_error_against_that_of_eager(backend, dtype, layout, channels, options):
    check_against_eager(backend, dtype, layout, channels, **options)


@pytest.mark.parametrize("backend", GPU)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("detach", [True, False])
def test_a_hundred_runs_are_one(backend, layout, detach):
    data = case(**PAPER | {"n": 300}, dtype=torch.bfloat16, layout=layout, device="cuda")
    first = run(backend.name, data, detach_cam_weight=detach)
    for _ in range(100):
        again = run(backend.name, data, detach_cam_weight=detach)
        assert all(torch.equal(again[name], first[name]) for name in first)


@pytest.mark.parametrize("backend", GPU)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("detach", [True, False])
def test_graph_capture_and_replay(backend, detach, layout):
    """Captured once, replayed with other features, labels and upstream gradients."""
    data = case(**PAPER, dtype=torch.bfloat16, layout=layout, device="cuda")
    f, w, b, targets, table, v = data
    f, w, b = f.requires_grad_(), w.requires_grad_(), b.requires_grad_()
    targets = targets.clone()
    scale = torch.ones((), device="cuda")

    def step():
        loss = rk.rebalanced_head_loss(
            f, w, b, targets, target_table=table, map_weights=v, backend=backend.name, detach_cam_weight=detach
        ).loss
        return loss, *torch.autograd.grad(loss * scale, (f, w, b))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in (1, 2):
        other = case(**PAPER, dtype=torch.bfloat16, layout=layout, device="cuda", seed=seed)
        with torch.no_grad():
            f.copy_(other[0])
            targets.copy_(other[3])
            scale.fill_(seed - 1.5)
        graph.replay()
        assert all(torch.equal(x, y) for x, y in zip(captured, step(), strict=True))


FIRST = """
import torch
import rebalfer_kernels as rk
device = torch.device("cuda", torch.cuda.device_count() - 1)
features = torch.randn(8, 2048, 7, 7, device=device, dtype=torch.bfloat16)
weight = torch.randn(7, 2048, device=device)
graph = torch.cuda.CUDAGraph()
with torch.cuda.device(device), torch.cuda.graph(graph):
    maps = rk.class_activation_maps(features, weight, backend="cuda")
graph.replay()
expected = rk.class_activation_maps(features.double(), weight.double(), backend="reference")
print(((maps - expected).norm() / expected.norm()).item())
"""


@pytest.mark.parametrize("backend", [b for b in GPU if b.values[0].name == "cuda"])
def test_the_first_call_on_a_device_may_be_captured(backend):
    """In a process of its own, where no kernel is loaded, and on the last device, which is not the current one."""
    ran = child.run("-c", FIRST, timeout=200)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert float(ran.stdout) < 1e-4


@pytest.mark.parametrize("backend", GPU)
def test_two_streams_at_once(backend):
    work = [case(**PAPER | {"n": 128}, dtype=torch.float32, device="cuda", seed=seed) for seed in (1, 2)]
    alone = [run(backend.name, data) for data in work]
    streams = [torch.cuda.Stream() for _ in work]
    torch.cuda.synchronize()
    for _ in range(20):
        together = []
        for stream, data in zip(streams, work, strict=True):
            with torch.cuda.stream(stream):
                together.append(run(backend.name, data))
        torch.cuda.synchronize()
        for got, expected in zip(together, alone, strict=True):
            assert all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.parametrize("backend", GPU)
def test_launches(backend):
    features, w, b, targets, table, v = case(**PAPER, dtype=torch.bfloat16, layout="channels_last", device="cuda")
    f, w, b = features.requires_grad_(), w.requires_grad_(), b.requires_grad_()
    one = torch.ones((), device="cuda")
    out = []

    def forward():
        out.append(rk.rebalanced_head_loss(f, w, b, targets, target_table=table, map_weights=v, backend=backend.name))

    forward()
    torch.autograd.grad(out[0].loss, (f, w, b), one)
    clock = CudaClock()
    forward_kernels = clock.launches(forward)
    backward_kernels = clock.launches(lambda: torch.autograd.grad(out[1].loss, (f, w, b), one))
    assert (len(forward_kernels), len(backward_kernels)) == LAUNCHES[backend.name], (forward_kernels, backward_kernels)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("backend", GPU)
def test_the_features_device_is_used_not_the_current_one(backend):
    data = case(**PAPER, dtype=torch.bfloat16, device="cuda:1")
    with torch.cuda.device(0):
        got = run(backend.name, data)
        assert torch.cuda.current_device() == 0
    with torch.cuda.device(1):
        expected = run(backend.name, data)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.parametrize("backend", GPU)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_more_than_2_to_the_31_elements(backend, layout):
    if torch.cuda.get_device_properties(0).total_memory < 30 * 2**30:
        pytest.skip("needs 30 GB of GPU memory")
    n = 2**31 // (512 * 49) // 2 + 100
    small = case(**PAPER, dtype=torch.bfloat16, layout=layout, device="cuda")
    rows = torch.arange(n, device="cuda") % PAPER["n"]
    features = small[0][torch.cat([rows, PAPER["n"] + rows])]
    features = features.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else features
    assert features.numel() > 2**31
    data = (features, *small[1:3], small[3][rows], *small[4:])
    got = run(backend.name, data, reduction="none")
    expected = run(backend.name, small, reduction="none")
    order = torch.arange(n - PAPER["n"], n, device="cuda") % PAPER["n"]
    assert torch.equal(got["loss"][-len(order) :], expected["loss"][order])
    assert torch.equal(got["d_features"][-len(order) :], expected["d_features"][PAPER["n"] + order])
    assert torch.equal(got["d_features"][n - len(order) : n], expected["d_features"][order])


@pytest.mark.parametrize("backend", GPU)
def test_labels_out_of_range_are_nan(backend):
    check_labels_out_of_range(backend, "cuda")


@pytest.mark.parametrize("backend", GPU)
def test_another_batch_compiles_nothing(backend):
    if backend.name != "triton":
        pytest.skip("compiled ahead")
    import triton

    compiled = []
    for n in (4, 200):  # without and with the kernel that sums over chunks of a batch
        run("triton", case(n, 64, 7, 7, 7, torch.bfloat16, layout="channels_last", device="cuda"))
    triton.knobs.runtime.jit_cache_hook = lambda *args, **more: compiled.append(more)
    try:
        for n in (1, 2, 3, 16, 17, 64, 1000):
            run("triton", case(n, 64, 7, 7, 7, torch.bfloat16, layout="channels_last", device="cuda"))
    finally:
        triton.knobs.runtime.jit_cache_hook = None
    assert compiled == []


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b.values[0].name == "cpu"])
def test_the_helpers_on_a_cpu(backend):
    for options in ({"detach_cam_weight": False}, {"p": 1}):
        check_against_eager(backend, torch.float32, "channels_last", 64, **options)
