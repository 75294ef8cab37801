"""The corpus, the training and the evaluation of the shipped models."""
