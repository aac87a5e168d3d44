"""The gradients of the head and of the maps of Eq. 2."""

from typing import Any, NamedTuple

import triton.language as tl

from .common import (
    Twin,
    add_weight_gradient,
    dot,
    inlined,
    kernel,
    load_features,
    load_maps,
    narrow,
    store_features,
    twin_rows,
    weight_tile,
)
from .cross_entropy import Upstream, load_upstream


class Upstreams(NamedTuple):
    """The gradients of the head's outputs, any of them None, and what they are multiplied by."""

    d_loss: Upstream
    d_classification: Upstream
    d_consistency: Upstream
    d_logits: Any  #: (2N, L)
    consistency_weight: Any
    share: Any  #: 1 / N under "mean"


@inlined
def consistency_upstream(up, samples, ok):
    """g_S of samples."""
    g = up.consistency_weight * load_upstream(up.d_loss, samples, ok)
    return (g + load_upstream(up.d_consistency, samples, ok)) * up.share


@inlined
def logits_gradient(up, logit_grad, rows, ok, N, k, L: tl.constexpr):
    """(rows, classes k) of dz, zero beyond L. Rows below N are images, the others twins."""
    at = rows[:, None] * L + k[None, :]
    mask = ok[:, None] & (k < L)[None, :]
    dz = tl.zeros([rows.shape[0], k.shape[0]], tl.float32)
    if up.d_loss.data is not None or up.d_classification.data is not None:
        samples = tl.where(rows < N, rows, rows - N)
        g = (load_upstream(up.d_loss, samples, ok) + load_upstream(up.d_classification, samples, ok)) * up.share
        dz += g[:, None] * tl.load(logit_grad + at, mask=mask, other=0.0)
    if up.d_logits is not None:
        dz += tl.load(up.d_logits + at, mask=mask, other=0.0)
    return dz


@inlined
def weight_gradient(
    up,
    logit_grad,
    pooled,
    cam_grad,
    d_weight,
    d_bias,
    partial,
    pid,
    N,
    chunk_size,
    SHAPE: tl.constexpr,
    CUT: tl.constexpr,
):
    """dW = dz^T pooled + dz~^T pooled~ + sum_i g_S,i K_i and db = sum dz + dz~, of a block of channels and classes.

    Program pid sums over the samples of one chunk; where that is not the whole batch, sum_chunks_kernel does the rest.
    """
    C: tl.constexpr = SHAPE.C
    L: tl.constexpr = SHAPE.L
    B_C: tl.constexpr = CUT.weight.channels
    B_L: tl.constexpr = CUT.backward.classes
    C_TILES: tl.constexpr = (C + B_C - 1) // B_C if d_weight is not None else 1
    L_TILES: tl.constexpr = (L + B_L - 1) // B_L
    B_K: tl.constexpr = 1 if B_C * B_L >= 4096 else 4096 // (B_C * B_L)
    chunk = pid // (C_TILES * L_TILES)
    c_tile = pid // L_TILES % C_TILES
    k = pid % L_TILES * B_L + tl.arange(0, B_L)
    c = c_tile * B_C + tl.arange(0, B_C)
    begin = chunk * chunk_size
    end = tl.minimum(begin + chunk_size, N)
    acc = tl.zeros([B_C, B_L], tl.float32)
    sum_dz = tl.zeros([B_L], tl.float32)
    if logit_grad is not None:
        for n0 in range(begin, end, CUT.batch):
            n = n0 + tl.arange(0, CUT.batch).to(tl.int64)
            ok = n < end
            for view in tl.static_range(2):
                m = n + view * N
                dz = logits_gradient(up, logit_grad, m, ok, N, k, L)
                sum_dz += tl.sum(dz, 0)
                if d_weight is not None:
                    means = tl.load(
                        pooled + m[None, :] * C + c[:, None], mask=(c < C)[:, None] & ok[None, :], other=0.0
                    )
                    acc = tl.dot(means, dz, acc, input_precision="ieee")
    if d_weight is not None:
        mask = (k < L)[None, :] & (c < C)[:, None]
        at = k[None, :] * C + c[:, None]
        if cam_grad is not None and (up.d_loss.data is not None or up.d_consistency.data is not None):
            for n0 in range(begin, end, B_K):
                n = n0 + tl.arange(0, B_K).to(tl.int64)
                ok = n < end
                g = consistency_upstream(up, n, ok)
                ok = ok[:, None, None] & mask[None, :, :]
                cam = tl.load(cam_grad + n[:, None, None] * (L * C) + at[None, :, :], mask=ok, other=0.0)
                acc += tl.sum(g[:, None, None] * cam, 0)
        if chunk_size >= N:
            tl.store(d_weight + at, narrow(acc, d_weight.dtype.element_ty), mask=mask)
        else:
            tl.store(partial + chunk.to(tl.int64) * (L * (C + 1)) + at, acc, mask=mask)
    if d_bias is not None:
        if c_tile == 0:
            if chunk_size >= N:
                tl.store(d_bias + k, narrow(sum_dz, d_bias.dtype.element_ty), mask=k < L)
            else:
                tl.store(partial + chunk.to(tl.int64) * (L * (C + 1)) + L * C + k, sum_dz, mask=k < L)


@inlined
def features_tile(pid, SHAPE: tl.constexpr, B_ROWS: tl.constexpr, B_C: tl.constexpr):
    """Sample, rows, which of them exist, and channels of program pid, where the features are tiled."""
    C_TILES: tl.constexpr = (SHAPE.C + B_C - 1) // B_C
    ROW_TILES: tl.constexpr = (SHAPE.HW + B_ROWS - 1) // B_ROWS
    rows = pid // C_TILES % ROW_TILES * B_ROWS + tl.arange(0, B_ROWS)
    c = pid % C_TILES * B_C + tl.arange(0, B_C)
    return (pid // (C_TILES * ROW_TILES)).to(tl.int64), rows, rows < SHAPE.HW, c


@inlined
def add_feature_gradient(d, weight, k, part, c, acc, SHAPE: tl.constexpr, PARTS: tl.constexpr):
    """acc + d @ W for d (rows, slots) and W (slots, channels): the rank-L gradient of the features.

    PARTS 1: float32, a slot is a class. Otherwise every class k has PARTS slots, and part says which of d_hi W_hi,
    d_lo W_hi, d_hi W_lo (and, too small to count, d_lo W_lo) a slot adds: so 8 classes fill the 16 slots that a
    tensor core multiplies at once. bfloat16 is exact for W in it (2 parts), never underflows, and holds float16 and
    float32 to 16 bits in two (4 parts).
    """
    ok = (k < SHAPE.L)[:, None] & (c < SHAPE.C)[None, :]
    w = tl.load(weight + k[:, None] * SHAPE.C + c[None, :], mask=ok, other=0.0)
    if PARTS == 1:
        acc = dot(d, w, acc)
    else:
        d_hi = narrow(d, tl.bfloat16)
        d_parts = tl.where((part % 2 == 0)[None, :], d_hi, narrow(d - d_hi.to(tl.float32), tl.bfloat16))
        if PARTS == 2:
            acc = dot(d_parts, w, acc)
        else:
            w = w.to(tl.float32)
            w_hi = narrow(w, tl.bfloat16)
            w_parts = tl.where((part < 2)[:, None], w_hi, narrow(w - w_hi.to(tl.float32), tl.bfloat16))
            acc = dot(d_parts, w_parts, acc)
    return acc


@inlined
def features_gradient(
    up,
    weight,
    map_grad,
    logit_grad,
    d_features,
    twin,
    pid,
    N,
    SHAPE: tl.constexpr,
    CUT: tl.constexpr,
    PARTS: tl.constexpr,
):
    """dF = U + W^T dz / HW and dF~ = -T^T(U) + W^T dz~ / HW of one tile of a pair, U = W^T dS computed once."""
    C: tl.constexpr = SHAPE.C
    HW: tl.constexpr = SHAPE.HW
    L: tl.constexpr = SHAPE.L
    B_ROWS: tl.constexpr = CUT.backward.rows
    B_C: tl.constexpr = CUT.backward.channels
    B_L: tl.constexpr = CUT.backward.classes
    i, rows, row_ok, c = features_tile(pid, SHAPE, B_ROWS, B_C)
    sample = i + tl.arange(0, 1)
    g = consistency_upstream(up, sample, sample >= 0)
    slot = tl.arange(0, PARTS * B_L)
    view = tl.arange(0, 2)
    u = tl.zeros([B_ROWS, B_C], tl.float32)
    q = tl.zeros([B_C], tl.float32)  # W^T dz / HW, one number a channel
    q_twin = q
    for l0 in range(0, L, B_L):
        k_slot = l0 + slot % B_L
        d = g[None, :] * load_maps(map_grad, i, rows, row_ok, k_slot, SHAPE)
        u = add_feature_gradient(d, weight, k_slot, slot // B_L, c, u, SHAPE, PARTS)
        if logit_grad is not None:
            k = l0 + tl.arange(0, B_L)
            w = tl.load(weight + k[:, None] * C + c[None, :], mask=(k < L)[:, None] & (c < C)[None, :], other=0.0)
            w = w.to(tl.float32) * (1.0 / HW)
            dz = logits_gradient(up, logit_grad, i + view * N, view < 2, N, k, L)
            both = tl.sum(dz[:, :, None] * w[None, :, :], 1)
            q += tl.sum(tl.where((view == 0)[:, None], both, 0.0), 0)
            q_twin += tl.sum(tl.where((view == 1)[:, None], both, 0.0), 0)
    store_features(d_features, q[None, :] + u, i, rows, row_ok, c, SHAPE)
    store_features(d_features, q_twin[None, :] - u, N + i, twin_rows(rows, twin, SHAPE.W), row_ok, c, SHAPE)


@kernel
def head_backward_kernel(
    d_loss,  # (N,) float32, a scalar (d_loss_stride 0) or None
    d_classification,  # (N,) float32, a scalar (d_classification_stride 0) or None
    d_consistency,  # (N,) float32, a scalar (d_consistency_stride 0) or None
    d_logits,  # (2N, L) float32 or None
    weight,  # (L, C)
    map_grad,  # (N, L, H, W) float32
    logit_grad,  # (2N, L) float32, None without targets
    pooled,  # (2N, C) float32 or None
    cam_grad,  # (N, L, C) float32 or None
    d_features,  # (2N, C, H, W), either layout, or None
    d_weight,  # (L, C) or None
    d_bias,  # (L,) or None
    partial,  # (chunks, L (C + 1)) float32, empty where one chunk of samples is the whole batch
    N,
    chunk_size,
    d_loss_stride,
    d_classification_stride,
    d_consistency_stride,
    consistency_weight,
    share,  # 1 / N under "mean"
    twin_offset,
    twin_stride_h,
    twin_stride_w,
    w_programs,
    SHAPE: tl.constexpr,  # tiles.Shape
    CUT: tl.constexpr,  # tiles.Policy
    PARTS: tl.constexpr,
):
    """The first w_programs programs sum the gradient of weight and bias, the others write that of the features."""
    up = Upstreams(
        Upstream(d_loss, d_loss_stride),
        Upstream(d_classification, d_classification_stride),
        Upstream(d_consistency, d_consistency_stride),
        d_logits,
        consistency_weight,
        share,
    )
    pid = tl.program_id(0)
    if pid < w_programs:
        weight_gradient(up, logit_grad, pooled, cam_grad, d_weight, d_bias, partial, pid, N, chunk_size, SHAPE, CUT)
    elif d_features is not None:
        twin = Twin(twin_offset, twin_stride_h, twin_stride_w)
        features_gradient(
            up,
            weight,
            map_grad,
            logit_grad,
            d_features,
            twin,
            pid - w_programs,
            N,
            SHAPE,
            CUT,
            PARTS,
        )


@kernel
def cam_backward_kernel(
    d_maps,  # (M, L, H, W) float32
    weight,  # (L, C)
    d_features,  # (M, C, H, W), either layout
    SHAPE: tl.constexpr,
    TILE: tl.constexpr,
    PARTS: tl.constexpr,
):
    """The gradient of Eq. 2 to the features, W^T dA, write-only."""
    B_ROWS: tl.constexpr = TILE.rows
    B_C: tl.constexpr = TILE.channels
    B_L: tl.constexpr = TILE.classes
    m, rows, row_ok, c = features_tile(tl.program_id(0), SHAPE, B_ROWS, B_C)
    slot = tl.arange(0, PARTS * B_L)
    acc = tl.zeros([B_ROWS, B_C], tl.float32)
    for l0 in range(0, SHAPE.L, B_L):
        k = l0 + slot % B_L
        d = load_maps(d_maps, m, rows, row_ok, k, SHAPE)
        acc = add_feature_gradient(d, weight, k, slot // B_L, c, acc, SHAPE, PARTS)
    store_features(d_features, acc, m, rows, row_ok, c, SHAPE)


@kernel
def cam_weight_kernel(
    d_maps,  # (M, L, H, W) float32
    features,  # (M, C, H, W), either layout
    partial,  # (chunks, L, C) float32
    M,
    chunks,
    SHAPE: tl.constexpr,
    TILE: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """The gradient of Eq. 2 to the weight, summed over the samples chunk, chunk + chunks, ... of each chunk."""
    C: tl.constexpr = SHAPE.C
    HW: tl.constexpr = SHAPE.HW
    L: tl.constexpr = SHAPE.L
    B_C: tl.constexpr = TILE.channels
    B_L: tl.constexpr = TILE.classes
    chunk, c, k = weight_tile(tl.program_id(0), SHAPE, B_C, B_L)
    acc = tl.zeros([B_C, B_L], tl.float32)
    for sample in range(chunk, M, chunks):
        m = tl.cast(sample, tl.int64)
        for row0 in range(0, HW, TILE.rows):
            rows = row0 + tl.arange(0, TILE.rows)
            row_ok = rows < HW
            d = load_maps(d_maps, m, rows, row_ok, k, SHAPE)
            acc = add_weight_gradient(load_features(features, m, rows, row_ok, c, SHAPE), d, acc, SPLIT)
    ok = (c < C)[:, None] & (k < L)[None, :]
    tl.store(partial + chunk.to(tl.int64) * (L * C) + k[None, :] * C + c[:, None], acc, mask=ok)


@kernel
def sum_chunks_kernel(
    partial,  # (chunks, SIZE + SIZE_MORE) float32: of each chunk of the batch SIZE numbers, then SIZE_MORE more
    out,  # (SIZE,) or None
    more,  # (SIZE_MORE,) or None
    chunks,
    SIZE: tl.constexpr,
    SIZE_MORE: tl.constexpr,
    B: tl.constexpr,
):
    """The sums over the chunks, one after the other."""
    at = tl.program_id(0) * B + tl.arange(0, B)
    acc = tl.zeros([B], tl.float32)
    for chunk in range(0, chunks):
        row = partial + tl.cast(chunk, tl.int64) * (SIZE + SIZE_MORE)
        acc += tl.load(row + at, mask=at < SIZE + SIZE_MORE, other=0.0)
    if out is not None:
        tl.store(out + at, narrow(acc, out.dtype.element_ty), mask=at < SIZE)
    if more is not None:
        tl.store(more + at - SIZE, narrow(acc, more.dtype.element_ty), mask=(at >= SIZE) & (at < SIZE + SIZE_MORE))
