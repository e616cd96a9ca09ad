"""Shards with corrupted images: the synthetic shifts of ImageNet-C (Hendrycks and Dietterich 2019).

The library `imagecorruptions` makes them; it is imported only when it is used.
"""

import hashlib
import io
import os
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastclip.atomic import writing
from fastclip.data.editing import ShardEditor
from fastclip.data.faults import FaultLog
from fastclip.data.index import Fault
from fastclip.data.remote import ShardCache, beside, is_remote, read_small
from fastclip.data.samples import UnreadableSample
from fastclip.data.shards import expand_shards, open_shard
from fastclip.data.writing import add_sizes

KINDS = (
    *("gaussian_noise", "shot_noise", "impulse_noise"),
    *("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    *("snow", "frost", "fog", "brightness"),
    *("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
)
# held out by its authors for choosing hyperparameters
EXTRA_KINDS = ("speckle_noise", "gaussian_blur", "spatter", "saturate")
SEVERITIES = range(1, 6)
# of an image, in pixels: the library takes none that are smaller
LEAST_SIDE = 32

_LABELS = ("cls", "txt", "json")
_BESIDE = (
    *("classes.txt", "classnames.txt"),
    *("templates.txt", "zeroshot_classification_templates.txt"),
)


def corrupt_image(image: Image.Image, kind: str, severity: int, key: str) -> Image.Image:
    """A corrupted copy of the same size.

    Args:
        image: RGB.
        kind: of `KINDS` or `EXTRA_KINDS`.
        severity: 1 (slight) to 5.
        key: the sample's name: with the kind it decides what is drawn at random.

    Raises:
        ValueError: the image is smaller than 32 pixels, or the library is not installed.
    """
    if min(image.size) < LEAST_SIDE:
        raise ValueError(
            f"{key} is {image.width} x {image.height}: corruptions are made for sides of "
            f"{LEAST_SIDE} pixels or more; leave such images out, or enlarge them first"
        )
    corrupt = _library().corrupt
    seed = int.from_bytes(hashlib.sha256(f"{kind}:{key}".encode()).digest()[:4], "little")
    with _seeded(seed):
        pixels = corrupt(np.asarray(image), severity=severity, corruption_name=kind)
    return Image.fromarray(pixels)


def corrupt_shards(
    shards: str,
    target: Path,
    kinds: Sequence[str] = KINDS,
    severity: int = 3,
    number: int | None = None,
) -> tuple[dict[str, int], FaultLog]:
    """Write `KIND-SEVERITY.tar` for each kind, with the images as PNG and the labels as they are.

    KEY.cls, KEY.txt and KEY.json are kept byte for byte; class names and templates beside the
    shards are copied. Pixels depend on the image, the key, the kind and the severity alone.

    Args:
        shards: as for `fastclip.data.shards.expand_shards`; no key may occur twice.
        target: folder, made if needed.
        kinds: of `KINDS` and `EXTRA_KINDS`.
        severity: 1 to 5.
        number: of samples, the first ones; None for all.

    Returns:
        The number of samples in each shard by its name, and what was left out: images that could
        not be read, or are smaller than 32 pixels.

    Raises:
        ValueError: a kind or the severity is unknown, no image can be used, a key occurs twice, or
            the library is not installed.
        FileExistsError: there is such a shard; nothing is overwritten.
        FileNotFoundError: a shard does not exist. FetchError: a remote one cannot be fetched.
    """
    unknown = [kind for kind in kinds if kind not in (*KINDS, *EXTRA_KINDS)]
    if unknown or not kinds:
        raise ValueError(
            f"unknown kind {unknown[0] if unknown else ''!r}; give some of "
            f"{', '.join((*KINDS, *EXTRA_KINDS))}"
        )
    if severity not in SEVERITIES:
        raise ValueError(f"severity {severity}: give 1 (slight) to 5")
    _library()
    names = expand_shards(shards)
    target.mkdir(parents=True, exist_ok=True)
    paths = {kind: target / f"{kind}-{severity}.tar" for kind in kinds}
    for path in paths.values():
        if path.exists():
            raise FileExistsError(f"{path} exists; delete it, or choose another folder")
    _copy_beside(names[0], target)
    faults = FaultLog()
    counts = {}
    for kind, path in paths.items():
        with (
            writing(path) as out,
            # names may be longer than USTAR takes them
            tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar,
        ):
            counts[path.name] = _write_corrupted(tar, names, kind, severity, number, faults)
            if not counts[path.name]:
                raise ValueError(f"no image of {shards} can be corrupted: {faults.summary()}")
        add_sizes(target, {path.name: counts[path.name]})
    return counts, faults


def _write_corrupted(
    tar: tarfile.TarFile,
    names: Sequence[str],
    kind: str,
    severity: int,
    number: int | None,
    faults: FaultLog,
) -> int:
    cache = ShardCache()
    keys: set[str] = set()
    for name in names:
        with open_shard(name, cache) as file:
            shard = ShardEditor(file, name)
            faults.add(shard.faults)
            for key, files in shard.samples.items():
                if len(keys) == number:
                    return len(keys)
                if key in keys:
                    raise ValueError(
                        f"{name} has the key {key} of an earlier sample; give "
                        "such shards one by one, with a folder each"
                    )
                try:
                    image = shard.image(key)
                    if min(image.size) < LEAST_SIDE:
                        size = f"{image.width} x {image.height}, at least {LEAST_SIDE} pixels"
                        raise UnreadableSample(Fault("small image", f"{name}:{key}", size))
                except UnreadableSample as error:
                    faults.add([error.fault])
                    continue
                keys.add(key)
                png = io.BytesIO()
                # anything but lossless would corrupt once more
                corrupt_image(image, kind, severity, key).save(png, "PNG")
                _add(tar, f"{key}.png", png.getvalue())
                for extension in _LABELS:
                    if extension in files:
                        _add(tar, f"{key}.{extension}", shard.read(*files[extension]))
    return len(keys)


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def _copy_beside(shard: str, target: Path) -> None:
    copies = {beside(shard, name): target / name for name in _BESIDE}
    if is_remote(shard):
        contents = read_small(copies)
    else:
        contents = {name: Path(name).read_bytes() for name in copies if os.path.isfile(name)}
    for name, content in contents.items():
        if not copies[name].exists():
            with writing(copies[name]) as file:
                file.write(content)


@contextmanager
def _seeded(number: int) -> Iterator[None]:
    """All that the library draws at random is seeded inside; NumPy's global state stays as it was.

    Most kinds draw from that state, glass blur and impulse noise from new generators, which would
    have a seed of the system's.
    """
    state, new_generator = np.random.get_state(), np.random.default_rng
    np.random.seed(number)
    np.random.default_rng = lambda seed=None: new_generator(number if seed is None else seed)
    try:
        yield
    finally:
        np.random.default_rng = new_generator
        np.random.set_state(state)


def _library() -> Any:
    try:
        import imagecorruptions
    except ModuleNotFoundError as error:
        raise ValueError(
            "corruptions need the package imagecorruptions-imaug: pip install "
            "'fastclip-kernels[corruptions]'"
        ) from error
    return imagecorruptions
