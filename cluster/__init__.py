"""Machines: connecting to Ray, placing and supervising groups of workers, deadlines, checkpoints and jobs.

    from cluster.connect import connect

`cluster` knows nothing of text or losses and imports neither `data` nor `rlhf`.
"""
