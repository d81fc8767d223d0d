"""Losses, mixing, averages, schedules, optimisers, precision."""
