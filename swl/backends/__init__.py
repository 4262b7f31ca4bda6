"""The backends: the protocol that each has (`protocol`), which one runs (`registry`), and one module or package for each."""

from swl.backends.protocol import IGNORED, INVALID, Backend, Rows, Target
from swl.backends.registry import (
    BackendInfo,
    active,
    available_backends,
    device,
    get,
    host_backend,
    loaded,
    on_device,
    resolve,
    scope,
    set_backend,
    use_backend,
)

__all__ = [
    "IGNORED",
    "INVALID",
    "Backend",
    "BackendInfo",
    "Rows",
    "Target",
    "active",
    "available_backends",
    "device",
    "get",
    "host_backend",
    "loaded",
    "on_device",
    "resolve",
    "scope",
    "set_backend",
    "use_backend",
]
