"""A model's features of every sample of shards, in copies of them: what distillation reads."""

import io
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Subset
from tqdm import tqdm

from fastclip.data.editing import ShardEditor, claim_folder
from fastclip.data.faults import FaultLog
from fastclip.data.loader import EvaluationSamples, evaluation_loader
from fastclip.data.samples import FEATURE_MEMBERS
from fastclip.data.shards import ShardSource, open_shard
from fastclip.data.tokens import bounded
from fastclip.device import autocast
from fastclip.evaluate.features import Encoding, evaluating, normalized, require_finite
from fastclip.models.clip import Model


@dataclass
class EmbeddedShards:
    """What was written: shards, samples with features, those that cannot be read."""

    shards: int = 0
    samples: int = 0
    faults: FaultLog = field(default_factory=FaultLog)


def embed_shards(
    model: Model, source: ShardSource, target: Path, encoding: Encoding, identity: dict[str, Any]
) -> EmbeddedShards:
    """Write shards anew with KEY.teacher_image.npy and KEY.teacher_text.npy; all else is kept.

    Both are (E,) float16, normalized. Samples that cannot be read are copied without them. Shards
    that are there are passed over, so the same call resumes.

    Args:
        model: whose features they are.
        source: shards with one caption a sample.
        target: folder for the shards under their names.
        encoding: how features are computed.
        identity: what they depend on; kept in the folder as `features.json`.

    Raises:
        ValueError: the target was begun with another identity, two shards have one name, a sample
            has several captions, or its features are not finite or there already.
        FileExistsError: the target holds such shards that were not written here.
    """
    paths = [target / name.rpartition("/")[2] for name in source.names]
    if len(set(paths)) < len(paths):
        raise ValueError(
            "two shards have the same name; give them in two commands, with a folder for each"
        )
    claim_folder(target, "features.json", identity, paths)
    samples = EvaluationSamples(source, model.preprocess)
    done, starts = EmbeddedShards(), accumulate((0, *source.counts))
    silent = not encoding.progress
    places = zip(source.names, paths, starts, source.counts, strict=False)
    for name, path, start, count in tqdm(
        list(places), desc="shards", unit="shard", disable=silent, leave=False
    ):
        if path.exists():
            continue
        part = Subset(samples, range(start, start + count))
        members = _members(model, part, encoding, done.faults)
        with open_shard(name, source.cache) as file:
            ShardEditor(file, name).add_members(path, members)
        done.shards += 1
        done.samples += len(members)
    return done


@torch.no_grad()
def _members(
    model: Model, part: Subset[dict[str, Any]], encoding: Encoding, faults: FaultLog
) -> dict[str, dict[str, bytes]]:
    """What each readable sample of a shard gets, by its key."""
    device = next(model.model.parameters()).device
    towers: Any = model.model
    tokenizer = bounded(model.tokenizer)
    loader = evaluation_loader(
        part,
        encoding.workers,
        batch_size=encoding.batch_size,
        collate_fn=list,
    )
    members = {}
    with evaluating(model.model), autocast(device, encoding.precision):
        for batch in loader:
            faults.add([fault for sample in batch for fault in sample["faults"]])
            readable = [sample for sample in batch if "image" in sample]
            if not readable:
                continue
            texts = tokenizer([_only_text(sample) for sample in readable]).to(device)
            images = torch.stack([sample["image"] for sample in readable]).to(device)
            pairs = zip(
                normalized(towers.encode_image(images)),
                normalized(towers.encode_text(texts)),
                strict=True,
            )
            for sample, pair in zip(readable, pairs, strict=True):
                files = zip(FEATURE_MEMBERS.values(), pair, strict=True)
                members[sample["key"]] = {
                    member: _npy(features, sample["key"]) for member, features in files
                }
    return members


def _only_text(sample: dict[str, Any]) -> str:
    texts: tuple[str, ...] = sample["texts"]
    if len(texts) != 1:
        raise ValueError(
            f"{sample['key']} has {len(texts)} captions, and a teacher's features are of one text "
            "a sample; leave all captions but one out"
        )
    return texts[0]


def _npy(features: Tensor, key: str) -> bytes:
    require_finite(features[None], [key])
    file = io.BytesIO()
    np.save(file, features.half().numpy())
    return file.getvalue()
