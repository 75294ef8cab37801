"""Part 11: expert parallelism: the experts of a mixture-of-experts model are spread over the ranks."""
