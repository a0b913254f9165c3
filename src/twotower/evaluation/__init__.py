"""Evaluation of a model: accuracy, likelihood of given text, tokens per pass, and speed."""
