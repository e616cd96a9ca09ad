"""A picture of retrieved examples: a text in front of the images it finds."""

import textwrap
from pathlib import Path

import torch

from fastclip.atomic import writing
from fastclip.data.order import Order
from fastclip.data.samples import Source
from fastclip.evaluate.features import ImageFeatures, embed_texts
from fastclip.models.clip import Model


def draw_retrieval(
    path: Path,
    model: Model,
    source: Source,
    images: ImageFeatures,
    queries: list[str],
    *,
    per_query: int = 6,
) -> None:
    """Write a PNG with one row a query: the text, then the best images, true ones framed green.

    Args:
        images: the features of all of `source`'s samples, none skipped.
        queries: texts that are captions of some of the images.

    Raises:
        ValueError: some samples of the source were skipped, so rows and features do not match.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    order = Order(source.counts, seed=0, window=0)
    if len(order) != len(images.texts):
        raise ValueError(f"{len(images.texts)} features of {len(order)} samples: some were skipped")
    ranking = (embed_texts(model, queries) @ images.features.T).topk(per_query, dim=1).indices
    size = (1.1 * (per_query + 2), 1.15 * len(queries))
    figure, axes = plt.subplots(
        len(queries), per_query + 1, figsize=size, width_ratios=[2] + [1] * per_query, squeeze=False
    )
    for row, query, best in zip(axes, queries, torch.unbind(ranking), strict=True):
        row[0].text(1, 0.5, textwrap.fill(query, 24), ha="right", va="center", fontsize=8)
        row[0].axis("off")
        for cell, index in zip(row[1:], best.tolist(), strict=True):
            cell.imshow(source.read(*order.locate(0, index)).image)
            cell.set_xticks([])
            cell.set_yticks([])
            right = query in images.texts[index]
            for spine in cell.spines.values():
                spine.set(color="tab:green" if right else "0.8", linewidth=3 if right else 1)
    figure.tight_layout(pad=0.4)
    with writing(path) as file:
        figure.savefig(file, dpi=130, format=path.suffix[1:] or "png")
    plt.close(figure)
