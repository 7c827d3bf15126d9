"""The methods, each built for a run's settings; all but SGD take the options of the engine."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import optax

import optax_sam

if TYPE_CHECKING:
    from .config import Config


def _ncsam(config: "Config", total_steps: int, start: int, wrong: float, **options: Any):
    near_noise_rate = min(max(wrong, 0.1), 0.4)
    return optax_sam.ncsam(
        config.rho,
        kappa=config.kappa,
        total_steps=total_steps,
        flip_ratio=near_noise_rate if config.flip_ratio is None else config.flip_ratio,
        seed=config.seed,
        warmup_steps=start or None,
        **options,
    )


METHODS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "sgd": lambda config, **options: optax.identity(),  # no perturbation: no options
    "sam": lambda config, **options: optax_sam.sam(config.rho, **options),
    "asam": lambda config, **options: optax_sam.asam(config.rho, **options),
    "saner": lambda config, **options: optax_sam.sam(config.rho, **options),  # + down-weighting
    "jsam": lambda config, **options: optax_sam.jsam(config.rho, **options),
    "lsam": lambda config, **options: optax_sam.lsam(config.rho, **options),
    "ncsam": _ncsam,
    "gsam": lambda config, **options: optax_sam.gsam(config.rho, **options),
    "friendly_sam": lambda config, **options: optax_sam.friendly_sam(config.rho, **options),
    "vasso": lambda config, **options: optax_sam.vasso(config.rho, **options),
    "wsam": lambda config, **options: optax_sam.wsam(config.rho, **options),
    "msam": lambda config, **options: optax_sam.msam(config.rho, config.momentum, **options),
    "looksam": lambda config, **options: optax_sam.looksam(config.rho, **options),
    "stable_sam": lambda config, **options: optax_sam.stable_sam(config.rho, **options),
    "le_sam": lambda config, **options: optax_sam.le_sam(
        0.1 if config.sigma is None else config.sigma, config.rho, **options
    ),
}


NAMES = {
    **{name: name.upper() for name in METHODS},
    **{"jsam": "J-SAM", "lsam": "L-SAM", "friendly_sam": "Friendly-SAM", "vasso": "VaSSO"},
    **{"msam": "Momentum-SAM", "looksam": "LookSAM"},
    **{"stable_sam": "Stable SAM", "le_sam": "LE-SAM"},
}
"""The methods as people write them."""


def build(
    config: "Config",
    total_steps: int,
    axis_name: str | None,
    wrong: float,
) -> optax.GradientTransformationExtraArgs:
    """The method with its options, to stand in front of the optimizer in the chain.

    Args:
      config: the settings.
      total_steps: optimizer steps of the whole run.
      axis_name: the mapped axis under ``pmap`` and ``shard_map``.
      wrong: share of wrong labels in the training set.

    Returns:
      The transformation.
    """
    options: dict[str, Any] = {"axis_name": axis_name}
    strength = config.down_weight
    if strength is None and config.method == "saner":
        strength = 0.5
    if strength is not None:
        if warmup := round(config.down_weight_warmup * config.epochs):
            per_epoch = total_steps // config.epochs
            if config.every_k is not None and config.method != "looksam":
                per_epoch = max(1, per_epoch // config.every_k)  # α counts second gradients
            strength = optax_sam.linear_warmup_alpha(strength, warmup, per_epoch)
        options["combination"] = optax_sam.down_weight(strength)
    if config.group_size is not None:
        options["group_size"] = config.group_size
    if config.every_k is not None:
        options["every_k"] = config.every_k
    start = round(config.method_starts * config.epochs) * (total_steps // config.epochs)
    if config.method == "ncsam":  # its schedule has to know
        return _ncsam(config, total_steps=total_steps, start=start, wrong=wrong, **options)
    if start:
        options["start_step"] = start
    return optax.with_extra_args_support(METHODS[config.method](config, **options))
