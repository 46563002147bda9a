"""Jobs on a real head node, started here on free loopback ports and stopped by its own pid."""

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
from contextlib import ExitStack
from pathlib import Path

import pytest

from cluster import jobs
from cluster.connect import connect
from cluster.errors import ClusterError
from cluster.jobs import python_for, submit

ROOT = Path(__file__).resolve().parent.parent


def free_ports(n: int) -> list[int]:
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(n)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]


@pytest.fixture(scope="module")
def dashboard() -> Iterator[str]:
    """Address of a head node that asks for a token, and has it in the environment, as a user would."""
    gcs, dashboard, client, agent, agent_grpc, metrics = free_ports(6)
    folder = tempfile.mkdtemp(prefix="rh-")  # short: Ray's sockets live below it, and their paths may have 107 characters
    token = pytest.MonkeyPatch()
    token.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    head = subprocess.Popen(
        [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=2", "--node-ip-address=127.0.0.1"),
            *(f"--port={gcs}", f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}", "--dashboard-host=127.0.0.1"),
            *(f"--dashboard-agent-listen-port={agent}", f"--dashboard-agent-grpc-port={agent_grpc}", f"--metrics-export-port={metrics}"),
            *(f"--temp-dir={folder}", "--disable-usage-stats", "--object-store-memory=100000000"),
        ],
        env={**os.environ, "RAY_AUTH_MODE": "token"},
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
        yield address
    finally:
        head.send_signal(signal.SIGTERM)
        try:
            head.wait(20)
        except subprocess.TimeoutExpired:
            head.kill()
        token.undo()
        shutil.rmtree(folder, ignore_errors=True)


def answers(address: str) -> bool:
    try:
        urllib.request.urlopen(f"{address}/api/version", timeout=2).close()
    except urllib.error.HTTPError:
        return True  # it is there, and wants a token
    except OSError:
        return False
    return True


def test_exit_code_and_log_of_a_job(dashboard: str, tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text("import os, sys\nprint('working in', os.listdir('.'))\nprint('no newline', end='')\nsys.exit(0)\n")
    lines: list[str] = []
    assert submit([python_for(dashboard), "job.py"], dashboard, tmp_path, echo=lines.append) == 0
    assert "working in ['job.py']" in lines
    assert any(line.endswith("no newline") for line in lines)


def test_exit_code_of_a_users_mistake(dashboard: str) -> None:
    """Through the command line, from the repository: its code is shipped, the mistake comes back as exit code 2."""
    lines: list[str] = []
    code = submit([python_for(dashboard), "-m", "rlhf.cli", "run", "recipes/nowhere.yaml"], dashboard, ROOT, echo=lines.append)
    assert code == 2
    assert any("no recipe at recipes/nowhere.yaml" in line for line in lines)


@pytest.mark.slow
def test_the_quickstarts_recipe_runs_as_a_job(dashboard: str, tmp_path: Path, cache_dir: Path) -> None:
    """Its first two stages, with fewer steps: Ray Data and Ray Train on a cluster that this process did not start."""
    small = [f"runs_dir={tmp_path}", f"data.cache_dir={cache_dir}", "pretrain.steps=3", "model.layers=1", "tokenizer.vocab_size=512"]
    for stage in ("data", "pretrain"):
        command = [sys.executable, "-m", "rlhf.cli", "submit", "recipes/quickstart.yaml", "--address", dashboard, "--only", stage, *small]
        done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"{stage}  " in done.stdout
        assert (tmp_path / "quickstart" / stage / "manifest.json").exists()
    assert (tmp_path / "quickstart" / "pretrain" / "model" / "model.safetensors").exists()


def test_local_joins_the_job_and_ctrl_c_stops_it(dashboard: str, tmp_path: Path) -> None:
    # one CPU more than this Ray of its own would have: only the job's cluster has the two of `dashboard`
    (tmp_path / "job.py").write_text(
        "import sys, time; sys.path.insert(0, sys.argv[1])\n"
        "from cluster.connect import connect\nimport ray\n"
        "with connect('local', num_cpus=1):\n    print('cpus', ray.cluster_resources()['CPU'], flush=True)\n    time.sleep(120)\n"
    )
    lines: list[str] = []

    def ctrl_c(line: str) -> None:
        lines.append(line)
        if line.startswith("cpus"):
            raise KeyboardInterrupt

    since = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        submit([python_for(dashboard), "job.py", str(ROOT)], dashboard, tmp_path, echo=ctrl_c)
    assert "cpus 2.0" in lines
    assert time.monotonic() - since < 60

    assert jobs._client(dashboard).get_job_status(lines[0].split()[1]) == "STOPPED"


def test_wrong_token(dashboard: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)
    with pytest.raises(ClusterError, match="wants its token"):
        submit(["true"], dashboard, tmp_path)


def test_nobody_at_that_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: False)  # as for a command that starts; the session of other tests may run
    (port,) = free_ports(1)
    with pytest.raises(ClusterError, match=f"no Ray dashboard answers at http://127.0.0.1:{port}"):
        submit(["true"], f"http://127.0.0.1:{port}", tmp_path)
    since = time.monotonic()
    for address in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}"):
        with pytest.raises(ClusterError, match=f"nothing answers at {address}"), connect(address):
            pass
    assert time.monotonic() - since < 10


def test_interpreter_of_a_job() -> None:
    assert python_for("http://127.0.0.1:8265") == sys.executable
    assert python_for("https://head.example:8265") == "python"
    assert os.path.isabs(sys.executable)
