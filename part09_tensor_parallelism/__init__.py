"""Part 9: tensor parallelism: each layer is split over several processes. Pipeline stages split the layers instead."""
