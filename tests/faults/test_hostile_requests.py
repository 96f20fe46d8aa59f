"""A real server under requests that no page sends: it refuses them in sentences, and goes on.

The long form is `make faults`; this is a part of it, with a planted model in the model's place.
"""

import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from hostile_requests import ROUTES, complaint, hostile_requests
from server_process import PageServer, page_server
from starlette.routing import compile_path

from synthetic_study import write_study
from vitrail.app import create_app

N_REQUESTS = 65

SERVE = """
import sys
sys.path.insert(0, sys.argv[2])
from synthetic_study import PlantedLive
from vitrail.app import serve

serve(sys.argv[1], PlantedLive(), port=0, open_browser=False)
"""


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_study(tmp_path_factory.mktemp("planted"), 12)


@pytest.fixture(scope="module")
def command(study: Path) -> list[str]:
    return ["-c", SERVE, str(study), str(Path(__file__).parents[1])]


@pytest.fixture(scope="module")
def server(command: list[str]) -> Iterator[PageServer]:
    with page_server(command) as running:
        yield running


def test_every_route_of_the_server_is_tried(study: Path) -> None:
    targets = [target.partition("?")[0] for target in ROUTES]
    paths = [route.path for route in create_app(study).routes if route.path.startswith(("/api", "/thumb", "/photo"))]
    patterns = {path: compile_path(path)[0] for path in paths}
    untried = [path for path, pattern in patterns.items() if not any(map(pattern.match, targets))]
    assert len(paths) > 15
    assert untried == []


def test_hostile_requests_are_refused_in_sentences_and_the_page_goes_on(server: PageServer) -> None:
    for kind, content in hostile_requests(0, N_REQUESTS):
        assert complaint(server.send(content)) == "", f"{kind}: {content[:300]!r}"
    assert server.get("/api/study").status == 200
    assert "Traceback" not in server.printed()


def test_senders_that_stall_hold_no_one_up(server: PageServer) -> None:
    body = f"POST /api/look HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nContent-Length: 1000\r\n\r\n".encode()
    with ExitStack() as open_connections:
        for content in [body] * 3 + [body[:60]] * 20:
            connection = open_connections.enter_context(socket.create_connection(("127.0.0.1", server.port), 30))
            connection.sendall(content)
        assert server.get("/api/study").seconds < 10
        assert server.get("/thumb/0").status == 200
