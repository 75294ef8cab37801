"""Part 15: the full architecture, with CUDA kernels."""
