"""Code that only the demo and the benchmark use."""
