"""Faults of the Triton kernels, which Triton's interpreter runs."""

from .mutant import Mutant

MUTANTS = [
    Mutant(
        "Triton: the flip left out on the load of the twin",
        "rebalfer_kernels/triton/forward.py",
        "f_twin = load_features(features, N + i, twin, row_ok",
        "f_twin = load_features(features, N + i, rows, row_ok",
        "test_triton.py::test_agreement",
    ),
    Mutant(
        "Triton: the tail of the channels is skipped",
        "rebalfer_kernels/triton/common.py",
        "return at, row_ok[:, None] & (c < SHAPE.C)[None, :]",
        "return at, row_ok[:, None] & (c < SHAPE.C // 16 * 16)[None, :]",
        "test_triton.py::test_agreement",
    ),
    Mutant(
        "Triton: the lower half of a float32 weight is dropped",
        "rebalfer_kernels/triton/forward.py",
        "acc_twin += acc_twin_lo * (1.0 / LO_SCALE)",
        "acc_twin += acc_twin_lo * 0.0",
        "test_triton.py::test_agreement",
    ),
    Mutant(
        "Triton: the lower half of dS is dropped",
        "rebalfer_kernels/triton/backward.py",
        "d_hi, narrow(d - d_hi.to(tl.float32), tl.bfloat16))",
        "d_hi, 0 * d_hi)",
        "test_triton.py::test_agreement",
    ),
    Mutant(
        "Triton: dF of the twin has the wrong sign",
        "rebalfer_kernels/triton/backward.py",
        "q_twin[None, :] - u",
        "q_twin[None, :] + u",
        "test_triton.py::test_agreement",
    ),
    Mutant(
        "Triton: dW and db of the images alone",
        "rebalfer_kernels/triton/backward.py",
        "for view in tl.static_range(2):",
        "for view in tl.static_range(1):",
        "test_triton.py::test_agreement",
    ),
    Mutant(
        "Triton: K without 1/(LHW)",
        "rebalfer_kernels/triton/forward.py",
        "acc * (1.0 / (L * HW)), mask=ok)",
        "acc, mask=ok)",
        "test_triton.py::test_agreement",
    ),
    Mutant(
        "Triton: the gradient of |vS|^2 without its 2",
        "rebalfer_kernels/triton/common.py",
        "else 2 * v * x",
        "else v * x",
        "test_triton.py::test_agreement",
    ),
    Mutant(
        "Triton: the mean's gradient not divided by N",
        "rebalfer_kernels/triton/host.py",
        "share=1.0 / max(n, 1) if options.mean else 1.0,",
        "share=1.0,",
        "test_triton.py::test_agreement",
    ),
    Mutant(
        "Triton: several tiles: the flip left out of the twin's maps",
        "rebalfer_kernels/triton/forward.py",
        "twin_rows(rows, twin, SHAPE.W)[None, :]",
        "rows[None, :]",
        "test_triton.py::test_agreement",
    ),
    Mutant(
        "Triton: several tiles: pooled features of the image twice",
        "rebalfer_kernels/triton/forward.py",
        "view = tl.where(c < C, i, N + i)",
        "view = tl.where(c < C, i, i)",
        "test_triton.py::test_agreement",
    ),
    Mutant(
        "Triton: the last chunk of the batch is left out",
        "rebalfer_kernels/triton/backward.py",
        "for chunk in range(0, chunks):",
        "for chunk in range(0, chunks - 1):",
        "test_triton.py::test_a_batch_of_several_chunks",
    ),
    Mutant(
        "Triton: a label is compared with the padded L",
        "rebalfer_kernels/triton/cross_entropy.py",
        "known = (y >= 0) & (y < L)",
        "known = (y >= 0) & (y < k.shape[0])",
        "test_triton.py::test_labels_out_of_range_are_nan_in_the_kernels",
    ),
    Mutant(
        "Triton: a zero target counts",
        "rebalfer_kernels/triton/cross_entropy.py",
        "counts = (k < L)[None, :] & (t != 0)",
        "counts = (k < L)[None, :]",
        "test_triton.py::test_a_zero_target_takes_no_part",
    ),
]
