"""Search among many features in a file: seconds and peak memory, beside sorting all scores.

python -m fastclip.bench.search --images 100000 --width 512
"""

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from numpy.lib.format import open_memmap

from fastclip.evaluate.search import search

_CHUNK = 10_000


def main() -> None:
    """Measure once and print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=100_000, help="rows of features")
    parser.add_argument("--width", type=int, default=512, help="of the features")
    parser.add_argument("--queries", type=int, default=1, help="searched for in one call")
    parser.add_argument("--k", type=int, default=10, help="images wanted of each")
    options = parser.parse_args()
    random = np.random.default_rng(0)
    queries = random.standard_normal((options.queries, options.width), dtype=np.float32)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "features.npy"
        _write(path, options.images, options.width, random)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        features = np.load(path, mmap_mode="r")
        # its best are equal rows
        queries[0] = features[0]
        started, used = time.perf_counter(), time.process_time()
        scores, rows = search(features, queries, options.k)
        seconds, processor = time.perf_counter() - started, time.process_time() - used
        peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        started = time.perf_counter()
        want = _sorted(features, queries, options.k)
        sorting = time.perf_counter() - started
        mapped = path.stat().st_size / 2**20
    print(
        json.dumps(
            {
                **vars(options),
                "seconds": round(seconds, 3),
                "cpu_seconds": round(processor, 3),
                # pages of the file that is mapped count, and can be dropped at any time
                "peak_mib": round(peak),
                "file_mib": round(mapped),
                "sort_seconds": round(sorting, 3),
                "equals_sort": rows.tolist() == want.tolist(),
                "best_score": round(scores[0, 0].item(), 4),
                "threads": torch.get_num_threads(),
            }
        )
    )


def _write(path: Path, count: int, width: int, random: np.random.Generator) -> None:
    """Normalized rows, of which every thousandth is the same."""
    rows = open_memmap(path, mode="w+", dtype=np.float32, shape=(count, width))
    for start in range(0, count, _CHUNK):
        drawn = random.standard_normal((min(_CHUNK, count - start), width), dtype=np.float32)
        rows[start : start + _CHUNK] = drawn / np.linalg.norm(drawn, axis=1, keepdims=True)
    rows[::1000] = rows[0]
    rows.flush()


def _sorted(features: np.ndarray, queries: np.ndarray, k: int) -> np.ndarray:
    """The first k rows of a stable sort of all scores in float64."""
    best = []
    for query in queries.astype(np.float64):
        starts = range(0, len(features), _CHUNK)
        scores = [(features[s : s + _CHUNK].astype(np.float64) * query).sum(axis=1) for s in starts]
        best.append(np.argsort(-np.concatenate(scores), kind="stable")[:k])
    return np.stack(best)


if __name__ == "__main__":
    main()
