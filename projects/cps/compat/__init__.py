"""Flags and results of the original's scripts and of the PaddleSeg port."""
