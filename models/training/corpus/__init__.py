"""The training text of the shipped models, all of it written by this project."""
