"""The shipped models, a folder each, and `training`, which made them."""
