"""The types that public signatures name beside Python's and NumPy's own."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import numpy as np

__all__ = [
    "Array",
    "ArrayLike",
    "BackendName",
    "Comm",
    "DTypeLike",
    "Direction",
    "LayerLike",
    "Reduction",
    "Results",
    "Seed",
    "Stream",
]

# What no static type describes: libraries have none in common. Type checkers let all of it pass; readers know what is meant.
Array: TypeAlias = Any
"""An array of NumPy, CuPy or another library."""
ArrayLike: TypeAlias = Any
"""An array of any library, or what NumPy makes one of: a number, or nested lists of numbers."""
Results: TypeAlias = Any
"""A loss, or a tuple that begins with it: the arguments decide which, as the docstring says under *Returns*."""
LayerLike: TypeAlias = Any
"""A `swl.nn.base.Layer`, or any object with the methods ``forward`` and ``backward``."""
Stream: TypeAlias = Any
"""A ``cupy.cuda.Stream``, or an object with ``__cuda_stream__``."""
Comm: TypeAlias = Any
"""An ``mpi4py.MPI.Intracomm``, or an object with those of its methods that are called."""

DTypeLike: TypeAlias = np.dtype[Any] | type[Any] | str
"""What `numpy.dtype` takes: ``np.float32``, ``"float32"``, ``ml_dtypes.bfloat16``."""
Seed: TypeAlias = "np.random.Generator | int | None"
"""What `numpy.random.default_rng` takes."""

BackendName: TypeAlias = Literal["numpy", "numba", "cupy", "auto"] | str
"""A backend's name: of this library's one of those listed; other packages bring their own."""
Reduction: TypeAlias = Literal["mean", "sum", "none"]
"""What becomes of the losses of the rows."""
Direction: TypeAlias = Literal["forward", "reverse", "jsd"]
"""Which divergence of a student from a teacher."""
