"""Contrastive losses as functions: exact, in memory linear in the batch.

Features are normalized by the caller and scales already exponentiated, as in open_clip. Results
are float32 (float64 for float64 features); gradients come in each input's dtype.

Over several processes the features are one process's rows, the anchors those of all: every process
returns the loss of the global batch ("none": of its own anchors). "gather" brings all columns at
once, "ring" one process's after the other, in memory linear in a process's own rows. A feature's
gradient is the number of processes times the global loss's, and those of scalars average to it, so
that the averaging of data-parallel training gives exactly the full batch's gradient. With "none"
gradients are those of the sum of upstream times loss over all processes: sum those of scalars over
the processes, do not average them. All processes call alike; the upstream gradient of a mean or sum
is the same on all.
"""

from fastclip.functional.blocks import mil_nce_loss, mp_nce_loss, nt_xent_loss, sup_con_loss
from fastclip.functional.distillation import distillation_loss
from fastclip.functional.global_contrastive import global_contrastive_loss
from fastclip.functional.pairs import clip_loss, info_nce_loss, siglip_loss
from fastclip.functional.ranking import ranking_loss
from fastclip.functional.statistics import similarity_statistics
from fastclip.ops.attention import attention, packed_attention
from fastclip.ops.collectives import Exchange
from fastclip.ops.similarity import Statistics as Statistics

__all__ = [
    "Exchange",
    "attention",
    "clip_loss",
    "distillation_loss",
    "global_contrastive_loss",
    "info_nce_loss",
    "mil_nce_loss",
    "mp_nce_loss",
    "nt_xent_loss",
    "packed_attention",
    "ranking_loss",
    "siglip_loss",
    "similarity_statistics",
    "sup_con_loss",
]
