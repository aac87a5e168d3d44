"""Faults of the head's autograd in C++."""

from .mutant import Mutant

SAME = "test_head.py::test_autograd_in_cpp_is_that_in_python_to_the_last_bit"
MUTANTS = [
    Mutant(
        "autograd in C++: the backward takes lambda for 1",
        "csrc/autograd/head.cpp",
        "saved[4], consistency_weight, of.twin_map()",
        "saved[4], 1.0, of.twin_map()",
        SAME,
    ),
    Mutant(
        "autograd in C++: the twin's map loses a digit",
        "csrc/autograd/head.cpp",
        "packed >> 8 & 63",
        "packed >> 8 & 15",
        SAME,
    ),
    Mutant(
        "autograd in C++: the gradient of the features in the other layout",
        "csrc/autograd/head.cpp",
        "!features.is_contiguous(), bias.has_value()",
        "features.is_contiguous(), bias.has_value()",
        SAME,
    ),
    Mutant(
        "autograd in C++: a bias is assumed",
        "csrc/autograd/head.cpp",
        "has_bias && ctx->needs_input_grad(2)",
        "ctx->needs_input_grad(2)",
        SAME,
    ),
    Mutant(
        "autograd in C++: means are taken for sums",
        "csrc/autograd/head.cpp",
        "bool mean() const { return flag(1); }",
        "bool mean() const { return flag(0); }",
        SAME,
    ),
    Mutant(
        "autograd in C++: second-order gradients are let through",
        "csrc/autograd/head.cpp",
        "if (at::GradMode::is_enabled()) refuse",
        "if (false) refuse",
        "test_head.py::test_second_order_is_refused",
    ),
    Mutant(
        "autograd in C++: a second differentiation does not find the call",
        "csrc/autograd/head.cpp",
        "return {loss, classification, consistency, logits, map_grad};",
        "return {loss, classification, consistency, logits, map_grad.clone()};",
        "test_head.py::test_second_order_is_refused",
    ),
    Mutant(
        "autograd in C++: the gradient to the maps is that of an output which callers see",
        "csrc/autograd/head.cpp",
        "ctx->save_for_backward({weight, map_grad, logit_grad, pooled, cam_grad});",
        "ctx->save_for_backward({weight, map_grad, logits, pooled, cam_grad});",
        SAME,
    ),
    Mutant(
        "autograd in C++: maps are always left out",
        "csrc/autograd/head.cpp",
        "    a.maps = maps;\n",
        "    a.maps = logits;\n",
        SAME,
    ),
]
