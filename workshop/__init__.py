"""The learner's command line: `python -m workshop`. Exercises are done in workspace/ and checked there."""
