"""Part 12: KV offloading: host memory, disk and Redis keep the KV cache that the device has no room for."""
