"""Is the training well? Watches loss and gradients, and says what is wrong, in which layer, since which step.

    health = Health()
    for warning in health.observe(step, loss, layer_norms): ...        # Warning(kind="spike", layer="layers.3", text="...")

Thresholds are wide on purpose: a warning that comes every hour is not read. What cannot go on (a loss or a gradient that is
not finite) is not a warning but the learner's TrainingError. `monotony` is PPO's: rewards that do not differ.
"""

import math
from collections import deque
from dataclasses import dataclass, field
from statistics import median

WINDOW = 64  # steps that say what is usual
LEAST = 20  # steps before anything counts as unusual: the first ones fall too fast
SPIKE = 8.0  # robust standard deviations of the loss, and a tenth of it at least
EXPLODING = 10.0  # times the median gradient norm
VANISHING = 1e-7  # of the largest layer's gradient norm; fp32 carries no more digits
PATIENCE = 5  # steps of it in a row: below a reward head that begins at zero the first gradients are zero
QUIET = 20  # steps until the same warning is given again


@dataclass(frozen=True)
class Warning:
    kind: str  # spike, exploding, vanishing
    layer: str  # "" when it is not about one
    text: str


@dataclass
class Health:
    losses: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    norms: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    silent: dict[str, int] = field(default_factory=dict)  # layer -> steps in a row that it got no gradient
    said: dict[tuple[str, str], int] = field(default_factory=dict)  # (kind, layer) -> step

    def observe(self, step: int, loss: float, layers: dict[str, float]) -> list[Warning]:
        """What is unusual about this step. `layers`: gradient norm of every layer before clipping."""
        total, largest = math.hypot(*layers.values()), max(layers, key=layers.__getitem__)
        found = []
        if len(self.losses) >= LEAST:
            usual, spread = median(self.losses), _spread(self.losses)
            if loss - usual > max(SPIKE * spread, 0.1 * abs(usual)):
                text = f"the loss is {loss:.4g}; it was {usual:.4g} +- {spread:.2g} in the {len(self.losses)} steps before"
                found.append(Warning("spike", "", text))
            if total > EXPLODING * (usual := median(self.norms)):
                share = layers[largest] ** 2 / total**2
                text = f"the gradient norm is {total:.4g}; its median is {usual:.3g}. {share:.0%} of its square is in {largest}"
                found.append(Warning("exploding", largest, text))
        for layer, norm in layers.items():
            self.silent[layer] = self.silent.get(layer, 0) + 1 if norm < VANISHING * layers[largest] else 0
            if self.silent[layer] >= PATIENCE:
                text = (
                    f"{self.silent[layer]} steps in a row {layer} got next to no gradient: {norm:.2g}, and {largest} {layers[largest]:.2g}"
                )
                found.append(Warning("vanishing", layer, text))
        self.losses.append(loss)
        self.norms.append(total)
        new = [w for w in found if step - self.said.get((w.kind, w.layer), -QUIET) >= QUIET]
        self.said |= {(w.kind, w.layer): step for w in new}
        return new


def monotony(steps: int, reward: float) -> str:
    """What to say when all answers of so many steps in a row were worth the same, else "". Again every `QUIET` steps."""
    if steps < PATIENCE or (steps - PATIENCE) % QUIET:
        return ""
    return (
        f"{steps} steps in a row every answer was worth {reward:g}, which teaches nothing. Begin with a model that is right at times, "
        "ask easier prompts, or give parts of an answer a reward of their own"
    )


def _spread(values: deque[float]) -> float:
    """A standard deviation that outliers do not widen: 1.4826 times the median distance from the median."""
    middle = median(values)
    return 1.4826 * median(abs(v - middle) for v in values)
