"""Formats for weights that are stored with fewer numbers than they have: shared kernels, packed indices."""
