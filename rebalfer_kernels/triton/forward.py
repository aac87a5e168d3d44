"""The head's forward, the maps of Eq. 2 and the gradient of the CAM's weight."""

from typing import Any, NamedTuple

import triton.language as tl

from .common import (
    Twin,
    add_weight_gradient,
    consistency_gradient,
    consistency_term,
    dot,
    inlined,
    kernel,
    load_features,
    load_maps,
    narrow,
    store_maps,
    twin_rows,
    weight_tile,
)
from .cross_entropy import Targets, cross_entropy, cross_entropy_gradient, log_sum_exp, target_rows


class Losses(NamedTuple):
    """Each sample's losses, (N,) float32, the logits they come from, and their gradient with respect to these.

    All but the consistency are None without targets, the gradient also where nobody wants it.
    """

    loss: Any
    classification: Any
    consistency: Any
    logits: Any  #: (2N, L) float32
    logit_grad: Any  #: (2N, L) float32


@inlined
def add_cams(f, weight, k, c, acc, acc_lo, SHAPE: tl.constexpr, LO_SCALE: tl.constexpr):
    """Eq. 2 for a block of channels: acc + f @ W^T; acc_lo, in units of 1 / LO_SCALE, what 16 bits of W leave out."""
    ok = (c < SHAPE.C)[:, None] & (k < SHAPE.L)[None, :]
    w = tl.load(weight + k[None, :] * SHAPE.C + c[:, None], mask=ok, other=0.0)
    hi = narrow(w, f.dtype)
    acc = dot(f, hi, acc)
    if LO_SCALE > 0:
        acc_lo = dot(f, narrow((w - hi.to(tl.float32)) * LO_SCALE, f.dtype), acc_lo)
    return acc, acc_lo


@inlined
def sum_rows(f, BY_MMA: tl.constexpr):
    """(channels,) float32 sums of (rows, channels) features.

    By tensor cores they are the product with a matrix of eighths, whose 8 columns then add up to the sum: a tile that
    only products read is kept in shared memory in the order that these read fastest.
    """
    if BY_MMA:
        eighths = tl.full([f.shape[0], 8], 0.125, f.dtype)
        return tl.sum(dot(tl.trans(f), eighths, tl.zeros([f.shape[1], 8], tl.float32)), 1)
    return tl.sum(f.to(tl.float32), 0)


@inlined
def classify(logit_grad, m, z, t, k, L: tl.constexpr):
    """The cross-entropy of view m from its logits (classes) and targets (1, classes); its gradient is stored."""
    z = z[None, :]
    lse, top = log_sum_exp(z, k, L)
    if logit_grad is not None:
        at = logit_grad + m * L + k[None, :]
        tl.store(at, cross_entropy_gradient(z, lse, top, t), mask=(k < L)[None, :])
    return cross_entropy(z, lse, top, t, k, L)


@inlined
def store_losses(
    losses,
    targets,
    bias,
    z,
    z_twin,
    cons,
    i,
    N,
    consistency_weight,
    k,
    L: tl.constexpr,
    BOTH_VIEWS: tl.constexpr,
):
    """What follows the pooling, for pair i: the logits of both views and the pair's losses (Eq. 1, 5, 6)."""
    tl.store(losses.consistency + i, cons)
    if targets.data is not None:
        if bias is not None:
            b = tl.load(bias + k, mask=k < L, other=0.0).to(tl.float32)
            z += b
            z_twin += b
        tl.store(losses.logits + i * L + k, z, mask=k < L)
        tl.store(losses.logits + (N + i) * L + k, z_twin, mask=k < L)
        sample = i + tl.arange(0, 1)
        t = target_rows(targets, sample, sample >= 0, k, L)
        classification = classify(losses.logit_grad, i, z, t, k, L)
        if BOTH_VIEWS:
            classification += classify(losses.logit_grad, N + i, z_twin, t, k, L)
        elif losses.logit_grad is not None:
            tl.store(losses.logit_grad + (N + i) * L + k, tl.zeros_like(z), mask=k < L)
        tl.store(losses.classification + sample, classification)
        tl.store(losses.loss + sample, classification + consistency_weight * cons)


@kernel
def head_forward_kernel(
    features,  # (2N, C, H, W), either layout
    weight,  # (L, C)
    bias,  # (L,) or None
    targets,  # (N,) int64, (N, L) float32 or None
    target_table,  # (L, L) float32, None without targets
    map_weights,  # (L,) float32
    loss,  # (N,) float32, None without targets
    classification,  # (N,) float32, None without targets
    consistency,  # (N,) float32
    logits,  # (2N, L) float32, None without targets
    maps,  # (2N, L, H, W) float32 or None
    map_grad,  # (N, L, H, W) float32 or None
    logit_grad,  # (2N, L) float32 or None
    pooled,  # (2N, C) float32 or None
    N,
    consistency_weight,
    twin_offset,
    twin_stride_h,
    twin_stride_w,
    SHAPE: tl.constexpr,  # tiles.Shape
    TILE: tl.constexpr,  # tiles.Tiles
    P: tl.constexpr,
    BOTH_VIEWS: tl.constexpr,
    POOL_BY_MMA: tl.constexpr,
    LO_SCALE: tl.constexpr,
):
    """The whole head of one pair, where its maps fit in one tile: features are read once, everything else is small."""
    C: tl.constexpr = SHAPE.C
    HW: tl.constexpr = SHAPE.HW
    L: tl.constexpr = SHAPE.L
    B_ROWS: tl.constexpr = TILE.rows
    B_C: tl.constexpr = TILE.channels
    B_L: tl.constexpr = TILE.classes
    i = tl.program_id(0).to(tl.int64)
    rows = tl.arange(0, B_ROWS)
    row_ok = rows < HW
    twin = twin_rows(rows, Twin(twin_offset, twin_stride_h, twin_stride_w), SHAPE.W)
    k = tl.arange(0, B_L)
    acc = tl.zeros([B_ROWS, B_L], tl.float32)
    acc_lo = acc
    acc_twin = acc
    acc_twin_lo = acc
    for c0 in range(0, C, B_C):
        c = c0 + tl.arange(0, B_C)
        f = load_features(features, i, rows, row_ok, c, SHAPE)
        f_twin = load_features(features, N + i, twin, row_ok, c, SHAPE)
        acc, acc_lo = add_cams(f, weight, k, c, acc, acc_lo, SHAPE, LO_SCALE)
        acc_twin, acc_twin_lo = add_cams(f_twin, weight, k, c, acc_twin, acc_twin_lo, SHAPE, LO_SCALE)
        if pooled is not None:
            tl.store(pooled + i * C + c, sum_rows(f, POOL_BY_MMA) * (1.0 / HW), mask=c < C)
            tl.store(pooled + (N + i) * C + c, sum_rows(f_twin, POOL_BY_MMA) * (1.0 / HW), mask=c < C)
    if LO_SCALE > 0:
        acc += acc_lo * (1.0 / LO_SCALE)
        acc_twin += acc_twin_lo * (1.0 / LO_SCALE)
    s = acc - acc_twin
    if maps is not None:
        store_maps(maps, acc, i, rows, row_ok, k, SHAPE)
        store_maps(maps, acc_twin, N + i, twin, row_ok, k, SHAPE)
    v = tl.load(map_weights + k, mask=k < L, other=0.0)
    if map_grad is not None:
        d = consistency_gradient(v[None, :], s, P) * (1.0 / (L * HW))
        store_maps(map_grad, d, i, rows, row_ok, k, SHAPE)
    cons = tl.sum(tl.sum(consistency_term(v[None, :], s, P), 0), 0) * (1.0 / (L * HW))
    z = tl.sum(acc, 0) * (1.0 / HW)
    z_twin = tl.sum(acc_twin, 0) * (1.0 / HW)
    losses = Losses(loss, classification, consistency, logits, logit_grad)
    labels = Targets(targets, target_table)
    store_losses(losses, labels, bias, z, z_twin, cons, i, N, consistency_weight, k, L, BOTH_VIEWS)


@kernel
def maps_kernel(
    features,  # (M, C, H, W), either layout
    weight,  # (L, C)
    maps,  # (M, L, H, W) float32
    pooled_tiles,  # (M, row tiles, C) float32 or None: sums over the rows of a tile / HW
    SHAPE: tl.constexpr,
    TILE: tl.constexpr,
    LO_SCALE: tl.constexpr,
):
    """Eq. 2 by tiles, for maps of any size and any number of classes."""
    C: tl.constexpr = SHAPE.C
    HW: tl.constexpr = SHAPE.HW
    B_ROWS: tl.constexpr = TILE.rows
    B_C: tl.constexpr = TILE.channels
    B_L: tl.constexpr = TILE.classes
    L_TILES: tl.constexpr = (SHAPE.L + B_L - 1) // B_L
    ROW_TILES: tl.constexpr = (HW + B_ROWS - 1) // B_ROWS
    pid = tl.program_id(0)
    m = (pid // (L_TILES * ROW_TILES)).to(tl.int64)
    row_tile = (pid // L_TILES) % ROW_TILES
    l_tile = pid % L_TILES
    rows = row_tile * B_ROWS + tl.arange(0, B_ROWS)
    row_ok = rows < HW
    k = l_tile * B_L + tl.arange(0, B_L)
    acc = tl.zeros([B_ROWS, B_L], tl.float32)
    acc_lo = acc
    for c0 in range(0, C, B_C):
        c = c0 + tl.arange(0, B_C)
        f = load_features(features, m, rows, row_ok, c, SHAPE)
        acc, acc_lo = add_cams(f, weight, k, c, acc, acc_lo, SHAPE, LO_SCALE)
        if pooled_tiles is not None:
            if l_tile == 0:
                sums = tl.sum(f.to(tl.float32), 0) * (1.0 / HW)
                tl.store(pooled_tiles + (m * ROW_TILES + row_tile) * C + c, sums, mask=c < C)
    if LO_SCALE > 0:
        acc += acc_lo * (1.0 / LO_SCALE)
    store_maps(maps, acc, m, rows, row_ok, k, SHAPE)


@inlined
def sum_pooled_tiles(pooled_tiles, pooled, i, N, C: tl.constexpr, ROW_TILES: tl.constexpr, B_C: tl.constexpr):
    """The pooled features of both views of pair i, summed over the row tiles of maps_kernel."""
    for c0 in range(0, 2 * C, B_C):
        c = c0 + tl.arange(0, B_C)
        view = tl.where(c < C, i, N + i)
        c = tl.where(c < C, c, c - C)
        total = tl.zeros([B_C], tl.float32)
        for tile in range(ROW_TILES):
            total += tl.load(pooled_tiles + (view * ROW_TILES + tile) * C + c, mask=c < C, other=0.0)
        tl.store(pooled + view * C + c, total, mask=c < C)


@kernel
def head_finish_kernel(
    bias,  # (L,) or None
    targets,  # (N,) int64, (N, L) float32 or None
    target_table,  # (L, L) float32, None without targets
    map_weights,  # (L,) float32
    loss,  # (N,) float32, None without targets
    classification,  # (N,) float32, None without targets
    consistency,  # (N,) float32
    logits,  # (2N, L) float32, None without targets
    maps,  # (2N, L, H, W) float32
    map_grad,  # (N, L, H, W) float32 or None
    logit_grad,  # (2N, L) float32 or None
    pooled_tiles,  # (2N, row tiles, C) float32, None where pooled is not wanted or already whole
    pooled,  # (2N, C) float32 or None
    N,
    consistency_weight,
    twin_offset,
    twin_stride_h,
    twin_stride_w,
    SHAPE: tl.constexpr,
    P: tl.constexpr,
    BOTH_VIEWS: tl.constexpr,
    ROW_TILES: tl.constexpr,
    B_ROWS: tl.constexpr,
    B_C: tl.constexpr,
    B_ALL: tl.constexpr,
):
    """The rest of the head of one pair from its maps, where they were computed by tiles."""
    HW: tl.constexpr = SHAPE.HW
    L: tl.constexpr = SHAPE.L
    i = tl.program_id(0).to(tl.int64)
    twin = Twin(twin_offset, twin_stride_h, twin_stride_w)
    k = tl.arange(0, B_ALL)
    v = tl.load(map_weights + k, mask=k < L, other=0.0)
    z = tl.zeros([B_ALL], tl.float32)
    z_twin = z
    terms = z
    for row0 in range(0, HW, B_ROWS):
        rows = row0 + tl.arange(0, B_ROWS)
        ok = (k < L)[:, None] & (rows < HW)[None, :]
        at = k[:, None] * HW + rows[None, :]
        twin_at = k[:, None] * HW + twin_rows(rows, twin, SHAPE.W)[None, :]
        a = tl.load(maps + i * (L * HW) + at, mask=ok, other=0.0)
        a_twin = tl.load(maps + (N + i) * (L * HW) + twin_at, mask=ok, other=0.0)
        if map_grad is not None:
            d = consistency_gradient(v[:, None], a - a_twin, P) * (1.0 / (L * HW))
            tl.store(map_grad + i * (L * HW) + at, d, mask=ok)
        terms += tl.sum(consistency_term(v[:, None], a - a_twin, P), 1)
        z += tl.sum(a, 1)
        z_twin += tl.sum(a_twin, 1)
    if pooled_tiles is not None:
        sum_pooled_tiles(pooled_tiles, pooled, i, N, SHAPE.C, ROW_TILES, B_C)
    z *= 1.0 / HW
    z_twin *= 1.0 / HW
    cons = tl.sum(terms, 0) * (1.0 / (L * HW))
    losses = Losses(loss, classification, consistency, logits, logit_grad)
    labels = Targets(targets, target_table)
    store_losses(losses, labels, bias, z, z_twin, cons, i, N, consistency_weight, k, L, BOTH_VIEWS)


@kernel
def cam_grad_kernel(
    features,  # (2N, C, H, W), either layout
    map_grad,  # (N, L, H, W) float32
    cam_grad,  # (N, L, C) float32
    N,
    twin_offset,
    twin_stride_h,
    twin_stride_w,
    SHAPE: tl.constexpr,
    TILE: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """K_i = sum_hw (d l_cons,i / dA) (F - T F~), of a block of channels and classes: the features are read again."""
    C: tl.constexpr = SHAPE.C
    HW: tl.constexpr = SHAPE.HW
    L: tl.constexpr = SHAPE.L
    B_C: tl.constexpr = TILE.channels
    B_L: tl.constexpr = TILE.classes
    i, c, k = weight_tile(tl.program_id(0), SHAPE, B_C, B_L)
    i = i.to(tl.int64)
    acc = tl.zeros([B_C, B_L], tl.float32)
    for row0 in range(0, HW, TILE.rows):
        rows = row0 + tl.arange(0, TILE.rows)
        row_ok = rows < HW
        d = load_maps(map_grad, i, rows, row_ok, k, SHAPE)
        twin = twin_rows(rows, Twin(twin_offset, twin_stride_h, twin_stride_w), SHAPE.W)
        acc = add_weight_gradient(load_features(features, i, rows, row_ok, c, SHAPE), d, acc, SPLIT)
        acc = add_weight_gradient(load_features(features, N + i, twin, row_ok, c, SHAPE), -d, acc, SPLIT)
    ok = (c < C)[:, None] & (k < L)[None, :]
    tl.store(cam_grad + i * (L * C) + k[None, :] * C + c[:, None], acc, mask=ok)
