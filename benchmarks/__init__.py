"""Figures against peers. Each module's docstring says how to run it; `make peers` makes the environment that the peers run in."""
