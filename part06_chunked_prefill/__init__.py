"""Part 6: chunked prefill. Long prompts are computed in chunks, beside the decodes."""
