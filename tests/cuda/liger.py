"""Liger's cross-entropy kernel by the rule of instructions.py, to stand beside ours in bounds.py where it is installed.

Triton compiles for a card that is not there. The kernel sweeps a row twice, a block of up to 32768 classes at a time; what lies
beyond the row in the last block is worked on too.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import compile_table
import instructions

WARPS, BLOCK = 32, 32768  # of a row, as Liger launches it
POINTERS = ("X_ptr", "Y_ptr", "loss_ptr")
TRITON = {"float": "fp32", "__nv_bfloat16": "bf16"}
L2 = {"80": 40e6, "90": 50e6}  # bytes


def installed() -> bool:
    return find_spec("triton") is not None and find_spec("liger_kernel") is not None


def block_of(C: int) -> int:
    """Return the classes of a block."""
    return min(BLOCK, 1 << (C - 1).bit_length())


def cubin(T: str, C: int, architecture: str) -> bytes:
    """Compile it for rows of C logits of type T, for class ids without options: value and gradient of a mean."""
    import triton
    from liger_kernel.ops.cross_entropy import liger_cross_entropy_kernel as kernel
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types: dict[str, str] = {
        "X_ptr": f"*{TRITON[T]}",
        "Y_ptr": "*i64",
        "loss_ptr": "*fp32",
        "sum_non_ignore_weight": "fp32",
        "weight_sum": "fp32",
        **dict.fromkeys(("X_stride", "n_cols", "n_non_ignore", "ignore_index"), "i32"),
    }
    rest = [name for name in kernel.arg_names if name not in types]
    constants: dict[str, Any] = {
        **{name: None for name in rest if name.endswith("_ptr")},
        **{name: 1 for name in rest if name.endswith("_stride")},
        **{name: False for name in rest if name.isupper()},
        "BLOCK_SIZE": block_of(C),
        "HAS_GRADIENTS": True,
        "label_smoothing": 0.0,
        "lse_square_scale": 0.0,
        "reduction": "mean",
        "softcap": None,
    }
    multiples = [*POINTERS, *(("X_stride", "n_cols") if C % 16 == 0 else ())]  # of 16, as Triton finds them out
    place = {name: (i,) for i, name in enumerate(kernel.arg_names)}
    source = ASTSource(
        kernel,
        {name: types.get(name, "constexpr") for name in kernel.arg_names},
        {place[name]: value for name, value in constants.items()},
        {place[name]: [["tt.divisibility", 16]] for name in multiples},
    )
    made = triton.compile(source, target=GPUTarget("cuda", int(architecture), 32), options={"num_warps": WARPS})
    return bytes(made.asm["cubin"])


def turns(T: str, C: int, architecture: str) -> list[instructions.Turn]:
    """Return the turns of its two loops, a block of classes each."""
    code = instructions.blocks(compile_table.disassembled(cubin(T, C, architecture)))
    V = (4 if T == "float" else 8) if C % 16 == 0 else 1  # rows that lie on no 16-byte boundary go one by one
    width = r".*\b128\b" if V > 1 else r"\.E(\.U16)?$"
    stores = [any(op.startswith("STG") for op in block.ops) for block in code]
    without = [block._replace(next=[]) if stored else block for block, stored in zip(code, stores, strict=True)]
    most = block_of(C) // (32 * WARPS * V)
    found = (
        instructions.cheapest_turn(without, rf"LDG{width}", V, most=most),
        instructions.cheapest_turn(code, rf"STG{width}", V, most=most),
    )
    return [turn for turn in found if turn is not None]


def bounds() -> Iterator[Any]:
    """Bound it as bounds.py does ours. Its second read of a row is from L2, where the rows at work have room there."""
    from bounds import CARDS, CASES, bound

    version = importlib.metadata.version("liger-kernel")
    for architecture, card in CARDS.items():
        for T, C in CASES:
            size = 4 if T == "float" else 2
            near = card.limits.processors * C * size < 0.8 * L2[architecture]
            waste = -(-C // block_of(C)) * block_of(C) / C
            yield bound(card, T, C, (f"Liger {version}",), turns(T, C, architecture), (2 if near else 3) * size, waste)
