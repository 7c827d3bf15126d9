"""Numbers that may be schedules, and the checks that every argument goes through."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax


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
    exclusive_maximum: bool = False,
    remedy: str = "",
) -> None:
    """Raises if a concrete Python number lies outside its range.

    JAX arrays are let through: under ``optax.inject_hyperparams`` the value is a tracer.
    """
    if isinstance(value, np.generic | np.ndarray) and np.ndim(value) == 0:
        value = value.item()
    if isinstance(value, jax.Array | np.ndarray):
        return
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number or a schedule, got {value!r}. {remedy}".rstrip())
    too_large = value >= maximum if exclusive_maximum else value > maximum
    if math.isnan(value) or value < minimum or too_large:
        bracket = ")" if exclusive_maximum or math.isinf(maximum) else "]"
        raise ValueError(
            f"{name} must lie in [{minimum:g}, {maximum:g}{bracket}, got {value!r}. {remedy}".rstrip()
        )


def check_integer(name: str, value: Any, *, minimum: int) -> None:
    """Raises unless ``value`` is a concrete integer of at least ``minimum``."""
    if isinstance(value, bool) or not isinstance(value, int):
        hint = (
            f" Under optax.inject_hyperparams name it in static_args=({name!r},)."
            if isinstance(value, jax.Array)
            else ""
        )
        raise TypeError(f"{name} must be a Python integer, got {value!r}.{hint}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}.")


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
        exclusive_maximum: bool = False,
        remedy: str = "",
    ):
        if not callable(value):
            check_number(
                name,
                value,
                minimum=minimum,
                maximum=maximum,
                exclusive_maximum=exclusive_maximum,
                remedy=remedy,
            )
        self._value = value

    def init(self) -> optax.EmptyState | ScheduleState:
        """The state: empty for a number, a count for a schedule."""
        if callable(self._value):
            return ScheduleState(count=jnp.zeros([], jnp.int32))
        return optax.EmptyState()

    def read(
        self, state: optax.OptState, dtype: jnp.dtype
    ) -> tuple[jax.Array, optax.EmptyState | ScheduleState]:
        """The value at this step, in ``dtype``, and the state of the next step."""
        if callable(self._value):
            value: Any = self._value(state.count)
            state = ScheduleState(count=optax.safe_increment(state.count))
        else:
            value = self._value
        return jnp.asarray(value).astype(dtype), state


def check_callable(name: str, value: Any, remedy: str) -> Callable:
    """Returns ``value`` if it can be called, and raises with the remedy otherwise."""
    if not callable(value):
        raise TypeError(f"{name} must be callable, got {value!r}. {remedy}")
    return value
