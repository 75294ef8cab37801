"""Part 14: quantization."""
