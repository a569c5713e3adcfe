"""Structural surgery: follow channels, plan what goes, shrink, and keep training, optimisers and checkpoints whole.

graph = channel_graph(network, example_input)      # who is coupled to whom
plan = allocate(graph, scores, ratios)             # layer -> kept channels, plain data
apply_cuts(network, plan.cuts(graph))              # physically narrow, any module
"""

from lightning_compress.core.surgery.fit import (
    change_in_fit,
    change_in_setup,
    check_epoch,
    check_trainer,
    replay_in_setup,
    resume_in_setup,
    resume_path,
    shrink_in_fit,
    shrink_in_setup,
    undo_changes,
    undo_in_fit,
)
from lightning_compress.core.surgery.graph import ChannelGraph, Group
from lightning_compress.core.surgery.plan import (
    ChannelPlan,
    Cut,
    allocate,
    floor_width,
    keep_highest,
    scaled_macs,
    widths,
)
from lightning_compress.core.surgery.probe import channel_graph, check_cuts
from lightning_compress.core.surgery.record import Record, attach_record, load, read_checkpoint, read_steps, replayable
from lightning_compress.core.surgery.shrink import apply_cuts, carry_optimizer

__all__ = [
    "ChannelGraph",
    "ChannelPlan",
    "Cut",
    "Group",
    "Record",
    "allocate",
    "apply_cuts",
    "attach_record",
    "carry_optimizer",
    "change_in_fit",
    "change_in_setup",
    "channel_graph",
    "check_cuts",
    "check_epoch",
    "check_trainer",
    "floor_width",
    "keep_highest",
    "load",
    "read_checkpoint",
    "read_steps",
    "replay_in_setup",
    "replayable",
    "resume_in_setup",
    "resume_path",
    "scaled_macs",
    "shrink_in_fit",
    "shrink_in_setup",
    "undo_changes",
    "undo_in_fit",
    "widths",
]
