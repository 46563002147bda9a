"""One exception for everything that machines refuse and that the user can mend."""


class ClusterError(RuntimeError):
    """Not enough CPUs or GPUs, no cluster at that address, a worker that does not answer. Says who, where and what to do."""
