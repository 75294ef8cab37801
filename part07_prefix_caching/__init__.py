"""Part 7: prefix caching. KV blocks of a prompt that was computed before are reused."""
