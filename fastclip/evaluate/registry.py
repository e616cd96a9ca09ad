"""The benchmarks that are files on disk: what they need, where it is from, what guessing scores."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fastclip.messages import filled


@dataclass(frozen=True)
class Benchmark:
    """A published benchmark.

    Args:
        name: the command's, `fastclip eval NAME --root FOLDER`.
        title: what it measures.
        task: as result files name it.
        files: paths and patterns below the root that must be there.
        source: where to get them and where they go.
        metric: what a model is compared by.
        chance: what guessing scores in it, in [0, 1]; by part where that differs.
    """

    name: str
    title: str
    task: str
    files: tuple[str, ...]
    source: str
    metric: str
    chance: Mapping[str, float] | float


_SUGARCREPE = "add_att add_obj replace_att replace_obj replace_rel swap_att swap_obj"

_ALL = (
    Benchmark(
        name="aro",
        title="ARO: relations, attributes and word order (Yuksekgonul et al. 2023)",
        task="image_caption_selection",
        files=("visual_genome_relation.json", "visual_genome_attribution.json", "images/*.jpg"),
        source=(
            "github.com/mertyg/vision-language-models-are-bows links the two JSON files and the "
            "Visual Genome images, which go to images/; coco_order.json and flickr30k_order.json, "
            "lists of {image_path, caption_options: [true, 4 perturbations]}, are optional"
        ),
        metric=(
            "relation_macro (without symmetric relations) and attribution_macro; coco_order and "
            "flickr30k_order"
        ),
        chance={"relation": 0.5, "attribution": 0.5, "coco_order": 0.2, "flickr30k_order": 0.2},
    ),
    Benchmark(
        name="sugarcrepe",
        title="SugarCrepe: hard negative captions without tell-tale style (Hsieh et al. 2023)",
        task="image_caption_selection",
        files=(*(f"sugar_crepe/{part}.json" for part in _SUGARCREPE.split()), "val2017/*.jpg"),
        source=(
            "the folder data of github.com/RAIVNLab/sugar-crepe goes to sugar_crepe/, COCO's "
            "val2017.zip of cocodataset.org is unpacked to val2017/"
        ),
        metric="macro, the mean accuracy of the seven sets",
        chance=0.5,
    ),
    Benchmark(
        name="winoground",
        title="Winoground: the same words in another order (Thrush et al. 2022)",
        task="image_caption_selection",
        files=("examples.jsonl", "images/*.png"),
        source=(
            "huggingface.co/datasets/facebook/winoground after accepting its license (research "
            "only): examples.jsonl, and images.zip unpacked to images/"
        ),
        metric="text_score, image_score and group_score",
        chance={"text_score": 0.25, "image_score": 0.25, "group_score": 1 / 6},
    ),
    Benchmark(
        name="docci",
        title="DOCCI: retrieval by long descriptions, test split (Onoe et al. 2024)",
        task="zeroshot_retrieval",
        files=("docci_descriptions.jsonlines", "images/*.jpg"),
        source=(
            "google.github.io/docci: docci_descriptions.jsonlines, and docci_images.tar.gz "
            "unpacked to images/"
        ),
        metric="image_retrieval_recall@k and text_retrieval_recall@k",
        chance={f"recall@{k}": k / 5000 for k in (1, 5, 10)},
    ),
    Benchmark(
        name="robustness",
        title="ImageNet and its natural shifts: effective robustness (Taori et al. 2020)",
        task="robustness",
        files=("imagenet/val/*",),
        source=(
            "image-net.org: ILSVRC2012's validation images, sorted into imagenet/val/WNID/; and "
            "any of imagenetv2-matched-frequency-format-val/ (huggingface.co/datasets/vaishaal/"
            "ImageNetV2), imagenet-sketch/ (github.com/HaohanWang/ImageNet-Sketch), imagenet-r/ "
            "(github.com/hendrycks/imagenet-r), imagenet-a/ (github.com/hendrycks/"
            "natural-adv-examples) and objectnet-1.0/ (objectnet.dev)"
        ),
        metric="acc1, and rho: how far it is above what ImageNet accuracy foretells",
        chance={
            **dict.fromkeys(("imagenet", "imagenetv2", "imagenet-sketch"), 1 / 1000),
            **dict.fromkeys(("imagenet-r", "imagenet-a"), 1 / 200),
            "objectnet": 1 / 113,
        },
    ),
)

BENCHMARKS: dict[str, Benchmark] = {benchmark.name: benchmark for benchmark in _ALL}


def require(name: str, root: Path) -> Path:
    """The folder of a benchmark whose files are there.

    Args:
        name: of `BENCHMARKS`.
        root: the folder.

    Raises:
        FileNotFoundError: a file is missing; the message says which, what to get and where from.
    """
    benchmark = BENCHMARKS[name]
    root = root.expanduser()
    missing = [file for file in benchmark.files if next(root.glob(file), None) is None]
    if missing:
        raise FileNotFoundError(
            f"{name}: {root} lacks {', '.join(missing)}; get the files from {benchmark.source}"
        )
    return root


def describe(benchmark: Benchmark) -> str:
    """The entry as text, in lines of at most 80 columns where words allow it."""
    chance = benchmark.chance
    parts = chance if isinstance(chance, Mapping) else {"": chance}
    lines = {
        "files": ", ".join(benchmark.files),
        "from": benchmark.source,
        "metric": benchmark.metric,
        "chance": ", ".join(f"{part} {share:.4g}".strip() for part, share in parts.items()),
    }
    return "\n".join(
        [
            filled(f"{benchmark.name}: ", benchmark.title, 2),
            *(filled(f"  {name + ':':8} ", text) for name, text in lines.items()),
        ]
    )
