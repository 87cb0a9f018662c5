"""A stand-in for a model hub: an HTTP server with the routes huggingface_hub calls, and ways to misbehave."""

from __future__ import annotations

import hashlib
import re
import socket
import struct
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal


@dataclass
class ModelHub:
    """Serves ``files`` of ``repository`` at ``revision``."""

    repository: str
    revision: str
    files: Mapping[str, bytes]
    url: str = ""
    #: After this many bytes of a body, once: the connection ends, is reset, or stays open in silence.
    stop_after_bytes: int | None = None
    stop_by: Literal["close", "reset", "silence"] = "close"
    #: Answered instead of a file, with the hub's error code if it has one.
    refuse: tuple[int, str] | None = None
    #: Bodies are served elsewhere, as the hub does with large files.
    content_url: str = ""
    #: What came in: method, path, Range, Authorization.
    requests: list[tuple[str, str, str, str]] = field(default_factory=list)
    released: threading.Event = field(default_factory=threading.Event)

    def ranges_asked(self, path: str) -> list[str]:
        """The Range headers of all downloads of ``path``, empty for a whole one."""
        return [range_ for method, url, range_, _ in self.requests if method == "GET" and url.endswith(path)]


@contextmanager
def serving(hub: ModelHub, host: str = "127.0.0.1") -> Iterator[ModelHub]:
    """Serve ``hub`` on a free port of ``host``."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def log_message(self, format: str, *args: object) -> None:
            pass

        def _answer(self, *, body: bool) -> None:
            range_ = self.headers.get("Range", "")
            hub.requests.append((self.command, self.path, range_, self.headers.get("Authorization", "")))
            if hub.refuse:
                self._empty(*hub.refuse)
                return
            prefix = f"/{hub.repository}/resolve/{hub.revision}/"
            content = hub.files.get(self.path.removeprefix(prefix)) if self.path.startswith(prefix) else None
            if content is None:
                self._empty(404, "EntryNotFound")
                return
            if hub.content_url:
                self.send_response(302)
                self.send_header("Location", f"{hub.content_url}{self.path}")
                self.send_header("X-Linked-Size", str(len(content)))
                self.send_header("X-Linked-Etag", f'"{hashlib.sha256(content).hexdigest()}"')
                self.send_header("X-Repo-Commit", hub.revision)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            match = re.fullmatch(r"bytes=(\d+)-", range_)
            start = int(match[1]) if match else 0
            self.send_response(206 if match else 200)
            if match:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.send_header("Content-Length", str(len(content) - start))
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", hub.revision)
            self.end_headers()
            if body:
                self._send(content[start:])

        def _send(self, content: bytes) -> None:
            stop, hub.stop_after_bytes = hub.stop_after_bytes, None
            if stop is None:
                self.wfile.write(content)
                return
            self.wfile.write(content[:stop])
            self.wfile.flush()
            if hub.stop_by == "silence":
                hub.released.wait(60)
            if hub.stop_by == "reset":
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                hub.released.wait(0.3)  # for the bytes to be read: a reset throws away what was not
                self.connection.close()
            self.close_connection = True

        def _empty(self, status: int, error_code: str) -> None:
            self.send_response(status)
            if error_code:
                self.send_header("X-Error-Code", error_code)
            self.send_header("Content-Length", "0")
            self.end_headers()

    server = ThreadingHTTPServer((host, 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://{host}:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        hub.released.set()
        server.shutdown()
        thread.join()
        server.server_close()
