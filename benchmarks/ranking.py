"""sentence-transformers' cached ranking loss, its own code and with fastclip's, at a large batch.

`python -m fastclip.bench.ranking --output FILE [--n 4096] [--width 384]`: the part of a step that
is the loss, from embeddings in mini-batches to their gradients, as its cached form calls it;
encoders are left out. Both run in turn; errors are against its own code in float64.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastclip
from fastclip.bench.runner import (
    Row,
    Settings,
    clustered,
    interleave,
    peak_since,
    quantile,
    reset_peak,
)
from fastclip.bench.screen import Rows

MINI_BATCH = 32
OURS, THEIRS = "fastclip", "sentence-transformers"


def columns(n: int, width: int) -> list[list[Tensor]]:
    """Queries and their documents in mini-batches, with a gradient each."""
    return [
        [part.clone().requires_grad_() for part in block.split(MINI_BATCH)]
        for block in clustered(2, n, width)
    ]


def step(loss: Any, representations: list[list[Tensor]], ours: bool) -> Tensor:
    """The loss's part of a step: its value, and the gradients of all embeddings."""
    for leaf in (leaf for column in representations for leaf in column):
        leaf.grad = None
    if not ours:
        return loss.calculate_loss(representations, with_backward=True)
    with fastclip.patch_sentence_transformers():
        return loss.calculate_loss(representations, with_backward=True)


def measure(n: int, width: int, settings: Settings) -> list[Row]:
    """Both, the loss's part of a step."""
    from sentence_transformers.sentence_transformer import losses

    made: Any = losses.CachedMultipleNegativesRankingLoss
    loss = made(torch.nn.Sequential(torch.nn.Identity()), mini_batch_size=MINI_BATCH)
    representations = columns(n, width)
    runs = {
        OURS: lambda: step(loss, representations, True),
        THEIRS: lambda: step(loss, representations, False),
    }
    exact = [[part.detach().double().requires_grad_() for part in c] for c in representations]
    step(loss, exact, False)
    want = torch.cat([part.grad for part in exact[0] if part.grad is not None])
    rows = []
    for name, run in runs.items():
        row = Row("cached ranking", name, n, width)
        rows.append(row)
        run()
        before = reset_peak(settings.device)
        run()
        row.peak_bytes = peak_since(settings.device, before)
        got = torch.cat([part.grad for part in representations[0] if part.grad is not None])
        row.error = ((got.double() - want).norm() / want.norm()).item()
    found, _ = interleave(runs, settings.rounds, settings)
    for row in rows:
        row.p20, row.p50, row.p80 = (quantile(found[row.baseline], q) for q in (0.2, 0.5, 0.8))
    assert rows[0].p50 is not None
    for row in rows:
        assert row.p50 is not None
        row.ratio = row.p50 / rows[0].p50
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write a file."""
    parser = argparse.ArgumentParser(prog="ranking", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="JSON file of the rows")
    parser.add_argument("--n", type=int, default=4096, help="queries")
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="few queries")
    options = parser.parse_args(arguments)
    n, rounds = (256, 1) if options.quick else (options.n, options.rounds)
    settings = Settings(rounds=rounds, warmup=1)
    with Rows("losses", settings, settings.device, options.output) as rows:
        rows.add(measure(n, options.width, settings))


if __name__ == "__main__":
    main()
