"""Leave out the doctests of modules and pages whose library is not installed; their tests say so by a skip."""

from importlib.util import find_spec

collect_ignore_glob = [
    *(["swl/torch/*", "docs/torch.md"] if find_spec("torch") is None else []),
    *(["swl/jax.py"] if find_spec("jax") is None else []),
]
