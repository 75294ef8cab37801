"""Part 10: data parallelism: several engines share the requests, in one server or behind a router."""
