"""Recall over many pairs: seconds and peak memory of `fastclip.evaluate.retrieval`.

python -m fastclip.bench.retrieval --pairs 100000 --width 512
"""

import argparse
import json
import resource
import time

import torch
import torch.nn.functional as F

from fastclip.evaluate.retrieval import retrieval_metrics


def main() -> None:
    """Measure once and print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=100_000, help="images, and as many texts")
    parser.add_argument("--width", type=int, default=512, help="of the features")
    options = parser.parse_args()
    torch.manual_seed(0)
    images = F.normalize(torch.randn(options.pairs, options.width), dim=1)
    # near to their images, so that recall is neither nothing nor all
    texts = F.normalize(images + 0.2 * torch.randn_like(images), dim=1)
    pairs = torch.arange(options.pairs)[:, None].repeat(1, 2)
    started = time.monotonic()
    metrics = retrieval_metrics(images, texts, pairs, (1, 5, 10))
    seconds = time.monotonic() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        json.dumps(
            {
                **vars(options),
                "seconds": round(seconds, 1),
                "peak_mib": round(peak),
                "threads": torch.get_num_threads(),
                "image_retrieval_recall@1": metrics["image_retrieval_recall@1"],
            }
        )
    )


if __name__ == "__main__":
    main()
