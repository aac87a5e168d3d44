"""The Triton kernels: one source for NVIDIA and AMD GPUs, run on a CPU by Triton's interpreter.

    host           what is launched and how often; registers the operators, so it is imported only when asked for
    forward        the head's forward, the maps of Eq. 2 and the gradient of the CAM's weight
    backward       the gradients of the head and of the maps
    cross_entropy  the losses and gradients of rows of logits, within the head and alone
    views          augmented views of uint8 images and their twins
    common         loads, stores and products that the kernels share
    tiles          how the work is cut up; needs no Triton

A tile of features is (rows, channels), a row being a pixel of the map, in either layout: the layout is in the strides
S_HW and S_C. The twin's rows are loaded in the order that undoes its transform, so no feature is ever moved for it.
Names in capitals are compile-time constants; the batch size never is one. B_ROWS, B_C and B_L are a tile's rows,
channels and classes, powers of two: a tile that reaches beyond the end is masked on loads (zeros) and on stores.

Precision: float32 operands are multiplied in IEEE float32, never tf32. 16-bit features go to the tensor cores as they
are; any other operand that is not exact in 16 bits is split into hi + lo, two numbers of 16 bits each. Every sum has
one order, fixed by (C, HW, L, layout, dtype, arch); nothing is added atomically.
"""
