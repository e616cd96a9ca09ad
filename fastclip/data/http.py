"""Files from HTTP servers, within bounds, with the status that a server gave."""

import base64
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException, HTTPResponse
from typing import BinaryIO
from urllib.error import HTTPError

# Without a byte for so long, a transfer has failed. A large file may take any time.
SILENCE_SECONDS = 60.0
_GONE = (404, 410)
_REFUSED = (401, 403)


class TooLargeError(OSError):
    """A server sends more than is taken."""


class _HttpRedirects(urllib.request.HTTPRedirectHandler):
    """Redirects of HTTP to HTTP; urllib's own would follow them to FTP as well."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        if not is_http(newurl):
            scheme = newurl.partition(":")[0][:40]
            raise HTTPError(newurl, code, f"with a redirect to {scheme}", headers, fp)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


_OPENER = urllib.request.build_opener(_HttpRedirects)


def is_http(url: str) -> bool:
    """Whether a URL is read here."""
    return url.lower().startswith(("http://", "https://"))


def read(url: str, limit: int) -> bytes:
    """A small file.

    Raises:
        FileNotFoundError: the server has no such file. PermissionError: it refuses to send it.
        OSError: it is over `limit` bytes, or the transfer failed otherwise.
    """
    with _answer(url) as (response, size):
        # of an answer that is cut, this gives what there is
        content = response.read(limit + 1)
    if len(content) > limit:
        raise TooLargeError(f"over {limit:,} bytes")
    if size is not None and len(content) != size:
        raise OSError(f"{len(content):,} of {size:,} bytes arrived")
    return content


def copy(url: str, target: BinaryIO, limit: int) -> None:
    """Write the file to `target`: as many bytes as the server declares, else at most `limit`.

    Raises:
        FileNotFoundError: the server has no such file. PermissionError: it refuses to send it.
        TooLargeError: no length is declared, and there are more than `limit` bytes.
        OSError: the transfer failed otherwise.
    """
    with _answer(url) as (response, size):
        written = 0
        while block := response.read(1 << 20):
            written += len(block)
            if size is None and written > limit:
                raise TooLargeError(f"sent over {limit:,} bytes without a declared length")
            target.write(block)
    if size is not None and written != size:
        raise OSError(f"{written:,} of {size:,} bytes arrived")


def _quoted(part: str) -> str:
    """A path or query as HTTP sends it."""
    return urllib.parse.quote(part, safe="/%:@!$&'()*+,;=~?-._")


@contextmanager
def _answer(url: str) -> Iterator[tuple[HTTPResponse, int | None]]:
    """The server's answer and the length it declares; the library's errors as OSError."""
    parts = urllib.parse.urlsplit(url)
    credentials, _, host = parts.netloc.rpartition("@")
    if parts.fragment:
        raise OSError("a URL ends before its '#'; write %23 for it in a name")
    # spaces and letters beyond ASCII; what is quoted already stays
    sent = parts._replace(netloc=host, path=_quoted(parts.path), query=_quoted(parts.query))
    request = urllib.request.Request(sent.geturl())
    # packed on the way, a small file could become a large one
    request.add_header("Accept-Encoding", "identity")
    if credentials:
        secret = base64.b64encode(urllib.parse.unquote(credentials).encode()).decode()
        # not sent on to where the server redirects
        request.add_unredirected_header("Authorization", f"Basic {secret}")
    try:
        with _OPENER.open(request, timeout=SILENCE_SECONDS) as response:
            packing = response.headers.get("Content-Encoding", "identity")
            if packing.lower() != "identity":
                raise OSError(f"the server sends it compressed (Content-Encoding: {packing[:40]})")
            if response.status != 200:
                raise OSError(f"the server answered {response.status} {response.reason}")
            # http.client takes what is not a number for no length
            yield response, response.length
    except HTTPError as error:
        error.close()
        said = f"the server answered {error.code} {error.reason}"
        if error.code in _GONE:
            raise FileNotFoundError(said) from error
        raise (PermissionError if error.code in _REFUSED else OSError)(said) from error
    except TimeoutError as error:
        raise OSError(f"no data for {SILENCE_SECONDS:g} seconds") from error
    except (HTTPException, ValueError) as error:
        raise OSError(f"{type(error).__name__}: {error}") from error
