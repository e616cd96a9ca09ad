"""ImageFolder: one folder a class, captions from prompt templates; and folders of images alone."""

import os
from array import array
from collections.abc import Iterator
from pathlib import Path

from fastclip.data.files import ImageFiles
from fastclip.data.index import IMAGE_EXTENSIONS
from fastclip.data.strings import Strings
from fastclip.data.templates import DEFAULT_TEMPLATES, fill_template


class FolderSource(ImageFiles):
    """The images of `FOLDER/CLASS NAME/*.jpg`, also jpeg, png and webp, and of folders in these.

    A sample's label is the index of its class among the sorted names of the folders, its captions
    are all templates filled with the name.

    Args:
        folder: holds one folder a class.
        templates: each with {} or {c} where the name goes.

    Raises:
        ValueError: there is no class with an image, no template, or one without a place.
        FileNotFoundError: there is no such folder.
    """

    def __init__(self, folder: Path, templates: list[str] | None = None) -> None:
        templates = list(DEFAULT_TEMPLATES) if templates is None else templates
        if not templates:
            raise ValueError(
                "there is no prompt template; give one a line, e.g. 'a photo of a {}.'"
            )
        self.classes = class_names(folder)
        self._captions = [
            tuple(fill_template(template, name) for template in templates) for name in self.classes
        ]
        self._paths = Strings()
        self._labels = array("i")
        for label, name in enumerate(self.classes):
            for path in image_paths(folder / name, inside=folder):
                self._paths.append(f"{name}/{path}")
                self._labels.append(label)
        if not self._labels:
            raise ValueError(
                f"{folder} holds no images; put them at CLASS NAME/*.jpg, one folder a class"
            )
        super().__init__(str(folder), len(self._labels), (folder,))

    def path_of(self, index: int) -> str:
        """The image's path below the folder."""
        return self._paths[index]

    def texts_of(self, index: int) -> tuple[str, ...]:
        """The class's prompts."""
        return self._captions[self._labels[index]]

    def label_of(self, index: int) -> int:
        """The class's index."""
        return self._labels[index]


class TreeSource(ImageFiles):
    """Every image below a folder, also of folders in it: neither captions nor labels.

    Args:
        folder: searched with all folders in it, also those that are links, each once; what is
            hidden is left out.

    Raises:
        ValueError: there is no image. FileNotFoundError: there is no such folder.
    """

    def __init__(self, folder: Path) -> None:
        self._paths = Strings()
        for path in image_paths(folder):
            self._paths.append(path)
        if not len(self._paths):
            raise ValueError(
                f"{folder} holds no images (.jpg, .jpeg, .png, .webp); if it holds shards, name "
                f"them, e.g. '{folder}/{{00000..00009}}.tar'"
            )
        super().__init__(str(folder), len(self._paths), (folder,))

    def path_of(self, index: int) -> str:
        """The image's path below the folder."""
        return self._paths[index]

    def texts_of(self, index: int) -> tuple[str, ...]:
        """There are none."""
        return ()


def image_paths(folder: Path, *, inside: Path | None = None) -> Iterator[str]:
    """The paths of all images below a folder, relative to it, each folder's in order.

    Args:
        folder: whose images are wanted.
        inside: a folder that it is part of; links that lead back to that are not followed.

    Raises:
        FileNotFoundError: there is no such folder. OSError: a folder in it cannot be read.
    """
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"{folder} does not exist or is not a folder")
    # links are followed, as class folders often are some; none that leads back
    seen = set() if inside is None else {_identity(inside)}
    for place, folders, files in os.walk(folder, followlinks=True, onerror=_raise):
        if _identity(place) in seen:
            folders.clear()
            continue
        seen.add(_identity(place))
        folders[:] = sorted(name for name in folders if name[0] != ".")
        below = os.path.relpath(place, folder)
        for name in sorted(files):
            if _is_image(name):
                yield name if below == os.curdir else f"{below}/{name}"


def _identity(folder: str | Path) -> tuple[int, int]:
    """The same for a folder and for links to it."""
    state = os.stat(folder)
    return state.st_dev, state.st_ino


def _raise(error: OSError) -> None:
    raise error


def has_classes_alone(folder: Path) -> bool:
    """Whether a folder has images, all of them in `FOLDER/CLASS NAME/`, as `FolderSource` wants."""
    depths = {path.count("/") for path in image_paths(folder)}
    return depths == {1}


def class_names(folder: Path) -> list[str]:
    """The names of an ImageFolder's classes in index order.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"{folder} does not exist or is not a folder")
    entries = os.scandir(folder)
    return sorted(entry.name for entry in entries if entry.is_dir() and entry.name[0] != ".")


def holds_image_folders(folder: Path) -> bool:
    """Whether a sub-folder has an image in it."""
    return os.path.isdir(folder) and any(
        _is_image(entry.name) for name in class_names(folder) for entry in os.scandir(folder / name)
    )


def _is_image(name: str) -> bool:
    return name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS and not name.startswith(".")
