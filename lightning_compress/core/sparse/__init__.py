"""Weights that are zero, or shared: masks, N:M groups, ADMM, and the formats in which they are stored."""
