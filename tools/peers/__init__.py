"""Part 15 beside the engines that people use: on the same weights and requests, in one run."""
