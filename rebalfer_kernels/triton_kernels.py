"""The Triton kernels: one source for NVIDIA and AMD, run on a CPU by Triton's interpreter. See triton_ops for launches.

A tile of features is (rows, channels), a row being a pixel of the map, in either layout: the layout is in the strides
S_HW and S_C. The twin's rows are loaded in the order that undoes its transform, so no feature is ever moved for it.
Names in capitals are compile-time constants; the batch size never is one. B_ROWS, B_C and B_L are the tile's rows,
channels and classes, powers of two and padded: a tile's tail is masked on loads (zeros) and on stores.

Precision: float32 operands are multiplied in IEEE float32, never tf32. 16-bit features go to the tensor cores as they
are; whatever else is multiplied there and is not exact in 16 bits travels as hi + lo, two numbers of 16 bits each.
Every sum has one order, fixed by (C, HW, L, layout, dtype, arch); nothing is added atomically.
"""

import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction


@triton.jit
def empty_kernel():
    pass


#: Whether the kernels below run in Triton's interpreter, as TRITON_INTERPRET=1 said when this module was imported.
INTERPRETED = isinstance(empty_kernel, InterpretedFunction)
_UPCAST = tl.constexpr(INTERPRETED)

#: What the kernels call is inlined by the compiler; the interpreter takes 2 ms for each call of a jit function.
_inlined = (lambda function: function) if INTERPRETED else triton.jit


@_inlined
def narrow(x, dtype: tl.constexpr):
    """x in dtype, rounded to nearest even."""
    if _UPCAST and dtype == tl.bfloat16 and x.dtype == tl.float32:  # the interpreter would cut the bits off
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@_inlined
def dot(a, b, acc):  # (M, K), (K, N), (M, N)
    """acc + a @ b; the products of 16-bit operands are exact."""
    if _UPCAST:  # the interpreter multiplies bfloat16 as if its bits were integers
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@_inlined
def load_tile(view, rows, row_ok, c, C: tl.constexpr, S_HW: tl.constexpr, S_C: tl.constexpr):
    """(rows, channels) of one view's features."""
    mask = row_ok[:, None] & (c < C)[None, :]
    return tl.load(view + rows[:, None] * S_HW + c[None, :] * S_C, mask=mask, other=0.0)


@_inlined
def store_tile(view, tile, rows, row_ok, c, C: tl.constexpr, S_HW: tl.constexpr, S_C: tl.constexpr):
    mask = row_ok[:, None] & (c < C)[None, :]
    tl.store(view + rows[:, None] * S_HW + c[None, :] * S_C, narrow(tile, view.dtype.element_ty), mask=mask)


@_inlined
def features_tile(pid, C: tl.constexpr, HW: tl.constexpr, B_ROWS: tl.constexpr, B_C: tl.constexpr):
    """Sample, rows, which of them exist, and channels of program pid, where the features are tiled."""
    C_TILES: tl.constexpr = (C + B_C - 1) // B_C
    ROW_TILES: tl.constexpr = (HW + B_ROWS - 1) // B_ROWS
    rows = pid // C_TILES % ROW_TILES * B_ROWS + tl.arange(0, B_ROWS)
    return (pid // (C_TILES * ROW_TILES)).to(tl.int64), rows, rows < HW, pid % C_TILES * B_C + tl.arange(0, B_C)


@_inlined
def weight_tile(pid, C: tl.constexpr, L: tl.constexpr, B_C: tl.constexpr, B_L: tl.constexpr):
    """Sample or chunk of samples, channels and classes of program pid, where the weight is tiled."""
    C_TILES: tl.constexpr = (C + B_C - 1) // B_C
    L_TILES: tl.constexpr = (L + B_L - 1) // B_L
    c = (pid // L_TILES) % C_TILES * B_C + tl.arange(0, B_C)
    return pid // (L_TILES * C_TILES), c, pid % L_TILES * B_L + tl.arange(0, B_L)


@_inlined
def twin_rows(rows, W: tl.constexpr, twin_offset, twin_h, twin_w):
    """T(A~)[rows] = A~[twin_rows]; see transforms.TwinMap."""
    return twin_offset + (rows // W) * twin_h + (rows % W) * twin_w


@_inlined
def accumulate_cams(f, weight, k, c, acc, acc_lo, C: tl.constexpr, L: tl.constexpr, LO_SCALE: tl.constexpr):
    """Eq. 2 for a block of channels: acc += f @ W^T; acc_lo, in units of 1 / LO_SCALE, what 16 bits of W leave out."""
    w = tl.load(weight + k[None, :] * C + c[:, None], mask=(c < C)[:, None] & (k < L)[None, :], other=0.0)
    hi = narrow(w, f.dtype)
    acc = dot(f, hi, acc)
    if LO_SCALE > 0:
        acc_lo = dot(f, narrow((w - hi.to(tl.float32)) * LO_SCALE, f.dtype), acc_lo)
    return acc, acc_lo


@_inlined
def spread(d, weight, k, part, c, acc, C: tl.constexpr, L: tl.constexpr, PARTS: tl.constexpr):
    """acc += d @ W for d (rows, slots) and W (slots, channels): the rank-L gradient of the features.

    PARTS 1: float32, a slot is a class. Otherwise every class k has PARTS slots, and part says which of d_hi W_hi,
    d_lo W_hi, d_hi W_lo (and, counting for nothing, d_lo W_lo) a slot adds: so 8 classes fill the 16 slots that a
    tensor core takes at once. bfloat16 is exact for W in it (2 parts), never underflows, and holds float16 and float32
    to 16 bits in two (4 parts).
    """
    w = tl.load(weight + k[:, None] * C + c[None, :], mask=(k < L)[:, None] & (c < C)[None, :], other=0.0)
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


@_inlined
def correlate(f, d, acc, SPLIT: tl.constexpr):
    """acc += f^T @ d for f (rows, channels) and float32 d (rows, classes): a gradient of the weight."""
    if SPLIT:  # d in units of its largest element, so that float16 can hold it
        top = tl.max(tl.max(tl.abs(d), 1), 0)
        top = tl.where(top > 0, top, 1.0)
        d = d / top
        hi = narrow(d, f.dtype)
        lo = narrow(d - hi.to(tl.float32), f.dtype)
        f = tl.trans(f)
        acc += top * dot(f, lo, dot(f, hi, tl.zeros_like(acc)))
    else:
        acc = dot(tl.trans(f), d, acc)
    return acc


@_inlined
def consistency_term(v, s, P: tl.constexpr):
    """|v S|^p of Eq. 5."""
    x = v * s
    return tl.abs(x) if P == 1 else x * x


@_inlined
def consistency_gradient(v, s, P: tl.constexpr):
    """d/dS |v S|^p = p v |v S|^(p-1) sign(v S), with sign(0) = 0 and NaN kept."""
    x = v * s
    return tl.where(x > 0, v, tl.where(x < 0, -v, x * v)) if P == 1 else 2 * v * x


@_inlined
def target_rows(targets, target_table, samples, ok, k, L: tl.constexpr, SOFT: tl.constexpr):
    """(samples, classes) target distributions t: rows of the table, or targets @ table; NaN for no class of [0, L)."""
    inside = (k < L)[None, :]
    if SOFT:
        t = tl.zeros([samples.shape[0], k.shape[0]], tl.float32)
        for y in range(L):
            share = tl.load(targets + samples * L + y, mask=ok, other=0.0)
            t += share[:, None] * tl.load(target_table + y * L + k[None, :], mask=inside, other=0.0)
        return t
    else:
        y = tl.load(targets + samples, mask=ok, other=0)
        known = (y >= 0) & (y < L)
        row = tl.where(known, y, 0)
        t = tl.load(target_table + row[:, None] * L + k[None, :], mask=inside & ok[:, None], other=0.0)
        return tl.where(known[:, None], t, float("nan"))


@_inlined
def log_sum_exp(z, k, L: tl.constexpr):  # (R, all classes)
    """log sum_l exp(z_l - top) and top, the largest logit: differences first, so that large logits lose no digits."""
    z = tl.where((k < L)[None, :], z, float("-inf"))
    top = tl.max(z, 1)
    return tl.log(tl.sum(tl.exp(z - top[:, None]), 1)), top


@_inlined
def cross_entropy(z, t, k, L: tl.constexpr):  # (R, all classes) both
    """-sum_l t_l log softmax(z)_l of each row."""
    lse, top = log_sum_exp(z, k, L)
    return tl.sum(tl.where((k < L)[None, :], t * (lse[:, None] - (z - top[:, None])), 0.0), 1)


@_inlined
def cross_entropy_gradient(
    g, logits, targets, target_table, rows, samples, ok, k, L: tl.constexpr, B_ALL: tl.constexpr, SOFT: tl.constexpr
):  # fmt: skip
    """(rows, classes k) g ((sum t) softmax(z)_l - t_l): the rows of the target table need not sum to 1."""
    every = tl.arange(0, B_ALL)
    z = tl.load(logits + rows[:, None] * L + every[None, :], mask=ok[:, None] & (every < L)[None, :], other=0.0)
    lse, top = log_sum_exp(z.to(tl.float32), every, L)
    total = tl.sum(target_rows(targets, target_table, samples, ok, every, L, SOFT), 1)
    t = target_rows(targets, target_table, samples, ok, k, L, SOFT)
    z = tl.load(logits + rows[:, None] * L + k[None, :], mask=ok[:, None] & (k < L)[None, :], other=0.0)
    return g[:, None] * (total[:, None] * tl.exp(z.to(tl.float32) - top[:, None] - lse[:, None]) - t)


@_inlined
def store_losses(
    loss, classification, consistency, logits, bias, targets, target_table, z, z_twin, cons, i, N, lam, k,
    L: tl.constexpr, SOFT: tl.constexpr, BOTH_VIEWS: tl.constexpr,
):  # fmt: skip
    """What follows the pooling, for pair i: the logits of both views and the losses of the pair (Eq. 1, 5, 6)."""
    tl.store(consistency + i, cons)
    if targets is not None:
        if bias is not None:
            b = tl.load(bias + k, mask=k < L, other=0.0).to(tl.float32)
            z += b
            z_twin += b
        tl.store(logits + i * L + k, z, mask=k < L)
        tl.store(logits + (N + i) * L + k, z_twin, mask=k < L)
        sample = i + tl.arange(0, 1)
        t = target_rows(targets, target_table, sample, sample >= 0, k, L, SOFT)
        cls = cross_entropy(z[None, :], t, k, L)
        if BOTH_VIEWS:
            cls += cross_entropy(z_twin[None, :], t, k, L)
        tl.store(classification + sample, cls)
        tl.store(loss + sample, cls + lam * cons)


@triton.jit(do_not_specialize=["N", "twin_offset", "twin_h", "twin_w"], do_not_specialize_on_alignment=["targets"])
def head_forward_kernel(
    features,  # (2N, C, H, W), either layout
    weight,  # (L, C)
    bias,  # (L,) or None
    targets,  # (N,) int64, (N, L) float32 or None
    target_table,  # (L, L) float32 or None
    map_weights,  # (L,) float32
    loss, classification, consistency,  # (N,) float32; the first two None without targets
    logits,  # (2N, L) float32, None without targets
    maps,  # (2N, L, H, W) float32 or None
    residual,  # (N, L, H, W) float32 or None
    pooled,  # (2N, C) float32 or None
    N, lam, twin_offset, twin_h, twin_w,
    C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, L: tl.constexpr, S_HW: tl.constexpr, S_C: tl.constexpr,
    P: tl.constexpr, BOTH_VIEWS: tl.constexpr, SOFT: tl.constexpr, LO_SCALE: tl.constexpr,
    B_ROWS: tl.constexpr, B_C: tl.constexpr, B_L: tl.constexpr,
):  # fmt: skip
    """The whole head of one pair, where its maps fit in one tile: features are read once, everything else is small."""
    HW: tl.constexpr = H * W
    i = tl.program_id(0).to(tl.int64)
    rows = tl.arange(0, B_ROWS)
    row_ok = rows < HW
    twin = twin_rows(rows, W, twin_offset, twin_h, twin_w)
    k = tl.arange(0, B_L)
    view = features + i * (C * HW)
    twin_view = features + (N + i) * (C * HW)
    acc = tl.zeros([B_ROWS, B_L], tl.float32)
    acc_lo = acc
    acc_twin = acc
    acc_twin_lo = acc
    for c0 in range(0, C, B_C):
        c = c0 + tl.arange(0, B_C)
        f = load_tile(view, rows, row_ok, c, C, S_HW, S_C)
        f_twin = load_tile(twin_view, twin, row_ok, c, C, S_HW, S_C)
        acc, acc_lo = accumulate_cams(f, weight, k, c, acc, acc_lo, C, L, LO_SCALE)
        acc_twin, acc_twin_lo = accumulate_cams(f_twin, weight, k, c, acc_twin, acc_twin_lo, C, L, LO_SCALE)
        if pooled is not None:
            tl.store(pooled + i * C + c, tl.sum(f.to(tl.float32), 0) * (1.0 / HW), mask=c < C)
            tl.store(pooled + (N + i) * C + c, tl.sum(f_twin.to(tl.float32), 0) * (1.0 / HW), mask=c < C)
    if LO_SCALE > 0:
        acc += acc_lo * (1.0 / LO_SCALE)
        acc_twin += acc_twin_lo * (1.0 / LO_SCALE)
    s = acc - acc_twin
    ok = row_ok[:, None] & (k < L)[None, :]
    if maps is not None:
        tl.store(maps + i * (L * HW) + k[None, :] * HW + rows[:, None], acc, mask=ok)
        tl.store(maps + (N + i) * (L * HW) + k[None, :] * HW + twin[:, None], acc_twin, mask=ok)
    if residual is not None:
        tl.store(residual + i * (L * HW) + k[None, :] * HW + rows[:, None], s, mask=ok)
    v = tl.load(map_weights + k, mask=k < L, other=0.0)
    cons = tl.sum(tl.sum(consistency_term(v[None, :], s, P), 0), 0) * (1.0 / (L * HW))
    z = tl.sum(acc, 0) * (1.0 / HW)
    z_twin = tl.sum(acc_twin, 0) * (1.0 / HW)
    store_losses(
        loss, classification, consistency, logits, bias, targets, target_table, z, z_twin, cons, i, N, lam, k, L, SOFT,
        BOTH_VIEWS,
    )  # fmt: skip


@triton.jit
def maps_kernel(
    features,  # (M, C, H, W), either layout
    weight,  # (L, C)
    maps,  # (M, L, H, W) float32
    pooled,  # (M, row tiles, C) float32 or None: sums over the rows of a tile / HW
    C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, L: tl.constexpr, S_HW: tl.constexpr, S_C: tl.constexpr,
    LO_SCALE: tl.constexpr, B_ROWS: tl.constexpr, B_C: tl.constexpr, B_L: tl.constexpr,
):  # fmt: skip
    """Eq. 2 by tiles, for maps of any size and any number of classes."""
    HW: tl.constexpr = H * W
    L_TILES: tl.constexpr = (L + B_L - 1) // B_L
    ROW_TILES: tl.constexpr = (HW + B_ROWS - 1) // B_ROWS
    pid = tl.program_id(0)
    m = (pid // (L_TILES * ROW_TILES)).to(tl.int64)
    row_tile = (pid // L_TILES) % ROW_TILES
    l_tile = pid % L_TILES
    rows = row_tile * B_ROWS + tl.arange(0, B_ROWS)
    row_ok = rows < HW
    k = l_tile * B_L + tl.arange(0, B_L)
    view = features + m * (C * HW)
    acc = tl.zeros([B_ROWS, B_L], tl.float32)
    acc_lo = acc
    for c0 in range(0, C, B_C):
        c = c0 + tl.arange(0, B_C)
        f = load_tile(view, rows, row_ok, c, C, S_HW, S_C)
        acc, acc_lo = accumulate_cams(f, weight, k, c, acc, acc_lo, C, L, LO_SCALE)
        if pooled is not None:
            if l_tile == 0:
                p = tl.sum(f.to(tl.float32), 0) * (1.0 / HW)
                tl.store(pooled + (m * ROW_TILES + row_tile) * C + c, p, mask=c < C)
    if LO_SCALE > 0:
        acc += acc_lo * (1.0 / LO_SCALE)
    ok = row_ok[:, None] & (k < L)[None, :]
    tl.store(maps + m * (L * HW) + k[None, :] * HW + rows[:, None], acc, mask=ok)


@triton.jit(do_not_specialize=["N", "twin_offset", "twin_h", "twin_w"], do_not_specialize_on_alignment=["targets"])
def head_finish_kernel(
    maps,  # (2N, L, H, W) float32
    pooled_tiles,  # (2N, row tiles, C) float32, or None where pooled is not wanted or already whole
    bias, targets, target_table, map_weights, loss, classification, consistency, logits, residual,
    pooled,  # (2N, C) float32
    N, lam, twin_offset, twin_h, twin_w,
    C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, L: tl.constexpr, P: tl.constexpr, BOTH_VIEWS: tl.constexpr,
    SOFT: tl.constexpr, ROW_TILES: tl.constexpr, B_ROWS: tl.constexpr, B_C: tl.constexpr, B_ALL: tl.constexpr,
):  # fmt: skip
    """The rest of the head of one pair from its maps, where they were computed by tiles."""
    HW: tl.constexpr = H * W
    i = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, B_ALL)
    v = tl.load(map_weights + k, mask=k < L, other=0.0)
    z = tl.zeros([B_ALL], tl.float32)
    z_twin = z
    cons = z
    for row0 in range(0, HW, B_ROWS):
        rows = row0 + tl.arange(0, B_ROWS)
        ok = (k < L)[:, None] & (rows < HW)[None, :]
        at = k[:, None] * HW + rows[None, :]
        twin_at = k[:, None] * HW + twin_rows(rows, W, twin_offset, twin_h, twin_w)[None, :]
        a = tl.load(maps + i * (L * HW) + at, mask=ok, other=0.0)
        a_twin = tl.load(maps + (N + i) * (L * HW) + twin_at, mask=ok, other=0.0)
        if residual is not None:
            tl.store(residual + i * (L * HW) + at, a - a_twin, mask=ok)
        cons += tl.sum(consistency_term(v[:, None], a - a_twin, P), 1)
        z += tl.sum(a, 1)
        z_twin += tl.sum(a_twin, 1)
    if pooled_tiles is not None:
        for c0 in range(0, 2 * C, B_C):  # both views
            c = c0 + tl.arange(0, B_C)
            row = tl.where(c < C, i, N + i)
            c = tl.where(c < C, c, c - C)
            p = tl.zeros([B_C], tl.float32)
            for tile in range(ROW_TILES):
                p += tl.load(pooled_tiles + (row * ROW_TILES + tile) * C + c, mask=c < C, other=0.0)
            tl.store(pooled + row * C + c, p, mask=c < C)
    store_losses(
        loss, classification, consistency, logits, bias, targets, target_table, z * (1.0 / HW), z_twin * (1.0 / HW),
        tl.sum(cons, 0) * (1.0 / (L * HW)), i, N, lam, k, L, SOFT, BOTH_VIEWS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["N"])
def mean_kernel(a, b, c, out_a, out_b, out_c, N, B: tl.constexpr):
    """The means of (N,) float32 a, b and c, the first two or None, in one fixed order; of nothing NaN."""
    at = tl.arange(0, B)
    sum_a = tl.zeros([B], tl.float32)
    sum_b = sum_a
    sum_c = sum_a
    for n0 in range(0, N, B):
        ok = at < N - n0
        if a is not None:
            sum_a += tl.load(a + n0 + at, mask=ok, other=0.0)
            sum_b += tl.load(b + n0 + at, mask=ok, other=0.0)
        sum_c += tl.load(c + n0 + at, mask=ok, other=0.0)
    n = N.to(tl.float32)
    if a is not None:
        tl.store(out_a, tl.sum(sum_a, 0) / n)
        tl.store(out_b, tl.sum(sum_b, 0) / n)
    tl.store(out_c, tl.sum(sum_c, 0) / n)


@triton.jit(do_not_specialize=["N", "twin_offset", "twin_h", "twin_w"])
def cam_grad_kernel(
    features,  # (2N, C, H, W), either layout
    residual,  # (N, L, H, W) float32
    map_weights,  # (L,) float32
    cam_grad,  # (N, L, C) float32
    N, twin_offset, twin_h, twin_w,
    C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, L: tl.constexpr, S_HW: tl.constexpr, S_C: tl.constexpr,
    P: tl.constexpr, SPLIT: tl.constexpr, B_ROWS: tl.constexpr, B_C: tl.constexpr, B_L: tl.constexpr,
):  # fmt: skip
    """K_i = sum_hw (d l_cons,i / dS) (F - T F~), of a block of channels and classes: the features are read again."""
    HW: tl.constexpr = H * W
    i, c, k = weight_tile(tl.program_id(0), C, L, B_C, B_L)
    i = i.to(tl.int64)
    v = tl.load(map_weights + k, mask=k < L, other=0.0)
    acc = tl.zeros([B_C, B_L], tl.float32)
    for row0 in range(0, HW, B_ROWS):
        rows = row0 + tl.arange(0, B_ROWS)
        row_ok = rows < HW
        ok = row_ok[:, None] & (k < L)[None, :]
        s = tl.load(residual + i * (L * HW) + k[None, :] * HW + rows[:, None], mask=ok, other=0.0)
        d = consistency_gradient(v[None, :], s, P)
        twin = twin_rows(rows, W, twin_offset, twin_h, twin_w)
        acc = correlate(load_tile(features + i * (C * HW), rows, row_ok, c, C, S_HW, S_C), d, acc, SPLIT)
        acc = correlate(load_tile(features + (N + i) * (C * HW), twin, row_ok, c, C, S_HW, S_C), -d, acc, SPLIT)
    ok = (c < C)[:, None] & (k < L)[None, :]
    tl.store(cam_grad + i * (L * C) + k[None, :] * C + c[:, None], acc * (1.0 / (L * HW)), mask=ok)


@_inlined
def upstream(g, samples, stride, ok):
    """An upstream gradient of samples; 0 where there is none."""
    if g is None:
        return tl.zeros([samples.shape[0]], tl.float32)
    else:
        return tl.load(g + samples * stride, mask=ok, other=0.0)


@_inlined
def logits_gradient(
    d_loss, d_classification, d_logits, targets, target_table, logits, rows, ok, N, share, d_loss_stride,
    d_classification_stride, k, L: tl.constexpr, BOTH_VIEWS: tl.constexpr, SOFT: tl.constexpr, B_ALL: tl.constexpr,
):  # fmt: skip
    """(rows, classes k) of dz, zero beyond L. Rows below N are images, the others twins."""
    samples = tl.where(rows < N, rows, rows - N)
    dz = tl.zeros([rows.shape[0], k.shape[0]], tl.float32)
    if d_loss is not None or d_classification is not None:
        g = upstream(d_loss, samples, d_loss_stride, ok)
        g = (g + upstream(d_classification, samples, d_classification_stride, ok)) * share
        of_loss = cross_entropy_gradient(g, logits, targets, target_table, rows, samples, ok, k, L, B_ALL, SOFT)
        wanted = ok[:, None] & (k < L)[None, :]
        if not BOTH_VIEWS:
            wanted = wanted & (rows < N)[:, None]
        dz += tl.where(wanted, of_loss, 0.0)
    if d_logits is not None:
        at = d_logits + rows[:, None] * L + k[None, :]
        dz += tl.load(at, mask=ok[:, None] & (k < L)[None, :], other=0.0)
    return dz


@_inlined
def residual_upstream(d_loss, d_consistency, samples, ok, lam, share, d_loss_stride, d_consistency_stride):
    """g_S of samples."""
    g = lam * upstream(d_loss, samples, d_loss_stride, ok)
    return (g + upstream(d_consistency, samples, d_consistency_stride, ok)) * share


@_inlined
def weight_gradient(
    d_loss, d_classification, d_consistency, d_logits, targets, target_table, logits, pooled, cam_grad, d_weight,
    d_bias, partial, pid, N, chunk_size, d_loss_stride, d_classification_stride, d_consistency_stride, lam, share,
    C: tl.constexpr, L: tl.constexpr, BOTH_VIEWS: tl.constexpr, SOFT: tl.constexpr, B_C: tl.constexpr,
    B_L: tl.constexpr, B_ALL: tl.constexpr, B_BATCH: tl.constexpr,
):  # fmt: skip
    """dW = dz^T P + dz~^T P~ + sum_i g_S,i K_i and db = sum dz + dz~, of one block of channels and classes.

    Program pid sums over the samples of one chunk; where that is not the whole batch, sum_chunks_kernel does the rest.
    dz is computed anew by every program, from a few numbers a sample.
    """
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
    if logits is not None:
        for n0 in range(begin, end, B_BATCH):
            n = n0 + tl.arange(0, B_BATCH).to(tl.int64)
            ok = n < end
            for view in tl.static_range(2):
                m = n + view * N
                dz = logits_gradient(
                    d_loss, d_classification, d_logits, targets, target_table, logits, m, ok, N, share, d_loss_stride,
                    d_classification_stride, k, L, BOTH_VIEWS, SOFT, B_ALL,
                )  # fmt: skip
                sum_dz += tl.sum(dz, 0)
                if d_weight is not None:
                    p = tl.load(pooled + m[None, :] * C + c[:, None], mask=(c < C)[:, None] & ok[None, :], other=0.0)
                    acc = tl.dot(p, dz, acc, input_precision="ieee")
    if d_weight is not None:
        mask = (k < L)[None, :] & (c < C)[:, None]
        at = k[None, :] * C + c[:, None]
        if cam_grad is not None and (d_loss is not None or d_consistency is not None):
            for n0 in range(begin, end, B_K):
                n = n0 + tl.arange(0, B_K).to(tl.int64)
                ok = n < end
                g = residual_upstream(d_loss, d_consistency, n, ok, lam, share, d_loss_stride, d_consistency_stride)
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


@_inlined
def features_gradient(
    d_loss, d_classification, d_consistency, d_logits, weight, targets, target_table, map_weights, logits, residual,
    d_features, pid, N, d_loss_stride, d_classification_stride, d_consistency_stride, lam, share, twin_offset, twin_h,
    twin_w, C: tl.constexpr, HW: tl.constexpr, W: tl.constexpr, L: tl.constexpr, S_HW: tl.constexpr, S_C: tl.constexpr,
    P: tl.constexpr, BOTH_VIEWS: tl.constexpr, SOFT: tl.constexpr, PARTS: tl.constexpr, B_ROWS: tl.constexpr,
    B_C: tl.constexpr, B_L: tl.constexpr, B_ALL: tl.constexpr,
):  # fmt: skip
    """dF = U + W^T dz / HW and dF~ = -T^T(U) + W^T dz~ / HW of one tile of a pair, U = W^T dS computed once."""
    i, rows, row_ok, c = features_tile(pid, C, HW, B_ROWS, B_C)
    sample = i + tl.arange(0, 1)
    ok = sample >= 0
    g = residual_upstream(d_loss, d_consistency, sample, ok, lam, share, d_loss_stride, d_consistency_stride)
    g = g * (1.0 / (L * HW))
    slot = tl.arange(0, PARTS * B_L)
    view = tl.arange(0, 2)
    u = tl.zeros([B_ROWS, B_C], tl.float32)
    q = tl.zeros([B_C], tl.float32)  # W^T dz / HW, one number a channel
    q_twin = q
    for l0 in range(0, L, B_L):
        k_slot = l0 + slot % B_L
        v = tl.load(map_weights + k_slot, mask=k_slot < L, other=0.0)
        at = i * (L * HW) + k_slot[None, :] * HW + rows[:, None]
        s = tl.load(residual + at, mask=row_ok[:, None] & (k_slot < L)[None, :], other=0.0)
        u = spread(g[None, :] * consistency_gradient(v[None, :], s, P), weight, k_slot, slot // B_L, c, u, C, L, PARTS)
        if logits is not None:
            k = l0 + tl.arange(0, B_L)
            w = tl.load(weight + k[:, None] * C + c[None, :], mask=(k < L)[:, None] & (c < C)[None, :], other=0.0)
            w = w.to(tl.float32) * (1.0 / HW)
            dz = logits_gradient(
                d_loss, d_classification, d_logits, targets, target_table, logits, i + view * N, view < 2, N, share,
                d_loss_stride, d_classification_stride, k, L, BOTH_VIEWS, SOFT, B_ALL,
            )  # fmt: skip
            both = tl.sum(dz[:, :, None] * w[None, :, :], 1)
            q += tl.sum(tl.where((view == 0)[:, None], both, 0.0), 0)
            q_twin += tl.sum(tl.where((view == 1)[:, None], both, 0.0), 0)
    twin = twin_rows(rows, W, twin_offset, twin_h, twin_w)
    store_tile(d_features + i * (C * HW), q[None, :] + u, rows, row_ok, c, C, S_HW, S_C)
    store_tile(d_features + (N + i) * (C * HW), q_twin[None, :] - u, twin, row_ok, c, C, S_HW, S_C)


@triton.jit(
    do_not_specialize=[
        "N", "chunk_size", "d_loss_stride", "d_classification_stride", "d_consistency_stride", "twin_offset", "twin_h",
        "twin_w", "w_programs",
    ],
    do_not_specialize_on_alignment=["targets", "d_loss", "d_classification", "d_consistency"],
)  # fmt: skip
def head_backward_kernel(
    d_loss, d_classification, d_consistency,  # float32 upstreams of the losses, scalars (stride 0) or (N,), or None
    d_logits,  # (2N, L) float32 or None
    weight,  # (L, C)
    targets, target_table,  # as in the forward, or None
    map_weights,  # (L,) float32
    logits,  # (2N, L) float32, None without targets
    residual,  # (N, L, H, W) float32
    pooled,  # (2N, C) float32 or None
    cam_grad,  # (N, L, C) float32 or None
    d_features,  # (2N, C, H, W), either layout, or None
    d_weight, d_bias,  # (L, C), (L,) or None
    partial,  # (chunks, L (C + 1)) float32, where a chunk of samples is not the whole batch
    N, chunk_size, d_loss_stride, d_classification_stride, d_consistency_stride, lam, share, twin_offset, twin_h,
    twin_w, w_programs,
    C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, L: tl.constexpr, S_HW: tl.constexpr, S_C: tl.constexpr,
    P: tl.constexpr, BOTH_VIEWS: tl.constexpr, SOFT: tl.constexpr, PARTS: tl.constexpr,
    B_ROWS: tl.constexpr, B_C: tl.constexpr, B_L: tl.constexpr, B_ALL: tl.constexpr, B_C_WEIGHT: tl.constexpr,
    B_BATCH: tl.constexpr,
):  # fmt: skip
    """The first w_programs programs take the gradient of weight and bias, the rest that of the features, write-only."""
    pid = tl.program_id(0)
    if pid < w_programs:
        weight_gradient(
            d_loss, d_classification, d_consistency, d_logits, targets, target_table, logits, pooled, cam_grad,
            d_weight, d_bias, partial, pid, N, chunk_size, d_loss_stride, d_classification_stride, d_consistency_stride,
            lam, share, C, L, BOTH_VIEWS, SOFT, B_C_WEIGHT, B_L, B_ALL, B_BATCH,
        )  # fmt: skip
    elif d_features is not None:
        features_gradient(
            d_loss, d_classification, d_consistency, d_logits, weight, targets, target_table, map_weights, logits,
            residual, d_features, pid - w_programs, N, d_loss_stride, d_classification_stride, d_consistency_stride,
            lam, share, twin_offset, twin_h, twin_w, C, H * W, W, L, S_HW, S_C, P, BOTH_VIEWS, SOFT, PARTS, B_ROWS,
            B_C, B_L, B_ALL,
        )  # fmt: skip


@triton.jit
def cam_backward_kernel(
    d_maps,  # (M, L, H, W) float32
    weight,  # (L, C)
    d_features,  # (M, C, H, W), either layout
    C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, L: tl.constexpr, S_HW: tl.constexpr, S_C: tl.constexpr,
    PARTS: tl.constexpr, B_ROWS: tl.constexpr, B_C: tl.constexpr, B_L: tl.constexpr,
):  # fmt: skip
    """The gradient of Eq. 2 to the features, W^T dA, write-only."""
    HW: tl.constexpr = H * W
    m, rows, row_ok, c = features_tile(tl.program_id(0), C, HW, B_ROWS, B_C)
    slot = tl.arange(0, PARTS * B_L)
    acc = tl.zeros([B_ROWS, B_C], tl.float32)
    for l0 in range(0, L, B_L):
        k = l0 + slot % B_L
        at = m * (L * HW) + k[None, :] * HW + rows[:, None]
        d = tl.load(d_maps + at, mask=row_ok[:, None] & (k < L)[None, :], other=0.0)
        acc = spread(d, weight, k, slot // B_L, c, acc, C, L, PARTS)
    store_tile(d_features + m * (C * HW), acc, rows, row_ok, c, C, S_HW, S_C)


@triton.jit(do_not_specialize=["M", "chunks"])
def cam_weight_kernel(
    d_maps,  # (M, L, H, W) float32
    features,  # (M, C, H, W), either layout
    partial,  # (chunks, L, C) float32
    M, chunks,
    C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, L: tl.constexpr, S_HW: tl.constexpr, S_C: tl.constexpr,
    SPLIT: tl.constexpr, B_ROWS: tl.constexpr, B_C: tl.constexpr, B_L: tl.constexpr,
):  # fmt: skip
    """The gradient of Eq. 2 to the weight, summed over the samples chunk, chunk + chunks, ... of each chunk."""
    HW: tl.constexpr = H * W
    chunk, c, k = weight_tile(tl.program_id(0), C, L, B_C, B_L)
    acc = tl.zeros([B_C, B_L], tl.float32)
    for sample in range(chunk, M, chunks):
        m = tl.cast(sample, tl.int64)
        for row0 in range(0, HW, B_ROWS):
            rows = row0 + tl.arange(0, B_ROWS)
            row_ok = rows < HW
            at = m * (L * HW) + k[None, :] * HW + rows[:, None]
            d = tl.load(d_maps + at, mask=row_ok[:, None] & (k < L)[None, :], other=0.0)
            acc = correlate(load_tile(features + m * (C * HW), rows, row_ok, c, C, S_HW, S_C), d, acc, SPLIT)
    ok = (c < C)[:, None] & (k < L)[None, :]
    tl.store(partial + chunk.to(tl.int64) * (L * C) + k[None, :] * C + c[:, None], acc, mask=ok)


@triton.jit(do_not_specialize=["chunks"])
def sum_chunks_kernel(
    partial,  # (chunks, SIZE + SIZE_MORE) float32: of each chunk of the batch SIZE numbers, then SIZE_MORE more
    out, more,  # (SIZE,) and (SIZE_MORE,), either or None
    chunks, SIZE: tl.constexpr, SIZE_MORE: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
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


@triton.jit(do_not_specialize=["M"], do_not_specialize_on_alignment=["targets"])
def cross_entropy_forward_kernel(
    logits,  # (M, L)
    targets,  # (M,) int64 or (M, L) float32
    target_table,  # (L, L) float32
    losses,  # (M,) float32
    M, L: tl.constexpr, SOFT: tl.constexpr, B_BATCH: tl.constexpr, B_ALL: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0).to(tl.int64) * B_BATCH + tl.arange(0, B_BATCH)
    ok = m < M
    k = tl.arange(0, B_ALL)
    z = tl.load(logits + m[:, None] * L + k[None, :], mask=ok[:, None] & (k < L)[None, :], other=0.0).to(tl.float32)
    t = target_rows(targets, target_table, m, ok, k, L, SOFT)
    tl.store(losses + m, cross_entropy(z, t, k, L), mask=ok)


@triton.jit(do_not_specialize=["M", "d_loss_stride"], do_not_specialize_on_alignment=["targets", "d_loss"])
def cross_entropy_backward_kernel(
    d_loss,  # float32 scalar (stride 0) or (M,)
    logits,  # (M, L)
    targets, target_table,
    d_logits,  # (M, L)
    M, d_loss_stride, share, L: tl.constexpr, SOFT: tl.constexpr, B_BATCH: tl.constexpr, B_ALL: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0).to(tl.int64) * B_BATCH + tl.arange(0, B_BATCH)
    ok = m < M
    k = tl.arange(0, B_ALL)
    g = upstream(d_loss, m, d_loss_stride, ok) * share
    dz = cross_entropy_gradient(g, logits, targets, target_table, m, m, ok, k, L, B_ALL, SOFT)
    mask = ok[:, None] & (k < L)[None, :]
    tl.store(d_logits + m[:, None] * L + k[None, :], narrow(dz, d_logits.dtype.element_ty), mask=mask)
