"""The methods that can be compared, one row each."""

from collections.abc import Callable
from typing import NamedTuple

import optax

import optax_sam


class Problem(NamedTuple):
    """What a method may depend on.

    Attributes:
      rho: the radius.
      alpha: strength of SANER's down-weighting.
      kappa: final strength of NCSAM's compensation.
      noise_rate: the setting: share of wrong labels, for asymmetric noise within the confused classes.
      total_steps: training steps of the whole run.
    """

    rho: float
    alpha: float
    kappa: float
    noise_rate: float
    total_steps: int


class Method(NamedTuple):
    """One row of the comparison.

    Attributes:
      label: name in tables and figures.
      rho: default radius on this problem.
      color: color in figures; its contrast to white and to a dark page is at least 3 : 1.
      build: ``build(problem, **options)`` gives the transformation before SGD in the chain; the
        options are those of every sharpness-aware method.
      penalized: whether ρ weighs an L2 penalty on the last layer, in place of a perturbation.
    """

    label: str
    rho: float
    color: str
    build: Callable[..., optax.GradientTransformation]
    penalized: bool = False


METHODS = {
    # choose_rho.py chooses SANER's radius, which SAM, J-SAM and L-SAM share.
    "sgd": Method("SGD", 0.0, "#7f7f7f", lambda p, **o: optax.identity()),
    "sam": Method("SAM", 0.3, "#1f77b4", lambda p, **o: optax_sam.sam(p.rho, **o)),
    "asam": Method("ASAM", 2.0, "#17a2a2", lambda p, **o: optax_sam.asam(p.rho, **o)),
    "saner": Method("SANER", 0.3, "#d1495b", lambda p, **o: optax_sam.saner(p.rho, p.alpha, **o)),
    "jsam": Method("J-SAM", 0.3, "#8e5bb5", lambda p, **o: optax_sam.jsam(p.rho, **o)),
    "lsam": Method("L-SAM", 0.3, "#b8741a", lambda p, **o: optax_sam.lsam(p.rho, **o)),
    "ncsam": Method(
        "NCSAM",
        0.2,
        "#2f9e5b",
        lambda p, **o: optax_sam.ncsam(
            p.rho,
            kappa=p.kappa,
            total_steps=p.total_steps,
            flip_ratio=min(max(p.noise_rate, 0.1), 0.4),
            **o,
        ),
    ),
    "gsam": Method("GSAM", 0.2, "#8c6d4f", lambda p, **o: optax_sam.gsam(p.rho, **o)),
    "friendly_sam": Method(
        "F-SAM", 0.2, "#cf68a6", lambda p, **o: optax_sam.friendly_sam(p.rho, **o)
    ),
    "vasso": Method("VaSSO", 0.2, "#84941f", lambda p, **o: optax_sam.vasso(p.rho, **o)),
    "wsam": Method("WSAM", 0.05, "#6468c0", lambda p, **o: optax_sam.wsam(p.rho, **o)),
    "looksam": Method("LookSAM", 0.2, "#3f8fd0", lambda p, **o: optax_sam.looksam(p.rho, **o)),
    "msam": Method("MSAM", 1.0, "#7a7a3a", lambda p, **o: optax_sam.msam(p.rho, momentum=0.9, **o)),
    "penalty": Method(
        "L2 penalty", 0.01, "#8f8499", lambda p, **o: optax.identity(), penalized=True
    ),
    # One perturbation per example, as in the J-SAM paper.
    "sam_1": Method(
        "1-SAM", 0.1, "#2f75a8", lambda p, **o: optax_sam.sam(p.rho, group_size=1, **o)
    ),
    "jsam_1": Method(
        "1-J-SAM", 0.05, "#8557ab", lambda p, **o: optax_sam.jsam(p.rho, group_size=1, **o)
    ),
    "lsam_1": Method(
        "1-L-SAM", 0.05, "#a36a10", lambda p, **o: optax_sam.lsam(p.rho, group_size=1, **o)
    ),
    # The SANER paper's ablations: SAM on coordinates B (0 < g'/g < 1) only, SGD on B only.
    "sam_on_b": Method(
        "SAM on B",
        0.2,
        "#4a93bd",
        lambda p, **o: optax_sam.sam(
            p.rho, **o, combination=optax_sam.restrict_to_coordinates("B")
        ),
    ),
    "sgd_on_b": Method(
        "SGD on B",
        0.2,
        "#8f8f8f",
        lambda p, **o: optax_sam.sam(
            p.rho, **o, combination=optax_sam.restrict_to_coordinates("AC")
        ),
    ),
}


def _with_saner(method: Method) -> Method:
    """SANER on top of a method, as its paper crosses them."""
    return method._replace(
        label=f"{method.label} + SANER",
        build=lambda p, **o: method.build(p, combination=optax_sam.down_weight(p.alpha), **o),
    )


METHODS |= {
    f"{name}_saner": _with_saner(METHODS[name])
    for name in ("asam", "gsam", "friendly_sam", "vasso", "ncsam", "looksam")
}
