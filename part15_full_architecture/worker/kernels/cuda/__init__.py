"""Kernels in CUDA C++. The same .cu files run on a GPU, and through cuda_on_cpu/ on a CPU."""
