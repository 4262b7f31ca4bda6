"""What is kept for each device, and how a kernel of it is launched."""

from __future__ import annotations

import threading
from types import ModuleType
from typing import Any

import numpy as np

from swl.backends.cupy.compilation import OPTIONS, instances, module_of, module_source
from swl.backends.cupy.plans import Limits

__all__ = ["NULL", "Device", "Launcher", "i32", "i64", "or_null", "row_stride", "rows_are_dense"]

_CLUSTER_LAUNCH = 120  # cudaDevAttrClusterLaunch, which CuPy does not name
NULL = np.uint64(0)  # a pointer to nothing
i32, i64 = np.int32, np.int64


class Device:
    """What is kept for each device: its limits, its kernels, and where its kernels report a bad class id."""

    def __init__(self, xp: ModuleType, index: int) -> None:
        attributes = xp.cuda.Device(index).attributes
        self.index = index
        self.limits = Limits(
            attributes["MultiProcessorCount"],
            attributes["MaxSharedMemoryPerBlockOptin"],
            bool(xp.cuda.runtime.deviceGetAttribute(_CLUSTER_LAUNCH, index)),
        )
        self.kernels: dict[str, Any] = {}
        with xp.cuda.Device(index):
            self.error = xp.zeros(5, dtype=np.uint64)
            xp.cuda.get_current_stream().synchronize()  # once: other streams use it too


class Launcher:
    """Launches kernels, each compiled at its first use."""

    def __init__(self, xp: ModuleType) -> None:
        self.xp = xp
        self._lock = threading.RLock()
        self._devices: dict[int, Device] = {}
        self._modules: dict[tuple[str, ...], Any] = {}

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        return self.xp.empty(shape, dtype=dtype)

    def _device(self, x: Any) -> Device:
        index = x.device.id
        found = self._devices.get(index)
        if found is None:
            with self._lock:
                found = self._devices.get(index) or Device(self.xp, index)
                self._devices[index] = found
        return found

    def _kernel(self, device: Device, name: str) -> Any:
        found = device.kernels.get(name)
        if found is None:
            with self._lock:
                group = module_of(name)
                if group not in self._modules:
                    self._modules[group] = self.xp.RawModule(
                        code=module_source(group), options=OPTIONS, name_expressions=instances(group)
                    )
                found = self._modules[group].get_function(name)
                if name.startswith(("ce_rows", "ce_cluster")):
                    found.max_dynamic_shared_size_bytes = device.limits.shared
                device.kernels[name] = found
        return found

    def _launch(self, device: Device, name: str, grid: Any, block: Any, args: Any, shared: int = 0) -> None:
        self._kernel(device, name)(grid, block, args, shared_mem=shared)


def or_null(x: Any | None) -> Any:
    return NULL if x is None else x


def row_stride(x: Any) -> int:
    """Distance of rows in elements."""
    return int(x.strides[0]) // int(x.itemsize)


def rows_are_dense(x: Any) -> bool:
    """Tell whether the elements of each row are neighbours, as the kernels want them."""
    return bool((x.shape[1] <= 1 or x.strides[1] == x.itemsize) and x.strides[0] % x.itemsize == 0)
