"""Jobs on a real head node. A whole recipe as a job is test_journey's."""

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from head import free_ports, head_node

from cluster import jobs
from cluster.connect import WORKER_ENV, connect
from cluster.errors import ClusterError
from cluster.jobs import python_for, submit

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def dashboard() -> Iterator[str]:
    """Address of a head node whose token is in the environment, as a user would have it."""
    with head_node() as (address, token), pytest.MonkeyPatch.context() as patch:
        for name, value in token.items():
            patch.setenv(name, value)
        yield address


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


def test_workers_of_a_local_ray_inherit_what_they_need(ray_session: None) -> None:
    """Those that Ray has started beforehand, with which a first task begins at once; nothing of it stays in this process."""
    names = [*WORKER_ENV, "PYTHONPATH"]

    @ray.remote
    def environment() -> dict[str, str | None]:
        return {name: os.environ.get(name) for name in names}

    found = ray.get(environment.remote(), timeout=60)
    assert {name: found[name] for name in WORKER_ENV} == WORKER_ENV
    assert str(ROOT) in (found["PYTHONPATH"] or "").split(os.pathsep)
    assert not set(WORKER_ENV) & set(os.environ)
