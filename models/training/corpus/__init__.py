"""The text the shipped models learn from, every line of it written by this project."""
