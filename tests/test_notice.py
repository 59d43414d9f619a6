"""Requests to save and stop."""

import http.server
import os
import signal
import threading
import time

from tinyllama_jax.train.notice import METADATA_VARIABLE, STOP_FILE, Notice


def test_slurm_warns_by_a_signal():
    before = signal.getsignal(signal.SIGUSR1)
    with Notice() as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.requested and stop.name == "SIGUSR1"
    assert signal.getsignal(signal.SIGUSR1) is before


def test_a_file_in_the_run_directory_asks_once(tmp_path):
    with Notice(tmp_path) as stop:
        assert not stop.requested
        (tmp_path / STOP_FILE).touch()
        assert stop.requested and stop.name == f"the file {tmp_path / STOP_FILE}"
    assert not (tmp_path / STOP_FILE).exists(), "heard, it must not stop the next start"


def test_a_cloud_that_takes_the_machine_away_is_heard(monkeypatch):
    answers = [b"FALSE", b"TRUE"]

    class Metadata(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            assert self.headers["Metadata-Flavor"] == "Google"
            self.send_response(200)
            self.end_headers()
            self.wfile.write(answers.pop(0))

        def log_message(self, *_):
            pass

    monkeypatch.setattr("tinyllama_jax.train.notice.POLL_SECONDS", 0.1)
    with http.server.HTTPServer(("127.0.0.1", 0), Metadata) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv(METADATA_VARIABLE, f"http://127.0.0.1:{server.server_port}/preempted")
        with Notice() as stop:
            end = time.monotonic() + 30
            while not stop.requested and time.monotonic() < end:
                time.sleep(0.02)
            assert stop.name == "the cloud's preemption notice" and answers == []
        server.shutdown()
