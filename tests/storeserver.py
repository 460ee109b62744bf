"""Object stores on this machine: moto's S3 server, and an emulator of Google's.

Both are programs in an environment of their own (`make test` makes it: botocore wants an older
python-dateutil than ours), named by STEP_RAY_STORES; tests skip without. What pyarrow speaks to
them is the real protocol.
"""

import os
import re
import signal
import socket
import subprocess
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
BIN = Path(os.environ.get("STEP_RAY_STORES") or HERE.parent / ".venv-stores/bin").resolve()
START_S = 60
KEYS = {
    "AWS_ACCESS_KEY_ID": "AKIAOFATEST",
    "AWS_SECRET_ACCESS_KEY": "secret-of-a-test",
    "AWS_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}
REQUEST = re.compile(r'"(PUT|GET|HEAD|DELETE|POST) /([^ ?]*)(?:\?[^ ]*)? HTTP/1.1" (?:2\d\d)')
COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class StoreServer:
    """A running server: its `url`, and what it was asked."""

    def __init__(self, url, log):
        self.url, self._log = url, log

    def asked(self, *methods):
        """The (method, key) of the requests so far that were answered, in their order.

        Without the marks of folders that pyarrow leaves when it deletes.
        """
        found = REQUEST.findall(COLOURS.sub("", self._log.read_text()))
        return [(m, key) for m, key in found if m in methods and not key.endswith("/")]


@contextmanager
def running(program, folder, *options):
    """Start one of the programs; it ends with the block."""
    if not (BIN / program).is_file():
        pytest.skip(f"no {program} in {BIN}: `make test` makes it, STEP_RAY_STORES names another")
    port, log = free_port(), folder / f"{program}.log"
    command = [str(BIN / program), *(option.format(port=port) for option in options)]
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file)
    try:
        deadline = time.monotonic() + START_S
        while not _answers(port):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        yield StoreServer(f"http://127.0.0.1:{port}", log)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def _answers(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def s3_server(folder):
    """Moto, without a bucket."""
    return running("moto_server", folder, "-H", "127.0.0.1", "-p", "{port}")


def gcs_server(folder):
    """The emulator of Google's storage, without a bucket."""
    options = ("start", "--host", "127.0.0.1", "--port", "{port}", "--in-memory")
    return running("gcp-storage-emulator", folder, *options)


def make_bucket(server, name):
    """As anyone may at moto."""
    request = urllib.request.Request(f"{server.url}/{name}", method="PUT")
    urllib.request.urlopen(request).close()
