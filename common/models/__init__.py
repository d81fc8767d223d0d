"""Encoders, heads and weight files shared by the papers."""
