"""Weights that are zero: masks, N:M groups, pattern storage."""
