"""Losses, mixing, averages, schedules, optimizers, precision."""
