"""Keeps small operators from waiting for each other's threads."""

import torch

torch.set_num_threads(1)
