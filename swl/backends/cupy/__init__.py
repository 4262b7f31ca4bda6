"""The CUDA backend: CUDA C kernels through CuPy."""
