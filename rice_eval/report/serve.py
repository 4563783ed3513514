"""A static file server for reports: this machine only, files only, read only."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote

from rice_eval.errors import UsageError

__all__ = ["HOST", "server", "url_of"]

HOST = "127.0.0.1"


class _Handler(SimpleHTTPRequestHandler):
    """Files of one folder, with no listing of folders, no links that lead out, and no names that start with a dot."""

    extensions_map = {**SimpleHTTPRequestHandler.extensions_map, ".webp": "image/webp", ".jsonl": "application/json"}  # noqa: RUF012

    def send_head(self) -> Any:
        # A page of another site can point its name at this machine: only our own names are answered.
        host = self.headers.get("Host", "").rsplit(":", 1)[0]
        if host not in (HOST, "localhost"):
            self.send_error(403, "this server answers to its own name only")
            return None
        root = Path(self.directory).resolve()
        target = Path(self.translate_path(self.path))
        try:
            inside = target.resolve()
        except (ValueError, OSError, RuntimeError):  # no name of a file (NUL, lone surrogates), or links in a circle
            self.send_error(404)
            return None
        if inside != root and root not in inside.parents:
            self.send_error(404)
            return None
        if any(part.startswith(".") for part in target.relative_to(self.directory).parts):
            self.send_error(404)
            return None
        return super().send_head()

    def list_directory(self, path: Any) -> None:
        """No listings: what is not linked is not shown."""
        self.send_error(404)

    def end_headers(self) -> None:
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cache-Control", "no-store")
        super().end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet: the browser shows what went wrong."""


@contextlib.contextmanager
def server(path: Path, port: int = 8000) -> Iterator[tuple[ThreadingHTTPServer, str]]:
    """A server over the folder of a report, not yet running, and the report's address.

    Args:
        path: an HTML file, or a folder that holds ``index.html`` or exactly one HTML file.
        port: 0 takes a free one.

    Raises:
        UsageError: no such file, no page in the folder, several pages, or a port that is taken.
    """
    page = _page(path)
    handler = partial(_Handler, directory=str(page.parent))
    try:
        made = ThreadingHTTPServer((HOST, port), handler)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(
            f"port {port} can't be served ({reason})", "choose another --port; 0 takes a free one"
        ) from error
    with made:
        yield made, url_of(made, page.name)


def url_of(made: ThreadingHTTPServer, name: str) -> str:
    """The address of a file of the server."""
    return f"http://{HOST}:{made.server_address[1]}/{quote(name)}"


def _page(path: Path) -> Path:
    fix = "write one with rice-eval report --out FILE"
    if path.is_file():
        return path.absolute()
    if not path.is_dir():
        raise UsageError(f"{path} does not exist", fix)
    pages = sorted(p for p in path.iterdir() if p.suffix == ".html" and p.is_file() and not p.name.startswith("."))
    index = path / "index.html"
    if index in pages:
        return index.absolute()
    if len(pages) == 1:
        return pages[0].absolute()
    if not pages:
        raise UsageError(f"{path} holds no HTML page", fix)
    raise UsageError(f"{path} holds {len(pages)} HTML pages and no index.html", "name one of them")
