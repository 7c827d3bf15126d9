"""Flax nnx: both passes see the live objects as they were, and only the clean pass changes them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import optax_sam
from optax_sam.nnx import capture_layer_input, loss_function, objective

INPUTS, LABELS = jax.random.normal(jax.random.key(0), (8, 4)), jnp.arange(8) % 3
RHO = 0.3


class Network(nnx.Module):
    """Batch normalization and dropout, whose random numbers come from inside or from the caller."""

    def __init__(self, seed: int = 0, own_randomness: bool = True):
        rngs = nnx.Rngs(seed)
        self.hidden = nnx.Linear(4, 16, rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs if own_randomness else None)
        self.head = nnx.Linear(16, 3, rngs=rngs)

    def __call__(self, x, rngs=None):
        return self.head(self.dropout(nnx.relu(self.norm(self.hidden(x))), rngs=rngs))


def loss_of(model, inputs, labels, *rngs):
    losses = optax.softmax_cross_entropy_with_integer_labels(model(inputs, *rngs), labels)
    return losses.mean()


def arrays(node):
    """Every array of a node, random keys as their bits."""
    leaves = jax.tree.leaves(nnx.as_pure(nnx.state(node)))
    return [
        jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        for x in leaves
    ]


def assert_equal(actual, expected, rtol=1e-6):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-7), actual, expected
    )


def gradients_by_hand(model, *args, loss=loss_of):
    """SAM's gradient: the second pass is on copies of everything as it was before the first."""
    perturbed, copies = nnx.clone((model, args))
    value, grads = nnx.value_and_grad(loss)(model, INPUTS, LABELS, *args)
    grads = nnx.as_pure(grads)
    scale = RHO / optax.tree.norm(grads)
    params = nnx.as_pure(nnx.state(perturbed, nnx.Param))
    nnx.update(perturbed, jax.tree.map(lambda p, g: p + scale * g, params, grads))
    return value, nnx.as_pure(nnx.grad(loss)(perturbed, INPUTS, LABELS, *copies))


def gradients_of_library(model, *args, loss=loss_of, make_loss):
    optimizer = nnx.Optimizer(model, optax_sam.sam(RHO), wrt=nnx.Param)
    loss_fn = make_loss(model, *args)
    value, grads = nnx.value_and_grad(loss)(model, INPUTS, LABELS, *args)
    before = nnx.as_pure(nnx.state(model, nnx.Param))
    updates = optimizer.update(model, grads, loss_fn=loss_fn)
    nnx.update(model, before)
    return value, nnx.as_pure(updates)


def function_of(model, *args):
    return loss_function(model, loss_of, INPUTS, LABELS, *args)


def objective_of(model, *args):
    return objective(model, INPUTS, LABELS, args=args)


def objective_with_call(model, *args):
    return objective(model, INPUTS, LABELS, call=lambda model, x, *rngs: model(x, *rngs), args=args)


@pytest.mark.parametrize(
    ("make_loss", "own_randomness"),
    [(function_of, True), (function_of, False), (objective_of, True), (objective_with_call, False)],
)
def test_both_passes_see_one_state_and_only_the_clean_pass_changes_it(make_loss, own_randomness):
    results = []
    for gradients in (
        gradients_by_hand,
        lambda *args: gradients_of_library(*args, make_loss=make_loss),
    ):
        model = Network(own_randomness=own_randomness)
        args = () if own_randomness else (nnx.Rngs(7),)
        gradients = nnx.jit(gradients)
        # Two steps: the second starts from what the first has left.
        results.append([gradients(model, *args) for _ in range(2)] + [arrays((model, args))])
    assert_equal(results[1], results[0])


def test_metrics_and_other_modules_among_the_arguments():
    """A metric counts each batch once; a teacher's parameters are no parameters of the model's loss."""

    def distillation(model, inputs, labels, teacher, metric):
        logits = model(inputs)
        losses = optax.softmax_cross_entropy(logits, jax.nn.softmax(teacher(inputs)))
        metric.update(values=losses)
        return losses.mean()

    def make_loss(model, *args):
        return loss_function(model, distillation, INPUTS, LABELS, *args)

    results = []
    for gradients in (
        lambda *args: gradients_by_hand(*args, loss=distillation),
        lambda *args: gradients_of_library(*args, loss=distillation, make_loss=make_loss),
    ):
        model, teacher, metric = Network(0), Network(1), nnx.metrics.Average()
        result = nnx.jit(gradients)(model, teacher, metric)
        assert metric.count[...] == len(INPUTS)
        results.append([result, arrays((model, teacher, metric))])
    assert_equal(results[1], results[0])


def test_what_the_model_and_the_arguments_share_their_copies_share():
    model = Network()

    def loss(copy, layer):
        assert layer is copy.hidden
        assert layer is not model.hidden
        return layer.kernel[...].sum()

    loss_fn = loss_function(model, loss, model.hidden)
    grads = jax.grad(loss_fn)(nnx.state(model, nnx.Param))
    assert_equal(nnx.as_pure(grads)["hidden"]["kernel"], jnp.ones((4, 16)))


def test_a_loss_with_auxiliary_output():
    def loss_with_logits(model, inputs, labels):
        logits = model(inputs)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), logits

    model = Network()
    params = nnx.state(model, nnx.Param)
    value, logits = loss_function(model, loss_with_logits, INPUTS, LABELS)(params)
    assert_equal(value, loss_function(model, loss_of, INPUTS, LABELS)(params))
    assert logits.shape == (8, 3)


@pytest.mark.parametrize("make_loss", [function_of, objective_of])
def test_nothing_of_the_live_model_is_kept(make_loss):
    """Evaluated later, after the model has changed, the loss is that of the snapshot."""
    model = Network()
    loss_fn = make_loss(model)
    params = nnx.as_pure(nnx.state(model, nnx.Param))
    expected = make_loss(nnx.clone(model))(nnx.state(model, nnx.Param))
    loss_of(model, INPUTS, LABELS)
    model.norm.scale[...] *= 2
    changed = arrays(model)
    assert_equal(loss_fn(params), expected)
    assert_equal(arrays(model), changed, rtol=0)


@pytest.mark.parametrize("wrt", [nnx.PathContains("head"), nnx.Any(nnx.BatchStat, nnx.Param)])
def test_wrt_chooses_the_parameters(wrt):
    model = Network()
    params = nnx.state(model, wrt)
    loss_fn = loss_function(model, loss_of, INPUTS, LABELS, wrt=wrt)
    before = arrays(model)
    assert jnp.isfinite(loss_fn(params))
    assert_equal(
        arrays(model), before, rtol=0
    )  # also where a parameter is one that the loss updates
    grads = jax.grad(loss_fn)(params)
    assert jax.tree.structure(nnx.as_pure(grads)) == jax.tree.structure(nnx.as_pure(params))
    expected = jax.grad(objective(model, INPUTS, LABELS, wrt=wrt))(params)
    assert_equal(nnx.as_pure(grads), nnx.as_pure(expected))


@pytest.mark.parametrize("make_loss", [function_of, objective_of])
@pytest.mark.parametrize("own_randomness", [True, False])
def test_a_snapshot_after_the_clean_pass_is_refused(make_loss, own_randomness):
    """AUDIT 1.11: the perturbed pass would draw another dropout mask."""
    model = Network(own_randomness=own_randomness)
    args = () if own_randomness else (nnx.Rngs(7),)
    optimizer = nnx.Optimizer(model, optax_sam.sam(RHO), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, *args):
        grads = nnx.grad(loss_of)(model, INPUTS, LABELS, *args)
        optimizer.update(model, grads, loss_fn=make_loss(model, *args))

    count = r"model\.dropout\.rngs\.count" if own_randomness else r"args\[\d\]\.default\.count"
    with pytest.raises(ValueError, match=count + r".*before .*nnx\.value_and_grad"):
        step(model, optimizer, *args)


def test_without_side_effects_the_order_does_not_matter():
    model = Network()
    model.eval()
    optimizer = nnx.Optimizer(model, optax_sam.sam(RHO), wrt=nnx.Param)
    grads = nnx.grad(loss_of)(model, INPUTS, LABELS)
    updates = optimizer.update(model, grads, loss_fn=function_of(model))
    reference = Network()
    reference.eval()
    assert_equal(nnx.as_pure(updates), gradients_by_hand(reference)[1])


def step_on_the_loss_itself(model, optimizer, *args):
    loss_fn = objective_of(model, *args)
    grads = jax.grad(loss_fn)(nnx.state(model, nnx.Param))
    return nnx.as_pure(optimizer.update(model, grads, loss_fn=loss_fn))


def test_metrics_of_an_optimizer_are_of_their_step():
    """Its state is variables, which the next step overwrites."""
    model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(
        model, optax.chain(optax_sam.saner(0.1), optax.sgd(0.5)), wrt=nnx.Param
    )
    history, copies = [], []
    for _ in range(2):
        loss_fn = objective(model, INPUTS, LABELS)
        grads = jax.grad(loss_fn)(nnx.state(model, nnx.Param))
        optimizer.update(model, grads, loss_fn=loss_fn)
        history.append(optax_sam.get_metrics(optimizer.opt_state))
        copies.append({name: float(number) for name, number in history[-1].items()})
    assert [{name: float(number) for name, number in m.items()} for m in history] == copies
    assert copies[0] != copies[1]


def test_the_loss_itself_as_the_clean_pass():
    """Right where the randomness is new at every step, so that nothing is lost with the copies."""
    model = nnx.Sequential(nnx.Linear(4, 16, rngs=nnx.Rngs(0)), nnx.Dropout(0.5))
    optimizer = nnx.Optimizer(model, optax_sam.sam(RHO), wrt=nnx.Param)

    def make(model, rngs):
        call = lambda model, x, rngs: model.layers[1](model.layers[0](x), rngs=rngs)  # noqa: E731
        return objective(model, INPUTS, LABELS, call=call, args=(rngs,))

    loss_fn = make(model, nnx.Rngs(3))
    grads = jax.grad(loss_fn)(nnx.state(model, nnx.Param))
    updates = optimizer.update(model, grads, loss_fn=loss_fn)
    assert np.isfinite(optax.tree.norm(nnx.as_pure(updates)))


def test_the_loss_itself_as_the_clean_pass_of_a_model_with_state_warns():
    """Nobody advances the model's random counts and statistics."""
    model = Network()
    optimizer = nnx.Optimizer(model, optax_sam.sam(RHO), wrt=nnx.Param)
    with pytest.warns(UserWarning, match=r"norm\.mean.*nnx\.value_and_grad"):
        step_on_the_loss_itself(model, optimizer)


def test_capture_gives_the_layer_back_after_an_exception():
    model = Network()
    head = model.head

    def evaluate_and_fail():
        with capture_layer_input(model, "head") as captured:
            assert model.head is not head
            assert model(INPUTS).shape == (8, 3)
            assert captured[0].shape == (8, 16)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate_and_fail()
    assert model.head is head


def test_capture_names_a_layer_that_is_missing():
    with pytest.raises(ValueError, match=r"no layer 'hidden.tail'"):
        capture_layer_input(Network(), "hidden.tail").__enter__()
