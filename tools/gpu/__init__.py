"""Everything that needs a CUDA device, prepared as one run of at most eight minutes: `make gpu`."""
