"""Every wait has a deadline, and the error names who is missing.

    values = wait({"policy[0]": ref, "critic[0]": other_ref}, seconds=600, what="update")

A wait that ends in an error does not wait for the rest.
"""

import time
from collections.abc import Mapping
from typing import Any

import ray
from ray import ObjectRef
from ray.exceptions import RayActorError

from cluster.errors import ClusterError


def wait(refs: Mapping[str, ObjectRef], seconds: float, what: str) -> dict[str, Any]:
    """The values of `refs` under the same names.

    Raises ClusterError naming who did not answer within `seconds`, or whose actor died. An error inside a call is raised
    as it is, as soon as it happens: the others are not waited for.
    """
    names = {ref: name for name, ref in refs.items()}
    values: dict[str, Any] = {}
    pending, end = list(names), time.monotonic() + seconds
    while pending:
        done, pending = ray.wait(pending, timeout=max(0.0, end - time.monotonic()))
        for ref in done:
            try:
                values[names[ref]] = ray.get(ref)
            except RayActorError as error:
                raise ClusterError(died(what, names[ref], error)) from error
        if not done:
            missing = ", ".join(names[ref] for ref in pending)
            raise ClusterError(
                f"{what}: no answer from {missing} within {seconds:g} s ({len(values)} of {len(names)} answered). "
                "Raise cluster.deadline_s if it is only slow; `ray stack` on its node shows where it stands"
            )
    return {name: values[name] for name in refs}


def died(what: str, who: str, error: RayActorError) -> str:
    """The message for an actor's death."""
    return f"{what}: {who} died ({_why(error)}); the same command resumes"


def _why(error: RayActorError) -> str:
    """One line of Ray's many: the exception that ended the actor when it is known, else what Ray says first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[-1] if "creation task" in lines[0] else lines[0]
