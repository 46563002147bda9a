"""Phases of pretraining (`pretrain.phases`): which window each step takes, by arithmetic over the step.

    plan = Curriculum(recipe.pretrain, recipe.seed, shards, mixture.sources(folder, "train"))
    plan.ids(137)                                # the units of step 137, out of plan.units
    plan.check()                                 # DataError when a phase shows a source more often than its max_epochs

A source's windows come in an order of its own (`data/order.py`), and every phase goes on in it where the last one of the same window
length stopped: nothing is seen twice before all of the source has been seen. How many windows of each source a phase
has had is exact after every window (`data/mixture.py`), also while weights move (`weights_to`). A phase of `bins` has an order of its
own and begins anew. Where no phase asks for weights or bins, sources are not told apart, and phases of one length take the windows
that `pretrain.steps` would take.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from data.errors import DataError
from data.mixture import Buckets, Category, Mixture, Order, Ramp, Source, categories, sources
from data.order import sample_index
from data.packing import Sample
from data.shards import TokenShards
from rlhf.recipe import Pretrain
from rlhf.recipe_data import Phase
from rlhf.training import Unit, Units

Text = Source | Category
SHOWN = 6  # sources named in a line; a corpus may have hundreds


def of(config: Pretrain, seed: int, folder: Path) -> "Curriculum | None":
    """The curriculum that a recipe asks for, over the shards in `folder`; None when it asks for plain steps."""
    if config.phases is None:
        return None
    shards = TokenShards(folder / "train")
    if all(phase.weights is None and phase.bins is None for phase in config.phases):
        return Curriculum(config, seed, shards, [Source("", 0, shards.tokens, shards.bytes_of_text)])
    found = sources(folder, "train")
    if not found:
        raise DataError(f"{folder}: an earlier version prepared it, without noting which text is whose; remove {folder.parent}")
    return Curriculum(config, seed, shards, found if config.mix_by == "source" else categories(folder, "train", shards.ends))


@dataclass(frozen=True)
class Planned:
    """A phase, and what came before it."""

    phase: Phase
    first: int  # step
    length: int  # tokens of a window
    windows: list[int]  # that each source has at this length
    before: list[int]  # windows of this length that earlier phases took of each source
    tokens_before: list[int]  # tokens that earlier phases took of each source
    mixture: Order


class Curriculum:
    def __init__(self, config: Pretrain, seed: int, shards: TokenShards, sources: Sequence[Text]) -> None:
        """`sources`: texts of the stream of `shards`; a single one of all tokens is in the order of plain steps.

        Raises DataError when a phase gives weight to a source without a window.
        """
        self.seed, self.batch, self.sources = seed, config.global_batch, sources
        whole = len(sources) == 1 and sources[0].tokens == shards.tokens
        self.hashes = [shards.manifest_hash if whole else f"{shards.manifest_hash}/{s.key}" for s in sources]
        self.phases: list[Planned] = []
        step, tokens = 0, [0] * len(sources)
        taken: dict[int, list[int]] = {}  # by window length
        for number, phase in enumerate(config.phases or [], start=1):
            length = phase.sequence_length or config.sequence_length
            held = [source.tokens // length for source in sources]
            self._check_text(number, phase, length, dict(zip((s.name for s in sources), held, strict=True)))
            places = phase.steps * config.global_batch
            before = taken.get(length, [0] * len(sources)) if phase.bins is None else [0] * len(sources)
            planned = Planned(phase, step, length, held, before, tokens, _order(phase, [s.name for s in sources], held, places))
            self.phases.append(planned)
            counts = planned.mixture.counts(places)
            if phase.bins is None:
                taken[length] = [a + b for a, b in zip(before, counts, strict=True)]
            tokens = [a + length * b for a, b in zip(tokens, counts, strict=True)]
            step += phase.steps
        self.steps = step
        blocks = [(length, source) for length in dict.fromkeys(p.length for p in self.phases) for source in range(len(sources))]
        of_blocks = [windows(shards, length, sources[source]) for length, source in blocks]
        self.units = joined(of_blocks)
        starts = np.cumsum([0, *(len(units.lengths) for units in of_blocks)])
        self._first_unit = {block: int(start) for block, start in zip(blocks, starts, strict=False)}
        self._blocks, self._starts = blocks, starts

    def ids(self, step: int) -> list[int]:
        """The units of one optimizer step: a function of seed, step and data alone."""
        planned = self._at(step)
        source, rank = planned.mixture.at(np.arange(self.batch, dtype=np.int64) + (step - planned.first) * self.batch)
        place = rank + np.array(planned.before)[source]
        epoch, place = np.divmod(place, np.array(planned.windows)[source])
        ids = np.empty(self.batch, np.int64)
        for s, e in {(int(s), int(e)) for s, e in zip(source, epoch, strict=True)}:
            here = (source == s) & (epoch == e)
            ids[here] = self._first_unit[planned.length, s] + self._permuted(planned, s, e, place[here])
        return ids.tolist()

    def _permuted(self, planned: Planned, source: int, epoch: int, places: np.ndarray) -> np.ndarray:
        """Which of a source's windows stand at these places of an epoch."""
        if not isinstance(planned.mixture, Buckets):
            return sample_index(self.seed, epoch, places, planned.windows[source], self.hashes[source])
        starts = np.array(planned.mixture.starts[source])
        bins, found = np.searchsorted(starts, places, side="right") - 1, np.empty_like(places)
        for b in np.unique(bins):
            start, stop, here = int(starts[b]), int(starts[b + 1]), bins == b
            name = f"{self.hashes[source]}/{start}-{stop}"
            found[here] = start + sample_index(self.seed, epoch, places[here] - start, stop - start, name)
        return found

    def spans(self, unit: int) -> list[tuple[int, int]]:
        """Where in the token stream a unit is: one run, or one for each document of a category."""
        block = int(np.searchsorted(self._starts, unit, side="right")) - 1
        length, source = self._blocks[block]
        start = (unit - int(self._starts[block])) * length
        return self.sources[source].spans(start, start + length)

    def metrics(self, done: int) -> dict[str, float]:
        """Which phase step `done` (from 1) was in, and each source's share of all tokens seen so far."""
        planned = self._at(done - 1)
        found: dict[str, float] = {"phase": self.phases.index(planned) + 1}
        if len(self.sources) > 1:
            counts = planned.mixture.counts((done - planned.first) * self.batch)
            tokens = [a + planned.length * b for a, b in zip(planned.tokens_before, counts, strict=True)]
            found |= {f"pretrain/share/{s.name}": t / sum(tokens) for s, t in zip(self.sources, tokens, strict=True)}
        return found

    def note(self, step: int) -> str:
        """What begins at this step, for a person; "" when nothing does."""
        planned = self._at(step)
        if step != planned.first:
            return ""
        which = f"phase {self.phases.index(planned) + 1} of {len(self.phases)}: steps {step + 1:,} to {step + planned.phase.steps:,}"
        seen = self._epochs(planned)
        if len(self.sources) == 1:
            return f"{which}, windows of {planned.length} tokens, {seen[0]:.3g} epochs"
        shares = {s: float(share) for s, share in enumerate(planned.mixture.shares) if share}
        texts = [f"{self.sources[s].name} {share:.3g} of the tokens ({seen[s]:.3g} epochs)" for s, share in _largest(shares)]
        return f"{which}, windows of {planned.length} tokens: {_listed(texts, len(shares))}"

    def summary(self) -> str:
        """How often all phases together show each source."""
        epochs = np.sum([self._epochs(planned) for planned in self.phases], axis=0)
        texts = [f"{self.sources[s].name} {seen:.3g}".strip() for s, seen in _largest(dict(enumerate(epochs.tolist())))]
        return f"{len(self.phases)} phases, {self.steps:,} steps; epochs over all of them: {_listed(texts, len(self.sources))}"

    def check(self) -> None:
        """Raises DataError when a phase shows a source more often than its max_epochs allows, with what would be allowed."""
        for number, planned in enumerate(self.phases, start=1):
            most = planned.phase.max_epochs
            for s, (seen, source) in enumerate(zip(self._epochs(planned), self.sources, strict=True)):
                if most is None or seen <= most:
                    continue
                room = most * planned.windows[s]  # windows
                steps = int(Fraction(room) / (planned.mixture.shares[s] * self.batch))
                share = int(1000 * room / (planned.phase.steps * self.batch)) / 1000
                or_share = f", or its share of the tokens to {share:g}" if len(self.sources) > 1 else ""
                raise DataError(
                    f"pretrain.phases: phase {number} would show {source.name or 'the text'} {seen:.2f} times, more often than "
                    f"max_epochs = {most:g} (it has {planned.windows[s]:,} windows of {planned.length} tokens): lower steps from "
                    f"{planned.phase.steps:,} to {steps:,}{or_share}"
                )

    def _check_text(self, number: int, phase: Phase, length: int, held: dict[str, int]) -> None:
        for name in {**(phase.weights or {}), **(phase.weights_to or {})}:
            if name not in held:
                raise DataError(f"pretrain.phases: phase {number} gives weight to {name}; there is {_listed(list(held)[:20], len(held))}")
            if not held.get(name):
                raise DataError(
                    f"pretrain.phases: phase {number} gives weight to {name}, which has no window of {length} tokens to train on "
                    "(a document of several sources belongs to the first of them in data.pretrain)"
                )
        if not any(held.values()):
            raise DataError(f"pretrain.phases: phase {number} wants windows of {length} tokens, and no source has as many to train on")

    def _at(self, step: int) -> Planned:
        return next(planned for planned in reversed(self.phases) if planned.first <= step)

    def _epochs(self, planned: Planned) -> list[float]:
        counts = planned.mixture.counts(planned.phase.steps * self.batch)
        return [count / windows if windows else 0.0 for count, windows in zip(counts, planned.windows, strict=True)]


def _order(phase: Phase, names: list[str], held: list[int], places: int) -> Order:
    if phase.bins is not None:
        return Buckets(held, phase.bins)
    if phase.weights is None:
        return Mixture(held, places)
    weights = [phase.weights.get(name, 0) for name in names]
    return (
        Mixture(weights, places) if phase.weights_to is None else Ramp(weights, [phase.weights_to.get(name, 0) for name in names], places)
    )


def windows(shards: TokenShards, length: int, text: Text | None = None) -> Units:
    """A text of the stream, or all of it, in windows of `length`; documents within one are segments of their own."""
    of = Source("", 0, shards.tokens, 0) if text is None else text

    def window(i: int) -> Unit:
        places = of.spans(i * length, (i + 1) * length)
        spans = [shards.span(*place) for place in places]
        weights = np.concatenate([shards.learned(*place) for place in places]).astype(np.float32)
        lengths = [segment for _, segments in spans for segment in segments]
        return [Sample(np.concatenate([tokens for tokens, _ in spans]), weights, lengths=lengths)]

    def documents(i: int) -> list[str]:
        names = [name for span in of.spans(i * length, (i + 1) * length) for name in shards.document_ids(*span)]
        return [f"document {name[:12]} of {shards.folder}" for name in names]

    return Units([length] * (of.tokens // length), window, shards.manifest_hash, documents)


def joined(parts: list[Units]) -> Units:
    """All units of all parts, numbered through."""
    starts = np.cumsum([0, *(len(units.lengths) for units in parts)])

    def place(i: int) -> tuple[Units, int]:
        part = int(np.searchsorted(starts, i, side="right")) - 1
        return parts[part], i - int(starts[part])

    def get(i: int) -> Unit:
        units, inner = place(i)
        return units.get(inner)

    def documents(i: int) -> list[str]:
        units, inner = place(i)
        return units.documents(inner)

    return Units([length for units in parts for length in units.lengths], get, parts[0].hash, documents)


def _largest(values: dict[int, float]) -> list[tuple[int, float]]:
    """The largest few, in their own order."""
    most = sorted(values, key=lambda s: -values[s])[:SHOWN]
    return [(s, values[s]) for s in sorted(most)]


def _listed(texts: list[str], of: int) -> str:
    return ", ".join(texts) + (f" and {of - len(texts)} more" if of > len(texts) else "")
