"""`python -m tools.weights`: files are served by this machine, whole, broken off and wrong."""

from __future__ import annotations

import hashlib
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from common.data import files
from common.data.files import BUNDLED, find_weights, published_weights
from common.errors import UserError
from tools import weights

NAME = "resnet9-test.pth"


class Server(http.server.ThreadingHTTPServer):
    """Serves `content`, in `most` bytes per answer at most; answers ranges, and remembers what was asked."""

    content, most, status, asked = b"", 10**9, 200, ()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/{NAME}"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        server: Any = self.server
        wanted = self.headers.get("Range")
        server.asked = (*server.asked, wanted)
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
        if start >= len(server.content):
            self.send_error(416)
            return
        self.send_response(server.status if server.status != 200 else 206 if wanted else 200)
        self.send_header("Content-Length", str(len(server.content) - start))
        self.end_headers()
        self.wfile.write(server.content[start:][: server.most])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    torch.save({"conv1.weight": torch.zeros(2, 2)}, tmp_path / "source.pth")
    with Server(("127.0.0.1", 0), Handler) as made:
        made.content = (tmp_path / "source.pth").read_bytes()
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield made
        made.shutdown()


@pytest.fixture
def record(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The only published file; SSS_WEIGHTS is an empty folder."""
    entry = {
        "used_by": ["u2pl"], "addresses": [server.address], "layout": "ResNet-9", "tensor": "conv1.weight",
        "licence": "free", "sha256": hashlib.sha256(server.content).hexdigest()[:8],
    }  # fmt: skip
    for module in (weights, files):
        monkeypatch.setattr(module, "published_weights", lambda: {NAME: entry})
    monkeypatch.setenv("SSS_WEIGHTS", str(tmp_path / "weights"))
    monkeypatch.chdir(tmp_path)
    return entry


def stored(tmp_path: Path) -> Path:
    return tmp_path / "weights" / NAME


def fails(*words: str) -> str:
    with pytest.raises(UserError) as caught:
        weights.main(list(words))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_get_list_and_check(
    record: dict[str, Any], server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert weights.main(["list"]) == 0
    assert " here " not in capsys.readouterr().out
    assert weights.main(["get", NAME]) == 0
    assert stored(tmp_path).read_bytes() == server.content
    assert weights.main(["get", NAME]) == 0  # nothing is fetched again
    assert len(server.asked) == 1
    assert weights.main(["list"]) == 0
    assert " here " in capsys.readouterr().out
    assert weights.main(["check"]) == 0
    assert capsys.readouterr().out == f"{stored(tmp_path)}: sha256 {record['sha256']} as published\n"
    stored(tmp_path).write_bytes(server.content[:-1])
    assert weights.main(["check"]) == 1
    assert f"{stored(tmp_path)}: is not the file on record (sha256 " in capsys.readouterr().out


def test_a_broken_download_is_gone_on_with(record: dict[str, Any], server: Server, tmp_path: Path) -> None:
    server.most = 300
    assert f"broke off at 300 of {len(server.content)} bytes" in fails("get", NAME)
    assert not stored(tmp_path).exists()
    server.most = 10**9
    assert weights.main(["get", NAME]) == 0
    assert server.asked == (None, "bytes=300-")
    assert stored(tmp_path).read_bytes() == server.content


def test_what_is_no_part_of_the_file_is_dropped(
    record: dict[str, Any], server: Server, tmp_path: Path
) -> None:
    stored(tmp_path).parent.mkdir()
    stored(tmp_path).with_name(f"{NAME}.part").write_bytes(server.content + b"and more")
    assert weights.main(["get", NAME]) == 0
    assert stored(tmp_path).read_bytes() == server.content


@pytest.mark.parametrize("left", [b"", b"of another file, and longer than that one is" * 99])
def test_a_server_without_ranges_sends_all_of_it(
    record: dict[str, Any], server: Server, tmp_path: Path, left: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored(tmp_path).parent.mkdir()
    stored(tmp_path).with_name(f"{NAME}.part").write_bytes(left)
    monkeypatch.setattr(Handler, "do_GET", lambda handler: plain(handler, server))
    assert weights.main(["get", NAME]) == 0
    assert stored(tmp_path).read_bytes() == server.content


def plain(handler: Handler, server: Server) -> None:
    handler.send_response(200)
    handler.end_headers()
    handler.wfile.write(server.content)


def test_another_mirror_is_asked(record: dict[str, Any], server: Server, tmp_path: Path) -> None:
    record["addresses"] = ["http://127.0.0.1:1/gone.pth", server.address]
    assert weights.main(["get", NAME]) == 0
    record["addresses"] = ["http://127.0.0.1:1/gone.pth"]
    stored(tmp_path).unlink()
    message = fails("get", NAME)
    assert message.startswith(f"{NAME}: cannot be fetched (http://127.0.0.1:1/gone.pth: ")
    assert f"save it as {stored(tmp_path)}" in message
    server.status = 404
    record["addresses"] = [server.address]
    assert "404" in fails("get", NAME)


def test_a_checksum_that_nobody_published_is_recorded(
    record: dict[str, Any], server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    del record["sha256"]
    assert weights.main(["get", NAME]) == 0
    assert (
        hashlib.sha256(server.content).hexdigest() in stored(tmp_path).with_name(f"{NAME}.sha256").read_text()
    )
    torch.save({"conv1.weight": torch.ones(2, 2)}, stored(tmp_path))
    assert "is not the file on record" in fails("get", NAME)
    assert weights.main(["check"]) == 1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"no such thing", "damaged or not a file of tensors"),
        ({"other.weight": torch.zeros(1)}, "is no ResNet-9, it lacks conv1.weight; remove it"),
    ],
)
def test_what_is_no_weight_file_is_refused(
    record: dict[str, Any], server: Server, tmp_path: Path, content: Any, words: str
) -> None:
    del record["sha256"]
    path = tmp_path / "other.pth"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    server.content = path.read_bytes()
    assert words in fails("get", NAME)
    assert not stored(tmp_path).with_name(f"{NAME}.sha256").exists()


def test_files_for_browsers_and_of_google_drive(
    record: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record["addresses"] = ["drive:AbC"]
    monkeypatch.setitem(__import__("sys").modules, "gdown", None)
    message = fails("get", NAME)
    assert "run pip install gdown" in message
    assert "https://drive.google.com/file/d/AbC" in message
    record |= {"by_hand": "https://share.example/x", "instead": "other.pth"}
    message = fails("get", NAME)
    assert "https://share.example/x; save it as" in message
    assert "'other.pth' (same layout, other training)" in message
    assert f"'unknown.pth': not on record; use one of {NAME}" in fails("get", "unknown.pth")


def test_a_run_that_lacks_a_file_names_the_command() -> None:
    for name in published_weights():
        with pytest.raises(UserError, match=f"run 'python -m tools.weights get {name}', put it there"):
            find_weights(name)
    with pytest.raises(UserError) as caught:
        find_weights("mine.pth")
    assert "tools.weights" not in str(caught.value)


def test_every_record_is_complete_and_every_setting_has_one() -> None:
    import re

    root = Path(__file__).resolve().parents[1]
    for name, entry in published_weights().items():
        assert {"used_by", "source", "layout", "licence"} <= entry.keys(), name
        assert ("addresses" in entry) != ("by_hand" in entry), name
        assert entry.get("sha256", "") in name, name
        assert entry.get("instead", name) in published_weights(), name
        for address in entry.get("addresses", ()):
            assert address.startswith(("https://", "drive:", "http://vllab1.ucmerced.edu/")), name
    named = set[str]()
    for path in root.glob("projects/*/configs/*.yaml"):
        named |= set(re.findall(r"^[^#\n]*\bweights: (\S+)", path.read_text(encoding="utf-8"), re.M))
    bundled = {path.name for path in BUNDLED.iterdir()}
    assert named - bundled - {"imagenet", "none"} <= published_weights().keys()
