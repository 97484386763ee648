"""Exact weighted sums of tensors: reference, CPU (numba) and GPU (Triton) kernels, and their dispatch.

Importing this package loads nothing heavy. `reference`, `dispatch`, `pinned` and `triton_kernels` need torch,
`cpu` needs numpy and llvmlite, and numba where it has to compile.
"""
