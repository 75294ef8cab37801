"""Part 7: prefix caching. KV blocks that were computed for an earlier prompt are reused."""
