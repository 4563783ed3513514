"""The local server and the two commands."""

from __future__ import annotations

import http.client
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from rice_eval.cli.report import register
from rice_eval.errors import UsageError
from rice_eval.report.serve import HOST, server
from rice_eval.results.store import ResultStore

from .factory import demo


@pytest.fixture
def site(tmp_path: Path) -> Iterator[tuple[int, Path]]:
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "report.html").write_text("<p>hello")
    (folder / ".hidden").write_text("no")
    (folder / "sub").mkdir()
    (tmp_path / "secret.txt").write_text("no")
    (folder / "circle").symlink_to(folder / "circle")
    (folder / "link.txt").symlink_to(tmp_path / "secret.txt")
    with server(folder, 0) as (made, url):
        port = made.server_address[1]
        assert url == f"http://{HOST}:{port}/report.html"
        assert made.server_address[0] == "127.0.0.1"
        thread = threading.Thread(target=made.serve_forever)
        thread.start()
        yield int(port), folder
        made.shutdown()
        thread.join()


ODD = ("/%00", "/a%00.html", "/%ED%A0%80", "/circle", "/" + "a" * 5000)
"""What no file is called: NUL, a lone surrogate, links in a circle, too long a name."""


def get(port: int, path: str, host: str | None = None) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(HOST, port, timeout=10)
    connection.request("GET", path, headers={"Host": host} if host else {})
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer.status, body


def test_it_serves_the_page_and_nothing_else(site: tuple[int, Path]) -> None:
    port, _ = site
    assert get(port, "/report.html") == (200, b"<p>hello")
    for path in ("/", "/sub/", "/.hidden", "/../secret.txt", "/%2e%2e/secret.txt", "/link.txt", "/none.html", *ODD):
        assert get(port, path)[0] == 404, path


def test_odd_names_leave_no_trace_and_no_dead_server(site: tuple[int, Path], capfd: pytest.CaptureFixture[str]) -> None:
    port, _ = site
    for path in ODD:
        assert get(port, path)[0] == 404, path
    assert get(port, "/report.html")[0] == 200
    assert capfd.readouterr().err == ""


def test_it_answers_to_its_own_name_only(site: tuple[int, Path]) -> None:
    port, _ = site
    assert get(port, "/report.html", host=f"localhost:{port}")[0] == 200
    assert get(port, "/report.html", host="evil.example")[0] == 403


def test_a_taken_port_and_a_missing_page_are_one_clear_line(site: tuple[int, Path], tmp_path: Path) -> None:
    port, folder = site
    with pytest.raises(UsageError, match=f"port {port} can't be served"), server(folder, port):
        pass
    with pytest.raises(UsageError, match="does not exist"), server(tmp_path / "none", 0):
        pass
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="holds no HTML page"), server(tmp_path / "empty", 0):
        pass
    (folder / "other.html").write_text("")
    with pytest.raises(UsageError, match="2 HTML pages"), server(folder, 0):
        pass
    (folder / "index.html").write_text("")
    with server(folder, 0) as (_, url):
        assert url.endswith("/index.html")


def test_the_report_command_writes_a_page(tmp_path: Path) -> None:
    app = typer.Typer()
    register(app)
    store = ResultStore(tmp_path / "results")
    for record, _ in demo(tmp_path / "in"):
        store.save(record, None)
    out = tmp_path / "page" / "report.html"
    result = CliRunner().invoke(
        app, ["report", "--results", str(tmp_path / "results"), "--out", str(out), "--title", "T"]
    )
    assert result.exit_code == 0, result.output
    assert "25 records" in result.output
    assert "<title>T</title>" in out.read_text()
    result = CliRunner().invoke(app, ["report", "--results", str(tmp_path / "results"), "--out", str(tmp_path)])
    assert isinstance(result.exception, UsageError)


def test_torch_is_not_imported() -> None:
    code = "import sys, rice_eval.cli.report, rice_eval.report.html, rice_eval.report.serve, rice_eval.report.panel_files; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
