"""ImageNet's validation images and its natural shifts, in the folders they are published in.

ImageNetV2 (Recht et al. 2019), ImageNet-Sketch (Wang et al. 2019), ImageNet-R (Hendrycks et al.
2021a), ImageNet-A (Hendrycks et al. 2021b) and ObjectNet (Barbu et al. 2019).
"""

import re
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from fastclip.bounded import read_object, read_text
from fastclip.data.files import image_size
from fastclip.data.index import IMAGE_EXTENSIONS
from fastclip.evaluate.features import ImageFile

VALIDATION = "imagenet"
_WORDNET_ID = re.compile(r"n\d{8}")
CLASSES = 1000
# how many classes ImageNet-R and ImageNet-A have
SUBSET_CLASSES = 200
# of images as they are published; of ObjectNet classes of objects
PUBLISHED_CLASSES = {
    "imagenet": CLASSES,
    "imagenetv2": CLASSES,
    "imagenet-sketch": CLASSES,
    "imagenet-r": SUBSET_CLASSES,
    "imagenet-a": SUBSET_CLASSES,
    "objectnet": 113,
}
# of red pixels around ObjectNet's images, so that training on them would show
OBJECTNET_BORDER = 2
# of ObjectNet, see its README
MAPPINGS = (
    "folder_to_objectnet_label.json",
    "objectnet_to_imagenet_1k.json",
    "pytorch_to_imagenet_2012_id.json",
    "imagenet_to_label_2012_v2",
)


class ShiftSet(NamedTuple):
    """Images and which of ImageNet's class indices are right for each.

    Args:
        name: e.g. "imagenet-r".
        images: N of them.
        allowed: the indices among which the model chooses; None for all.
        correct: N sets of right ones.
    """

    name: str
    images: list[ImageFile]
    allowed: tuple[int, ...] | None
    correct: list[frozenset[int]]

    def answers(self) -> dict[int, frozenset[int]]:
        """For every right index those that are right together with it."""
        return {index: group for group in set(self.correct) for index in group}


@cache
def wordnet_ids() -> tuple[str, ...]:
    """ImageNet's 1000 WordNet ids, which name the folders, in the order of class indices."""
    from timm.data import ImageNetInfo

    return tuple(ImageNetInfo().label_names())


def prompts() -> tuple[list[str], list[str]]:
    """The class names in the order of class indices and the 80 templates of CLIP's authors."""
    import open_clip

    templates = [template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]
    return list(open_clip.IMAGENET_CLASSNAMES), templates


def prompts_of(folders: Sequence[str]) -> tuple[list[str], list[str]] | None:
    """Class names, in the order of the folders, and templates; None of other folders.

    ImageNet's are called by WordNet ids, ImageNetV2's by class indices, all from 0 to 999.
    """
    index = {str(row): row for row in range(CLASSES)}
    if set(folders) != index.keys():
        if not folders or not all(_WORDNET_ID.fullmatch(folder) for folder in folders):
            return None
        index = {name: row for row, name in enumerate(wordnet_ids())}
    if not index.keys() >= set(folders):
        return None
    classes, templates = prompts()
    return [classes[index[folder]] for folder in folders], templates


def read_validation(root: Path) -> ShiftSet | None:
    """`imagenet/val/WNID/*`, None where it is not there."""
    return _read_wordnet(VALIDATION, [root / "imagenet" / "val"])


def read_v2(root: Path) -> ShiftSet | None:
    """`imagenetv2-matched-frequency-format-val/INDEX/*`, None where it is not there.

    Raises:
        ValueError: a folder's name is not a class index.
    """
    folder = root / "imagenetv2-matched-frequency-format-val"
    indices = {str(index): index for index in range(CLASSES)}
    return _read_folders("imagenetv2", folder, indices) if folder.is_dir() else None


def read_sketch(root: Path) -> ShiftSet | None:
    """`imagenet-sketch/sketch/WNID/*` or `imagenet-sketch/WNID/*`, None where it is not there."""
    folder = root / "imagenet-sketch"
    return _read_wordnet("imagenet-sketch", [folder / "sketch", folder])


def read_r(root: Path) -> ShiftSet | None:
    """`imagenet-r/WNID/*`, None where it is not there; see `_read_subset`."""
    return _read_subset("imagenet-r", root)


def read_a(root: Path) -> ShiftSet | None:
    """`imagenet-a/WNID/*`, None where it is not there; see `_read_subset`."""
    return _read_subset("imagenet-a", root)


def read_objectnet(root: Path) -> ShiftSet | None:
    """`objectnet-1.0/images/FOLDER/*` with `objectnet-1.0/mappings`, None where it is not there.

    Of its 313 classes of objects the 113 that are ImageNet's, each of which stands for one or more
    of ImageNet's classes, 125 in all, among which the model chooses.

    Raises:
        FileNotFoundError: a mapping is missing. ValueError: one names what others do not know.
    """
    folder = root / "objectnet-1.0"
    if not (folder / "images").is_dir():
        return None
    answers = _objectnet_answers(folder / "mappings")
    images: list[ImageFile] = []
    correct: list[frozenset[int]] = []
    for name, right in sorted(answers.items()):
        for path in _image_paths(folder / "images" / name):
            images.append(ImageFile(path, _inside_border(path)))
            correct.append(right)
    allowed = tuple(sorted(frozenset().union(*answers.values())))
    return ShiftSet("objectnet", images, allowed, correct)


SHIFTS: dict[str, Callable[[Path], ShiftSet | None]] = {
    "imagenetv2": read_v2,
    "imagenet-sketch": read_sketch,
    "imagenet-r": read_r,
    "imagenet-a": read_a,
    "objectnet": read_objectnet,
}


def _read_wordnet(name: str, folders: Sequence[Path]) -> ShiftSet | None:
    """The first folder that holds folders of WordNet ids."""
    indices = {wnid: index for index, wnid in enumerate(wordnet_ids())}
    for folder in folders:
        if any((folder / wnid).is_dir() for wnid in indices):
            return _read_folders(name, folder, indices)
    return None


def _read_subset(name: str, root: Path) -> ShiftSet | None:
    """A set of 200 classes, to which the model's choice is restricted.

    Raises:
        ValueError: there are more or fewer, so that the choice would be another.
    """
    found = _read_wordnet(name, [root / name])
    if found is None:
        return None
    allowed = tuple(sorted(found.answers()))
    if len(allowed) != SUBSET_CLASSES:
        raise ValueError(
            f"{root / name} has images of {len(allowed)} classes, {name} has {SUBSET_CLASSES}: the "
            "model would choose among others; unpack it whole"
        )
    return found._replace(allowed=allowed)


def _read_folders(name: str, folder: Path, indices: dict[str, int]) -> ShiftSet:
    """The images of `folder/CLASS/*`, in the order of class indices.

    Raises:
        ValueError: a folder is not a class.
    """
    names = [path.name for path in folder.iterdir() if path.is_dir()]
    unknown = sorted(set(names) - set(indices))
    if unknown:
        raise ValueError(
            f"{folder / unknown[0]} is not a class of ImageNet: folders are named as "
            f"{next(iter(indices))}; move it elsewhere"
        )
    images: list[ImageFile] = []
    correct: list[frozenset[int]] = []
    for class_name in sorted(names, key=indices.__getitem__):
        found = [ImageFile(path) for path in _image_paths(folder / class_name)]
        images += found
        correct += [frozenset({indices[class_name]})] * len(found)
    if not images:
        raise ValueError(f"{folder} holds no image; unpack {name} there")
    return ShiftSet(name, images, None, correct)


def _image_paths(folder: Path) -> Iterator[Path]:
    """The images in a folder, sorted; none where it is missing."""
    endings = {f".{extension}" for extension in IMAGE_EXTENSIONS}
    paths = sorted(folder.iterdir()) if folder.is_dir() else []
    return (path for path in paths if path.suffix.lower() in endings)


def _inside_border(path: Path) -> tuple[int, int, int, int]:
    width, height = image_size(path)
    border = OBJECTNET_BORDER
    return border, border, width - border, height - border


def _objectnet_answers(mappings: Path) -> dict[str, frozenset[int]]:
    """The class indices that are right for each folder of an object that ImageNet knows."""
    paths = [mappings / name for name in MAPPINGS]
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{', '.join(missing)} not found: ObjectNet's images have no ImageNet classes without; "
            "unpack its folder mappings too"
        )
    label_of_folder, names_of_label, line_of_index = map(_read_json, paths[:3])
    lines = read_text(paths[3]).splitlines()
    index_of_line = {line: int(index) for index, line in line_of_index.items()}
    index_of_name = {name.strip(): index_of_line.get(line) for line, name in enumerate(lines)}
    answers = {}
    for folder, label in label_of_folder.items():
        if label not in names_of_label:
            continue
        indices = {name: index_of_name.get(name) for name in names_of_label[label].split("; ")}
        unknown = [name for name, index in indices.items() if index is None]
        if unknown:
            raise ValueError(
                f"{mappings}: {label!r} stands for ImageNet's {unknown[0]!r}, which "
                "imagenet_to_label_2012_v2 does not have; unpack the mappings again"
            )
        answers[folder] = frozenset(index for index in indices.values() if index is not None)
    return answers


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return read_object(path)
    except ValueError as error:
        raise ValueError(f"{error}; unpack it again") from error
