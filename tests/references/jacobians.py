"""The factored gradients of J-SAM and L-SAM, slow and obvious: every Jacobian is formed."""

import jax
import jax.numpy as jnp


def factored_gradient(apply_fn, loss, inputs, labels, jacobian_at, logit_term_at):
    """Network Jacobian at one point times logit term at another, averaged example by example."""

    @jax.jit
    def one_example(x, y):
        def logits_of(params):
            return apply_fn(params, x[None])[0]

        jacobian = jax.jacrev(logits_of)(jacobian_at)
        logit_term = jax.grad(lambda z: loss(z[None], y[None])[0])(logits_of(logit_term_at))
        return jax.tree.map(lambda j: jnp.tensordot(logit_term, j, logit_term.ndim), jacobian)

    gradients = [one_example(x, y) for x, y in zip(inputs, labels, strict=True)]
    return jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *gradients)
