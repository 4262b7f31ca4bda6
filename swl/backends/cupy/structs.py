"""The structs that kernels take by value, declared here as in ``kernels/problem.cuh``.

CuPy passes a NumPy array of one element as it lies in memory. `Struct.check` is C++ that compiles only where the compiler's
layout is NumPy's; it is compiled into every module that has the struct.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

__all__ = ["PROBLEM", "ROWS_OUT", "Argument", "Struct", "acc_type"]

_DTYPES = {"i64": np.int64, "int": np.int32, "float": np.float32, "double": np.float64}


def acc_type(T: str) -> str:
    """Name ``Acc<T>`` of common.cuh."""
    return "double" if T == "double" else "float"


class Argument(np.ndarray[Any, Any]):
    """A struct filled with values. It keeps the arrays that it points to alive."""

    struct: Struct
    type_argument: str
    values: dict[str, Any]


class Struct:
    """A struct ``name<T>``: its fields in order with their types in C++, where A is ``Acc<T>``."""

    def __init__(self, name: str, fields: dict[str, str]) -> None:
        self.name, self.fields = name, fields
        self._pointers = [c_type.endswith("*") for c_type in fields.values()]
        self._dtypes = {T: self._dtype(T) for T in ("float", "double", "__half", "__nv_bfloat16")}

    def c_type(self, field: str, T: str) -> str:
        """Give the type of a field of ``name<T>``."""
        return re.sub(r"\bT\b", T, re.sub(r"\bA\b", acc_type(T), self.fields[field]))

    def _dtype(self, T: str) -> np.dtype[Any]:
        types = {field: self.c_type(field, T) for field in self.fields}
        return np.dtype([(f, np.uint64 if c.endswith("*") else _DTYPES[c]) for f, c in types.items()], align=True)

    def check(self, T: str) -> str:
        """Give C++ that compiles only where ``name<T>`` has these fields, of these types, in these places."""
        dtype, here = self._dtypes[T], f"{self.name}<{T}>"
        assert dtype.fields is not None
        lines = [f'static_assert(sizeof({here}) == {dtype.itemsize}, "{here}");']
        for field, (_, offset, *_) in dtype.fields.items():
            same = f"Same<decltype({here}::{field}), {self.c_type(field, T)}>::value"
            lines.append(
                f'static_assert({same} && __builtin_offsetof({here}, {field}) == {offset}, "{here}::{field}");'
            )
        return "\n".join(lines) + "\n"

    def __call__(self, T: str, values: dict[str, Any]) -> Argument:
        """Fill ``name<T>``. A pointer is given as the array, or None."""
        row = tuple(
            (0 if value is None else value.data.ptr) if pointer else value
            for pointer, value in zip(self._pointers, (values[field] for field in self.fields), strict=True)
        )
        made = np.array(row, self._dtypes[T]).view(Argument)
        made.struct, made.type_argument, made.values = self, T, values
        return made


PROBLEM = Struct(
    "Problem",
    {
        "logits_nc": "const T*",
        "stride": "i64",
        "N": "i64",
        "C": "i64",
        "ids_n": "const i64*",
        "probs_nc": "const void*",
        "probs_type": "int",
        "probs_row": "i64",
        "probs_column": "i64",
        "weight_c": "const A*",
        "row_weight_n": "const A*",
        "bias_c": "const A*",
        "hot": "A",
        "rest": "A",
        "softcap": "A",
        "z_loss": "A",
        "temperature_inverse": "A",
        "softcap_inverse": "A",
        "softcap_rate": "A",
        "softcap_rate_rest": "A",
        "mass_hit": "A",
        "mass_miss": "A",
        "first_class": "i64",
    },
)
ROWS_OUT = Struct(
    "RowsOut",
    {
        "loss_n": "A*",
        "row_max_n": "A*",
        "log_sum_n": "A*",
        "target_dot_n": "A*",
        "mass_n": "A*",
        "entropy_n": "A*",
        "log_prob_n": "A*",
        "argmax_n": "i64*",
    },
)
