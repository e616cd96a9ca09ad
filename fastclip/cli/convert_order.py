"""`fastclip convert aro-order`: the cases of COCO-Order and Flickr30k-Order from captions."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from fastclip.data.order_perturbations import SPACY_MODEL, spacy_tagger, write_order_cases
from fastclip.messages import logger


@dataclass(frozen=True)
class AroOrder:
    """Shuffle the words of captions in four ways, for `fastclip eval aro`.

    Needs the package spacy, and its model: python -m spacy download en_core_web_sm. For example:

    fastclip convert aro-order dataset_coco.json /data/aro/coco_order.json

    The published cases were drawn by other random numbers.
    """

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    """dataset_coco.json or dataset_flickr30k.json with Karpathy's splits; the test split is used.
    """
    target: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """coco_order.json or flickr30k_order.json in the folder to evaluate."""
    tagger: str = SPACY_MODEL
    """spaCy model that finds nouns and adjectives."""
    seed: int = 0
    """Seed of the shuffles."""

    def run(self) -> None:
        """Write the cases; prints their number."""
        count = write_order_cases(self.source, self.target, spacy_tagger(self.tagger), self.seed)
        logger.info(f"{self.target.name}: {count} cases")
