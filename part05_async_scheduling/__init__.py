"""Part 5: async scheduling. While a step runs, the next one is scheduled and launched."""
