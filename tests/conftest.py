"""Makes `foreign` importable in every test, and keeps small operators from waiting for each other's threads."""

import torch

torch.set_num_threads(1)
