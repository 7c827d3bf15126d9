"""What one compiled program trains: a head, a method, and what can be added to it."""

import dataclasses
from typing import Any, NamedTuple

import optax

import optax_sam

from .compensations import READINGS, compensated
from .methods import METHODS


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The static part of a run: two runs with the same recipe share a compiled program."""

    method: str = "sgd"
    """A row of methods.py."""

    head: str = "mlp"
    """``linear`` or ``mlp``."""

    hidden: int = 512
    """Units of the hidden layer."""

    momentum: float = 0.9
    """Momentum of SGD."""

    loss: str = "cross_entropy"
    """A row of losses.py."""

    saner: bool = False
    """Weaken the coordinates with 0 < g'/g < 1, on top of any method."""

    average: float | None = None
    """Climb along the average gradient with this weight of the new one (VaSSO), in place of g."""

    coordinates: str | None = None
    """Letters of A, B and C: take SAM's gradient on these coordinates only, elsewhere the clean one."""

    group_size: int | None = None
    """Examples that share an ε, in place of the method's own."""

    start: float = 0.0
    """Share of the training before the method begins; until then it is SGD."""

    weight_average: float | None = None
    """Decay of an average of the weights, which then predicts."""

    dropout: float = 0.0
    """Share of the last layer's inputs that is left out."""

    mixup: bool = False
    """Mix pairs of examples and their labels, with weights from Beta(strength, strength)."""

    penalty: bool = False
    """Add an L2 penalty of the knobs' strength on the last layer and its inputs (J-SAM's stand-in)."""

    step_decay: bool = False
    """The learning rate falls to a tenth after half and after three quarters of the training, as in
    NCSAM's paper, in place of a cosine."""

    reading: str | None = None
    """A row of compensations.py in place of the method, with κ as the knobs' strength."""

    @property
    def integer_labels(self) -> bool:
        """Whether the loss takes class indices, which NCSAM asks for."""
        return self.loss == "cross_entropy" and not self.mixup

    def build(self, rho: Any, strength: Any = 0.0) -> optax.GradientTransformationExtraArgs:
        """The method with its additions; decay, momentum and learning rate come behind it."""
        if self.reading is not None:
            return compensated(READINGS[self.reading], rho, strength)
        if not (self.saner or self.average or self.group_size or self.coordinates):
            return optax.with_extra_args_support(METHODS[self.method].build(rho))
        combination = optax_sam.down_weight(0.5) if self.saner or self.method == "saner" else None
        if self.coordinates:
            combination = optax_sam.restrict_to_coordinates(self.coordinates)
        options: dict[str, Any] = {"combination": combination, "group_size": self.group_size}
        if self.average is not None:
            if self.method != "sam":
                raise ValueError(f"average: it goes with sam only, not with {self.method!r}.")
            return optax_sam.vasso(rho, self.average, **options)
        named = {"sam": optax_sam.sam, "saner": optax_sam.sam, "jsam": optax_sam.jsam}
        if self.method not in named:
            raise ValueError(f"saner, group_size: not with {self.method!r}; take sam or jsam.")
        return named[self.method](rho, **options)


class Knobs(NamedTuple):
    """The traced part of a run.

    Attributes:
      rho: the radius.
      decay: weight decay, added to the method's gradient.
      rate: the first learning rate; it falls to 0 along a cosine, or in steps.
      strength: of the loss, of mixup, of the penalty, or κ. Each is a float, or an array with one
        value per lane.
    """

    rho: Any = 0.0
    decay: Any = 5e-4
    rate: Any = 0.02
    strength: Any = 0.0
