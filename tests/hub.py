"""A hub on this machine: the part of the hub's protocol that downloads use, over real files, with faults.

with Hub({"someone/base": folder}) as hub:
    loratune("train", "someone/base", …, hub=hub)     a real process whose only hub this is
    hub.requests                                       what it was asked for
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

_FILE = re.compile(r"/([\w.-]+/[\w.-]+)/resolve/([\w.-]+)/(.+)")
_INFO = re.compile(r"/api/models/([\w.-]+/[\w.-]+)(?:/revision/[\w.-]+)?(/tree/[\w.-]+)?")


@dataclass(frozen=True)
class Request:
    """`start`: the first byte that was asked for. `late`: whether it came when `Hub.late` said so."""

    method: str
    path: str
    start: int
    late: bool


class Hub:
    """Serves models.

    Attributes:
        cut_after: bytes of an answer after which the connection breaks; None where it holds.
        gated: whether nobody is let in. late: asked at each request.
    """

    def __init__(self, models: Mapping[str, Path], *, late: Callable[[], bool] = lambda: False) -> None:
        self.models = dict(models)
        self.requests: list[Request] = []
        self.cut_after: int | None = None
        self.gated = False
        self.late = late
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def commit(self, name: str) -> str:
        """Of the files as they are now."""
        files = [(path.name, path.read_bytes()) for path in sorted(self.models[name].iterdir())]
        return hashlib.sha256(repr(files).encode()).hexdigest()[:40]

    def of(self, path: str) -> list[Request]:
        """The requests for the contents of a file."""
        return [r for r in self.requests if r.method == "GET" and r.path.endswith(path)]


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        path = self.path.partition("?")[0]
        start = int((re.match(r"bytes=(\d+)-", self.headers.get("Range", "")) or [0, 0])[1])
        self.hub.requests.append(Request(self.command, path, start, self.hub.late()))
        file, info = _FILE.fullmatch(path), _INFO.fullmatch(path)
        name = str((file or info or [None, None])[1])
        folder = self.hub.models.get(name)
        if folder is None:
            self._refuse(404, "RepoNotFound")
        elif self.hub.gated:
            self._refuse(403, "GatedRepo")
        elif info is not None:
            self._send(json.dumps(_listing(folder) if info[2] else self._about(name)).encode(), name, with_body)
        elif file is not None and (folder / file[3]).is_file():
            self._send((folder / file[3]).read_bytes(), name, with_body, start)
        else:
            self._refuse(404, "EntryNotFound")

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        for name, value in {"X-Error-Code": code, "Content-Length": "0"}.items():
            self.send_header(name, value)
        self.end_headers()

    def _about(self, name: str) -> dict[str, Any]:
        files = [{"rfilename": path.name} for path in sorted(self.hub.models[name].iterdir())]
        return {"id": name, "sha": self.hub.commit(name), "siblings": files}

    def _send(self, content: bytes, name: str, with_body: bool, start: int = 0) -> None:
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", self.hub.commit(name))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if not with_body:
            return
        cut = self.hub.cut_after
        self.wfile.write(content[start:] if cut is None else content[start : start + cut])
        if cut is not None and len(content) - start > cut:
            self.close_connection = True


def _listing(folder: Path) -> list[dict[str, Any]]:
    return [
        {"type": "file", "path": p.name, "size": p.stat().st_size, "oid": hashlib.sha256(p.read_bytes()).hexdigest()}
        for p in sorted(folder.iterdir())
    ]


def loratune(*words: object, hub: Hub, cache: Path, offline: bool = False) -> subprocess.CompletedProcess[str]:
    """`loratune …` in a process of its own, with an empty or kept cache of downloads."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    env |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(cache), "HF_HUB_DOWNLOAD_TIMEOUT": "5", "NO_COLOR": "1"}
    if offline:
        env["HF_HUB_OFFLINE"] = "1"
    command = [sys.executable, "-m", "loratune", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=280, check=False)
