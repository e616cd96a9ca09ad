"""Adding to the samples of shards: all else is kept byte for byte, and a kill costs little."""

import fcntl
import hashlib
import json
import os
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from PIL import Image

from fastclip.atomic import append, create, partial_of, publish, write_text
from fastclip.bounded import LINE, parse_json, read_object
from fastclip.data.index import IMAGE_EXTENSIONS, Fault, index_file
from fastclip.data.remote import is_remote
from fastclip.data.samples import MAX_TEXT_BYTES, UnreadableSample, decode_image
from fastclip.data.writing import add_sizes, locked

# Of an image to be captioned; smaller ones are tracking pixels and dividing lines, which show
# nothing and make some models' image processors fail.
MIN_SIDE = 8


class Journal:
    """Work that is done on a file not finished yet, a line of JSON a piece; the first says of what.

    One process at a time has it. A line that a kill has torn is cut off.

    Args:
        path: of the file that is being made; the journal lies beside it.

    Attributes:
        mine: False while another process has it.
        pieces: what is done.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.with_name(path.name + ".journal")
        self.pieces: list[dict[str, Any]] = []
        self.mine = True
        self._file = append(self.path)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.mine = False
        except OSError:
            # some file systems have no locks; there, one process must do at a time
            pass

    def begin(self, identity: dict[str, Any]) -> None:
        """Begin work that depends on `identity`, or resume it.

        Raises:
            ValueError: it was begun with another.
        """
        self._file.seek(0)
        whole = 0
        while line := self._file.readline(LINE):
            try:
                piece = parse_json(line, str(self.path))
            except ValueError:
                break
            if not line.endswith(b"\n") or not isinstance(piece, dict):
                break
            self.pieces.append(piece)
            whole += len(line)
        self._file.truncate(whole)
        if not self.pieces:
            self.add(identity)
        _require_same(self.path, self.pieces.pop(0), identity, "delete it to begin the shard anew")

    def add(self, piece: dict[str, Any]) -> None:
        """Have a piece of work on the disk."""
        self._file.write(json.dumps(piece, ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.pieces.append(piece)

    def close(self) -> None:
        """Let another process have it."""
        self._file.close()


def folders_of(names: Iterable[str]) -> list[str]:
    """The folders of shards, each once, in order: absolute paths, and URLs without secrets.

    Of a URL its scheme, host and path are kept; user names, passwords and queries may be secrets.

    Args:
        names: paths and URLs, as `fastclip.data.shards.expand_shards` gives them.
    """
    return sorted({_folder_of(name) for name in names})


def _folder_of(name: str) -> str:
    if not is_remote(name):
        return os.path.dirname(os.path.abspath(name))
    url = urlsplit(name)
    host = url.netloc.rpartition("@")[2]
    return f"{url.scheme}://{host}{url.path.rpartition('/')[0]}"


def claim_folder(folder: Path, name: str, identity: dict[str, Any], files: list[Path]) -> None:
    """Write down in FOLDER/NAME what a folder's files depend on, or see that it is as before.

    Raises:
        ValueError: it is not. FileExistsError: some of the files are there, but not that of `name`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    with locked(folder):
        if not path.exists():
            if there := [file for file in files if file.exists()]:
                raise FileExistsError(
                    f"{there[0]} exists and is not overwritten; choose a new folder"
                )
            write_text(path, json.dumps(identity, indent=1, ensure_ascii=False) + "\n")
        try:
            found = read_object(path)
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}); repair it") from error
    _require_same(path, found, identity, "give the former value, or choose a new folder")


def _require_same(path: Path, found: dict[str, Any], wanted: dict[str, Any], remedy: str) -> None:
    changed = [
        f"{name} was {found.get(name)!r} and is {wanted.get(name)!r}"
        for name in sorted(found.keys() | wanted.keys())
        if found.get(name) != wanted.get(name)
    ]
    if changed:
        raise ValueError(f"{path} was started with other settings: {'; '.join(changed)}; {remedy}")


class ShardEditor:
    """A tar whose samples can get a further key in their KEY.json, or further members.

    Everything else stays as it is, byte for byte: other members and their order, other keys of
    KEY.json, what lies behind a damaged place. KEY.json is made where there is none.

    Args:
        file: the tar, open.
        name: of it, for messages.

    Attributes:
        samples: the files of each by extension, as (offset, bytes), by the samples' keys.
        faults: what in the tar cannot be read.
        identity: what distinguishes it from another.
    """

    def __init__(self, file: BinaryIO, name: str) -> None:
        self.file = file
        self.name = name
        index = index_file(file, name)
        self.samples = dict(index.samples)
        self.faults = index.faults
        start = hashlib.sha256(self.read(0, 1 << 16)).hexdigest()
        self.identity = {"bytes": os.fstat(file.fileno()).st_size, "sha256 of 64 KiB": start}
        self._places = {fault.where for fault in index.faults}

    def read(self, offset: int, size: int) -> bytes:
        """These bytes of the tar."""
        return os.pread(self.file.fileno(), size, offset)

    def text(self, key: str) -> str:
        """A sample's KEY.txt; empty where there is none."""
        offset, size = self.samples[key].get("txt", (0, 0))
        return self.read(offset, min(size, MAX_TEXT_BYTES)).decode("utf-8", "ignore")

    def json(self, key: str) -> tuple[str, dict[str, Any]]:
        """A sample's KEY.json as it is written and as it is read, "{}" where there is none.

        Raises:
            UnreadableSample: nothing can be added to it.
        """
        where = f"{self.name}:{key}.json"
        place = self.samples[key].get("json")
        if place is None:
            # the index spells what cannot be printed with backslashes
            if where in self._places or "\\" in key:
                raise UnreadableSample(Fault("damaged JSON", where, "it is not an ordinary member"))
            return "{}", {}
        offset, size = place
        if size > MAX_TEXT_BYTES:
            raise UnreadableSample(Fault("JSON too long", where, f"{size:,} bytes"))
        try:
            # an extended header in the two blocks before may say the size again
            if re.search(rb"[0-9] size=[0-9]+\n", self.read(max(0, offset - 1024), 512)):
                raise ValueError("its size is in an extended header")
            text = self.read(offset, size).decode("utf-8")
            content = json.loads(text)
            if not isinstance(content, dict):
                raise ValueError("no dictionary")
        except (ValueError, RecursionError) as error:
            raise UnreadableSample(Fault("damaged JSON", where, str(error)[:80])) from error
        return text, content

    def image(self, key: str) -> Image.Image:
        """A sample's image, RGB.

        Raises:
            UnreadableSample: it is not a whole image, or too small to show anything.
        """
        where = f"{self.name}:{key}"
        files = self.samples[key]
        encoded = self.read(*next(files[name] for name in IMAGE_EXTENSIONS if name in files))
        image = decode_image(encoded, where)
        if min(image.size) < MIN_SIDE:
            detail = f"{image.width} x {image.height}"
            raise UnreadableSample(Fault("image too small", where, detail))
        return image

    def images_ahead(
        self, batches: Iterable[list[str]]
    ) -> Iterator[tuple[dict[str, Image.Image], list[Fault]]]:
        """The images of each batch of keys that can be read, and the faults of the others.

        A batch is read while the caller is at work on the one before.
        """

        def load(keys: list[str]) -> tuple[dict[str, Image.Image], list[Fault]]:
            images, faults = {}, []
            for key in keys:
                try:
                    images[key] = self.image(key)
                except UnreadableSample as error:
                    faults.append(error.fault)
            return images, faults

        with ThreadPoolExecutor(1) as pool:
            waiting: Future | None = None
            for keys in batches:
                following = pool.submit(load, keys)
                if waiting:
                    yield waiting.result()
                waiting = following
            if waiting:
                yield waiting.result()

    def write(self, path: Path, name: str, values: dict[str, str]) -> None:
        """Write the tar with the key `name` added to the KEY.json of the samples in `values`.

        Where all samples have the same texts, `sizes.json` beside it has their number before it
        has its own name.

        Raises:
            UnreadableSample: see `json`. ValueError: what was written does not read as it should.
        """
        edits = []
        wanted = {key: _sizes(files) for key, files in self.samples.items()}
        for key, value in values.items():
            files = self.samples[key]
            text = self.json(key)[0].rstrip()[:-1].rstrip()
            text += "" if text.endswith("{") else ", "
            content = (text + json.dumps({name: value}, ensure_ascii=False)[1:]).encode()
            wanted[key]["json"] = len(content)
            if "json" in files:
                offset, size = files["json"]
                header = _resized(self.read(offset - 512, 512), len(content))
                edits.append((offset - 512, _end(offset, size), header + _padded(content)))
            else:
                edits.append(self._behind(key, {"json": content}))
        self._publish(path, edits, wanted)

    def add_members(self, path: Path, members: Mapping[str, Mapping[str, bytes]]) -> None:
        """Write the tar with further members, by extension, behind those of samples, by key.

        Where all samples have the same texts, `sizes.json` beside it has their number before it
        has its own name.

        Raises:
            ValueError: a sample has such a member already, or a name that cannot be written again;
                or what was written does not read as it should.
        """
        wanted = {key: _sizes(files) for key, files in self.samples.items()}
        edits = []
        for key, added in members.items():
            if there := self.samples[key].keys() & added.keys():
                raise ValueError(
                    f"{self.name}:{key}.{min(there)} is there already; begin with shards without it"
                )
            if "\\" in key:
                # the index spells what cannot be printed with backslashes
                raise ValueError(f"{self.name}: the name {key} cannot be written again; rename it")
            wanted[key] |= {extension: len(content) for extension, content in added.items()}
            edits.append(self._behind(key, added))
        self._publish(path, edits, wanted)

    def _behind(self, key: str, added: Mapping[str, bytes]) -> tuple[int, int, bytes]:
        """The edit that puts members behind the last one of a sample."""
        end = max(_end(offset, size) for offset, size in self.samples[key].values())
        blocks = []
        for extension, content in added.items():
            member = tarfile.TarInfo(f"{key}.{extension}")
            member.size = len(content)
            blocks.append(member.tobuf(tarfile.PAX_FORMAT) + _padded(content))
        return end, end, b"".join(blocks)

    def _publish(
        self, path: Path, edits: list[tuple[int, int, bytes]], wanted: dict[str, dict[str, int]]
    ) -> None:
        """Write the tar with the edits; it must then hold members of the sizes in `wanted`."""
        self._copy(partial_of(path), sorted(edits))
        with partial_of(path).open("rb") as written:
            found = dict(index_file(written, self.name).samples)
        if {key: _sizes(files) for key, files in found.items()} != wanted:
            raise ValueError(f"{self.name} is not a tar that can be edited; rewrite it with tar")
        # readers count the samples that have the text they need: all, or nobody knows how many
        texts = {("txt" in files, "json" in files) for files in wanted.values()}
        if texts in ({(True, True)}, {(True, False)}):
            add_sizes(path.parent, {path.name: len(self.samples)})
        publish(path)

    def _copy(self, path: Path, edits: list[tuple[int, int, bytes]]) -> None:
        """Write the file with the bytes from each start to end replaced; have it on the disk."""
        size = os.fstat(self.file.fileno()).st_size
        place = 0
        with create(path) as out:
            for start, end, content in [*edits, (size, size, b"")]:
                while block := self.read(place, min(max(0, start - place), 1 << 24)):
                    place += out.write(block)
                # the padding of a last member may be cut off
                out.write(bytes(max(0, start - place)) + content)
                place = end
            out.flush()
            os.fsync(out.fileno())


def _sizes(files: dict[str, tuple[int, int]]) -> dict[str, int]:
    return {extension: size for extension, (_, size) in files.items()}


def _end(offset: int, size: int) -> int:
    """Where the blocks of a member's content end."""
    return offset + size + -size % 512


def _padded(content: bytes) -> bytes:
    """A member's content, filled up to whole blocks."""
    return content + bytes(-len(content) % 512)


def _resized(header: bytes, size: int) -> bytes:
    """A tar's header block with another size in it."""
    blank = header[:124] + b"%011o\0" % size + header[136:148] + b" " * 8 + header[156:]
    return blank[:148] + b"%06o\0 " % sum(blank) + blank[156:]
