"""Callbacks that remove channels, filters or kernels."""
