"""Everything that optax exports and that makes, wraps or schedules a gradient transformation.

A row says how to build it with harmless arguments. What is in no row must be in
:data:`NOT_TRANSFORMATIONS`; a test fails for a name that is in neither, so a new release shows up.
"""

import dataclasses
import functools
import inspect
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, Literal

import jax
import optax
import optax.contrib
import optax.losses
import optax.schedules
import optax.transforms

Kind = Literal["optimizer", "transformation", "wrapper"]

MODULES: dict[str, ModuleType] = {
    "optax": optax,
    "optax.contrib": optax.contrib,
    "optax.transforms": optax.transforms,
    "optax.schedules": optax.schedules,
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One exported name, or one way of using it.

    Attributes:
      kind: what it is.
      build: builds it; a wrapper takes the transformation that it goes around.
      extra: the keyword arguments that its ``update`` needs.
      per_example: it takes one gradient per example.
    """

    kind: Kind
    build: Callable[..., Any]
    extra: tuple[str, ...] = ()
    per_example: bool = False

    def make(self, *inner: Any) -> Any:
        """The transformation; optax may say that it is deprecated."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            return self.build(*inner)


LINESEARCH = ("value", "grad", "value_fn")

# The leaves of tests/composition/by_hand.py.
SOME_LEAVES = {"bias": False, "hidden": True, "out": True}
ALL_LEAVES = {"bias": True, "hidden": True, "out": True}


def _named(*names: str, **arguments: Any) -> dict[str, Row]:
    """Optimizers that take a learning rate first."""
    return {
        name: Row("optimizer", functools.partial(_find(name), 0.1, **arguments)) for name in names
    }


def _plain(*names: str, kind: Kind = "transformation") -> dict[str, Row]:
    """Those that need no argument."""
    return {name: Row(kind, _find(name)) for name in names}


def _find(name: str) -> Callable[..., Any]:
    module = optax.contrib if name.startswith("contrib.") else optax
    found: Callable[..., Any] = getattr(module, name.removeprefix("contrib."))
    return found


OPTIMIZERS = {
    **_named("adabelief", "adadelta", "adafactor", "adagrad", "adam", "adamax", "adamaxw"),
    **_named("adamw", "adan", "amsgrad", "fromage", "lamb", "lars", "lion", "nadam", "nadamw"),
    **_named("novograd", "optimistic_adam", "optimistic_adam_v2", "optimistic_gradient_descent"),
    **_named("radam", "rmsprop", "rprop", "sgd", "sign_sgd", "signum", "sm3", "yogi"),
    "noisy_sgd": Row("optimizer", lambda: optax.noisy_sgd(0.1, key=0)),
    "polyak_sgd": Row("optimizer", lambda: optax.polyak_sgd(0.1), ("value",)),
    "lbfgs": Row("optimizer", lambda: optax.lbfgs(), LINESEARCH),
    **_named("contrib.acprop", "contrib.ademamix", "contrib.adopt", "contrib.dog", "contrib.dowg"),
    **_named("contrib.madgrad", "contrib.muon", "contrib.simplified_ademamix"),
    **_plain("contrib.cocob", "contrib.dadapt_adamw", "contrib.prodigy", kind="optimizer"),
    **_plain("contrib.schedule_free_sgd", "contrib.schedule_free_adamw", kind="optimizer"),
    "contrib.momo": Row("optimizer", lambda: optax.contrib.momo(0.1), ("value",)),
    "contrib.momo_adam": Row("optimizer", lambda: optax.contrib.momo_adam(0.1), ("value",)),
    "contrib.sophia": Row("optimizer", lambda: optax.contrib.sophia(0.1), ("obj_fn",)),
    "contrib.galore": Row("optimizer", lambda: optax.contrib.galore(0.1, rank=1)),
    "contrib.dpsgd": Row(
        "optimizer", lambda: optax.contrib.dpsgd(0.1, 1.0, 0.1, 0), per_example=True
    ),
}

TRANSFORMATIONS = {
    **_plain("add_decayed_weights", "apply_every", "centralize", "identity"),
    **_plain("keep_params_nonnegative", "normalize_by_update_norm"),
    **_plain("scale_by_adadelta", "scale_by_adam", "scale_by_adamax", "scale_by_adan"),
    **_plain("scale_by_amsgrad", "scale_by_belief", "scale_by_distance_over_gradients"),
    **_plain("scale_by_factored_rms", "scale_by_lbfgs", "scale_by_lion", "scale_by_novograd"),
    **_plain("scale_by_optimistic_gradient", "scale_by_param_block_norm"),
    **_plain("scale_by_param_block_rms", "scale_by_radam", "scale_by_rms", "scale_by_rss"),
    **_plain("scale_by_sign", "scale_by_sm3", "scale_by_stddev", "scale_by_trust_ratio"),
    **_plain("scale_by_yogi", "set_to_zero", "zero_nans"),
    "adaptive_grad_clip": Row("transformation", lambda: optax.adaptive_grad_clip(0.01)),
    "add_noise": Row("transformation", lambda: optax.add_noise(0.1, 0.5, 0)),
    "clip": Row("transformation", lambda: optax.clip(0.05)),
    "clip_by_block_rms": Row("transformation", lambda: optax.clip_by_block_rms(0.05)),
    "clip_by_global_norm": Row("transformation", lambda: optax.clip_by_global_norm(0.05)),
    "ema": Row("transformation", lambda: optax.ema(0.9)),
    "freeze": Row("transformation", lambda: optax.freeze(SOME_LEAVES)),
    "measure_with_ema": Row(
        "transformation",
        lambda: optax.monitor({"norm": optax.measure_with_ema(optax.tree.norm, 0.9)}),
    ),
    "monitor": Row("transformation", lambda: optax.monitor({"norm": optax.tree.norm})),
    "snapshot": Row("transformation", lambda: optax.snapshot("norm", optax.tree.norm)),
    "scale": Row("transformation", lambda: optax.scale(0.5)),
    "scale_by_learning_rate": Row("transformation", lambda: optax.scale_by_learning_rate(0.1)),
    "scale_by_rprop": Row("transformation", lambda: optax.scale_by_rprop(0.1)),
    "scale_by_schedule": Row(
        "transformation", lambda: optax.scale_by_schedule(optax.linear_schedule(1.0, 0.0, 4))
    ),
    "stateless": Row(
        "transformation",
        lambda: optax.stateless(lambda updates, params: optax.tree.scale(0.5, updates)),
    ),
    "stateless_with_tree_map": Row(
        "transformation", lambda: optax.stateless_with_tree_map(lambda update, param: 0.5 * update)
    ),
    "trace": Row("transformation", lambda: optax.trace(0.9)),
    "scale_by_polyak": Row("transformation", lambda: optax.scale_by_polyak(), ("value",)),
    "scale_by_backtracking_linesearch": Row(
        "transformation", lambda: optax.scale_by_backtracking_linesearch(5), LINESEARCH
    ),
    "scale_by_zoom_linesearch": Row(
        "transformation", lambda: optax.scale_by_zoom_linesearch(5), LINESEARCH
    ),
    **_plain("contrib.normalize", "contrib.scale_by_acprop", "contrib.scale_by_ademamix"),
    **_plain("contrib.scale_by_adopt", "contrib.scale_by_cocob"),
    **_plain("contrib.scale_by_simplified_ademamix"),
    # Without dimension numbers it takes the parameters for one matrix.
    "contrib.scale_by_muon": Row(
        "transformation",
        lambda: optax.masked(
            optax.contrib.scale_by_muon(
                weight_dimension_numbers=lambda updates: jax.tree.map(
                    lambda _: optax.contrib.MuonDimensionNumbers(), updates
                )
            ),
            SOME_LEAVES,
        ),
    ),
    "contrib.scale_by_galore": Row("transformation", lambda: optax.contrib.scale_by_galore(rank=1)),
    "contrib.scale_by_madgrad": Row("transformation", lambda: optax.contrib.scale_by_madgrad(0.1)),
    "contrib.hutchinson_estimator_diag_hessian": Row(
        "transformation",
        lambda: optax.contrib.hutchinson_estimator_diag_hessian(jax.random.key(0)),
        ("obj_fn",),
    ),
    "contrib.reduce_on_plateau": Row(
        "transformation", lambda: optax.contrib.reduce_on_plateau(0.5, patience=1), ("value",)
    ),
    "contrib.differentially_private_aggregate": Row(
        "transformation",
        lambda: optax.contrib.differentially_private_aggregate(1.0, 0.1, 0),
        per_example=True,
    ),
}


def _partition(inner: Any, leaves: dict[str, bool]) -> Any:
    transforms = {"with": inner, "without": optax.set_to_zero()}
    labels = jax.tree.map(lambda keep: "with" if keep else "without", leaves)
    return optax.partition(transforms, labels)


def _injected(inject: Callable[..., Any], inner: Any) -> Any:
    return inject(lambda factor: optax.chain(inner, optax.scale(factor)))(factor=1.0)


def _multi_steps(inner: Any) -> Any:
    return optax.MultiSteps(inner, 2).gradient_transformation()


def _from_second_step(step: Any) -> Any:
    return step >= 1


WRAPPERS = {
    "chain": Row("wrapper", lambda inner: optax.chain(optax.identity(), inner)),
    "named_chain": Row("wrapper", lambda inner: optax.named_chain(("inner", inner))),
    "with_extra_args_support": Row("wrapper", optax.with_extra_args_support),
    "inject_hyperparams": Row("wrapper", lambda inner: _injected(optax.inject_hyperparams, inner)),
    "inject_stateful_hyperparams": Row(
        "wrapper", lambda inner: _injected(optax.inject_stateful_hyperparams, inner)
    ),
    "apply_if_finite": Row("wrapper", lambda inner: optax.apply_if_finite(inner, 3)),
    "conditionally_mask": Row(
        "wrapper", lambda inner: optax.conditionally_mask(inner, _from_second_step)
    ),
    "conditionally_transform": Row(
        "wrapper", lambda inner: optax.conditionally_transform(inner, _from_second_step)
    ),
    "MultiSteps": Row("wrapper", lambda inner: optax.MultiSteps(inner, 2)),
    "MultiSteps.gradient_transformation": Row("wrapper", _multi_steps),
    "masked (all leaves)": Row("wrapper", lambda inner: optax.masked(inner, ALL_LEAVES)),
    "masked (some leaves)": Row("wrapper", lambda inner: optax.masked(inner, SOME_LEAVES)),
    "partition (all leaves)": Row("wrapper", lambda inner: _partition(inner, ALL_LEAVES)),
    "partition (some leaves)": Row("wrapper", lambda inner: _partition(inner, SOME_LEAVES)),
    "selective_transform": Row(
        "wrapper",
        lambda inner: optax.selective_transform(
            inner, freeze_mask=jax.tree.map(lambda keep: not keep, SOME_LEAVES)
        ),
    ),
    "flatten": Row("wrapper", optax.flatten),
    "lookahead": Row("wrapper", lambda inner: optax.lookahead(inner, 2, 0.5)),
    "contrib.schedule_free": Row("wrapper", lambda inner: optax.contrib.schedule_free(inner, 0.1)),
    "contrib.mechanize": Row("wrapper", optax.contrib.mechanize),
    "contrib.split_real_and_imaginary": Row("wrapper", optax.contrib.split_real_and_imaginary),
    "contrib.sam": Row(
        "wrapper", lambda inner: optax.contrib.sam(inner, optax.sgd(0.1), sync_period=2)
    ),
    "contrib.scale_by_galore (base_optimizer)": Row(
        "wrapper", lambda inner: optax.contrib.scale_by_galore(rank=1, base_optimizer=inner)
    ),
}

ROWS: dict[str, Row] = OPTIMIZERS | TRANSFORMATIONS | WRAPPERS

SCHEDULES: dict[str, Callable[[], Callable[[Any], Any]]] = {
    "constant_schedule": lambda: optax.constant_schedule(0.1),
    "cosine_decay_schedule": lambda: optax.cosine_decay_schedule(0.2, 3),
    "cosine_onecycle_schedule": lambda: optax.cosine_onecycle_schedule(4, 0.3),
    "exponential_decay": lambda: optax.exponential_decay(0.2, 2, 0.5),
    "join_schedules": lambda: optax.join_schedules(
        [optax.constant_schedule(0.1), optax.constant_schedule(0.2)], [1]
    ),
    "linear_onecycle_schedule": lambda: optax.linear_onecycle_schedule(4, 0.3),
    "linear_schedule": lambda: optax.linear_schedule(0.1, 0.3, 3),
    "piecewise_constant_schedule": lambda: optax.piecewise_constant_schedule(0.1, {1: 2.0}),
    "piecewise_interpolate_schedule": lambda: optax.piecewise_interpolate_schedule(
        "linear", 0.1, {2: 2.0}
    ),
    "polynomial_schedule": lambda: optax.polynomial_schedule(0.1, 0.3, 2, 3),
    "sgdr_schedule": lambda: optax.sgdr_schedule(
        [{"init_value": 0.1, "peak_value": 0.3, "decay_steps": 4, "warmup_steps": 2}]
    ),
    "warmup_constant_schedule": lambda: optax.warmup_constant_schedule(0.1, 0.3, 2),
    "warmup_cosine_decay_schedule": lambda: optax.warmup_cosine_decay_schedule(0.1, 0.3, 2, 4),
    "warmup_exponential_decay_schedule": lambda: optax.warmup_exponential_decay_schedule(
        0.1, 0.3, 2, 2, 0.5
    ),
}

# The same function under its older name.
ALIASES = {"multi_transform": "partition"}

NOT_TRANSFORMATIONS = frozenset(
    {
        # the types themselves, what makes one out of functions, and type aliases
        *("GradientTransformation", "GradientTransformationExtraArgs", "StatefulSchedule"),
        *("init_empty_state", "tree_map_params", "value_and_grad_from_state"),
        "WrappedSchedule",
        # functions of numbers and arrays
        *("apply_updates", "bias_correction", "global_norm", "incremental_update"),
        *("matrix_inverse_pth_root", "microbatch", "multi_normal", "nnls", "periodic_update"),
        *("per_example_global_norm_clip", "per_example_layer_norm_clip", "power_iteration"),
        *("safe_increment", "safe_int32_increment", "safe_norm", "safe_root_mean_squares"),
        *("scale_gradient", "unitwise_clip", "unitwise_norm", "update_infinity_moment"),
        *("update_moment", "update_moment_per_elem_norm", "contrib.schedule_free_eval_params"),
        # arguments of MultiSteps
        *("skip_large_updates", "skip_not_finite"),
    }
)


def exported() -> Iterator[str]:
    """The names of all functions and transformations that optax exports, but its losses."""
    losses = {id(getattr(optax.losses, name)) for name in dir(optax.losses)}
    seen: set[str] = set()
    for module_name, module in MODULES.items():
        for name in sorted(vars(module)):
            value = getattr(module, name)
            if name.startswith("_") or not _is_candidate(value) or id(value) in losses:
                continue
            full_name = f"contrib.{name}" if module_name == "optax.contrib" else name
            if full_name not in seen:
                seen.add(full_name)
                yield full_name


def _is_candidate(value: Any) -> bool:
    """Functions, and classes with an ``update``; no modules, states or type aliases."""
    if inspect.isclass(value):
        return hasattr(value, "update") and hasattr(value, "init")
    return (
        inspect.isfunction(value)
        or isinstance(value, functools.partial)
        or (callable(value) and hasattr(value, "__wrapped__"))
    )


def unclassified() -> list[str]:
    """The exported names in no row and in no list."""
    rows = {name.split(" (")[0].split(".gradient")[0] for name in ROWS}
    known = rows | set(SCHEDULES) | set(ALIASES) | NOT_TRANSFORMATIONS
    return [name for name in exported() if name not in known]
