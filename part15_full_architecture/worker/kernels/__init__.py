"""The operations of a step as kernels: in CUDA C++, in Triton and in Numba, each with a reference in torch."""
