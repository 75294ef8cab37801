"""The learner's command line: `workshop`. Exercises are done in workspace/ and checked there."""

COMMAND = ".venv/bin/workshop"  # as a learner types it, in the root of the repository
