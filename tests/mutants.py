"""Injected faults: breaks the sources in one place at a time; each time a named test must fail.

    python tests/mutants.py            all of them, some minutes
    python tests/mutants.py flip dW    those whose description holds one of the words

Every fault is applied alone to a copy of the tree, whose native part is built unoptimised into a cache of its own (an
object file whose preprocessed source another copy had is shared).
The copy without a fault must pass the named tests first. Exit status 1 if a fault survives.
"""

from __future__ import annotations

import concurrent.futures
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
TREE = ("rebalfer_kernels", "csrc", "bench", "tests", "pyproject.toml")
COMPILER = """#!/bin/sh
[ "$1" = --version ] && exec g++ "$@"
case "$*" in *" -c "*) ;; *) exec g++ "$@" -O0 ;; esac
for out; do :; done
g++ "$@" -E -P && key=$(sha256sum < "$out" | cut -c 1-32) || exit 1
[ -e {objects}/$key ] || { g++ "$@" -O0 -o {objects}/$key.$$ && mv {objects}/$key.$$ {objects}/$key; } || exit 1
cp {objects}/$key "$out"
"""


class Mutant(NamedTuple):
    what: str
    file: str
    old: str  #: occurs exactly once in the file
    new: str
    test: str  #: must fail


PYTHON = [
    Mutant(
        "Eq. 4 without its factor 1 - beta",
        "rebalfer_kernels/class_balance.py",
        "-(1 - beta) / torch.expm1(n * math.log(beta))",
        "-1 / torch.expm1(n * math.log(beta))",
        "test_class_balance.py::test_eq4",
    ),
    Mutant(
        "Eq. 4 left unnormalised",
        "rebalfer_kernels/class_balance.py",
        "return (b * (len(b) / b.sum()) if normalize else b).float()\n\n\ndef inverse",
        "return b.float()\n\n\ndef inverse",
        "test_class_balance.py::test_eq4",
    ),
    Mutant(
        "Eq. 8 without 1 - alpha",
        "rebalfer_kernels/class_balance.py",
        "return ((1 - alpha) * eye + alpha * share).float()",
        "return (eye + alpha * share).float()",
        "test_class_balance.py::test_eq8",
    ),
    Mutant(
        "Eq. 8 divides by the weights' sum in place of L",
        "rebalfer_kernels/class_balance.py",
        "share = (b / len(b)).expand",
        "share = (b / b.sum()).expand",
        "test_class_balance.py::test_eq8",
    ),
    Mutant(
        "the flip left out",
        "rebalfer_kernels/reference.py",
        '"hflip": (lambda x: x.flip(-1), lambda a: a.flip(-1)),',
        '"hflip": (lambda x: x.flip(-1), lambda a: a),',
        "test_laws.py::test_maps_that_agree_have_no_consistency_loss",
    ),
    Mutant(
        "the index of the twin's map with h and w exchanged",
        "rebalfer_kernels/transforms.py",
        "coefficients += [at, at_down - at, at_right - at]",
        "coefficients += [at, at_right - at, at_down - at]",
        "test_head.py::test_square_transforms",
    ),
    Mutant(
        "the twin's map starts in the wrong row",
        "rebalfer_kernels/transforms.py",
        "offset = self.row * (height - 1) * width + self.column * (width - 1)",
        "offset = self.row * height * width + self.column * (width - 1)",
        "test_triton.py::test_agreement",
    ),
    Mutant(
        "the twin's map of the native kernels starts in the wrong column",
        "csrc/layout.h",
        "t[3] * (W - 1)",
        "t[3] * W",
        "test_head.py::test_options",
    ),
    Mutant(
        'views="original" classifies the twin too',
        "rebalfer_kernels/functional.py",
        'p, transform, views == "both", detach_cam_weight, reduction,',
        "p, transform, True, detach_cam_weight, reduction,",
        "test_head.py::test_options",
    ),
    Mutant(
        'cross-entropy takes "none" for "mean"',
        "rebalfer_kernels/functional.py",
        '_constant(target_table, dtype), name, reduction == "mean"',
        "_constant(target_table, dtype), name, True",
        "test_parts.py::test_rebalanced_cross_entropy",
    ),
    Mutant(
        "a scheduled lambda is left out",
        "rebalfer_kernels/functional.py",
        "loss = reference.combine(classification, consistency, consistency_weight)\n    return",
        "loss = classification + consistency\n    return",
        "test_parts.py::test_a_scheduled_consistency_weight",
    ),
    Mutant(
        "the strides of the logits' upstream are ignored",
        "rebalfer_kernels/ops.py",
        "d_logits = d_logits.contiguous()",
        "pass",
        "test_parts.py::test_upstream_gradients_of_any_stride",
    ),
    Mutant(
        "the strides of the maps' upstream are ignored",
        "rebalfer_kernels/ops.py",
        "d_maps.contiguous(), weight if features",
        "d_maps, weight if features",
        "test_parts.py::test_class_activation_maps",
    ),
    Mutant(
        "second-order gradients are let through",
        "rebalfer_kernels/ops.py",
        "*grads, *sources) if torch.is_grad_enabled() else grads",
        "*grads, *sources) if False else grads",
        "test_head.py::test_second_order_is_refused",
    ),
    Mutant(
        "a fake of the wrong layout",
        "rebalfer_kernels/ops.py",
        "layout = torch.channels_last if channels_last else torch.contiguous_format",
        "layout = torch.contiguous_format",
        "test_ops.py::test_opcheck",
    ),
    Mutant(
        "the reference does not detach the weight",
        "rebalfer_kernels/reference.py",
        "weight.detach() if detach_cam_weight else weight)",
        "weight)",
        "test_head.py::test_options",
    ),
]

OPS = [
    Mutant(
        'views="original": the twin\'s cross-entropy is added',
        "csrc/cpu/ops.cpp",
        "(both_views ? cross_entropy(z.get() + L, row_t, L) : A(0))",
        "cross_entropy(z.get() + L, row_t, L)",
        "test_head.py::test_options",
    ),
    Mutant(
        'views="original": the twin\'s dz keeps its first term',
        "csrc/cpu/ops.cpp",
        "if (both_views) cross_entropy_gradient(z + (N + i) * L",
        "cross_entropy_gradient(z + (N + i) * L",
        "test_head.py::test_options",
    ),
    Mutant(
        "consistency without 1/L",
        "csrc/cpu/ops.cpp",
        "cons[i] = sum / A(L * HW)",
        "cons[i] = sum / A(HW)",
        "test_head.py::test_options",
    ),
    Mutant(
        "dS without 1/(L HW)",
        "csrc/cpu/ops.cpp",
        "const A scale = g / A(L * HW);",
        "const A scale = g;",
        "test_head.py::test_options",
    ),
    Mutant(
        '"mean": gradients not divided by N',
        "csrc/cpu/ops.cpp",
        "const A share = mean ? A(1) / A(std::max<int64_t>(N, 1)) : A(1);",
        "const A share = A(1);",
        "test_head.py::test_options",
    ),
    Mutant(
        "lambda left out of g_S",
        "csrc/cpu/ops.cpp",
        "(A(consistency_weight) * g_loss[i] + g_cons[i]) * share",
        "(g_loss[i] + g_cons[i]) * share",
        "test_head.py::test_options",
    ),
    Mutant(
        "dW misses the twins",
        "csrc/cpu/ops.cpp",
        "k.accumulate(M, L, here, dz.get()",
        "k.accumulate(N, L, here, dz.get()",
        "test_head.py::test_options",
    ),
    Mutant(
        "db misses the twins",
        "csrc/cpu/ops.cpp",
        "for (int64_t m = 0; m < M; ++m) sum += dz.get()[m * L + l];",
        "for (int64_t m = 0; m < N; ++m) sum += dz.get()[m * L + l];",
        "test_head.py::test_options",
    ),
    Mutant(
        "dW of the CAM: the twin's sign",
        "csrc/cpu/ops.cpp",
        "d_twin[l * pitch + tables.get().index[x]] = -d.get()[l * pitch + x];",
        "d_twin[l * pitch + tables.get().index[x]] = d.get()[l * pitch + x];",
        "test_head.py::test_options",
    ),
    Mutant(
        "dW of the CAM left out where the consistency alone has an upstream",
        "csrc/cpu/ops.cpp",
        "if (K && (g_loss.data || g_cons.data))",
        "if (K && g_loss.data)",
        "test_parts.py::test_attention_consistency",
    ),
    Mutant(
        "the last class's residual is left unwritten",
        "csrc/cpu/ops.cpp",
        "if (save_residual)\n",
        "if (save_residual && l + 1 < L)\n",
        "test_head.py::test_options",
    ),
    Mutant(
        "the strides of a per-sample upstream are ignored",
        "csrc/cpu/ops.cpp",
        "stride = t->dim() ? t->stride(0) : 0;",
        "stride = t->dim() ? 1 : 0;",
        "test_parts.py::test_upstream_gradients_of_any_stride",
    ),
    Mutant(
        "cross-entropy backward under mean not divided by M",
        "csrc/cpu/ops.cpp",
        "mean ? g[m] / A(M) : g[m]",
        "g[m]",
        "test_parts.py::test_rebalanced_cross_entropy",
    ),
    Mutant(
        "soft targets read the table transposed",
        "csrc/cpu/ops.cpp",
        "soft_[i * L_ + y] * table_[y * L_ + l]",
        "soft_[i * L_ + y] * table_[l * L_ + y]",
        "test_parts.py::test_rebalanced_cross_entropy",
    ),
    Mutant(
        "a label is not checked",
        "csrc/cpu/ops.cpp",
        "if (classes_[i] < 0 || classes_[i] >= L)",
        "if (classes_[i] < 0)",
        "test_head.py::test_labels_out_of_range",
    ),
    Mutant(
        "REBALFER_CPU_ISA is ignored",
        "csrc/cpu/ops.cpp",
        "if (!asked || !*asked) return available.front();",
        "return available.front();",
        "test_isa.py",
    ),
]

HEAD_MATH = [
    Mutant(
        "the gradient for p = 1 without v",
        "csrc/head_math.h",
        "return x > 0 ? v : x < 0 ? -v : x * v;",
        "return x > 0 ? A(1) : x < 0 ? A(-1) : x * v;",
        "test_head.py::test_options",
    ),
    Mutant(
        "sign(0) = 1",
        "csrc/head_math.h",
        "return x > 0 ? v : x < 0 ? -v : x * v;",
        "return x >= 0 ? v : x < 0 ? -v : x * v;",
        "test_parts.py::test_where_the_views_agree_the_gradient_is_zero_for_p_1_too",
    ),
    Mutant(
        "the gradient for p = 2 without its 2",
        "csrc/head_math.h",
        "return A(2) * v * x;",
        "return v * x;",
        "test_head.py::test_options",
    ),
    Mutant(
        "|v S| without v",
        "csrc/head_math.h",
        "template <typename A>\nREBALFER_HD A consistency_term(A v, A s, int p) {\n  const A x = v * s;",
        "template <typename A>\nREBALFER_HD A consistency_term(A v, A s, int p) {\n  const A x = s;",
        "test_head.py::test_options",
    ),
    Mutant(
        "the logarithm of the sum without the largest logit taken off",
        "csrc/head_math.h",
        "top = z[l] > top ? z[l] : top;",
        "top = 0;",
        "test_parts.py::test_rebalanced_cross_entropy",
    ),
    Mutant(
        "dz takes it that a row of the table sums to 1",
        "csrc/head_math.h",
        "dz[l] += g * (total * std::exp",
        "dz[l] += g * (std::exp",
        "test_head.py::test_options",
    ),
]

KERNELS = [
    Mutant(
        "channels_last: the tail of the channels is skipped",
        "csrc/cpu/kernels.cpp",
        "if (rest) step(whole, [rest]",
        "if (false) step(whole, [rest]",
        "test_head.py::test_options",
    ),
    Mutant(
        "channels_last: the flip left out on the load",
        "csrc/cpu/kernels.cpp",
        "f_twin[h] = pair.f_twin + pair.table.index[x + h] * g.C;",
        "f_twin[h] = pair.f_twin + (x + h) * g.C;",
        "test_head.py::test_options",
    ),
    Mutant(
        "NCHW: the flip left out where maps are subtracted",
        "csrc/cpu/kernels.cpp",
        "s[l * p + x] -= maps_twin[l * p + twin.index[x]];",
        "s[l * p + x] -= maps_twin[l * p + x];",
        "test_isa.py",
    ),
    Mutant(
        "NCHW: a wrong row stride of the twin's maps",
        "csrc/cpu/kernels.cpp",
        "s[l * p + x] -= maps_twin[l * p + twin.index[x]];",
        "s[l * p + x] -= maps_twin[l * g.HW + twin.index[x]];",
        "test_isa.py",
    ),
    Mutant(
        "NCHW: the first of the last positions is not written",
        "csrc/cpu/kernels.cpp",
        "for (int64_t x = row.first_column; x < row.first_column + row.columns; ++x)\n        out[x]",
        "for (int64_t x = row.first_column + 1; x < row.first_column + row.columns; ++x)\n        out[x]",
        "test_head.py::test_options",
    ),
    Mutant(
        "NCHW: the last positions take no part in the maps",
        "csrc/cpu/kernels.cpp",
        "maps[l * pitch(g.HW) + row.first_column + r] = lane_sum<A>",
        "maps[l * pitch(g.HW) + row.first_column + r] = 0 * lane_sum<A>",
        "test_head.py::test_options",
    ),
    Mutant(
        "dF: the logits' part without 1/HW",
        "csrc/cpu/kernels.cpp",
        "store(constants + c, sum * scale);",
        "store(constants + c, sum);",
        "test_head.py::test_options",
    ),
    Mutant(
        "channels_last: dF of the twin has the wrong sign",
        "csrc/cpu/kernels.cpp",
        "put(twin + i * kN, load(constants[1] + c + i * kN) - acc[i]);",
        "put(twin + i * kN, load(constants[1] + c + i * kN) + acc[i]);",
        "test_head.py::test_options",
    ),
    Mutant(
        "the logits without the bias",
        "csrc/cpu/kernels.cpp",
        "(bias ? static_cast<const A*>(bias)[l + i] : A(0))",
        "A(0)",
        "test_head.py::test_options",
    ),
    Mutant(
        "large NCHW outputs: the last line of a block is not copied",
        "csrc/cpu/kernels.cpp",
        "for (int64_t i = 0; i < bytes; i += kVectorBytes) {",
        "for (int64_t i = 0; i + kVectorBytes < bytes; i += kVectorBytes) {",
        "test_parts.py::test_large_gradients",
    ),
    Mutant(
        "large channels_last outputs: streamed over the next vector",
        "csrc/cpu/kernels.cpp",
        "store_streaming(q, v);",
        "store_streaming(out[0], v);",
        "test_parts.py::test_large_gradients",
    ),
    Mutant(
        "NCHW: whole rows of the view's end are read past it",
        "csrc/cpu/kernels.cpp",
        "g.C - (behind + g.HW - 1) / g.HW)",
        "g.C)",
        "test_sanitizers.py",
    ),
    Mutant(
        "the scratch has no room for the columns",
        "csrc/cpu/kernels.cpp",
        "kMaxColumns * g.L * kN * of_a + 16 * 64;",
        "0;",
        "test_sanitizers.py",
    ),
    Mutant(
        "bfloat16 is truncated, not rounded",
        "csrc/cpu/simd.h",
        "VecU rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;",
        "VecU rounded = bits >> 16;",
        "test_error_rule.py::test_error_rule",
    ),
]

#: Killed through Triton's interpreter.
TRITON = [
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

#: Killed through the emulator that runs the CUDA sources on a CPU.
CUDA = [
    Mutant(
        "CUDA: the twin's index left out of the residual",
        "csrc/cuda/kernels_forward.cuh",
        "total[1][l][shared.twin[x]];\n        sum",
        "total[1][l][x];\n        sum",
        "emulator/test_cuda_kernels.py::test_options",
    ),
    Mutant(
        "CUDA: a float32 weight meets 16-bit features rounded",
        "csrc/cuda/kernels_forward.cuh",
        "make_float2(fmaf(d[2], scale, d[0]), fmaf(d[3], scale, d[1]))",
        "make_float2(fmaf(0.0f, scale, d[0]), d[1])",
        "emulator/test_cuda_kernels.py::test_misaligned_bases_and_a_float32_weight",
    ),
    Mutant(
        "CUDA: float16's low parts are not scaled back",
        "csrc/cuda/kernels_forward.cuh",
        "scale = 1.0f / kLowScale<T>",
        "scale = 1.0f",
        "emulator/test_cuda_kernels.py::test_misaligned_bases_and_a_float32_weight",
    ),
    Mutant(
        "CUDA: the twin's pooled features in the original's place",
        "csrc/cuda/kernels_forward.cuh",
        "p.pooled[(view * p.g.N + pair) * p.g.C",
        "p.pooled[pair * p.g.C",
        "emulator/test_cuda_kernels.py::test_options",
    ),
    Mutant(
        "CUDA: dW of the CAM: the twin's sign",
        "csrc/cuda/kernels_forward.cuh",
        "total[1][l][shared.twin[x]] = -d;",
        "total[1][l][shared.twin[x]] = d;",
        "emulator/test_cuda_kernels.py::test_options",
    ),
    Mutant(
        "CUDA: a stage's second slab is not waited for",
        "csrc/cuda/kernels_forward.cuh",
        "(consumed / slots) & 1",
        "0",
        "emulator/test_cuda_kernels.py::test_every_cluster_size_and_slabs_that_come_twice",
    ),
    Mutant(
        "CUDA: a stage is overwritten while warps read it",
        "csrc/cuda/kernels_forward.cuh",
        "    if (issued < total) __syncthreads();\n",
        "",
        "emulator/test_cuda_kernels.py::test_every_cluster_size_and_slabs_that_come_twice",
    ),
    Mutant(
        "CUDA: cp.async is waited for one group late",
        "csrc/cuda/kernels_forward.cuh",
        "      cp_async_wait<kStages - 1>();\n      const uint4* from",
        "      cp_async_wait<kStages>();\n      const uint4* from",
        "emulator/test_cuda_kernels.py::test_options",
    ),
    Mutant(
        "CUDA: the mean loss without lambda",
        "csrc/cuda/kernels_forward.cuh",
        "return cls[i] + p.consistency_weight * cons[i];",
        "return cls[i] + cons[i];",
        "emulator/test_cuda_kernels.py::test_options",
    ),
    Mutant(
        "CUDA: the ticket is not reset",
        "csrc/cuda/kernels_common.cuh",
        "    if (last) ticket_reset(ticket);\n",
        "",
        "emulator/test_cuda_kernels.py::test_options",
    ),
    Mutant(
        "CUDA: dS rounded to bfloat16",
        "csrc/cuda/kernels_backward.cuh",
        "{l0, l1, l0, l1}",
        "{0 * l0, 0 * l1, 0 * l0, 0 * l1}",
        "emulator/test_cuda_kernels.py::test_options",
    ),
    Mutant(
        "CUDA: dF~ without the twin's index",
        "csrc/cuda/kernels_backward.cuh",
        "store(out_twin, shared.twin[x], channel(0), v);",
        "store(out_twin, x, channel(0), v);",
        "emulator/test_cuda_kernels.py::test_options",
    ),
    Mutant(
        "CUDA: dF~ of NCHW: the sign of U",
        "csrc/cuda/kernels_backward.cuh",
        "from_float<T>(k[1][i] - u[i]);",
        "from_float<T>(k[1][i] + u[i]);",
        "emulator/test_cuda_kernels.py::test_options",
    ),
    Mutant(
        "CUDA: W^T dz~ without 1 / (H W)",
        "csrc/cuda/kernels_backward.cuh",
        "sum_twin / float(HW)",
        "sum_twin",
        "emulator/test_cuda_kernels.py::test_options",
    ),
    Mutant(
        "CUDA: dW of the first 128 rows alone",
        "csrc/cuda/kernels_backward.cuh",
        "p.pooled + m0 * C + c",
        "p.pooled + c",
        "emulator/test_cuda_kernels.py::test_more_samples_than_threads",
    ),
    Mutant(
        "CUDA: the stride of a per-sample upstream is ignored",
        "csrc/cuda/kernels_backward.cuh",
        "u.data + i * u.stride",
        "u.data + i",
        "emulator/test_cuda_kernels.py::test_options",
    ),
]

MUTANTS = PYTHON + OPS + HEAD_MATH + KERNELS + TRITON + CUDA


def copy(work: str) -> Path:
    to = Path(tempfile.mkdtemp(dir=work))
    for name in TREE:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, to / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, to / name)
    return to


def run(tree: Path, tests: list[str]) -> tuple[int, str]:
    """pytest's exit status and output; a cache of its own, so that no mutated library stays anywhere."""
    objects = tree.parent / "objects"
    objects.mkdir(exist_ok=True)
    compiler = tree / "g++-unoptimised"
    compiler.write_text(COMPILER.replace("{objects}", str(objects)))
    compiler.chmod(0o755)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("REBALFER_", "PYTHONPATH"))}
    environment |= {"REBALFER_CACHE_DIR": str(tree / "cache"), "CXX": str(compiler), "OMP_NUM_THREADS": "1"}
    environment |= {"TRITON_INTERPRET": str(int(all(_interpreted(test) for test in tests)))}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=line", "-p", "no:cacheprovider"]
    command += [f"tests/{test}" for test in tests]
    result = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    return result.returncode, result.stdout + result.stderr


def _interpreted(test: str) -> bool:
    return test.startswith("test_triton.py")


def kill(mutant: Mutant, work: str) -> tuple[str, float]:
    """ "killed", or what happened instead, and the seconds it took."""
    start = time.monotonic()
    tree = copy(work)
    file = tree / mutant.file
    file.write_text(file.read_text().replace(mutant.old, mutant.new))
    status, output = run(tree, [mutant.test])
    shutil.rmtree(tree)
    # 1: a test failed; 0: none did, or all were skipped; anything else is no verdict (no such test, ...).
    verdict = {0: "SURVIVED", 1: "killed"}.get(status, f"pytest exited with {status}")
    if "building the CPU kernels failed" in output or " -x c++ " in output:  # the second is the emulator's compiler
        verdict = "does not compile"
    return verdict if verdict == "killed" else f"{verdict}\n{output[-1500:]}", time.monotonic() - start


def main(words: list[str]) -> int:
    chosen = [m for m in MUTANTS if not words or any(w in m.what for w in words)]
    for mutant in chosen:
        count = (ROOT / mutant.file).read_text().count(mutant.old)
        if count != 1:
            print(f"{mutant.what}: the old text occurs {count} times in {mutant.file}, expected once")
            return 1
    survivors = 0
    with tempfile.TemporaryDirectory(prefix="mutants-") as work:
        tests = sorted({m.test for m in chosen})
        native = [t for t in tests if not _interpreted(t)]
        for part in (["test_native.py::test_it_builds_here", *native], [t for t in tests if _interpreted(t)]):
            status, output = run(copy(work), part) if part else (0, "")
            if status != 0:
                print(f"without any fault the tests do not pass:\n{output[-5000:]}")
                return 1
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            results = pool.map(kill, chosen, [work] * len(chosen))
            for mutant, (verdict, seconds) in zip(chosen, results, strict=True):
                survivors += verdict != "killed"
                print(f"{mutant.what:70} {mutant.test.split('::')[-1]:50} {seconds:4.0f} s  {verdict}", flush=True)
    print(f"{len(chosen)} faults, {survivors} not killed")
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
