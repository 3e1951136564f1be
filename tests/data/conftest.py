import contextlib
import dataclasses
import http.server
import threading

import pytest
from cifar10_fakes import BINARY_ARCHIVE, SMALL

from distopt.data import cifar10, cifar10_files


@pytest.fixture
def small_release(monkeypatch):
    monkeypatch.setattr(cifar10, "OFFICIAL", SMALL)
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def official(monkeypatch):
    monkeypatch.setattr(cifar10, "OFFICIAL", cifar10_files.OFFICIAL)


class _Server(http.server.ThreadingHTTPServer):
    content = BINARY_ARCHIVE
    repeat = 1
    requests = 0
    sent = 0


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.requests += 1
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.server.content) * self.server.repeat))
        self.end_headers()
        with contextlib.suppress(ConnectionError):  # the other side may have had enough
            for _ in range(self.server.repeat):
                self.wfile.write(self.server.content)
                self.server.sent += len(self.server.content)

    def log_message(self, *_):
        """Keep quiet."""


@pytest.fixture
def server(monkeypatch):
    with _Server(("127.0.0.1", 0), _Handler) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.02,))
        thread.start()
        url = f"http://127.0.0.1:{running.server_port}/cifar-10-binary.tar.gz"
        monkeypatch.setattr(cifar10, "OFFICIAL", dataclasses.replace(SMALL, url=url))
        yield running
        running.shutdown()
        thread.join()
