"""Part 13: disaggregated prefill and decode."""
