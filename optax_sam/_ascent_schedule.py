"""Which steps take a second gradient."""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import optax

from optax_sam._hyperparameters import ScheduleState, check_integer
from optax_sam.convolutions import inside_control_flow

Result = TypeVar("Result")


class AscentSchedule:
    """Every k-th step in ``[start_step, stop_step)``; a count is kept only where it is needed."""

    def __init__(self, every_k: int | None, start_step: int | None, stop_step: int | None):
        self.every_step = every_k is None and start_step is None and stop_step is None
        self.every_k = 1 if every_k is None else every_k
        self.start_step = 0 if start_step is None else start_step
        self.stop_step = stop_step
        check_integer("every_k", self.every_k, minimum=1)
        check_integer("start_step", self.start_step, minimum=0)
        if stop_step is not None:
            check_integer("stop_step", stop_step, minimum=self.start_step)

    def init(self) -> optax.EmptyState | ScheduleState:
        """The state: empty where every step takes a second gradient."""
        if self.every_step:
            return optax.EmptyState()
        return ScheduleState(count=jnp.zeros([], jnp.int32))

    def choose(
        self,
        state: optax.EmptyState | ScheduleState,
        ascent_step: Callable[[], Result],
        step_between: Callable[[], Result],
    ) -> tuple[Result, optax.EmptyState | ScheduleState]:
        """Runs one of the two steps; no condition is compiled where every step is an ascent step."""
        if not isinstance(state, ScheduleState):
            return ascent_step(), state
        count = state.count
        is_ascent_step = (count >= self.start_step) & (
            (count - self.start_step) % self.every_k == 0
        )
        if self.stop_step is not None:
            is_ascent_step &= count < self.stop_step
        result = jax.lax.cond(is_ascent_step, inside_control_flow(ascent_step), step_between)
        return result, ScheduleState(count=optax.safe_increment(count))
