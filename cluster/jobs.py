"""Run a command as a Ray job and stay with it: its log streams here, its exit code is ours, ctrl-C stops it.

    address = "http://127.0.0.1:8265"
    code = submit([python_for(address), "-m", "rlhf.cli", "run", "recipes/quickstart.yaml"], address, Path("."))

The working directory is shipped to the cluster, so that nodes need nothing but the dependencies.
"""

import asyncio
import os
import shlex
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import cluster.connect  # sets Ray's environment before ray is imported
from cluster.errors import ClusterError

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

FINISH_SECONDS = 30.0  # from the end of the log to the job's final state
STOP_SECONDS = 15.0


def submit(
    command: list[str], address: str, working_dir: Path, echo: Callable[[str], None] = print, env: dict[str, str] | None = None
) -> int:
    """Run `command` on the cluster behind the dashboard at `address`, in a copy of `working_dir`; returns its exit code.

    `echo` gets the id of the job and then every line of its log. A KeyboardInterrupt stops the job and is raised again.
    Raises ClusterError when no cluster answers, when it refuses the job, or when the job dies without an exit code.
    """
    client = _client(address)
    try:
        job = client.submit_job(
            entrypoint=shlex.join(command),
            runtime_env={
                "working_dir": str(working_dir),
                "excludes": cluster.connect.NOT_SHIPPED,
                "env_vars": {**cluster.connect.WORKER_ENV, **(env or {})},
            },
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise ClusterError(f"the cluster at {address} refused the job: {_first_line(error)}") from error
    echo(f"job {job} on {address}")
    try:
        asyncio.run(_follow(client, job, echo))
    except KeyboardInterrupt:
        _stop(client, job)
        raise
    return _exit_code(client, job)


def _client(address: str) -> "JobSubmissionClient":
    """Ray asks for a token when its head node found one. Its own client sends it only if RAY_AUTH_MODE=token is set here
    too, a trap for everyone who did not: so ask without, and when refused, with the token that Ray itself would take."""
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    cluster.connect.quiet()
    try:
        try:
            return JobSubmissionClient(address)
        except AuthenticationError:
            token = _token()
            if token is None:
                raise
            return JobSubmissionClient(address, headers={"Authorization": f"Bearer {token}"})
    except AuthenticationError as error:
        raise ClusterError(
            f"the cluster at {address} wants its token: put what `ray get-auth-token` prints on its head node into RAY_AUTH_TOKEN"
        ) from error
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ClusterError(
            f"no Ray dashboard answers at {address}: {_first_line(error)}. "
            "It is the address that `ray start --head` prints, by default http://127.0.0.1:8265."
        ) from error


def _token() -> str | None:
    """The token of this user's clusters, from the three places that Ray documents, in its order."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return os.environ["RAY_AUTH_TOKEN"]
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    return path.read_text().strip() if path.is_file() else None


def python_for(address: str) -> str:
    """The interpreter to name in a job's command. A head node on this machine was most likely started from our own environment,
    which need not be on its PATH; other machines are expected to have theirs on the PATH."""
    host = urlsplit(address).hostname or ""
    return sys.executable if host in ("localhost", "127.0.0.1", "::1") else "python"


async def _follow(client: "JobSubmissionClient", job: str, echo: Callable[[str], None]) -> None:
    """Whole lines of the job's log until it ends. Ray delivers it in pieces that may end within a line."""
    rest = ""
    try:
        async for piece in client.tail_job_logs(job):
            *lines, rest = (rest + piece).split("\n")
            for line in lines:
                echo(line)
    except RuntimeError as error:
        echo(f"(the log stream broke off: {_first_line(error)}; the job goes on, waiting for its end)")
    if rest:
        echo(rest)


def _exit_code(client: "JobSubmissionClient", job: str) -> int:
    """Exit code of an ended job. As long as the log stream broke off and the job runs, wait for it."""
    deadline = time.monotonic() + FINISH_SECONDS
    while True:
        info = client.get_job_info(job)
        if info.status.is_terminal():
            break
        if info.status != "RUNNING" and time.monotonic() > deadline:
            raise ClusterError(f"job {job} is {info.status} and did not start within {FINISH_SECONDS:.0f} s: {info.message}")
        time.sleep(0.2)
    if info.driver_exit_code is None:
        raise ClusterError(f"job {job} ended as {info.status} without an exit code: {_first_line(RuntimeError(info.message))}")
    return int(info.driver_exit_code)


def _stop(client: "JobSubmissionClient", job: str) -> None:
    """Stop the job and give its driver a moment to end cleanly, so that what it holds is free when we return."""
    with suppress(RuntimeError):  # it ended by itself in the meantime
        client.stop_job(job)
    deadline = time.monotonic() + STOP_SECONDS
    while time.monotonic() < deadline and not client.get_job_status(job).is_terminal():
        time.sleep(0.2)


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
