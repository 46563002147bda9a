"""Run a command as a Ray job and stay with it: its log streams here, its exit code is ours, ctrl-C stops it.

    code = submit(["python", "-m", "rlhf.cli", "run", "recipes/quickstart.yaml"], "http://127.0.0.1:8265", Path("."))

The working directory is shipped to the cluster, so that nodes need nothing but the dependencies.
"""

import asyncio
import shlex
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import cluster.connect  # sets Ray's environment before ray is imported
from cluster.errors import ClusterError

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

FINISH_SECONDS = 30.0  # from the end of the log to the job's final state
STOP_SECONDS = 15.0


def submit(command: list[str], address: str, working_dir: Path, echo: Callable[[str], None] = print, env: dict[str, str] | None = None) -> int:
    """Run `command` on the cluster behind the dashboard at `address`, in a copy of `working_dir`; returns its exit code.

    `echo` gets the id of the job and then every line of its log. A KeyboardInterrupt stops the job and is raised again.
    Raises ClusterError when no cluster answers, when it refuses the job, or when the job dies without an exit code.
    """
    from ray.job_submission import JobSubmissionClient

    try:
        client = JobSubmissionClient(address)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ClusterError(
            f"no Ray dashboard answers at {address}: {_first_line(error)}. "
            "It is the address that `ray start --head` prints, by default http://127.0.0.1:8265."
        ) from error
    try:
        job = client.submit_job(
            entrypoint=shlex.join(command),
            runtime_env={"working_dir": str(working_dir), "excludes": cluster.connect.NOT_SHIPPED, "env_vars": env or {}},
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
