"""Who may use the app, what it serves, and its command line."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

pytest.importorskip("gradio", reason="the extra `app` is not installed")

from helpers import REPO
from starlette.applications import Starlette
from starlette.testclient import TestClient
from written_runs import write_run

from rlhf.app import data_tab, pages
from rlhf.app.guard import Guard


def client(
    roots: list[Path], token: str = "", address: str = "http://127.0.0.1:7860"
) -> TestClient:
    return TestClient(Guard(Starlette(routes=[pages.route(roots)]), token), base_url=address)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    run = write_run(tmp_path)
    for name in ("report.html", "curves.png", "model.bin"):
        (run / name).write_text("<p>page</p>")
    return run


def test_pages_of_runs_are_served_in_a_sandbox_and_nothing_else(run: Path, tmp_path: Path) -> None:
    browser = client([tmp_path])
    answer = browser.get(pages.address(run / "report.html"))
    assert answer.status_code == 200 and answer.text == "<p>page</p>"
    assert answer.headers["Content-Security-Policy"].startswith("sandbox allow-scripts;")
    outside = tmp_path.parent / f"{tmp_path.name}-other"
    outside.mkdir()
    (outside / "report.html").write_text("secret")
    (run / "frontier.png").symlink_to(outside / "report.html")
    (run / "loop").symlink_to(run / "loop")
    for path in (
        pages.PREFIX + str(run / "model.bin"),
        pages.PREFIX + f"{run}/loop/report.html",
        pages.PREFIX + str(run / "config.yaml"),
        pages.PREFIX + str(outside / "report.html"),
        pages.PREFIX + str(run / "frontier.png"),
        pages.PREFIX + f"{tmp_path}/%2e%2e/{outside.name}/report.html",
        pages.PREFIX + "/etc/passwd",
        pages.PREFIX + "/%00",
        pages.PREFIX + f"{run}/%00/report.html",
        pages.PREFIX + f"{run}/%ff/report.html",
        pages.PREFIX + f"{run}/{'x' * 300}/report.html",
    ):
        assert browser.get(path).status_code == 404, path


def test_other_sites_and_other_names_are_refused(run: Path, tmp_path: Path) -> None:
    page = pages.address(run / "report.html")
    browser = client([tmp_path])
    assert browser.get(page, headers={"Origin": "http://127.0.0.1:7860"}).status_code == 200
    for foreign in ("https://example.org", "null", "http://127.0.0.1:7861"):
        assert browser.get(page, headers={"Origin": foreign}).status_code == 403
    assert client([tmp_path], address="http://rebound.example.org").get(page).status_code == 403
    assert client([tmp_path], address="http://localhost:7860").get(page).status_code == 200


def test_elsewhere_only_the_address_with_the_token_opens_the_page(
    run: Path, tmp_path: Path
) -> None:
    page = pages.address(run / "report.html")
    browser = client([tmp_path], token="abc", address="http://machine:7860")
    assert browser.get(page).status_code == 403
    assert browser.get(f"{page}?token=abd").status_code == 403
    answer = browser.get(f"{page}?token=abc")
    assert answer.status_code == 200 and "token" not in str(answer.url)
    assert browser.get(page).status_code == 200, "by the cookie"
    assert browser.post(page, headers={"Origin": "https://example.org"}).status_code == 403
    stranger = client([tmp_path], token="abc", address="http://machine:7860")
    assert stranger.get(page, headers={"Cookie": "rlhf-1=abc; x=\x01"}).status_code == 403


def app(*args: str, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rlhf.app", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **options)


def test_what_is_wrong_is_one_line(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = app("--port", port, cwd=REPO)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "Address already in use; choose another --port" in done.stderr
    for args, words in (
        ([str(tmp_path / "none")], "no such folder"),
        (["--port", "99999999"], "a number from 0 to 65535"),
        (["--host", "no.such.host.invalid"], "--host no.such.host.invalid"),
    ):
        done = app(*args, cwd=REPO)
        assert done.returncode == 2 and words in done.stderr and len(done.stderr.splitlines()) == 1


def test_it_ends_quietly_while_a_browser_is_connected(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "rlhf.app", "--port", "0", str(tmp_path)]
    with subprocess.Popen(command, cwd=REPO, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        address = process.stderr.readline().strip()
        with httpx.stream("GET", f"{address}/gradio_api/heartbeat/browser") as answer:
            assert answer.status_code == 200
            process.terminate()
            assert process.stderr.read() == ""
    assert process.returncode == -signal.SIGTERM


def test_without_gradio_it_says_what_to_install(tmp_path: Path) -> None:
    code = (
        "import sys, importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'gradio' else find(name, *rest)\n"
        "from rlhf.app.__main__ import main; sys.exit(main())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (
        2,
        "error: gradio is not installed: pip install -e '.[app]'\n",
    )


def test_inspection_shows_errors_and_pages(tmp_path: Path) -> None:
    inspect = data_tab.inspector([tmp_path])
    *_, (_, log, _, _) = inspect("sandbox", "'")
    assert "No closing quotation" in log
    *_, (_, log, _, frame) = inspect("jsonl", "")
    assert "data.sources.mine.path has no value" in log and frame == ""
    assert data_tab.frame_of("/etc/passwd<script>", [tmp_path]) == (
        "<p>/etc/passwd&lt;script&gt;: no page there</p>"
    )
