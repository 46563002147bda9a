"""One way to Ray, wherever it runs.

    with connect("local"):                      # start Ray on this machine, and stop it at the end
        ...
    with connect("auto"), connect("ray://head:10001"):     # or join a running one

Inside a Ray job (`roundhouse submit`, `ray job submit`) "local" joins the cluster that runs the job: the same recipe
works in both places. Always pass the address: without one, Ray may join whatever cluster file an old session left behind.
"""

import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.errors import ClusterError

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing leaves the machine; read when ray is imported

ROOT = Path(__file__).resolve().parent.parent
NOT_SHIPPED = ["/runs", "/.venv*", "/.git", "/.ci", "/docs", "/benchmarks", "**/__pycache__", "/.*_cache", "/.hypothesis"]
REACH_SECONDS = 5.0

# glibc hands every freed block over 128 kB back to the kernel and asks for it again, and each step's activations are such
# blocks. Keeping them made one plain training loop (10.5 M parameters, 2 threads) 4-13 % faster. Read when a process starts,
# hence an environment.
WORKER_ENV = {"MALLOC_MMAP_THRESHOLD_": str(4 << 30), "MALLOC_TRIM_THRESHOLD_": str(4 << 30)}


@contextmanager
def connect(address: str = "local", num_cpus: float | None = None) -> Iterator[None]:
    """Ray, connected for the length of a `with` block. `num_cpus` (only when starting one here) defaults to this process's cores.

    Raises ClusterError when nothing answers at `address` or Ray cannot start here.
    """
    import ray  # two seconds: only those who need it pay

    if ray.is_initialized():  # a session fixture, or a notebook: theirs to stop
        yield
        return
    quiet()
    try:
        _init(address, num_cpus)
    except ClusterError:
        raise
    except Exception as error:  # Ray raises anything from ValueError to bare RuntimeError here
        raise ClusterError(_why_not(address, error)) from error
    try:
        yield
    finally:
        ray.shutdown()


def inside_job() -> bool:
    """Whether this process is the driver of a Ray job: its supervisor hands these two down."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ and "RAY_ADDRESS" in os.environ


def local_cores() -> int:
    """Cores this process may run on, which in a container or under taskset are fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def object_store_bytes() -> int:
    """Bytes of objects in the shared memory of all nodes."""
    import ray

    name = "object_store_memory"
    return int(ray.cluster_resources().get(name, 0) - ray.available_resources().get(name, 0))


def quiet() -> None:
    """Ray's progress messages would break the live line; its warnings and errors still come through, but for two that
    are announcements (tokens are on, as they should be; progress bars are off, as we asked)."""
    for name in ("ray", "ray.data", "ray.train", "ray.tune"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for name in ("ray._private.authentication.authentication_token_setup", "ray.data._internal.progress"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _init(address: str, num_cpus: float | None) -> None:
    import ray

    common = {"logging_level": logging.WARNING, "log_to_driver": False}
    if address == "local" and inside_job():
        ray.init(address=os.environ["RAY_ADDRESS"], **common)  # the job's runtime_env already ships the code
    elif address == "local":
        # Workers import data, cluster and rlhf from here; they are children of this machine, so a path is enough. They inherit it: a
        # `runtime_env` would leave the workers unused that Ray starts beforehand, and the first task waiting 1.2 s for others.
        path = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH", "")) if p)
        with _environment({"PYTHONPATH": path, **WORKER_ENV}):
            ray.init(
                address="local",
                num_cpus=local_cores() if num_cpus is None else num_cpus,
                include_dashboard=False,
                **common,
            )
        _wait_for_cpus()
    else:
        _reach(address)
        ray.init(address=address, runtime_env={"working_dir": str(ROOT), "excludes": NOT_SHIPPED, "env_vars": WORKER_ENV}, **common)


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """These variables for the processes that are started within."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _wait_for_cpus() -> None:
    """A node's resources are known a moment after it is up; Ray Data, asked before, warns that it will hang."""
    import ray

    end = time.monotonic() + REACH_SECONDS
    while not ray.available_resources().get("CPU") and time.monotonic() < end:
        time.sleep(0.05)


def _reach(address: str) -> None:
    """A closed door is told within seconds; Ray itself would knock for a minute."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit():
        return  # "auto": Ray looks for a cluster of this machine and says at once when there is none
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=REACH_SECONDS).close()
    except OSError as error:
        raise ClusterError(
            f"nothing answers at {address} ({error}). Is the head node up (`ray start --head`), and is this its address?"
        ) from None


def _why_not(address: str, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if address == "local":
        return f"Ray did not start on this machine: {reason}"
    return f"cannot join Ray at {address}: {reason}. `ray start --head` starts one; `cluster.address: local` needs none."
