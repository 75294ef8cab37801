"""What only the demo and the benchmark use."""
