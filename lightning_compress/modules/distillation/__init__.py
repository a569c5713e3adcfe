"""Distillation methods that are training systems: networks that teach each other."""
