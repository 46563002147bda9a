"""Which bundles go to which node: arithmetic on resources, no Ray.

    pools = pools_of({"policy": Demand(8, cpus=1, gpus=1), "reference": Demand(8, cpus=1, gpus=1)}, [["policy", "reference"]])
    plan(pools, {"node a": {"CPU": 16, "GPU": 8}})          # [["node a"] * 8], or None when it does not fit

A pool is what becomes one placement group: a group of its own, or a colocated set, whose groups take turns on the same bundles.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, islice
from math import floor

Amounts = Mapping[str, float]  # resource -> amount, of a bundle or of what is free on a node

WORK = 200_000  # layouts times nodes looked at before a search gives up, about 2 s; clusters of equal nodes need one layout per pool
DEEP = 16  # nodes of one pool up to which bundles are tried on one node rather than the other
CHOICES = 500  # sets of nodes looked at for one pool and one number of nodes


@dataclass(frozen=True)
class Demand:
    """`workers` actors, each with `cpus` cores and `gpus` GPUs of one node; on `nodes` nodes, as many on each (None: on few)."""

    workers: int
    cpus: float
    gpus: float
    nodes: int | None = None

    @property
    def meets(self) -> bool:
        """Whether the actors form a process group, for which the first one listens on a port: one CPU actor alone needs none."""
        return self.workers > 1 or self.gpus > 0

    @property
    def bundle(self) -> dict[str, float]:
        return {name: amount for name, amount in (("CPU", self.cpus), ("GPU", self.gpus)) if amount > 0}

    @property
    def width(self) -> float:
        """What an actor takes of the devices it would share: its GPUs, or its cores when it has none."""
        return self.gpus or self.cpus

    def __str__(self) -> str:
        each = " + ".join(f"{amount:g} {name}" for name, amount in self.bundle.items()) or "nothing"
        spread = "" if self.nodes is None else f" on {self.nodes} node{'s' * (self.nodes > 1)}"
        return f"{self.workers} x ({each}){spread}"


@dataclass(frozen=True)
class Pool:
    """One placement group. The first of its groups has one actor per bundle and holds the bundles' GPUs."""

    names: tuple[str, ...]
    demand: Demand  # of the bundles: as many workers as there are bundles

    @property
    def bundle(self) -> dict[str, float]:
        return self.demand.bundle or {"CPU": 0.001}  # Ray refuses an empty one


def pools_of(demands: Mapping[str, Demand], colocate: Sequence[Sequence[str]] = ()) -> list[Pool]:
    """The pools of all groups. Members of a set that are not in `demands` are left out.

    A set's bundle holds one actor of its widest group and as many of a narrower one as fit, so that the GPUs of an actor are
    always on one node. Its cores are what the neediest group asks: only one of them works at a time.
    """
    sets = [tuple(name for name in names if name in demands) for names in colocate]
    shared = {name for names in sets for name in names}
    found = [Pool((name,), demand) for name, demand in demands.items() if name not in shared]
    for names in filter(None, sets):
        first = max(names, key=lambda name: demands[name].width)
        names = (first, *(name for name in names if name != first))
        cores = max(demands[name].cpus * per_bundle(demands[first], demands[name]) for name in names)
        nodes = next((demands[name].nodes for name in names if demands[name].nodes), None)
        found.append(Pool(names, Demand(demands[first].workers, cores, demands[first].gpus, nodes)))
    return found


def per_bundle(widest: Demand, demand: Demand) -> int:
    """How many actors of `demand` share a bundle made for one actor of `widest`."""
    return max(1, round(widest.width / demand.width)) if demand.width else 1


def disagreement(demands: Mapping[str, Demand]) -> str | None:
    """Why these groups cannot share devices, or None."""
    of = "gpus" if any(d.gpus for d in demands.values()) else "cpus"
    shares = ", ".join(f"{name} {d.workers} x {getattr(d, of):g}" for name, d in demands.items())
    if of == "gpus" and any(d.gpus == 0 or d.gpus != int(d.gpus) for d in demands.values()):
        return f"groups on the same devices take whole GPUs, or none of them any ({shares})"
    widest = max(d.width for d in demands.values())
    totals = [d.workers * d.width for d in demands.values()]
    if max(totals) - min(totals) > 1e-6:
        return f"groups on the same devices must take the same amount, workers x {of} ({shares})"
    if any(d.width and abs(widest / d.width - round(widest / d.width)) > 1e-6 for d in demands.values()):
        return f"the widest actor of a set must be a multiple of the others ({shares})"
    nodes = {d.nodes for d in demands.values() if d.nodes}
    if len(nodes) > 1:
        return f"groups on the same devices are on the same nodes, got nodes = {' and '.join(str(n) for n in sorted(nodes))}"
    bundles = min(d.workers for d in demands.values())
    if nodes and bundles % min(nodes):
        return f"{bundles} sets of devices cannot be spread evenly over nodes = {min(nodes)} ({shares})"
    return None


def plan(pools: Sequence[Pool], free: Mapping[str, Amounts]) -> list[list[str]] | None:
    """The node of every bundle of every pool, or None when they do not all fit into `free`.

    Largest bundles first, each pool on as few nodes as it can and on the fullest that hold it; where that leaves no room for a
    later pool, the next layout is tried.
    """
    for r in ("CPU", "GPU"):
        if sum(p.demand.workers * p.bundle.get(r, 0) for p in pools) > sum(amounts.get(r, 0) for amounts in free.values()) + 1e-6:
            return None
    order = by_size(pools)
    tries = iter(range(WORK // max(1, len(free))))

    def search(i: int, free: Mapping[str, Amounts]) -> dict[int, Counter[str]] | None:
        if i == len(order):
            return {}
        pool = pools[order[i]]
        for layout in layouts(pool, free):
            if next(tries, None) is None:
                return None
            rest = search(i + 1, _less(free, layout, pool.bundle))
            if rest is not None:
                return {order[i]: layout, **rest}
        return None

    found = search(0, free)
    return None if found is None else [sorted(found[i].elements()) for i in range(len(pools))]


def homeless(pools: Sequence[Pool], free: Mapping[str, Amounts]) -> dict[int, int]:
    """Whom to name when `plan` finds nothing: pool -> bundles without a place when the largest are placed first."""
    found = {}
    for i in by_size(pools):
        pool = pools[i]
        layout = next(layouts(pool, free), None)
        if layout is None:
            room = sum(sorted((_room(pool, amounts) for amounts in free.values()), reverse=True)[: pool.demand.nodes])
            found[i] = max(1, pool.demand.workers - room)
        else:
            free = _less(free, layout, pool.bundle)
    return found


def by_size(pools: Sequence[Pool]) -> list[int]:
    """Numbers of the pools, largest bundles first; among equal ones, those that are bound to a number of nodes."""

    def size(i: int) -> tuple[float, ...]:
        bundle, demand = pools[i].bundle, pools[i].demand
        return (-bundle.get("GPU", 0), -bundle.get("CPU", 0), not demand.nodes, -demand.workers)

    return sorted(range(len(pools)), key=size)


def layouts(pool: Pool, free: Mapping[str, Amounts]) -> Iterator[Counter[str]]:
    """Ways to spread a pool over the nodes, node -> bundles: on few nodes first, on full ones first, equal ones once."""
    bundles, fixed = pool.demand.workers, pool.demand.nodes
    room = {node: _room(pool, amounts) for node, amounts in free.items()}

    def emptiness(node: str) -> tuple[float, float]:
        return (free[node].get("GPU", 0), free[node].get("CPU", 0))

    for n in (fixed,) if fixed else range(1, min(bundles, len(room)) + 1):
        least = bundles // n if fixed or n == 1 else 1
        fits = [node for node, count in room.items() if count >= least]
        if sum(sorted((room[node] for node in fits), reverse=True)[:n]) < bundles or len(fits) < n:
            continue
        fits.sort(key=emptiness if least * n == bundles else lambda node: (-room[node], *emptiness(node)))
        seen = set()
        for nodes in islice(combinations(fits, n), CHOICES):
            kind = tuple(sorted((room[node], *emptiness(node)) for node in nodes))
            if kind in seen:
                continue
            seen.add(kind)
            if fixed:
                yield Counter(dict.fromkeys(nodes, least))
            else:
                roomiest = sorted(nodes, key=lambda node: -room[node])
                yield from map(Counter, _fillings(roomiest, [room[node] for node in roomiest], bundles))


def _fillings(nodes: Sequence[str], room: Sequence[int], bundles: int) -> Iterator[dict[str, int]]:
    """All ways to put `bundles` on exactly these nodes, at least one on each; the first ones as full as can be."""
    if len(nodes) > DEEP:  # the first one alone: nobody searches that far
        filling: dict[str, int] = {}
        for left, (node, most) in zip(range(len(nodes) - 1, -1, -1), zip(nodes, room, strict=True), strict=True):
            filling[node] = min(most, bundles - sum(filling.values()) - left)
        yield filling
        return
    if len(nodes) == 1:
        if 1 <= bundles <= room[0]:
            yield {nodes[0]: bundles}
        return
    for count in range(min(room[0], bundles - len(nodes) + 1), max(0, bundles - sum(room[1:]) - 1), -1):
        for rest in _fillings(nodes[1:], room[1:], bundles - count):
            yield {nodes[0]: count, **rest}


def _room(pool: Pool, free: Amounts) -> int:
    """How many of the pool's bundles fit into `free`, at most as many as it has."""
    return min(pool.demand.workers, *(floor((free.get(r, 0) + 1e-6) / amount) for r, amount in pool.bundle.items()))


def _less(free: Mapping[str, Amounts], layout: Counter[str], bundle: Amounts) -> dict[str, Amounts]:
    taken = {node: {r: a - layout[node] * bundle.get(r, 0) for r, a in free[node].items()} for node in layout}
    return {**free, **taken}
