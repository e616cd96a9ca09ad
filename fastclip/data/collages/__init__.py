"""Collages: photographs in a grid of four places, drawn and captioned from integer seeds."""

from fastclip.data.collages.captions import (
    NEGATIVE_KINDS,
    QUALITIES,
    caption,
    caption_claims,
    hard_negative_claims,
    hard_negatives,
)
from fastclip.data.collages.photos import Photographs, Shapes
from fastclip.data.collages.source import CollageSource
from fastclip.data.collages.world import (
    PLACES,
    Claim,
    Collage,
    Photo,
    has_held_out,
    held_out,
    holds,
    is_held_out,
    relation_between,
    sample_collage,
)

__all__ = [
    "NEGATIVE_KINDS",
    "PLACES",
    "QUALITIES",
    "Claim",
    "Collage",
    "CollageSource",
    "Photo",
    "Photographs",
    "Shapes",
    "caption",
    "caption_claims",
    "hard_negative_claims",
    "hard_negatives",
    "has_held_out",
    "held_out",
    "holds",
    "is_held_out",
    "relation_between",
    "sample_collage",
]
