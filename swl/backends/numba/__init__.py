"""The CPU backend: compiled kernels over row ranges, on a pool of ordinary threads."""
