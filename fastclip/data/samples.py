"""One sample, and what makes one unusable."""

import codecs
import io
import json
import os
from collections.abc import Callable, Container
from dataclasses import dataclass, field
from typing import Any, BinaryIO, Protocol

import numpy as np
from PIL import Image, UnidentifiedImageError

from fastclip.data.augment import AugmentationParams, Hue
from fastclip.data.complexity import too_complex
from fastclip.data.index import IMAGE_EXTENSIONS, MAX_MEMBER_BYTES, Fault

MAX_IMAGE_PIXELS = 25_000_000
# With the shorter side resized to 500 pixels, such a strip has 25 million as well.
MAX_ASPECT = 100
# A decoder goes over the whole image for each scan of a progressive JPEG; it has about ten.
MAX_JPEG_SCANS = 100
MAX_TEXT_BYTES = 1 << 20
MAX_LABEL_BYTES = 64
MAX_FEATURE_BYTES = 1 << 20
# a teacher's features of a sample: what a batch calls them, and the members that hold them
FEATURE_MEMBERS = {
    "teacher_image_features": "teacher_image.npy",
    "teacher_text_features": "teacher_text.npy",
}

_NO_IMAGE = Image.new("RGB", (1, 1))

# of a sample's members, by extension
_Contents = dict[str, bytes]


class Meaning(Protocol):
    """What a sample's texts and class say, known to the source that made them.

    Augmentation asks it, so that all that is said stays true.

    """

    @property
    def structure(self) -> frozenset[str]:
        """Words, in lower case, that say how the others of a text belong together."""
        ...

    def is_true_of(self, view: AugmentationParams, hue: Hue) -> bool:
        """Whether all that is said is true of a view; it is of the image as it is.

        Args:
            view: of the image.
            hue: "yiq" or "hsv", as its colors are turned.
        """
        ...


@dataclass
class Sample:
    """One image with its captions.

    Attributes:
        image: RGB; what the file's header says, without pixels, where it was not to be decoded.
        texts: the captions, where no source of them is asked for by name.
        label: the class index, where the data has one.
        encoded: the image file's own bytes, where there is a file.
        captions: the captions of each source that was asked for and is there, by its name.
        negatives: false captions that the data bring.
        where: the image's file or member, for messages.
        meaning: what texts and class say, where that is known.
        features: those of `FEATURE_MEMBERS` that were asked for and are there, (E,) float32 each.
    """

    key: str
    image: Image.Image
    texts: tuple[str, ...]
    label: int | None = None
    encoded: bytes | None = None
    captions: dict[str, tuple[str, ...]] = field(default_factory=dict)
    negatives: tuple[str, ...] = ()
    where: str = ""
    meaning: Meaning | None = None
    features: dict[str, np.ndarray] = field(default_factory=dict)


class Source(Protocol):
    """Where samples come from: declared counts per shard and random access.

    parts: number of shards of each pattern joined by '::'.
    """

    counts: tuple[int, ...]
    parts: tuple[int, ...]

    def read(self, shard: int, index: int, *, pixels: bool = True) -> Sample: ...

    def place(self, shard: int) -> str:
        """The name of a shard or table, for messages."""
        ...

    def drain_faults(self) -> list[Fault]: ...

    def digest(self) -> str:
        """What changes when other images are read: of files their names, sizes and times."""
        ...


class UnreadableSample(Exception):
    """One sample cannot be used; the run continues with another."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(str(fault))
        self.fault = fault


def open_image(encoded: bytes, where: str) -> Image.Image:
    """A JPEG, PNG or WebP image whose header was read but not its pixels.

    Raises:
        UnreadableSample: the bytes are no such image; or it has over 25 million pixels, a side
            over 100 times the other, over 100 scans or too much before its pixels, and is not to
            be decoded.
    """
    excess = too_complex(encoded)
    if excess:
        raise UnreadableSample(Fault("image too complex", where, excess))
    try:
        # other formats of Pillow's start programs, or are not what trainers expect
        image = Image.open(io.BytesIO(encoded), formats=("JPEG", "PNG", "WEBP"))
    except UnidentifiedImageError as error:
        detail = f"no JPEG, PNG or WebP; it begins with {encoded[:16]!r}"
        raise UnreadableSample(Fault("corrupt image", where, detail)) from error
    except Image.DecompressionBombError as error:
        raise UnreadableSample(Fault("image too large", where, str(error)[:80])) from error
    except Exception as error:
        raise UnreadableSample(Fault("corrupt image", where, str(error)[:80])) from error
    size = f"{image.width} x {image.height}"
    if image.width * image.height > MAX_IMAGE_PIXELS:
        raise UnreadableSample(Fault("image too large", where, size))
    if max(image.size) > MAX_ASPECT * min(image.size):
        raise UnreadableSample(Fault("image too narrow", where, size))
    scans = _count_scans(encoded) if image.format in ("JPEG", "MPO") else 0
    if scans > MAX_JPEG_SCANS:
        raise UnreadableSample(Fault("image too complex", where, f"{scans:,} scans"))
    return image


def _count_scans(encoded: bytes) -> int:
    """How often a JPEG has the mark of a scan, which compressed data cannot hold."""
    # six times as fast as bytes.count, which stops at every 0xff
    levels = np.frombuffer(encoded, dtype=np.uint8)
    return int(np.count_nonzero((levels[:-1] == 0xFF) & (levels[1:] == 0xDA)))


def decode_image(encoded: bytes, where: str) -> Image.Image:
    """An RGB image from JPEG, PNG or WebP bytes.

    Raises:
        UnreadableSample: see `open_image` and `decode`.
    """
    return decode(open_image(encoded, where), where)


def decode(image: Image.Image, where: str) -> Image.Image:
    """The pixels of an opened image as RGB: its first frame, without its transparency.

    An orientation in EXIF is left aside, as open_clip does.

    Raises:
        UnreadableSample: the file is not a whole image.
    """
    try:
        if image.mode.startswith("I"):
            # 16-bit gray, of which Pillow's conversion makes white
            return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
        return image.convert("RGB")
    # Pillow raises more than OSError on damaged input, and the set changes with releases
    except Exception as error:
        raise UnreadableSample(Fault("corrupt image", where, str(error)[:80])) from error


class SampleReader:
    """Reads a shard's samples, whose places an index has.

    Args:
        required: extensions a sample must have besides an image.
        captions, optional_texts, features: see `fastclip.data.shards.ShardSource`.

    Attributes:
        required: what an index must be asked for.
    """

    def __init__(
        self,
        required: tuple[str, ...],
        captions: tuple[str, ...] = (),
        optional_texts: bool = False,
        features: bool = False,
    ) -> None:
        self.captions = captions
        self.features = features
        self.optional_texts = optional_texts and not captions and "txt" not in required
        if captions:
            # any of them will do; where there are several, only reading shows which
            members = {"txt" if name == "txt" else "json" for name in captions}
            others = tuple(extension for extension in required if extension != "txt")
            required = (*others, *(members if len(members) == 1 else ()))
        self.required = required

    def contents(self, file: BinaryIO, files: dict[str, tuple[int, int]], where: str) -> _Contents:
        """The bytes of what a sample needs of its {extension: (offset, bytes)}.

        Of texts that are too long one byte more than the limit is read, of JSON nothing.

        Raises:
            UnreadableSample: the file is shorter than it was. OSError: it cannot be read.
        """
        image = _image_extension(files)
        limits = {image: MAX_MEMBER_BYTES, "cls": MAX_LABEL_BYTES + 1}
        if "txt" in self.required or "txt" in self.captions or self.optional_texts:
            limits["txt"] = MAX_TEXT_BYTES + 1
        if "txt" in self.required or self.captions or self.optional_texts:
            limits["json"] = MAX_TEXT_BYTES
        if self.features:
            limits |= dict.fromkeys(FEATURE_MEMBERS.values(), MAX_FEATURE_BYTES + 1)
        contents = {}
        for extension, limit in limits.items():
            offset, size = files.get(extension, (0, limit + 1))
            if extension not in files or (extension == "json" and size > limit):
                continue
            size = min(size, limit)
            contents[extension] = os.pread(file.fileno(), size, offset)
            if len(contents[extension]) < size:
                fault = Fault("shard changed while it was read", f"{where}.{extension}")
                raise UnreadableSample(fault)
        return contents

    def sample(self, key: str, contents: _Contents, where: str, *, pixels: bool = True) -> Sample:
        """The sample that `contents` make; without `pixels` its image is opened, not decoded.

        Raises:
            UnreadableSample: with the reason, and `where` with the member's extension.
            ValueError: a teacher's features are no such vector.
        """
        image, encoded = self.image(contents, where, pixels=pixels)
        sample = Sample(key, image, (), encoded=encoded)
        sample.where = f"{where}.{_image_extension(contents)}"
        try:
            self.add_texts(sample, contents, where)
        except UnreadableSample:
            if not self.optional_texts:
                raise
        try:
            sample.label = self.label(contents, where)
        except UnreadableSample:
            # some data have a name there, which is no matter where no class is needed
            if "cls" in self.required:
                raise
        sample.features = {
            name: decode_features(contents[member], f"{where}.{member}")
            for name, member in FEATURE_MEMBERS.items()
            if member in contents
        }
        return sample

    def check(
        self, file: BinaryIO, key: str, files: dict[str, tuple[int, int]], where: str
    ) -> tuple[list[Fault], bool]:
        """All that is wrong with a sample, and whether `sample` makes one of it all the same."""
        try:
            contents = self.contents(file, files, where)
        except UnreadableSample as error:
            return [error.fault], False
        except OSError as error:
            return [Fault("member not readable", where, str(error))], False
        texts = _fault_of(self.add_texts, Sample(key, _NO_IMAGE, ()), contents, where)
        label = _fault_of(self.label, contents, where)
        found = [_fault_of(self.image, contents, where), texts]
        readable = not any(found) and (label is None or "cls" not in self.required)
        found.append(label)
        if texts is None and "txt" in contents:
            # it may be damaged where KEY.json has captions that are used instead
            found.append(_fault_of(decode_text, contents["txt"], f"{where}.txt"))
        size = files["json"][1] if "json" in files else 0
        found.append(_json_fault(contents.get("json", b""), size, f"{where}.json"))
        return [fault for fault in found if fault], readable

    def image(
        self, contents: _Contents, where: str, *, pixels: bool = True
    ) -> tuple[Image.Image, bytes]:
        """The image and its file; see `sample`."""
        extension = _image_extension(contents)
        where = f"{where}.{extension}"
        image = open_image(contents[extension], where)
        return decode(image, where) if pixels else image, contents[extension]

    def add_texts(self, sample: Sample, contents: _Contents, where: str) -> None:
        """Give the sample its captions and negatives; see `sample`."""
        content = _json_object(contents.get("json", b""))
        sample.negatives = _texts(content.get("hard_negatives"))
        found: tuple[str, ...]
        unusable: UnreadableSample | None = None
        for name in self.captions:
            if name != "txt":
                found = _texts(content.get(name))
            elif "txt" in contents:
                try:
                    found = (decode_text(contents["txt"], f"{where}.txt"),)
                except UnreadableSample as error:
                    found, unusable = (), error
            else:
                found = ()
            if found:
                sample.captions[name] = found
        # one usable caption is enough
        if unusable is not None and not sample.captions:
            raise unusable
        sample.texts = tuple(text for found in sample.captions.values() for text in found)
        if not sample.texts:
            listed = content.get("captions")
            sample.texts = _texts(listed) if isinstance(listed, list) else ()
            if not sample.texts and "txt" in contents:
                sample.texts = (decode_text(contents["txt"], f"{where}.txt"),)
        if self.captions and not sample.texts:
            raise UnreadableSample(Fault("sample without caption", where))

    def label_of(self, file: BinaryIO, files: dict[str, tuple[int, int]], where: str) -> int | None:
        """The class index of a sample in a file; None where there is none or a damaged one."""
        if "cls" not in files:
            return None
        offset, size = files["cls"]
        content = os.pread(file.fileno(), min(size, MAX_LABEL_BYTES + 1), offset)
        try:
            return self.label({"cls": content}, where)
        except UnreadableSample:
            return None

    def label(self, contents: _Contents, where: str) -> int | None:
        """The class index, None where there is none; see `sample`."""
        if "cls" not in contents:
            return None
        encoded, where = contents["cls"].removeprefix(codecs.BOM_UTF8), f"{where}.cls"
        try:
            label = int(encoded) if len(encoded) <= MAX_LABEL_BYTES else -1
        except ValueError as error:
            raise UnreadableSample(Fault("class index is not an integer", where)) from error
        if not 0 <= label < 1 << 31:
            raise UnreadableSample(Fault("class index out of range", where))
        return label


def decode_text(encoded: bytes, where: str) -> str:
    """The caption in a text file, without a byte-order mark and blanks around it.

    Raises:
        UnreadableSample: it is over 1 MiB, no UTF-8, empty, or holds zero bytes.
    """
    if len(encoded) > MAX_TEXT_BYTES:
        raise UnreadableSample(Fault("caption too long", where, f"over {MAX_TEXT_BYTES:,} bytes"))
    try:
        text = encoded.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise UnreadableSample(Fault("caption is not UTF-8", where)) from error
    if "\0" in text:
        # as UTF-16 has, and headers of the archive where a size in it is wrong
        raise UnreadableSample(Fault("caption holds zero bytes", where))
    if not text:
        raise UnreadableSample(Fault("empty caption", where))
    return text


def decode_features(encoded: bytes, where: str) -> np.ndarray:
    """The vector in a .npy file, (E,) float32.

    Raises:
        ValueError: it is no file of one vector of finite float16, float32 or float64 numbers; such
            a sample is an error of whoever wrote the features, and not left out.
    """
    file = io.BytesIO(encoded)
    try:
        # np.load would also open archives, and make room for whatever a header claims
        if len(encoded) > MAX_FEATURE_BYTES or np.lib.format.read_magic(file) != (1, 0):
            raise ValueError(f"over {MAX_FEATURE_BYTES:,} bytes, or no .npy file of version 1.0")
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        if dtype.kind != "f" or len(shape) != 1 or not shape[0]:
            raise ValueError(f"{dtype} of shape {shape}")
        features = np.frombuffer(file.read(), dtype)
        if features.shape != shape or not np.isfinite(features).all():
            raise ValueError(f"not {shape[0]} finite numbers")
    # what a damaged header makes numpy raise changes with its releases
    except Exception as error:
        raise ValueError(
            f"{where} holds no features ({error}); write one vector of finite numbers, (E,) in "
            "float16 or float32, as fastclip embed shards does"
        ) from error
    return features.astype(np.float32)


def _image_extension(files: Container[str]) -> str:
    return next(extension for extension in IMAGE_EXTENSIONS if extension in files)


def _json_object(encoded: bytes) -> dict[str, Any]:
    """A sample's KEY.json; empty where it is none, which KEY.txt then makes up for."""
    try:
        content = json.loads(encoded) if encoded else {}
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _json_fault(encoded: bytes, size: int, where: str) -> Fault | None:
    """What keeps captions in KEY.json from being used, over which `_json_object` is silent."""
    if size > MAX_TEXT_BYTES:
        return Fault("JSON too long", where, f"{size:,} bytes")
    try:
        content = json.loads(encoded) if encoded else {}
    except (ValueError, RecursionError) as error:
        return Fault("damaged JSON", where, str(error)[:80])
    if not isinstance(content, dict):
        return Fault("JSON is not a dictionary", where)
    listed = content.get("captions", [])
    if not isinstance(listed, list) or not all(isinstance(text, str) for text in listed):
        return Fault("captions are not a list of texts", where)
    return None


def _fault_of(step: Callable[..., object], *arguments: object) -> Fault | None:
    try:
        step(*arguments)
    except UnreadableSample as error:
        return error.fault
    return None


def _texts(value: object) -> tuple[str, ...]:
    """The texts of a value of JSON, one or a list of them; empty where it is anything else."""
    try:
        listed = [value] if isinstance(value, str) else value
        if not isinstance(listed, list):
            return ()
        # half a surrogate pair, which JSON may spell and no tokenizer takes, fails here
        texts = tuple(text.encode().decode().strip() for text in listed if text.strip())
        return texts if not any("\0" in text for text in texts) else ()
    except (ValueError, AttributeError, TypeError):
        return ()
