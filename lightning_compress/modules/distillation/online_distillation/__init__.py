r"""Online distillation: several cheap students and a teacher that is made of their features, trained together.

Xie et al., "Training convolutional neural networks with cheap convolutions and online distillation", 2019,
arXiv:1909.13063. Cheap convolutions are those of `lightning_compress.networks.convert_to_cheap`.

M students of one architecture, from different random weights, see the same images. s_j are the logits of student j, Z_j
its last feature maps. The teacher is no network of its own but a head on all maps together,

    t = FC_t( GAP( ReLU( BN( concat_j Z_j ) ) ) ),

and everything is trained by one loss with one optimiser:

    L = CE(t, y) + sum_j [ CE(s_j, y) + T^2 KL( softmax(t / T) || softmax(s_j / T) ) ].

KL is the mean over images and classes. Its gradient reaches the teacher too, and through Z all students: what they
learn from, learns from them. After every epoch the student that validates best is chosen; it alone is deployed.

To read in this order: `losses` (the mathematics), `cohort` (the students, and the teacher made of them), `module` (the
training).
"""

from lightning_compress.modules.distillation.online_distillation.cohort import Cohort, OnlineTeacher
from lightning_compress.modules.distillation.online_distillation.module import OnlineDistillation

__all__ = ["Cohort", "OnlineDistillation", "OnlineTeacher"]
