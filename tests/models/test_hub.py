"""A name that is no folder here: how the hub is asked, and how long a missing hub is waited for."""

from __future__ import annotations

import http.server
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from tests.ports import free_port
from tests.programs import ROOT

ASK = """
import sys, time
from {module} import {function} as ask
from megadistill.errors import ConfigError
import huggingface_hub.utils, transformers
start = time.monotonic()
try:
    ask("models/studnt", key="student.model")
except ConfigError as error:
    print(time.monotonic() - start)
    print(error)
"""


class NotThere(http.server.BaseHTTPRequestHandler):
    """Answers 404 to everything, as the hub does for a model that there is not."""

    asked: list[str]

    def do_HEAD(self) -> None:
        self.asked.append(self.path)
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[tuple[str, list[str]]]:
    """A hub's address, and the paths that were asked of it."""
    handler = type("Handler", (NotThere,), {"asked": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", handler.asked
    server.shutdown()
    server.server_close()


def ask(module: str, function: str, endpoint: str, cwd) -> tuple[float, str]:
    done = subprocess.run(
        [sys.executable, "-c", ASK.format(module=module, function=function)],
        cwd=cwd,
        env={"HF_ENDPOINT": endpoint, "HF_HOME": str(cwd), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    seconds, message = done.stdout.rstrip().split("\n", 1)
    return float(seconds), message


@pytest.mark.parametrize(
    ("module", "function"),
    [
        ("megadistill.models.model_files", "find_model"),
        ("megadistill.data.tokenizer", "open_tokenizer"),
    ],
)
def test_a_hub_that_cannot_be_reached_is_not_waited_for(module, function, tmp_path) -> None:
    """The hub's client took 25 s for a mistyped folder, and 55 s for its tokenizer."""
    seconds, message = ask(module, function, f"http://127.0.0.1:{free_port()}", tmp_path)
    assert message.startswith(
        "student.model: models/studnt is no folder here, and cannot be had from the hub, which "
        "cannot be reached (Connect"
    )
    assert "\n" not in message
    assert seconds < 12


def test_a_hub_that_answers_is_asked_for_the_model(hub, tmp_path) -> None:
    endpoint, asked = hub
    _, message = ask("megadistill.models.model_files", "find_model", endpoint, tmp_path)
    assert message.startswith("student.model: models/studnt is no folder here, and cannot be had")
    assert "RepositoryNotFound" in message
    assert "/models/studnt/resolve/main/config.json" in asked


def test_a_mistyped_folder_beside_others_is_refused_without_the_hub(hub, tmp_path) -> None:
    endpoint, asked = hub
    (tmp_path / "models" / "student").mkdir(parents=True)
    _, message = ask("megadistill.models.model_files", "find_model", endpoint, tmp_path)
    assert message == (
        "student.model: models/studnt does not exist (is models/student meant?), expected a "
        "model's folder, or a hub id (owner/name)"
    )
    assert asked == []
