"""What the Triton kernels share: tiles of features and of maps, products of 16-bit operands, Eq. 5 of one number."""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

#: Decorates a kernel: it is compiled once for all sizes of the batch, twin's transforms and kinds of upstream gradient;
#: once more where N and L are odd, as what is saved for the backward then lies at other addresses (ops.Saved).
kernel = triton.jit(
    do_not_specialize=[
        "N",
        "M",
        "chunks",
        "chunk_size",
        "w_programs",
        "d_loss_stride",
        "d_classification_stride",
        "d_consistency_stride",
        "twin_offset",
        "twin_stride_h",
        "twin_stride_w",
    ],
    do_not_specialize_on_alignment=["targets", "d_loss", "d_classification", "d_consistency"],
)


@kernel
def empty_kernel():
    pass


#: Whether the kernels run in Triton's interpreter, as TRITON_INTERPRET=1 said when this module was imported.
INTERPRETED = isinstance(empty_kernel, InterpretedFunction)
_UPCAST = tl.constexpr(INTERPRETED)

#: Decorates what kernels call, which the compiler inlines; the interpreter needs 2 ms for each call of a jit function.
inlined = (lambda function: function) if INTERPRETED else triton.jit


class Twin(NamedTuple):
    """Where a row of the twin is read: T(A~)[h, w] = A~.flatten()[offset + h stride_h + w stride_w]."""

    offset: Any
    stride_h: Any
    stride_w: Any


@inlined
def twin_rows(rows, twin, W: tl.constexpr):
    return twin.offset + (rows // W) * twin.stride_h + (rows % W) * twin.stride_w


@inlined
def narrow(x, dtype: tl.constexpr):
    """x in dtype, rounded to nearest even."""
    if _UPCAST and dtype == tl.bfloat16 and x.dtype == tl.float32:  # the interpreter would cut the bits off
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@inlined
def dot(a, b, acc):  # (M, K), (K, N), (M, N)
    """acc + a @ b; the products of 16-bit operands are exact."""
    if _UPCAST:  # the interpreter multiplies bfloat16 as if its bits were integers
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@inlined
def features_at(m, rows, row_ok, c, SHAPE: tl.constexpr):
    """Offsets of the (rows, channels) of view m in (M, C, H, W), and which of them exist."""
    at = m * (SHAPE.C * SHAPE.HW) + rows[:, None] * SHAPE.S_HW + c[None, :] * SHAPE.S_C
    return at, row_ok[:, None] & (c < SHAPE.C)[None, :]


@inlined
def load_features(features, m, rows, row_ok, c, SHAPE: tl.constexpr):
    at, ok = features_at(m, rows, row_ok, c, SHAPE)
    return tl.load(features + at, mask=ok, other=0.0)


@inlined
def store_features(features, tile, m, rows, row_ok, c, SHAPE: tl.constexpr):
    at, ok = features_at(m, rows, row_ok, c, SHAPE)
    tl.store(features + at, narrow(tile, features.dtype.element_ty), mask=ok)


@inlined
def maps_at(m, rows, row_ok, k, SHAPE: tl.constexpr):
    """Offsets of the (rows, classes) of view m in (M, L, H, W), and which of them exist."""
    at = m * (SHAPE.L * SHAPE.HW) + k[None, :] * SHAPE.HW + rows[:, None]
    return at, row_ok[:, None] & (k < SHAPE.L)[None, :]


@inlined
def load_maps(maps, m, rows, row_ok, k, SHAPE: tl.constexpr):
    at, ok = maps_at(m, rows, row_ok, k, SHAPE)
    return tl.load(maps + at, mask=ok, other=0.0)


@inlined
def store_maps(maps, tile, m, rows, row_ok, k, SHAPE: tl.constexpr):
    at, ok = maps_at(m, rows, row_ok, k, SHAPE)
    tl.store(maps + at, tile, mask=ok)


@inlined
def weight_tile(pid, SHAPE: tl.constexpr, B_C: tl.constexpr, B_L: tl.constexpr):
    """Sample or chunk of samples, channels and classes of program pid, where the weight is tiled."""
    C_TILES: tl.constexpr = (SHAPE.C + B_C - 1) // B_C
    L_TILES: tl.constexpr = (SHAPE.L + B_L - 1) // B_L
    c = (pid // L_TILES) % C_TILES * B_C + tl.arange(0, B_C)
    return pid // (L_TILES * C_TILES), c, pid % L_TILES * B_L + tl.arange(0, B_L)


@inlined
def add_weight_gradient(f, d, acc, SPLIT: tl.constexpr):
    """acc + f^T @ d for f (rows, channels) and float32 d (rows, classes): a gradient of the weight."""
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


@inlined
def consistency_term(v, s, P: tl.constexpr):
    """|v S|^p of Eq. 5."""
    x = v * s
    return tl.abs(x) if P == 1 else x * x


@inlined
def consistency_gradient(v, s, P: tl.constexpr):
    """d/dS |v S|^p = p v |v S|^(p-1) sign(v S), with sign(0) = 0 and NaN kept."""
    x = v * s
    return tl.where(x > 0, v, tl.where(x < 0, -v, x * v)) if P == 1 else 2 * v * x
