"""Code that all parts share and no lesson teaches: checkpoints, configs, the HTTP server, traces, plots."""
