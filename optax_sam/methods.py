"""The named methods: each is one composition of the three stages.

==================  =======================================  =======================  ==================
method              perturbation                             evaluation               combination
==================  =======================================  =======================  ==================
``sam``             normalized                               full gradient            –
``asam``            adaptive                                 full gradient            –
``saner``           normalized                               full gradient            down-weight
``jsam``            normalized                               Jacobian only            –
``functional_sam``  normalized, also preconditioned          Jacobian only            –
``lsam``            normalized                               logit term only          –
``ncsam``           normalized → noise compensation → ball   full gradient            –
``gsam``            normalized                               full gradient            minus orthogonal
``friendly_sam``    gradient without its average             full gradient            –
``vasso``           average gradient                         full gradient            –
``wsam``            normalized                               full gradient            extrapolate
``stable_sam``      normalized                               full gradient            renormalize
``le_sam``          loss budget                              full gradient            –
``looksam``         normalized                               every k steps, reused    –
``msam``            against the momentum                     one gradient per step    –
==================  =======================================  =======================  ==================

Every method takes the keyword options of :class:`Options`. SANER on top of any of them
is ``combination=down_weight(0.5)``: a combination given by the user comes behind the method's own.
"""

import inspect
from collections.abc import Callable
from typing import Any, Literal, ParamSpec, TypedDict, TypeVar, Unpack, cast

import optax

from optax_sam._axes import AxisName
from optax_sam._checks import check_bool
from optax_sam._hyperparameters import check_integer, check_number
from optax_sam._masks import MaskOrFunction
from optax_sam._stages import as_stage
from optax_sam.combinations import (
    decouple,
    down_weight,
    extrapolate,
    renormalize,
    reuse_orthogonal,
    subtract_orthogonal,
)
from optax_sam.evaluations import Evaluation, full_gradient, jacobian_only, logit_only
from optax_sam.perturbations import (
    adaptive,
    add_noise_compensation,
    loss_budget,
    moving_average,
    noise_compensation_schedule,
    normalized,
    project_to_ball,
    subtract_moving_average,
)
from optax_sam.sharpness_aware import sharpness_aware
from optax_sam.wrappers import (
    When,
    along_previous,
    check_ascent_fraction,
    in_steps,
    on_first,
    sometimes,
)


class Options(TypedDict, total=False):
    """The keyword options of every named method: conveniences for stages and wrappers.

    With ``every_k``, ``start_step``, ``stop_step`` and ``when`` some steps have no second gradient. A
    schedule of a radius or a strength does not see them: it counts the steps with a second gradient.
    In LookSAM only that of ρ does; its α and a ``combination`` act on every step and count them all.

    Attributes:
      combination: a third stage; it comes behind the method's own.
      mask: see :func:`optax_sam.sharpness_aware`.
      group_size: see :func:`optax_sam.sharpness_aware`.
      axis_name: see :func:`optax_sam.sharpness_aware`.
      ascent_steps: n, :func:`optax_sam.in_steps` around the perturbation.
      ascent_fraction: q, :func:`optax_sam.on_first` around the perturbation.
      every_k: :func:`optax_sam.sometimes` around the method: every k-th step.
      start_step: the same wrapper: from this step on.
      stop_step: the same wrapper: before this step.
      when: the same wrapper: where a condition on the gradient holds.

    Example:
      >>> import optax, optax_sam
      >>> options = optax_sam.Options(group_size=4, start_step=1000)
      >>> tx = optax.chain(optax_sam.saner(rho=0.05, **options), optax.sgd(0.1))
    """

    combination: optax.GradientTransformation | None
    mask: MaskOrFunction
    group_size: int | None
    axis_name: AxisName
    ascent_steps: int | None
    ascent_fraction: float | None
    every_k: int | None
    start_step: int | None
    stop_step: int | None
    when: When | Callable[[optax.Updates, optax.Params], Any] | None


def _compose(
    options: Options,
    perturbation: optax.GradientTransformation,
    *,
    evaluation: Evaluation = full_gradient,
    combination: optax.GradientTransformation | None = None,
    along_previous_direction: bool = False,
    otherwise: optax.GradientTransformation | None = None,
    on_every_step: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """A method of its own stages, with what the options add around them.

    ``on_every_step`` is a combination behind all others that also sees the steps in between.
    """
    given: dict[str, Any] = dict(options)
    unknown = sorted(set(given) - set(Options.__annotations__))
    if unknown:
        raise TypeError(
            f"unknown option {unknown[0]}=. The options of every method are "
            f"{', '.join(Options.__annotations__)}."
        )
    if (steps := given.pop("ascent_steps", None)) is not None:
        check_integer("ascent_steps", steps, minimum=1)
        if along_previous_direction:
            raise ValueError(
                f"msam climbs along its own last direction, so ascent_steps={steps}, which takes a new "
                "gradient after each of its steps, has no meaning. Leave it out."
            )
        perturbation = in_steps(perturbation, steps)
    if (fraction := given.pop("ascent_fraction", None)) is not None:
        check_ascent_fraction("ascent_fraction", fraction)
        if along_previous_direction:
            raise ValueError(
                f"msam climbs along its own last direction, so ascent_fraction={fraction}, which "
                "climbs along a gradient of a part of the batch, has no meaning. Leave it out."
            )
        if given.get("group_size") is not None:
            raise ValueError(
                f"ascent_fraction={fraction} cannot be combined with "
                f"group_size={given['group_size']}: each group climbs along its own gradient."
            )
        perturbation = on_first(perturbation, fraction)
    if along_previous_direction and given.get("group_size") is not None:
        raise ValueError(
            f"msam climbs along its own last direction, so group_size={given['group_size']}, which "
            "gives each group its own, has no meaning. Leave it out."
        )
    users = given.pop("combination", None)
    if users is not None:
        users = as_stage("combination", users)
    if otherwise is not None:  # what the user adds acts on the steps in between, too
        otherwise = _chain(otherwise, users)
    else:
        combination = _chain(combination, users)
    condition = {
        name: given.pop(name, None) for name in ("every_k", "start_step", "stop_step", "when")
    }
    is_conditional = any(value is not None for value in condition.values())
    if is_conditional:
        otherwise = _chain(otherwise, on_every_step)
    else:
        combination = _chain(combination, on_every_step)
    method = sharpness_aware(perturbation, evaluation=evaluation, combination=combination, **given)
    if along_previous_direction:
        method = along_previous(method)
    if not is_conditional:
        return method
    return sometimes(method, otherwise=otherwise, axis_name=given.get("axis_name"), **condition)


def _chain(
    own: optax.GradientTransformation | None, users: optax.GradientTransformation | None
) -> optax.GradientTransformation | None:
    """The user's combination behind the method's own, if there are both."""
    if own is None or users is None:
        return own or users
    return optax.chain(as_stage("combination", own), as_stage("combination", users))


P = ParamSpec("P")
R = TypeVar("R")


def _with_options(method: Callable[P, R]) -> Callable[P, R]:
    """Spells the options out in the signature of a method.

    ``optax.inject_hyperparams`` binds arguments by signature and cannot forward a ``**options``;
    editors and ``help`` show the real keywords too. The list exists once, in :class:`Options`.
    """
    own = inspect.signature(method).parameters
    spelled = [p for p in own.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    spelled += [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
        for name in Options.__annotations__
        if name not in own
    ]
    method.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        sorted(spelled, key=lambda parameter: parameter.kind)
    )
    return method


@_with_options
def sam(
    rho: optax.ScalarOrSchedule = 0.05, **options: Unpack[Options]
) -> optax.GradientTransformationExtraArgs:
    r"""Sharpness-aware minimization.

    .. math:: \epsilon = \rho \frac{g}{\lVert g \rVert}, \qquad d = \nabla L(w + \epsilon)

    Args:
      rho: the radius ρ ≥ 0; a number or a schedule of the step. ρ = 0 is the base optimizer.
      **options: see :class:`optax_sam.Options`.

    Returns:
      An ``optax.GradientTransformationExtraArgs``; ``update`` needs ``params`` and ``loss_fn``.

    Raises:
      ValueError: if ``rho`` is a negative number.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optax_sam
      >>> tx = optax.chain(optax_sam.sam(rho=0.5), optax.sgd(0.1))
      >>> loss_fn = lambda w: jnp.sum(w**2)
      >>> w = jnp.array([3.0, 4.0])
      >>> updates, _ = tx.update(jax.grad(loss_fn)(w), tx.init(w), w, loss_fn=loss_fn)
      >>> [round(float(x), 4) for x in updates]
      [-0.66, -0.88]

    References:
      Foret, Kleiner, Mobahi, Neyshabur, Sharpness-Aware Minimization for Efficiently Improving
      Generalization, ICLR 2021, arXiv 2010.01412, equations (2) and (3). Code: google-research/sam.
    """
    return _compose(options, normalized(rho))


@_with_options
def asam(
    rho: optax.ScalarOrSchedule = 0.5,
    eta: float = 0.01,
    scale_mask: MaskOrFunction = None,
    **options: Unpack[Options],
) -> optax.GradientTransformationExtraArgs:
    r"""Adaptive SAM: the neighborhood is measured in units of the weights.

    .. math::
       \epsilon = \rho \frac{t^2 g}{\lVert t g \rVert}, \quad t = |w| + \eta, \qquad
       d = \nabla L(w + \epsilon)

    Args:
      rho: the relative radius ρ ≥ 0, about 10 times SAM's; a number or a schedule of the step.
      eta: η ≥ 0, keeps zero weights movable.
      scale_mask: where False, t = 1; see :func:`optax_sam.adaptive`. The authors scale weights only,
        not biases.
      **options: see :class:`optax_sam.Options`.

    Returns:
      An ``optax.GradientTransformationExtraArgs``; ``update`` needs ``params`` and ``loss_fn``.

    Raises:
      ValueError: if ``rho`` or ``eta`` is a negative number; from ``update``, if ``scale_mask`` does
        not match the parameters.
      TypeError: from ``update``, if ``scale_mask`` is no pytree of bools.

    Example:
      >>> import jax, optax, optax_sam
      >>> is_no_bias = lambda params: jax.tree_util.tree_map_with_path(
      ...     lambda path, _: "bias" not in jax.tree_util.keystr(path), params)
      >>> tx = optax.chain(optax_sam.asam(rho=0.5, scale_mask=is_no_bias), optax.sgd(0.1))

    References:
      Kwon, Kim, Park, Choi, ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant Learning
      of Deep Neural Networks, ICML 2021, arXiv 2102.11600, equation (6). Code: SamsungLabs/ASAM.
    """
    return _compose(options, adaptive(rho, eta, scale_mask))


@_with_options
def saner(
    rho: optax.ScalarOrSchedule = 0.1,
    alpha: optax.ScalarOrSchedule = 0.5,
    ratio_epsilon: float | None = None,
    **options: Unpack[Options],
) -> optax.GradientTransformationExtraArgs:
    r"""SANER: SAM that magnifies its down-weighting of noisy gradients.

    .. math::
       \epsilon = \rho \frac{g}{\lVert g \rVert}, \quad g' = \nabla L(w + \epsilon), \qquad
       d = (1 - \alpha \, \mathbb{1}[0 < g'/g < 1]) \, g'

    SANER on top of another method is that method with ``combination=down_weight(alpha)``.

    Args:
      rho: the radius ρ ≥ 0; a number or a schedule. ρ = 0 is the base optimizer.
      alpha: the paper's strength, 0 ≤ α ≤ 1; a number or a schedule, such as
        :func:`optax_sam.linear_warmup_alpha`. α = 0 is SAM. The authors' *code* calls 1 − α alpha.
      ratio_epsilon: ``1e-8`` for the authors' code; see :func:`optax_sam.down_weight`.
      **options: see :class:`optax_sam.Options`.

    Returns:
      An ``optax.GradientTransformationExtraArgs``; ``update`` needs ``params`` and ``loss_fn``. The
      state's metrics include the share of down-weighted coordinates.

    Raises:
      ValueError: if ``rho`` is negative or ``alpha`` outside [0, 1].

    Example:
      >>> import optax, optax_sam
      >>> tx = optax.chain(
      ...     optax_sam.saner(rho=0.1, alpha=0.5),
      ...     optax.add_decayed_weights(5e-4),
      ...     optax.sgd(0.1, momentum=0.9))

    References:
      Luong et al., Understanding SAM's Robustness to Noisy Labels through Gradient Down-weighting,
      AISTATS 2026, arXiv 2411.17132, equation (6). Code: lhchau/saner.
    """
    return _compose(options, normalized(rho), combination=down_weight(alpha, ratio_epsilon))


@_with_options
def jsam(
    rho: optax.ScalarOrSchedule = 0.05, **options: Unpack[Options]
) -> optax.GradientTransformationExtraArgs:
    r"""J-SAM: only the network's Jacobian is perturbed.

    .. math::
       \epsilon = \rho \frac{g}{\lVert g \rVert}, \qquad
       d = \frac{1}{B} \sum_i J(w + \epsilon, x_i)^\top \, \partial_z \ell(f(w, x_i), y_i)

    It keeps nearly all of SAM's robustness to label noise. No Jacobian is formed: it is one
    vector-Jacobian product. In a linear model it is the base optimizer. ε is that of the batch, which
    is :func:`functional_sam`; the paper's form, with one per example, is ``group_size=1``.

    Args:
      rho: the radius ρ ≥ 0; a number or a schedule. ρ = 0 is the base optimizer.
      **options: see :class:`optax_sam.Options`.

    Returns:
      An ``optax.GradientTransformationExtraArgs``; ``update`` needs ``params`` and an
      :class:`optax_sam.Objective` as ``loss_fn``, and takes ``logits``.

    Raises:
      ValueError: if ``rho`` is a negative number.
      TypeError: from ``update``, if ``loss_fn`` is not an ``Objective``.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optax_sam
      >>> tx = optax.chain(optax_sam.jsam(rho=0.05), optax.sgd(0.1))
      >>> objective = optax_sam.Objective(lambda w, x: x @ w, jnp.eye(2), jnp.array([0, 1]))
      >>> w = jnp.zeros((2, 2))
      >>> updates, _ = tx.update(jax.grad(objective)(w), tx.init(w), w, loss_fn=objective)

    References:
      Baek, Kolter, Raghunathan, Why is SAM Robust to Label Noise?, ICLR 2024, arXiv 2405.03676,
      equation (4.2). The authors published no code. With one ε per batch it is Functional-SAM,
      :func:`functional_sam`.
    """
    return _compose(options, normalized(rho), evaluation=jacobian_only)


@_with_options
def functional_sam(
    rho: optax.ScalarOrSchedule = 0.05,
    preconditioner: optax.GradientTransformation | None = None,
    **options: Unpack[Options],
) -> optax.GradientTransformationExtraArgs:
    r"""Functional-SAM: J-SAM with one ε per batch, for language models; also preconditioned.

    .. math::
       \epsilon = \rho \frac{D^{-1} g}{\lVert D^{-1} g \rVert}, \qquad
       d = \frac{1}{B} \sum_i J(w + \epsilon, x_i)^\top \, \partial_z \ell(f(w, x_i), y_i)

    Without a preconditioner D = 1, and it is :func:`jsam`. In language models SAM mostly lowers the
    sharpness that comes from the logits, which does not help; this evaluation leaves that part out.

    Args:
      rho: the radius ρ ≥ 0; a number or a schedule. ρ = 0 is the base optimizer.
      preconditioner: from gradients to :math:`D^{-1} g`, with D of Adam's second moment:
        ``optax.scale_by_rms(0.999, eps_in_sqrt=False, bias_correction=True)`` keeps one of its own,
        :func:`optax_sam.scale_by_second_moment` reads that of the Adam behind the method.
      **options: see :class:`optax_sam.Options`.

    Returns:
      An ``optax.GradientTransformationExtraArgs``; ``update`` needs ``params`` and an
      :class:`optax_sam.Objective` as ``loss_fn``, and takes ``logits``.

    Raises:
      ValueError: if ``rho`` is a negative number.
      TypeError: if ``preconditioner`` is no gradient transformation; from ``update``, if ``loss_fn`` is
        not an ``Objective``.

    Example:
      >>> import optax, optax_sam
      >>> rms = optax.scale_by_rms(0.999, eps_in_sqrt=False, bias_correction=True)
      >>> tx = optax.chain(
      ...     optax_sam.functional_sam(rho=0.05, preconditioner=rms), optax.adamw(3e-4))

    References:
      Singh, Mobahi, Agarwala, Dauphin, Avoiding Spurious Sharpness Minimization Broadens Applicability
      of SAM, ICML 2025, arXiv 2502.02407. The authors published no code.
    """
    ascent = normalized(rho)
    if preconditioner is not None:
        ascent = optax.chain(as_stage("preconditioner", preconditioner), ascent)
    return _compose(options, ascent, evaluation=jacobian_only)


@_with_options
def lsam(
    rho: optax.ScalarOrSchedule = 0.05, **options: Unpack[Options]
) -> optax.GradientTransformationExtraArgs:
    r"""L-SAM: only the logit term is perturbed.

    .. math::
       \epsilon = \rho \frac{g}{\lVert g \rVert}, \qquad
       d = \frac{1}{B} \sum_i J(w, x_i)^\top \, \partial_z \ell(f(w + \epsilon, x_i), y_i)

    The control experiment to :func:`jsam`: nearly none of SAM's robustness to label noise is left.
    In a linear model it is SAM.

    Args:
      rho: the radius ρ ≥ 0; a number or a schedule. ρ = 0 is the base optimizer.
      **options: see :class:`optax_sam.Options`.

    Returns:
      An ``optax.GradientTransformationExtraArgs``; ``update`` needs ``params`` and an
      :class:`optax_sam.Objective` as ``loss_fn``.

    Raises:
      ValueError: if ``rho`` is a negative number.
      TypeError: from ``update``, if ``loss_fn`` is not an ``Objective``.

    Example:
      >>> import optax, optax_sam
      >>> tx = optax.chain(optax_sam.lsam(rho=0.05), optax.sgd(0.1))

    References:
      Baek, Kolter, Raghunathan, Why is SAM Robust to Label Noise?, ICLR 2024, arXiv 2405.03676,
      equation (4.1). The authors published no code.
    """
    return _compose(options, normalized(rho), evaluation=logit_only)


@_with_options
def ncsam(
    rho: optax.ScalarOrSchedule = 0.05,
    kappa: float = 0.1,
    total_steps: int | None = None,
    flip_ratio: float = 0.2,
    *,
    seed: int = 0,
    deterministic: bool = False,
    projection: bool = True,
    warmup_steps: int | None = None,
    warmup: Literal["sgd", "sam"] = "sgd",
    label_of: Callable[[Any], Any] | None = None,
    by_weights: bool = False,
    **options: Unpack[Options],
) -> optax.GradientTransformationExtraArgs:
    r"""NCSAM: SAM whose perturbation is compensated for the effect of label noise.

    .. math::
       \epsilon = \mathrm{Proj}_{\lVert \cdot \rVert \le \rho}
       \Big( \rho \frac{g}{\lVert g \rVert} + s(t) \, g^* \Big), \qquad
       s(t) = \kappa \min(1, 2 (3 - 2t) t^2), \qquad d = \nabla L(w + \epsilon)

    :math:`g^*` is the gradient of some examples of the batch with flipped labels; see
    :func:`optax_sam.add_noise_compensation`.

    Args:
      rho: the radius ρ ≥ 0; a number or a schedule of the step.
      kappa: κ ≥ 0, the final strength of the compensation; 0.03 to 0.4 in the paper. κ = 0 is SAM.
      total_steps: steps of the whole training, warm-up included, for the schedule s(t) (see
        :func:`optax_sam.noise_compensation_schedule`); None compensates with κ from the start.
      flip_ratio: r, 0 < r ≤ 1, the share of examples with flipped labels: near the noise rate up to
        40 %, lower above. The step costs about 2 + r times an SGD step.
      seed: the same seed gives the same flips.
      deterministic: flip the examples with the smallest logit gaps instead of drawing them.
      projection: project to the ρ-ball as in the paper; False as in the authors' released code.
      warmup_steps: steps before the compensation begins, if any; the paper takes 50 of 200 epochs.
      warmup: what those steps are, ``"sgd"`` (no second gradient) or ``"sam"``.
      label_of: picks the labels out of a pytree; see :func:`optax_sam.add_noise_compensation`.
      by_weights: take the chosen examples by weights of 0 and 1, for batches that are sharded over
        devices under ``jit``: nothing is gathered, and the step costs about 3 times an SGD step.
      **options: see :class:`optax_sam.Options`; ``start_step`` is ``warmup_steps`` here, and ``when``
        does not go with ``total_steps`` or ``warmup="sam"``, whose steps could not be counted.

    Returns:
      An ``optax.GradientTransformationExtraArgs``; ``update`` needs ``params`` and an
      :class:`optax_sam.Objective` with integer or soft labels as ``loss_fn``, and takes ``logits``.

    Raises:
      ValueError: if a number is out of range, if ``warmup`` is another word, if ``warmup_steps`` leaves
        none of ``total_steps``, if ``start_step`` is given in its place, or if ``when`` is combined
        with ``total_steps`` or a warm-up by SAM.
      TypeError: from ``update``, if ``loss_fn`` is not an ``Objective``.

    Example:
      >>> import optax, optax_sam
      >>> tx = optax.chain(
      ...     optax_sam.ncsam(rho=0.05, kappa=0.1, total_steps=1000, flip_ratio=0.4),
      ...     optax.sgd(0.05, momentum=0.9))

    References:
      Xu, Deng, Pang, NCSAM: Noise-Compensated Sharpness-Aware Minimization for Noisy Label Learning,
      arXiv 2601.19947 (version 3), equations (10) to (18). The released codes compute something else.
    """
    warmup_steps = 0 if warmup_steps is None else warmup_steps
    check_integer("warmup_steps", warmup_steps, minimum=0)
    check_bool("projection", projection)
    if warmup not in ("sgd", "sam"):
        raise ValueError(f"warmup must be 'sgd' or 'sam', got {warmup!r}.")
    skipped = warmup_steps if warmup == "sgd" else 0
    start_step = options.get("start_step")
    if start_step is not None and start_step != skipped:
        raise ValueError(f"start_step={start_step} is warmup_steps in ncsam: pass that instead.")
    options["start_step"] = skipped or None
    if options.get("when") is not None and (total_steps is not None or warmup_steps > skipped):
        counted = "warmup='sam'" if total_steps is None else f"total_steps={total_steps}"
        raise ValueError(
            f"when cannot be combined with {counted} in ncsam: only the steps with a second gradient "
            "could be counted, and how many there will be is not known. Leave one of the two out."
        )
    strength: optax.ScalarOrSchedule = kappa
    every_k = options.get("every_k")
    every_k = 1 if every_k is None else check_integer("every_k", every_k, minimum=1)
    check_number(
        "kappa",
        kappa,
        minimum=0,
        remedy="The paper's schedule is total_steps=; for another one pass the schedule as strength= "
        "of optax_sam.add_noise_compensation.",
    )
    if total_steps is not None:
        check_integer("total_steps", total_steps, minimum=1)
        if warmup_steps >= total_steps:
            raise ValueError(
                f"warmup_steps={warmup_steps} leaves none of total_steps={total_steps} for the "
                "compensation; total_steps counts the whole training, warm-up included."
            )
        progress = noise_compensation_schedule(kappa, total_steps)
        # It counts the steps with a second gradient, and has not seen the others.
        strength = lambda count: progress(count * every_k + skipped)  # noqa: E731
    compensation = add_noise_compensation(
        strength,
        flip_ratio,
        seed=seed,
        deterministic=deterministic,
        start_step=-(-(warmup_steps - skipped) // every_k),
        label_of=label_of,
        by_weights=by_weights,
    )
    stages = [normalized(rho), compensation, *([project_to_ball(rho)] if projection else [])]
    return _compose(options, optax.chain(*stages))


@_with_options
def gsam(
    rho: optax.ScalarOrSchedule = 0.05,
    alpha: optax.ScalarOrSchedule = 0.1,
    **options: Unpack[Options],
) -> optax.GradientTransformationExtraArgs:
    r"""GSAM: surrogate gap guided SAM.

    .. math::
       \epsilon = \rho \frac{g}{\lVert g \rVert}, \qquad d = g' - \alpha \, g_\perp, \qquad
       g_\perp = g - \frac{\langle g, g' \rangle}{\lVert g' \rVert^2} \, g'

    The paper ties ρ to the learning rate's
    schedule; pass such a schedule as ``rho``.

    Args:
      rho: the radius ρ ≥ 0; a number or a schedule of the step.
      alpha: weight α of the orthogonal part; a number or a schedule. α = 0 is SAM.
      **options: see :class:`optax_sam.Options`.

    Returns:
      An ``optax.GradientTransformationExtraArgs``; ``update`` needs ``params`` and ``loss_fn``.

    Raises:
      ValueError: if ``rho`` is a negative number.

    Example:
      >>> import optax, optax_sam
      >>> tx = optax.chain(optax_sam.gsam(rho=0.05, alpha=0.1), optax.sgd(0.1))

    References:
      Zhuang et al., Surrogate Gap Minimization Improves Sharpness-Aware Training, ICLR 2022,
      arXiv 2203.08065, algorithm 1. Code: juntang-zhuang/GSAM.
    """
    return _compose(options, normalized(rho), combination=subtract_orthogonal(alpha))


@_with_options
def friendly_sam(
    rho: optax.ScalarOrSchedule = 0.05,
    sigma: float = 1.0,
    decay: float = 0.9,
    **options: Unpack[Options],
) -> optax.GradientTransformationExtraArgs:
    r"""Friendly-SAM: climbs along the batch's own part of the gradient.

    .. math:: \epsilon = \rho \frac{g - \sigma m}{\lVert g - \sigma m \rVert}, \qquad
       d = \nabla L(w + \epsilon), \qquad m \leftarrow \lambda m + (1 - \lambda) g

    Args:
      rho: the radius ρ ≥ 0; a number or a schedule of the step.
      sigma: how much σ of the average m is subtracted. σ = 0 is SAM.
      decay: λ, 0 ≤ λ ≤ 1; 0.6 in the authors' run script.
      **options: see :class:`optax_sam.Options`.

    Returns:
      An ``optax.GradientTransformationExtraArgs``; ``update`` needs ``params`` and ``loss_fn``.

    Raises:
      ValueError: if ``rho`` is a negative number or ``decay`` outside [0, 1].

    Example:
      >>> import optax, optax_sam
      >>> tx = optax.chain(optax_sam.friendly_sam(rho=0.05), optax.sgd(0.1))

    References:
      Li et al., Friendly Sharpness-Aware Minimization, CVPR 2024, arXiv 2403.12350, algorithm 1.
      Code: nblt/F-SAM.
    """
    ascent = optax.chain(subtract_moving_average(sigma, decay), normalized(rho))
    return _compose(options, ascent)


@_with_options
def vasso(
    rho: optax.ScalarOrSchedule = 0.05, theta: float = 0.2, **options: Unpack[Options]
) -> optax.GradientTransformationExtraArgs:
    r"""VaSSO: climbs along an average gradient, to suppress the variance of the ascent.

    .. math:: m \leftarrow (1 - \theta) m + \theta g, \qquad
       \epsilon = \rho \frac{m}{\lVert m \rVert}, \qquad d = \nabla L(w + \epsilon)

    Args:
      rho: the radius ρ ≥ 0; a number or a schedule of the step.
      theta: weight θ of the current gradient, 0 < θ ≤ 1. θ = 1 is SAM.
      **options: see :class:`optax_sam.Options`.

    Returns:
      An ``optax.GradientTransformationExtraArgs``; ``update`` needs ``params`` and ``loss_fn``.

    Raises:
      ValueError: if ``rho`` is a negative number or ``theta`` outside (0, 1].

    Example:
      >>> import optax, optax_sam
      >>> tx = optax.chain(optax_sam.vasso(rho=0.05, theta=0.2), optax.sgd(0.1))

    References:
      Li, Giannakis, Enhancing Sharpness-Aware Optimization Through Variance Suppression, NeurIPS
      2023, arXiv 2309.15639, algorithm 1. Code: BingcongLi/VaSSO.
    """
    return _compose(options, optax.chain(moving_average(theta), normalized(rho)))


@_with_options
def wsam(
    rho: optax.ScalarOrSchedule = 0.05,
    gamma: optax.ScalarOrSchedule = 0.9,
    base: optax.GradientTransformation | None = None,
    **options: Unpack[Options],
) -> optax.GradientTransformationExtraArgs:
    r"""WSAM: sharpness as a regularization term with a weight of its own.

    .. math::
       \epsilon = \rho \frac{g}{\lVert g \rVert}, \qquad g' = \nabla L(w + \epsilon), \qquad
       d = \mathrm{base}(g) + \frac{\gamma}{1 - \gamma} (g' - g)

    Without a base, base(g) = g: the coupled form, whose whole direction goes through the optimizer
    behind it. With one it is the authors' default, the decoupled form, in which the sharpness term
    does not go through the momentum.

    Args:
      rho: the radius ρ ≥ 0; a number or a schedule of the step.
      gamma: 0 ≤ γ < 1; a number or a schedule. γ = 0 is the base optimizer; γ = ½ is SAM
        without ``base``.
      base: the base optimizer without its learning rate, such as ``optax.trace(0.9)``, and with its
        weight decay; only the learning rate stands behind the method then. See
        :func:`optax_sam.decouple`.
      **options: see :class:`optax_sam.Options`. The base optimizer sees every step, also those without
        a second gradient.

    Returns:
      An ``optax.GradientTransformationExtraArgs``; ``update`` needs ``params`` and ``loss_fn``.

    Raises:
      ValueError: if ``rho`` is a negative number or ``gamma`` outside [0, 1).
      TypeError: if ``base`` is no gradient transformation.

    Example:
      >>> import optax, optax_sam
      >>> coupled = optax.chain(optax_sam.wsam(rho=0.05, gamma=0.9), optax.sgd(0.1, momentum=0.9))
      >>> decoupled = optax.chain(
      ...     optax_sam.wsam(rho=0.05, gamma=0.9, base=optax.trace(0.9)),
      ...     optax.scale_by_learning_rate(0.1))

    References:
      Yue et al., Sharpness-Aware Minimization Revisited: Weighted Sharpness as a Regularization Term,
      KDD 2023, arXiv 2305.15817, equation (6). Code: atorch in intelligent-machine-learning/dlrover.
    """
    return _compose(
        options,
        normalized(rho),
        combination=extrapolate(gamma),
        on_every_step=None if base is None else decouple(base),
    )


@_with_options
def stable_sam(
    rho: optax.ScalarOrSchedule = 0.05, **options: Unpack[Options]
) -> optax.GradientTransformationExtraArgs:
    r"""Stable SAM: SAM's direction with the length of the clean gradient.

    .. math::
       \epsilon = \rho \frac{g}{\lVert g \rVert}, \qquad g' = \nabla L(w + \epsilon), \qquad
       d = \frac{\lVert g \rVert}{\lVert g' \rVert} \, g'

    Training stays stable at larger learning rates than with SAM: momentum, clipping and learning rate
    see directions of the clean gradient's length.

    Args:
      rho: the radius ρ ≥ 0; a number or a schedule. ρ = 0 is the base optimizer.
      **options: see :class:`optax_sam.Options`.

    Returns:
      An ``optax.GradientTransformationExtraArgs``; ``update`` needs ``params`` and ``loss_fn``.

    Raises:
      ValueError: if ``rho`` is a negative number.

    Example:
      >>> import optax, optax_sam
      >>> tx = optax.chain(optax_sam.stable_sam(rho=0.05), optax.sgd(0.1))

    References:
      Tan, Zhang, Liu, Wang, Hao, Stabilizing Sharpness-Aware Minimization Through a Simple
      Renormalization Strategy, JMLR 2025, arXiv 2401.07250. Code: cltan023/stablesam2024.
    """
    return _compose(options, normalized(rho), combination=renormalize())


@_with_options
def le_sam(
    sigma: optax.ScalarOrSchedule,
    rho_max: optax.ScalarOrSchedule,
    **options: Unpack[Options],
) -> optax.GradientTransformationExtraArgs:
    r"""LE-SAM: a fixed rise of the loss in place of a fixed radius.

    .. math::
       \epsilon = \rho_t \frac{g}{\lVert g \rVert}, \qquad
       \rho_t = \min\Big(\frac{\sigma}{\lVert g \rVert}, \rho_\mathrm{max}\Big), \qquad
       d = \nabla L(w + \epsilon)

    Args:
      sigma: the budget σ ≥ 0, in units of the loss; a number or a schedule, such as a cosine that ends
        at 0. σ = 0 is the base optimizer.
      rho_max: the largest radius ρ_max ≥ 0; a number or a schedule. For σ large enough it is SAM's ρ.
      **options: see :class:`optax_sam.Options`.

    Returns:
      An ``optax.GradientTransformationExtraArgs``; ``update`` needs ``params`` and ``loss_fn``.

    Raises:
      ValueError: if ``sigma`` or ``rho_max`` is a negative number.

    Example:
      >>> import optax, optax_sam
      >>> tx = optax.chain(optax_sam.le_sam(sigma=0.1, rho_max=0.5), optax.sgd(0.1))

    References:
      Wang, Liu, Xie, Gao, Fix the Loss, Not the Radius: Rethinking the Adversarial Perturbation of
      Sharpness-Aware Minimization, ICML 2026, arXiv 2605.10183.
    """
    return _compose(options, loss_budget(sigma, rho_max))


@_with_options
def looksam(  # type: ignore[misc]  # every_k has a default of its own here
    rho: optax.ScalarOrSchedule = 0.05,
    every_k: int = 5,
    alpha: optax.ScalarOrSchedule = 0.7,
    norm_epsilon: float = 0.0,
    **options: Unpack[Options],
) -> optax.GradientTransformationExtraArgs:
    r"""LookSAM: a second gradient every k steps, whose part orthogonal to g is reused in between.

    .. math::
       d = g' = \nabla L(w + \rho g / \lVert g \rVert) \;\text{ every } k \text{ steps,} \qquad
       d = g + \alpha \frac{\lVert g \rVert}{\lVert v \rVert} v \;\text{ between,} \qquad
       v = g' - \frac{\langle g', g \rangle}{\lVert g \rVert^2} \, g

    The second gradient is really skipped: a step costs 1 + 1/k times an SGD step on average. The
    steps between reuse v, also where ``when`` does not hold; before ``start_step`` and from
    ``stop_step`` on they are plain.

    Args:
      rho: the radius ρ ≥ 0; a number or a schedule of the steps with a second gradient.
      every_k: k ≥ 1. k = 1 is SAM.
      alpha: α ≥ 0, length of the reused part relative to g; a number or a schedule of all steps.
      norm_epsilon: added to ‖v‖; see :func:`optax_sam.reuse_orthogonal`.
      **options: see :class:`optax_sam.Options`. A ``combination`` acts on
        every step, behind the reused part.

    Returns:
      An ``optax.GradientTransformationExtraArgs``; ``update`` needs ``params`` and ``loss_fn``.

    Raises:
      ValueError: if ``rho`` or ``alpha`` is a negative number or ``every_k`` is below 1.

    Example:
      >>> import optax, optax_sam
      >>> tx = optax.chain(optax_sam.looksam(rho=0.05, every_k=5), optax.sgd(0.1))

    References:
      Liu et al., Towards Efficient and Scalable Sharpness-Aware Minimization, CVPR 2022,
      arXiv 2203.02714, algorithm 1, with global norms.
    """
    check_integer("every_k", every_k, minimum=1)
    reused: optax.GradientTransformation = reuse_orthogonal(alpha, norm_epsilon)
    stop_step = options.get("stop_step")
    if stop_step is not None:
        reused = optax.conditionally_transform(reused, lambda step: step < stop_step)
    with_period = cast(Options, {"every_k": every_k} | options)
    return _compose(with_period, normalized(rho), otherwise=reused)


@_with_options
def msam(
    rho: optax.ScalarOrSchedule = 3.0, momentum: float = 0.9, **options: Unpack[Options]
) -> optax.GradientTransformationExtraArgs:
    r"""Momentum-SAM: perturbs along the momentum step, at one gradient per step.

    .. math:: \epsilon = -\rho \frac{v}{\lVert v \rVert}, \qquad d = \nabla L(w + \epsilon), \qquad
       v \leftarrow \mu v + d

    The clean gradient is not used: under ``jit`` its backward pass is removed, and the loss that you
    report costs a forward pass, or nothing if you report the metric ``perturbed_loss`` (except with
    BatchNorm, whose statistics need the forward pass at w). Use the same momentum in the optimizer
    behind it. Weight decay behind it does not enter v. A step without an ascent (``every_k``,
    ``start_step``, ``stop_step``, ``when``) needs the clean gradient: it descends along it, and does
    not enter v either.

    Args:
      rho: the radius ρ ≥ 0; a number or a schedule of the step. The authors take 3 on CIFAR.
      momentum: μ, 0 ≤ μ < 1.
      **options: see :class:`optax_sam.Options`.

    Returns:
      An ``optax.GradientTransformationExtraArgs``; ``update`` needs ``params`` and ``loss_fn``.

    Raises:
      ValueError: if ``rho`` is a negative number or ``momentum`` outside [0, 1), or with
        ``group_size``, ``ascent_fraction`` or ``ascent_steps``.

    Example:
      >>> import optax, optax_sam
      >>> tx = optax.chain(optax_sam.msam(rho=3.0, momentum=0.9), optax.sgd(0.1, momentum=0.9))

    References:
      Becker, Altrock, Risse, Momentum-SAM: Sharpness Aware Minimization without Computational
      Overhead, 2024, arXiv 2401.12033; the sign is that of the authors' code, MarlonBecker/MSAM.
    """
    check_number("momentum", momentum, minimum=0, maximum=1, exclusive_maximum=True)
    ascent = optax.chain(optax.trace(momentum), normalized(rho), optax.scale(-1.0))
    return _compose(options, ascent, along_previous_direction=True)
