"""Part 7: prefix caching. What was computed once is found again."""
