"""Metrics, evaluation, inference, pictures."""
