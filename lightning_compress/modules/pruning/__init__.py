"""Pruning methods that are a training system of their own."""
