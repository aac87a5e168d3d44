"""The cross-entropy of rows of logits against a target table (Eq. 1 with Eq. 8), within the head and alone."""

from typing import Any, NamedTuple

import triton.language as tl

from .common import inlined, kernel, narrow


class Targets(NamedTuple):
    """What the samples are classified against; all None where only the consistency is asked for."""

    data: Any  #: (N,) int64 classes, or (N, L) float32 distributions
    table: Any  #: (L, L) float32


@inlined
def target_rows(targets, samples, ok, k, L: tl.constexpr):
    """(samples, classes) target distributions t: rows of the table, or targets @ table; NaN for no class of [0, L)."""
    inside = (k < L)[None, :]
    if targets.data.dtype.element_ty == tl.int64:
        y = tl.load(targets.data + samples, mask=ok, other=0)
        known = (y >= 0) & (y < L)
        row = tl.where(known, y, 0)
        t = tl.load(targets.table + row[:, None] * L + k[None, :], mask=inside & ok[:, None], other=0.0)
        return tl.where(known[:, None], t, float("nan"))
    else:
        t = tl.zeros([samples.shape[0], k.shape[0]], tl.float32)
        for y in range(L):
            weight = tl.load(targets.data + samples * L + y, mask=ok, other=0.0)
            t += weight[:, None] * tl.load(targets.table + y * L + k[None, :], mask=inside, other=0.0)
        return t


@inlined
def load_logits(logits, rows, ok, k, L: tl.constexpr):
    """(rows, classes) as float32."""
    z = tl.load(logits + rows[:, None] * L + k[None, :], mask=ok[:, None] & (k < L)[None, :], other=0.0)
    return z.to(tl.float32)


@inlined
def log_sum_exp(z, k, L: tl.constexpr):  # (rows, all classes)
    """log sum_l exp(z_l - top) and top, the largest logit: differences first, so that large logits lose no digits."""
    z = tl.where((k < L)[None, :], z, float("-inf"))
    top = tl.max(z, 1)
    return tl.log(tl.sum(tl.exp(z - top[:, None]), 1)), top


@inlined
def cross_entropy(z, lse, top, t, k, L: tl.constexpr):  # (rows, all classes) z and t
    """-sum_l t_l log softmax(z)_l of each row; a zero target takes no part, even where its logit is -inf."""
    counts = (k < L)[None, :] & (t != 0)
    return tl.sum(t * tl.where(counts, lse[:, None] - (z - top[:, None]), 0.0), 1)


@inlined
def cross_entropy_gradient(z, lse, top, t):  # (rows, all classes) z and t
    """(sum t) softmax(z)_l - t_l, up to L: the rows of the target table need not sum to 1."""
    return tl.sum(t, 1)[:, None] * tl.exp(z - top[:, None] - lse[:, None]) - t


class Upstream(NamedTuple):
    """The gradient of a loss: None, a scalar (stride 0), or one number a sample; float32."""

    data: Any
    stride: Any


@inlined
def load_upstream(d, samples, ok):
    """The upstream gradient of each sample; 0 where there is none."""
    if d.data is None:
        return tl.zeros([samples.shape[0]], tl.float32)
    else:
        return tl.load(d.data + samples * d.stride, mask=ok, other=0.0)


@kernel
def cross_entropy_forward_kernel(
    logits,  # (M, L)
    targets,  # (M,) int64 or (M, L) float32
    target_table,  # (L, L) float32
    losses,  # (M,) float32
    M,
    L: tl.constexpr,
    B_BATCH: tl.constexpr,
    B_ALL: tl.constexpr,
):
    m = tl.program_id(0).to(tl.int64) * B_BATCH + tl.arange(0, B_BATCH)
    ok = m < M
    k = tl.arange(0, B_ALL)
    z = load_logits(logits, m, ok, k, L)
    t = target_rows(Targets(targets, target_table), m, ok, k, L)
    lse, top = log_sum_exp(z, k, L)
    tl.store(losses + m, cross_entropy(z, lse, top, t, k, L), mask=ok)


@kernel
def cross_entropy_backward_kernel(
    d_loss,  # (M,) float32, or a scalar: d_loss_stride 0
    logits,  # (M, L)
    targets,  # (M,) int64 or (M, L) float32
    target_table,  # (L, L) float32
    d_logits,  # (M, L)
    M,
    d_loss_stride,
    share,  # 1 / M under "mean"
    L: tl.constexpr,
    B_BATCH: tl.constexpr,
    B_ALL: tl.constexpr,
):
    m = tl.program_id(0).to(tl.int64) * B_BATCH + tl.arange(0, B_BATCH)
    ok = m < M
    k = tl.arange(0, B_ALL)
    g = load_upstream(Upstream(d_loss, d_loss_stride), m, ok) * share
    z = load_logits(logits, m, ok, k, L)
    lse, top = log_sum_exp(z, k, L)
    t = target_rows(Targets(targets, target_table), m, ok, k, L)
    dz = g[:, None] * cross_entropy_gradient(z, lse, top, t)
    mask = ok[:, None] & (k < L)[None, :]
    tl.store(d_logits + m[:, None] * L + k[None, :], narrow(dz, d_logits.dtype.element_ty), mask=mask)


@inlined
def store_mean(losses, mean, N, B: tl.constexpr):
    """The mean over the samples in one fixed order; of no samples NaN."""
    if losses is not None:
        at = tl.arange(0, B)
        total = tl.zeros([B], tl.float32)
        for n0 in range(0, N, B):
            total += tl.load(losses + n0 + at, mask=at < N - n0, other=0.0)
        tl.store(mean, tl.sum(total, 0) / N.to(tl.float32))


@kernel
def mean_kernel(
    loss,  # (N,) float32 or None, like the next two
    classification,
    consistency,
    mean_loss,  # () float32, None where the loss is, like the next two
    mean_classification,
    mean_consistency,
    N,
    B: tl.constexpr,
):
    """One program for each of the three."""
    which = tl.program_id(0)
    if which == 0:
        store_mean(loss, mean_loss, N, B)
    elif which == 1:
        store_mean(classification, mean_classification, N, B)
    else:
        store_mean(consistency, mean_consistency, N, B)
