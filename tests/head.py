"""A Ray head node of its own on free loopback ports, as `ray start --head` makes one, stopped by its own pid.

with head_node() as (address, env):         # of the dashboard, and what a user of it has in the environment
    submit(command, address, folder)
"""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager


def free_ports(n: int) -> list[int]:
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(n)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]


@contextmanager
def head_node() -> Iterator[tuple[str, dict[str, str]]]:
    """A head node with two CPUs that asks for a token: its dashboard's address, and the environment that holds the token."""
    gcs, dashboard, client, agent, agent_grpc, metrics = free_ports(6)
    folder = tempfile.mkdtemp(prefix="rh-")  # short: Ray's sockets live below it, and their paths may have 107 characters
    token = {"RAY_AUTH_TOKEN": secrets.token_hex(32)}
    head = subprocess.Popen(
        [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=2", "--node-ip-address=127.0.0.1"),
            *(f"--port={gcs}", f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}", "--dashboard-host=127.0.0.1"),
            *(f"--dashboard-agent-listen-port={agent}", f"--dashboard-agent-grpc-port={agent_grpc}", f"--metrics-export-port={metrics}"),
            *(f"--temp-dir={folder}", "--disable-usage-stats", "--object-store-memory=200000000"),
        ],
        env=os.environ | token | {"RAY_AUTH_MODE": "token"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    address = f"http://127.0.0.1:{dashboard}"
    try:
        deadline = time.monotonic() + 60
        while not answers(address):
            assert head.poll() is None, head.stderr.read() if head.stderr else ""
            assert time.monotonic() < deadline, "the dashboard did not come up"
            time.sleep(0.5)
        yield address, token
    finally:
        head.send_signal(signal.SIGTERM)
        try:
            head.wait(5)  # it asks its processes one by one
        except subprocess.TimeoutExpired:
            head.kill()  # its reaper ends what is left
            head.wait()
        shutil.rmtree(folder, ignore_errors=True)


def answers(address: str) -> bool:
    try:
        urllib.request.urlopen(f"{address}/api/version", timeout=2).close()
    except urllib.error.HTTPError:
        return True  # it is there, and wants a token
    except OSError:
        return False
    return True
