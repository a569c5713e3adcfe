"""Operators that torch does not have: a reference in torch, compiled code for the CPU, Triton for the GPU."""
