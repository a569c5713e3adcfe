"""Fake quantisers, observers, integer and bit-packed formats."""
