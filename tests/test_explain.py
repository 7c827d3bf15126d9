"""explain says what the engine does, for methods behind any wrapper."""

import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest

import optax_sam
from optax_sam import Objective, _cost, explain, normalized, sam, sharpness_aware
from tests import registry


def setting(batch=8):
    objective = Objective(
        lambda p, x: jnp.tanh(x @ p["w"] + p["b"]) @ p["head"],
        jnp.ones((batch, 30)),
        jnp.zeros(batch, jnp.int32),
    )
    return objective, {"w": jnp.ones((30, 20)), "b": jnp.ones(20), "head": jnp.ones((20, 3))}


def lines(tx, *, batch=8, **options):
    """The lines of the text above the table, by title."""
    objective, params = setting(batch)
    text = explain(tx, objective.replace(**options), params)
    return dict(line.split(":", 1) for line in text.split("\n\n")[0].split("\n"))


def line(title, tx, **options):
    return lines(tx, **options)[title].strip()


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: sam(0.1), "2.00 gradients a step (SGD: 1)"),
        (lambda: optax_sam.saner(0.1), "2.00 gradients a step (SGD: 1)"),
        (lambda: sam(0.1, ascent_steps=2), "3.00 gradients a step (SGD: 1)"),
        (lambda: sam(0.1, ascent_fraction=0.25), "1.25 gradients a step (SGD: 1)"),
        (lambda: optax_sam.msam(0.1), "1.00 gradients a step (SGD: 1)"),
        # A combination that uses the clean gradient: it is computed for it.
        (lambda: optax_sam.msam(0.1, combination=optax_sam.down_weight()), "2.00 gradients a step"),
        (lambda: sam(0.1, every_k=5), "1.00 to 2.00 gradients, depending on the step (SGD: 1)"),
        (
            lambda: optax_sam.looksam(0.1, every_k=5),
            "1.00 to 2.00 gradients, depending on the step",
        ),
        (lambda: sam(0.1, group_size=8), "2.00 gradients a step (SGD: 1)"),
        # All gradients of the groups and their averages, but no gradient of the whole batch.
        (lambda: optax_sam.asam(0.1, group_size=1), "2.49 gradients a step (SGD: 1)"),
    ],
)
def test_counts_the_gradients_of_a_step(make, expected):
    assert line("cost", make()).startswith(expected)


def test_the_cost_of_one_sam_is_near_that_of_sam():
    gradients = float(line("cost", sam(0.1, group_size=1)).split()[0])
    assert 1.5 < gradients < 2.2


def test_a_loss_without_products_has_no_count():
    text = explain(sam(0.1), lambda w: jnp.sum(w**4), jnp.ones(3))
    assert "not counted: the loss has no matrix products" in text


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("gradient", [False, True])
def test_counts_convolutions_as_the_compiler_does(stride, gradient):
    def loss(kernel, x):
        return jnp.sum(
            jax.lax.conv_general_dilated(
                x, kernel, (stride, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
        )

    function = jax.grad(loss, argnums=(0, 1)) if gradient else loss
    arguments = (jnp.ones((3, 3, 8, 16)), jnp.ones((4, 10, 6, 8)))
    ours = _cost.multiplications(jax.make_jaxpr(function)(*arguments))
    flops = jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"]
    assert ours.least == ours.most == pytest.approx(flops / 2, rel=0.05)


def test_counts_the_rounds_of_a_loop():
    def function(x):
        return jax.lax.scan(lambda c, _: (c @ x, None), x, None, 5)[0]

    assert _cost.multiplications(jax.make_jaxpr(function)(jnp.ones((2, 2)))) == (40, 40)


def test_counts_the_branch_of_this_platform():
    def function(x):
        return jax.lax.platform_dependent(x, tpu=lambda x: x, default=lambda x: x @ x)

    assert _cost.multiplications(jax.make_jaxpr(function)(jnp.ones((2, 2)))) == (8, 8)


WRAPPED = {
    "sharpness_aware": lambda: sam(0.1, group_size=1),
    "chain(clip_by_global_norm, sharpness_aware, chain(trace, scale))": lambda: optax.chain(
        optax.clip_by_global_norm(1.0),
        sam(0.1, group_size=1),
        optax.chain(optax.trace(0.9), optax.scale(-0.1)),
    ),
    "inject_hyperparams(sam)": lambda: optax.inject_hyperparams(sam, static_args=("group_size",))(
        rho=0.1, group_size=1
    ),
    "MultiSteps(chain(sharpness_aware, scale))": lambda: optax.MultiSteps(
        optax.chain(sam(0.1, group_size=1), optax.scale(-0.1)), 3
    ),
    "sometimes(sharpness_aware)": lambda: optax_sam.sometimes(sam(0.1, group_size=1), every_k=2),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_finds_the_method_behind_wrappers(name):
    text = explain(WRAPPED[name](), *setting())
    assert f"optimizer:       {name}\n" in text
    assert text.count("8 of 1 example, by the fast path") == 1
    assert "independence:    proved" in text
    assert "dense (T=1, K=30, O=20)  Gram matrices" in text
    assert "copies" in text


def test_finds_momentum_sam():
    found = lines(optax_sam.along_previous(sharpness_aware(normalized(0.1))))
    assert found["optimizer"].strip() == "along_previous(sharpness_aware)"
    assert found["groups"].strip() == "none: one perturbation for the batch"


@pytest.mark.parametrize("name", registry.METHODS)
def test_names_the_stages_of_every_method(name):
    found = lines(registry.METHODS[name].make(0.1))
    assert found["evaluation"].strip() in ("full_gradient", "jacobian_only", "logit_only")
    for title in ("perturbation", "combination"):
        assert found[title].strip()
        assert "update" not in found[title]


def test_names_nested_stages():
    stage = optax.chain(optax_sam.moving_average(0.2), normalized(0.1))
    assert line("perturbation", sharpness_aware(stage)) == "chain(moving_average, normalized)"
    saner = optax_sam.saner(0.1)
    assert line("combination", saner) == "down_weight"


def test_says_why_groups_are_differentiated_by_themselves():
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the text says it, and says it once
        groups = line("groups", optax_sam.friendly_sam(0.1, group_size=2))
    assert groups.startswith("4 of 2 examples, each by itself: the first stage adds something")
    groups = line("groups", sam(0.1, group_size=2), penalty=lambda p: jnp.sum(p["w"] ** 2))
    assert "each by itself: the objective has a penalty" in groups
    groups = line("groups", sam(0.1, group_size=8))
    assert groups == "one: group_size=8 is the batch"


def test_says_when_groups_are_faster_by_themselves():
    class Convolutional(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3)(nn.Conv(4, (3, 3))(x).mean((1, 2)))

    model, inputs = Convolutional(), jnp.ones((32, 4, 4, 3))
    params = jax.eval_shape(model.init, jax.random.key(0), inputs)  # shapes will do
    objective = Objective(model.apply, inputs, jnp.zeros(32, jnp.int32))
    text = explain(sam(0.1, group_size=16), objective, params)
    assert "2 of 16 examples, each by itself: groups of this size are faster" in text


def test_microbatches_are_told():
    assert line("at once", sam(0.1, group_size=2), microbatch_size=4) == "4 of 8 examples"
    assert line("at once", sam(0.1, group_size=2)) == "8 of 8 examples"


def test_names_what_is_not_perturbed():
    perturbed = line("perturbed", sam(0.1, mask={"w": True, "b": False, "head": True}))
    assert perturbed == "2 of 3 parameters, without ['b']"
    assert line("perturbed", sam(0.1)) == "all parameters"


def test_passes_on_other_warnings():
    objective, params = setting()
    tx = optax.chain(sam(0.1), optax_sam.saner(0.1))
    assert "warning: a sharpness-aware method got another one's direction" in explain(
        tx, objective, params
    )


def test_refuses_what_has_no_method():
    with pytest.raises(
        ValueError, match=r"no sharpness-aware method in tx, which is chain\(.*scale"
    ):
        explain(optax.adam(0.1), *setting())
    with pytest.raises(TypeError, match=r"tx must be an optimizer.*got 3"):
        explain(3, *setting())
    hidden = optax.MultiSteps(sam(0.1), 2).gradient_transformation()
    with pytest.raises(TypeError, match="drop them too"):
        explain(hidden, *setting())


def test_refuses_mixed_examples():
    objective, params = setting()
    mixing = objective.replace(apply_fn=lambda p, x: (x - x.mean(0)) @ p["w"] @ p["head"])
    with pytest.raises(ValueError, match="not independent"):
        explain(sam(0.1, group_size=1), mixing, params)
    assert "2 of 4 examples" in explain(sam(0.1, group_size=4), mixing, params)


def test_leaves_nothing_behind():
    """Explaining changes nothing, also after an error, and collects nothing afterwards."""
    from optax_sam._engine import decisions

    with pytest.raises(ValueError, match="no sharpness-aware method in tx"):
        explain(optax.adam(0.1), *setting())
    assert decisions.get() is None


def test_a_stage_gets_its_own_arguments():
    objective, params = setting()
    stage = optax_sam.scale_by_second_moment()
    tx = optax_sam.functional_sam(0.1, preconditioner=stage, group_size=2)
    text = explain(tx, objective, params, second_moment=params)
    assert "gives every coordinate of the gradient a factor of its own" in text
    with pytest.raises(ValueError, match="needs second_moment"):
        explain(tx, objective, params)
