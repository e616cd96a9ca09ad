"""What servers of every behavior come to: the shard, or an error that says what happened."""

import gzip
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from fastclip.data import http, remote
from fastclip.data.remote import FetchError, ShardCache
from fastclip.data.shards import ShardSource
from fastclip.data.templates import read_beside
from tests.data.hostile import END, sample

TAR = b"".join(sample(str(number)) for number in range(4)) + END
LIMIT = 1 << 18
LOADED = ""
Answer = Callable[["Handler"], None]


class Handler(BaseHTTPRequestHandler):
    """Answers as the case in `answers` says for a path."""

    protocol_version = "HTTP/1.1"
    answers: ClassVar[dict[str, Answer]] = {}
    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self.close_connection = True
        with suppress(OSError):
            self.answers.get(self.path, status(404))(self)

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""

    def count(self) -> int:
        """How often this path was asked for."""
        return self.asked.count(self.path)

    def send(self, code: int, content: bytes, **headers: str) -> None:
        """An answer with these headers and no others."""
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)


def status(code: int, **headers: str) -> Answer:
    return lambda handler: handler.send(code, b"", Content_Length="0", **headers)


def body(content: bytes, **headers: str) -> Answer:
    """A whole answer with a length."""
    return lambda handler: handler.send(
        200, content, **{"Content_Length": str(len(content)), **headers}
    )


def raw(content: bytes) -> Answer:
    """Bytes instead of an answer."""
    return lambda handler: handler.wfile.write(content) and None


def first(count: int, answer: Answer, content: bytes = TAR) -> Answer:
    """One answer so many times, the content afterwards."""
    return lambda handler: (answer if handler.count() <= count else body(content))(handler)


def chunked(content: bytes, *, end: bool = True, size: str = "") -> Answer:
    def answer(handler: Handler) -> None:
        head = size or f"{len(content):x}"
        handler.send(200, f"{head}\r\n".encode() + content + b"\r\n", Transfer_Encoding="chunked")
        if end:
            handler.wfile.write(b"0\r\n\r\n")

    return answer


def slowly(content: bytes, pieces: int, pause: float) -> Answer:
    def answer(handler: Handler) -> None:
        handler.send(200, b"", Content_Length=str(len(content)))
        step = -(-len(content) // pieces)
        for start in range(0, len(content), step):
            handler.wfile.write(content[start : start + step])
            handler.wfile.flush()
            time.sleep(pause)

    return answer


def endless(prefix: bytes = TAR, header: str = "") -> Answer:
    def answer(handler: Handler) -> None:
        handler.send(200, prefix, **({"Content_Length": header} if header else {}))
        for _ in range(1000):
            handler.wfile.write(bytes(1 << 16))

    return answer


def silent(before: bytes = b"") -> Answer:
    def answer(handler: Handler) -> None:
        handler.wfile.write(before)
        handler.wfile.flush()
        time.sleep(2)

    return answer


def reset(after: bytes = b"") -> Answer:
    def answer(handler: Handler) -> None:
        handler.wfile.write(after)
        linger = struct.pack("ii", 1, 0)
        handler.connection.setsockopt(1, 13, linger)
        handler.connection.close()

    return answer


@dataclass(frozen=True)
class Case:
    """A behavior with its outcome: no message where the shard is loaded.

    requests: how often the shard is asked for.
    """

    answer: Answer
    message: str = LOADED
    requests: int = 1


THREE = 3
HTML = b"<!DOCTYPE html><html>Please sign in</html>" * 20
OK = b"HTTP/1.1 200 OK\r\n"


def cases() -> dict[str, Case]:
    return {
        # whole
        "with its length": Case(body(TAR)),
        "without a length": Case(lambda handler: handler.send(200, TAR)),
        "chunked": Case(chunked(TAR)),
        "HTTP/1.0": Case(raw(b"HTTP/1.0 200 OK\r\n\r\n" + TAR)),
        "larger than the cache, declared": Case(body(TAR + bytes(2 * LIMIT))),
        "longer than silence may last": Case(slowly(TAR, 6, 0.15)),
        "identity, as asked": Case(body(TAR, Content_Encoding="identity")),
        "text/html, but a tar": Case(body(TAR, Content_Type="text/html")),
        "more than declared": Case(
            lambda handler: handler.send(200, TAR + b"x" * 100, Content_Length=str(len(TAR)))
        ),
        "hundred continue": Case(raw(b"HTTP/1.1 100 Continue\r\n\r\n" + OK + b"\r\n" + TAR)),
        "a length that is not a number": Case(raw(OK + b"Content-Length: many\r\n\r\n" + TAR)),
        "a negative length": Case(raw(OK + b"Content-Length: -5\r\n\r\n" + TAR)),
        # after a failure or two
        "503 once": Case(first(1, status(503)), requests=2),
        "503 twice": Case(first(2, status(503)), requests=3),
        "429 once": Case(first(1, status(429, Retry_After="1")), requests=2),
        "500 once": Case(first(1, status(500)), requests=2),
        "403 once": Case(first(1, status(403)), requests=2),
        "reset once": Case(first(1, reset()), requests=2),
        "reset in the middle once": Case(
            first(1, reset(OK + b"Content-Length: 9999\r\n\r\n" + TAR[:700])), requests=2
        ),
        "cut once": Case(first(1, body(TAR[:-700], Content_Length=str(len(TAR)))), requests=2),
        "cut in a chunk once": Case(first(1, chunked(TAR[:-9], size="ffff")), requests=2),
        "no answer once": Case(first(1, raw(b"")), requests=2),
        "HTML once": Case(first(1, body(HTML)), requests=2),
        "nothing once": Case(first(1, body(b"")), requests=2),
        "silent once": Case(first(1, silent()), requests=2),
        # never
        "404": Case(status(404), "does not exist"),
        "410": Case(status(410), "does not exist"),
        "401": Case(status(401), "attempts: the server answered 401 Unauthorized", THREE),
        "403": Case(status(403), "attempts: the server answered 403 Forbidden", THREE),
        "429": Case(status(429), "attempts: the server answered 429 Too Many", THREE),
        "503": Case(status(503), "attempts: the server answered 503 Service", THREE),
        "204": Case(status(204), "attempts: the server answered 204 No Content", THREE),
        "206": Case(
            lambda handler: handler.send(206, TAR[:512], Content_Length="512"),
            "attempts: the server answered 206 Partial",
            THREE,
        ),
        "304": Case(status(304), "attempts: the server answered 304 Not Modified", THREE),
        "HTML": Case(body(HTML), "attempts: what arrived is not a tar .*DOCTYPE html", THREE),
        "nothing": Case(body(b""), "attempts: what arrived is empty file", THREE),
        "cut": Case(
            body(TAR[:1024], Content_Length="5000"), "attempts: 1,024 of 5,000 bytes", THREE
        ),
        "cut chunk": Case(chunked(TAR[:-9], size="ffff"), "attempts: IncompleteRead", THREE),
        "chunk of no number": Case(chunked(TAR, size="zz"), "attempts: IncompleteRead", THREE),
        "silent": Case(silent(), "attempts: no data for 0.5 seconds", THREE),
        "silent after the headers": Case(
            silent(OK + b"Content-Length: 99\r\n\r\n"), "attempts: no data for", THREE
        ),
        "reset": Case(reset(), "attempts: .*[Rr]eset", THREE),
        "endless": Case(endless(), "sent over 262,144 bytes without a declared length; raise"),
        "endless chunks": Case(
            chunked(TAR + bytes(2 * LIMIT)), "sent over 262,144 bytes without a declared length"
        ),
        "endless headers": Case(raw(OK + b"A: b\r\n" * 500), "attempts: .*100 headers", THREE),
        "a header line without end": Case(raw(OK + b"A" * 99_999), "attempts: LineTooLong", THREE),
        "no HTTP": Case(raw(b"220 ftp.example.org ready\r\n"), "attempts: BadStatusLine", THREE),
        "packed, unasked": Case(
            body(gzip.compress(bytes(50 << 20)), Content_Encoding="gzip"),
            r"attempts: the server sends it compressed \(Content-Encoding: gzip\)",
            THREE,
        ),
        "to a file": Case(status(302, Location="file:///etc/passwd"), "attempts: .*302", THREE),
        "to another scheme": Case(status(302, Location="gopher://h/"), "attempts: .*302", THREE),
        "to itself": Case(status(302, Location="/a.tar"), "attempts: .* 302 .*infinite loop", 15),
    }


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Its URL, with a slash; what it answers is `Handler.answers`."""
    monkeypatch.setattr(remote, "PAUSE_SECONDS", 0)
    monkeypatch.setattr(http, "SILENCE_SECONDS", 0.5)
    monkeypatch.setattr(Handler, "answers", {})
    monkeypatch.setattr(Handler, "asked", [])
    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{running.server_address[1]}/"
    running.shutdown()
    thread.join()
    running.server_close()


def kept(folder: Path) -> list[str]:
    return [p.suffix for p in folder.glob("shards/*") if not p.name.startswith(".lock")]


@pytest.mark.parametrize("name", cases())
def test_servers(server: str, tmp_path: Path, name: str) -> None:
    case = cases()[name]
    Handler.answers["/a.tar"] = case.answer
    cache = ShardCache(tmp_path, LIMIT)
    if case.message:
        with pytest.raises(FetchError, match=rf"a\.tar .*{case.message}"):
            ShardSource(server + "a.tar", cache=cache)
        assert kept(tmp_path) == []
    else:
        source = ShardSource(server + "a.tar", cache=cache)
        assert [source.read(0, i).key for i in range(4)] == ["0", "1", "2", "3"]
        assert source.drain_faults() == []
        assert kept(tmp_path) == [".tar"]
    assert Handler.asked.count("/a.tar") == case.requests


def test_a_redirect_is_followed_without_the_secret(server: str, tmp_path: Path) -> None:
    secrets = []

    def listen(handler: Handler) -> None:
        secrets.append(handler.headers["Authorization"])
        answer = status(302, Location="/b.tar") if handler.path == "/a.tar" else body(TAR)
        answer(handler)

    Handler.answers |= {"/a.tar": listen, "/b.tar": listen}
    url = server.replace("//", "//user:s%40cret@") + "a.tar"
    assert ShardSource(url, cache=ShardCache(tmp_path)).counts == (4,)
    assert secrets == ["Basic dXNlcjpzQGNyZXQ=", None]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (body(b'{"a.tar": 4}'), LOADED),
        (first(1, status(503), b'{"a.tar": 4}'), LOADED),
        (first(1, body(b'{"a.tar"', Content_Length="12"), b'{"a.tar": 4}'), LOADED),
        (status(403), LOADED),
        (status(503), "could not be read: the server answered 503"),
        (body(b'{"a.tar": 4}', Content_Length="99"), "could not be read: 12 of 99 bytes arrived"),
        (body(b"<html>"), "is damaged"),
        (body(b"[" * 100_000), "is damaged"),
        (body(b'{"a.tar": -1}'), "a count is -1"),
        (endless(b" "), "could not be read: over 1,048,576 bytes"),
        (silent(), "could not be read: no data for 0.5 seconds"),
        (body(gzip.compress(b"{}"), Content_Encoding="gzip"), "could not be read: .*compressed"),
    ],
    ids=[
        *("counts", "503 once", "cut once", "403", "503", "cut"),
        *("HTML", "deep", "-1", "endless", "silent", "packed"),
    ],
)
def test_counts(
    server: str, tmp_path: Path, answer: Answer, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "SMALL_BYTES", 1 << 20)
    Handler.answers |= {"/sizes.json": answer, "/a.tar": body(TAR)}
    if message:
        with pytest.raises((FetchError, ValueError), match=rf"sizes\.json .*{message}"):
            ShardSource(server + "a.tar", cache=ShardCache(tmp_path))
    else:
        assert ShardSource(server + "a.tar", cache=ShardCache(tmp_path)).counts == (4,)


@pytest.mark.parametrize("file", ["sizes.json", "a_stats.json", "classes.txt"])
def test_files_beside_a_shard_are_asked_for_with_its_query(
    server: str, tmp_path: Path, file: str
) -> None:
    """As Hugging Face's servers have it; a name ends where the query begins."""
    contents = {
        "sizes.json": b'{"a.tar": 3}',
        "a_stats.json": b'{"successes": 3}',
        "classes.txt": b"ant\ncat\n",
    }
    Handler.answers |= {
        "/d/a.tar?download=true&from=x/y": body(TAR),
        f"/d/{file}?download=true&from=x/y": body(contents[file]),
    }
    url = server + "d/a.tar?download=true&from=x/y"
    source = ShardSource(url, cache=ShardCache(tmp_path))
    assert source.counts == (4 if file == "classes.txt" else 3,)
    assert source.read(0, 2).key == "2"
    assert read_beside(url, ("classes.txt",)) == (["ant", "cat"] if file[0] == "c" else None)
    # what is not named like a shard has no statistics
    Handler.answers["/get?id=7"] = body(TAR)
    assert ShardSource(server + "get?id=7", cache=ShardCache(tmp_path)).counts == (4,)
    assert not any("get" in path and "stats" in path for path in Handler.asked)


def test_a_refused_connection_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PAUSE_SECONDS", 0)
    with pytest.raises(FetchError, match=r"sizes\.json could not be read: .*refused"):
        ShardSource("http://127.0.0.1:9/a.tar", cache=ShardCache(tmp_path))


def test_a_redirect_leads_to_http_alone(server: str, tmp_path: Path) -> None:
    for target in ("ftp://127.0.0.1:9/a.tar", "file:///etc/hostname"):
        Handler.answers["/a.tar"] = status(302, Location=target)
        with pytest.raises(FetchError, match=r"a\.tar .*(redirect|not allowed)"):
            ShardSource(server + "a.tar", cache=ShardCache(tmp_path))
    assert kept(tmp_path) == []


def test_names_with_blanks_and_other_letters(server: str, tmp_path: Path) -> None:
    Handler.answers["/my%20data/%E3%83%87%231.tar"] = body(TAR)
    for name in ("my data/デ%231.tar", "my%20data/%E3%83%87%231.tar"):
        assert ShardSource(server + name, cache=ShardCache(tmp_path / name[:3])).counts == (4,)
    with pytest.raises(FetchError, match="write %23"):
        ShardSource(server + "a#1.tar", cache=ShardCache(tmp_path))
