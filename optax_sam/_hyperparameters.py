"""Numbers that may be schedules, and the checks that every argument goes through."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_sam._checks import call


class ScheduleState(NamedTuple):
    """State of a hyperparameter that follows a schedule.

    Attributes:
      count: int32 scalar, the number of updates so far.
    """

    count: jax.Array  # type: ignore[assignment]  # optax's name; hides tuple.count


def check_number(
    name: str,
    value: Any,
    *,
    minimum: float = -math.inf,
    maximum: float = math.inf,
    exclusive_minimum: bool = False,
    exclusive_maximum: bool = False,
    kind: str = "a number",
    remedy: str = "",
) -> None:
    """Raises unless ``value`` is one finite real number inside its range.

    Python, NumPy and JAX scalars are read alike. Of a traced value, which ``jit`` makes of what
    ``optax.inject_hyperparams`` holds, only shape and dtype can be checked.
    """
    check_scalar(name, value, kind=kind, remedy=remedy)
    if isinstance(value, jax.core.Tracer):
        return
    number = value.item() if isinstance(value, jax.Array | np.ndarray | np.generic) else value
    is_open_below = exclusive_minimum or math.isinf(minimum)
    is_open_above = exclusive_maximum or math.isinf(maximum)
    is_inside = (minimum < number if is_open_below else minimum <= number) and (
        number < maximum if is_open_above else number <= maximum
    )  # false for NaN
    if not is_inside:
        left, right = "(" if is_open_below else "[", ")" if is_open_above else "]"
        raise ValueError(
            f"{name} must lie in {left}{minimum:g}, {maximum:g}{right}, got {number!r}. "
            f"{remedy}".rstrip()
        )


def check_scalar(name: str, value: Any, *, kind: str = "a number", remedy: str = "") -> None:
    """Raises unless ``value`` is one real number, traced or not; bools are none."""
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        is_real = jnp.issubdtype(value.dtype, np.integer) or jnp.issubdtype(
            value.dtype, np.floating
        )
        if value.shape != ():
            raise ValueError(
                f"{name} must be a scalar, got an array of shape {value.shape}. {remedy}".rstrip()
            )
    else:
        is_real = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_real:
        raise TypeError(f"{name} must be {kind}, got {value!r}. {remedy}".rstrip())


def check_integer(name: str, value: Any, *, minimum: int) -> int:
    """The Python integer that ``value`` is; raises unless it is one of at least ``minimum``.

    A JAX array is refused, concrete or not: what such an argument decides (shapes, the number of
    passes) is fixed when a step is compiled.
    """
    if isinstance(value, jax.Array):
        raise TypeError(
            f"{name} must be an integer that is known when the step is compiled, got {value!r}. "
            f"Pass int({name}); under optax.inject_hyperparams name it in static_args=({name!r},)."
        )
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} must be an integer, got {value!r}.")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}.")
    return int(value)


class Hyperparameter:
    """A number, a traced array or a schedule, read in the same way.

    A step count is kept only where a schedule was given.
    """

    def __init__(
        self,
        name: str,
        value: optax.ScalarOrSchedule,
        *,
        minimum: float = -math.inf,
        maximum: float = math.inf,
        exclusive_minimum: bool = False,
        exclusive_maximum: bool = False,
        remedy: str = "",
    ) -> None:
        if not callable(value):
            check_number(
                name,
                value,
                minimum=minimum,
                maximum=maximum,
                exclusive_minimum=exclusive_minimum,
                exclusive_maximum=exclusive_maximum,
                kind="a number or a schedule",
                remedy=remedy,
            )
        self._name = name
        self._value = value

    def init(self) -> optax.EmptyState | ScheduleState:
        """The state: empty for a number, a count for a schedule."""
        if callable(self._value):
            return ScheduleState(count=jnp.zeros([], jnp.int32))
        return optax.EmptyState()

    def read(self, state: Any, dtype: Any) -> tuple[jax.Array, optax.EmptyState | ScheduleState]:
        """The value at this step, in ``dtype``, and the state of the next step.

        What a schedule returns is traced under ``jit``, so its range is not checked.
        """
        if not callable(self._value):
            return jnp.asarray(self._value).astype(dtype), state
        value = call(
            self._name,
            self._value,
            state.count,
            takes="the step, as a schedule does",
            remedy="Pass a number, or a schedule such as optax.linear_schedule(0.0, 0.1, 1000).",
        )
        check_scalar(
            f"what the schedule of {self._name} returns",
            value,
            remedy="A schedule maps the step to a number.",
        )
        next_state = ScheduleState(count=optax.safe_increment(state.count))
        return jnp.asarray(value).astype(dtype), next_state
