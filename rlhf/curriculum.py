"""Phases of pretraining (`pretrain.phases`): which window each step takes, by arithmetic over the step.

    plan = Curriculum(recipe.pretrain, recipe.seed, shards, mixture.sources(folder, "train"))
    plan.ids(137)                                # the units of step 137, out of plan.units
    plan.check()                                 # DataError when a phase shows a source more often than its max_epochs

A source's windows come in an order of its own (`data/order.py`), and every phase goes on in it where the last one of the same window
length stopped: nothing is seen twice before all of the source has been seen. How many windows of each source a phase
has had is exact after every window (`data/mixture.py`). Where no phase asks for weights, sources are not told apart, and
phases of one length take the windows that `pretrain.steps` would take.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.errors import DataError
from data.mixture import Mixture, Source, sources
from data.order import sample_index
from data.packing import Sample
from data.shards import TokenShards
from rlhf.recipe import Phase, Pretrain
from rlhf.training import Unit, Units

SHOWN = 6  # sources named in a line; a corpus may have hundreds


def of(config: Pretrain, seed: int, folder: Path) -> "Curriculum | None":
    """The curriculum that a recipe asks for, over the shards in `folder`; None when it asks for plain steps."""
    if config.phases is None:
        return None
    shards = TokenShards(folder / "train")
    if all(phase.weights is None for phase in config.phases):
        return Curriculum(config, seed, shards, [Source("", 0, shards.tokens, shards.bytes_of_text)])
    found = sources(folder, "train")
    if not found:
        raise DataError(f"{folder}: an earlier version prepared it, without noting which text is whose; remove {folder.parent}")
    return Curriculum(config, seed, shards, found)


@dataclass(frozen=True)
class Planned:
    """A phase, and what came before it."""

    phase: Phase
    first: int  # step
    length: int  # tokens of a window
    windows: list[int]  # that each source has at this length
    before: list[int]  # windows of this length that earlier phases took of each source
    tokens_before: list[int]  # tokens that earlier phases took of each source
    mixture: Mixture


class Curriculum:
    def __init__(self, config: Pretrain, seed: int, shards: TokenShards, sources: list[Source]) -> None:
        """`sources`: runs of the stream of `shards`; a single one of all tokens is in the order of plain steps.

        Raises DataError when a phase gives weight to a source without a window.
        """
        self.seed, self.batch, self.sources = seed, config.global_batch, sources
        whole = len(sources) == 1 and sources[0].tokens == shards.tokens
        self.hashes = [shards.manifest_hash if whole else f"{shards.manifest_hash}/{s.start}-{s.stop}" for s in sources]
        self.phases: list[Planned] = []
        step, tokens = 0, [0] * len(sources)
        taken: dict[int, list[int]] = {}  # by window length
        for number, phase in enumerate(config.phases or [], start=1):
            length = phase.sequence_length or config.sequence_length
            held = [source.tokens // length for source in sources]
            weights = held if phase.weights is None else [phase.weights.get(source.name, 0) for source in sources]
            self._check_text(number, phase, length, dict(zip((s.name for s in sources), held, strict=True)))
            places = phase.steps * config.global_batch
            planned = Planned(phase, step, length, held, taken.get(length, [0] * len(sources)), tokens, Mixture(weights, places))
            self.phases.append(planned)
            counts = planned.mixture.counts(places)
            taken[length] = [a + b for a, b in zip(planned.before, counts, strict=True)]
            tokens = [a + length * b for a, b in zip(tokens, counts, strict=True)]
            step += phase.steps
        self.steps = step
        blocks = [(length, source) for length in dict.fromkeys(p.length for p in self.phases) for source in range(len(sources))]
        of_blocks = [windows(shards, length, sources[source].start, sources[source].stop) for length, source in blocks]
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
            found = sample_index(self.seed, e, place[here], planned.windows[s], self.hashes[s])
            ids[here] = self._first_unit[planned.length, s] + found
        return ids.tolist()

    def span(self, unit: int) -> tuple[int, int]:
        """Where in the token stream a unit begins and ends."""
        block = int(np.searchsorted(self._starts, unit, side="right")) - 1
        length, source = self._blocks[block]
        start = self.sources[source].start + (unit - int(self._starts[block])) * length
        return start, start + length

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
        seen, total = self._epochs(planned), planned.mixture.period
        if len(self.sources) == 1:
            return f"{which}, windows of {planned.length} tokens, {seen[0]:.3g} epochs"
        shares = {s: part / total for s, part in enumerate(planned.mixture.parts) if part}
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
                steps = int(room * planned.mixture.period / (planned.mixture.parts[s] * self.batch))
                share = int(1000 * room / (planned.phase.steps * self.batch)) / 1000
                or_share = f", or its share of the tokens to {share:g}" if len(self.sources) > 1 else ""
                raise DataError(
                    f"pretrain.phases: phase {number} would show {source.name or 'the text'} {seen:.2f} times, more often than "
                    f"max_epochs = {most:g} (it has {planned.windows[s]:,} windows of {planned.length} tokens): lower steps from "
                    f"{planned.phase.steps:,} to {steps:,}{or_share}"
                )

    def _check_text(self, number: int, phase: Phase, length: int, held: dict[str, int]) -> None:
        for name in phase.weights or {}:
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


def windows(shards: TokenShards, length: int, start: int = 0, stop: int | None = None) -> Units:
    """Tokens [start, stop) of the stream in windows of `length`; documents within one are segments of their own."""
    stop = shards.tokens if stop is None else stop

    def span(i: int) -> tuple[int, int]:
        return start + i * length, start + (i + 1) * length

    def window(i: int) -> Unit:
        tokens, lengths = shards.span(*span(i))
        return [Sample(tokens, shards.learned(*span(i)).astype(np.float32), lengths=lengths)]

    def documents(i: int) -> list[str]:
        return [f"document {name[:12]} of {shards.folder}" for name in shards.document_ids(*span(i))]

    return Units([length] * ((stop - start) // length), window, shards.manifest_hash, documents)


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
