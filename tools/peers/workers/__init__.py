"""One program for each engine, run in that engine's environment; loop.py has the protocol."""
