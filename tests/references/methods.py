"""Every method, slow and obvious: one flat vector, explicit loops over steps, formulas as printed.

Each reference is a class with ``epsilon(problem, w)`` and ``direction(problem, w)``, called once per
step. ``problem`` gives ``grad(w)``, ``logits(w)``, ``labels`` and ``on(indices, labels)``, the same
problem on other examples.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax


@functools.partial(jax.jit, static_argnums=0)
def mean_loss(forward, w, inputs, labels):
    logits = forward(w, inputs)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


gradient = jax.jit(jax.grad(mean_loss, argnums=1), static_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def jacobian_times_logit_term(forward, w_jacobian, w_logits, inputs, labels):
    """Sum over examples and classes of the Jacobian at one point times the logit term at another."""
    jacobian = jax.jacrev(forward)(w_jacobian, inputs)
    term = jax.nn.softmax(forward(w_logits, inputs)) - jax.nn.one_hot(labels, jacobian.shape[1])
    return jnp.einsum("bcp,bc->p", jacobian, term) / len(labels)


class Problem:
    """A classification loss of a flat parameter vector."""

    def __init__(self, forward, inputs, labels):
        self.forward, self.inputs, self.labels = forward, inputs, labels

    def logits(self, w):
        return self.forward(w, self.inputs)

    def grad(self, w):
        return gradient(self.forward, w, self.inputs, self.labels)

    def on(self, indices, labels=None):
        labels = self.labels[indices] if labels is None else labels
        return Problem(self.forward, self.inputs[indices], labels)

    def product(self, w_jacobian, w_logits):
        return jacobian_times_logit_term(
            self.forward, w_jacobian, w_logits, self.inputs, self.labels
        )


def length(v):
    return np.sqrt(np.sum(np.square(np.asarray(v))))


def towards(v, rho):
    return rho * v / length(v) if length(v) else 0 * v


class SAM:
    def __init__(self, rho=0.05):
        self.rho = rho

    def epsilon(self, problem, w):
        return towards(problem.grad(w), self.rho)

    def direction(self, problem, w):
        return problem.grad(w + self.epsilon(problem, w))


class ASAM(SAM):
    def epsilon(self, problem, w):
        t = jnp.abs(w) + 0.01
        g = problem.grad(w)
        return t * towards(t * g, self.rho)


class JSAM(SAM):
    def direction(self, problem, w):
        return problem.product(w + self.epsilon(problem, w), w)


class FunctionalSAM(JSAM):
    """Preconditioned, with a second moment of its own."""

    step = 0
    moment = 0.0

    def epsilon(self, problem, w):
        g = problem.grad(w)
        self.step += 1
        self.moment = 0.999 * self.moment + 0.001 * g**2
        corrected = self.moment / (1 - 0.999**self.step)
        return towards(g / (jnp.sqrt(corrected) + 1e-8), self.rho)


class LSAM(SAM):
    def direction(self, problem, w):
        return problem.product(w, w + self.epsilon(problem, w))


class NCSAM(SAM):
    """With the m smallest gaps, so that nothing is random."""

    def epsilon(self, problem, w):
        logits = np.asarray(problem.logits(w))
        gaps = np.sort(logits)[:, -1] - np.sort(logits)[:, -2]
        chosen = np.argsort(gaps, kind="stable")[: len(gaps) // 2]
        flipped = []
        for i in chosen:
            scores = [(z, c) for c, z in enumerate(logits[i]) if c != problem.labels[i]]
            flipped.append(max(scores)[1])
        noise = problem.on(chosen, jnp.array(flipped)).grad(w)
        v = towards(problem.grad(w), self.rho) + 0.1 * noise
        return towards(v, self.rho) if length(v) > self.rho else v


class GSAM(SAM):
    alpha = 0.1

    def direction(self, problem, w):
        g = problem.grad(w)
        perturbed = super().direction(problem, w)
        unit = perturbed / length(perturbed)
        return perturbed - self.alpha * (g - jnp.dot(g, unit) * unit)


class FriendlySAM(SAM):
    average = None

    def epsilon(self, problem, w):
        g = problem.grad(w)
        h = g if self.average is None else g - self.average
        self.average = g if self.average is None else 0.9 * self.average + 0.1 * g
        return towards(h, self.rho)


class VaSSO(SAM):
    average = None

    def epsilon(self, problem, w):
        g = problem.grad(w)
        self.average = g if self.average is None else 0.8 * self.average + 0.2 * g
        return towards(self.average, self.rho)


class WSAM(SAM):
    gamma = 0.9

    def direction(self, problem, w):
        g = problem.grad(w)
        return g + self.gamma / (1 - self.gamma) * (super().direction(problem, w) - g)


class DecoupledWSAM(WSAM):
    """Momentum on the clean gradient, and none on the sharpness."""

    momentum = 0.0

    def direction(self, problem, w):
        g = problem.grad(w)
        self.momentum = 0.9 * self.momentum + g
        return self.momentum + super().direction(problem, w) - g


class StableSAM(SAM):
    def direction(self, problem, w):
        return towards(super().direction(problem, w), length(problem.grad(w)))


class LESAM(SAM):
    budget = 0.2

    def epsilon(self, problem, w):
        g = problem.grad(w)
        return towards(g, min(self.budget / length(g), self.rho))


class LookSAM(SAM):
    alpha = 0.7
    step = 0

    def direction(self, problem, w):
        g = problem.grad(w)
        self.step += 1
        if self.step % 5 != 1:
            return g + self.alpha * towards(self.v, length(g))
        perturbed = super().direction(problem, w)
        unit = towards(g, 1)
        self.v = perturbed - jnp.dot(perturbed, unit) * unit
        return perturbed


class MomentumSAM(SAM):
    v = previous = 0.0

    def epsilon(self, problem, w):
        self.v = 0.9 * self.v + self.previous
        return -towards(self.v + 0 * w, self.rho)

    def direction(self, problem, w):
        self.previous = super().direction(problem, w)
        return self.previous


class Restricted(SAM):
    def direction(self, problem, w):
        g = np.asarray(problem.grad(w))
        perturbed = np.asarray(super().direction(problem, w))
        d = g.copy()
        for i in range(len(d)):
            if g[i] != 0 and 0 < perturbed[i] / g[i] < 1:
                d[i] = perturbed[i]
        return d


def with_saner(method, without=()):
    """Down-weights by one half what another method gives, coordinate by coordinate."""

    class WithSANER(method):
        strength = 0.5

        def direction(self, problem, w):
            g = np.asarray(problem.grad(w))
            d = np.array(super().direction(problem, w))
            for i in range(len(d)):
                if g[i] != 0 and 0 < d[i] / g[i] < 1 and i not in without:
                    d[i] *= 1 - self.strength
            return d

    return WithSANER


METHODS = {
    "sam": SAM,
    "asam": ASAM,
    "saner": with_saner(SAM),
    "jsam": JSAM,
    "functional_sam": FunctionalSAM,
    "lsam": LSAM,
    "ncsam": NCSAM,
    "gsam": GSAM,
    "friendly_sam": FriendlySAM,
    "vasso": VaSSO,
    "wsam": WSAM,
    "decoupled_wsam": DecoupledWSAM,
    "stable_sam": StableSAM,
    "le_sam": LESAM,
    "looksam": LookSAM,
    "msam": MomentumSAM,
    "restricted": Restricted,
    "ae_sam": SAM,
    "masked_saner": with_saner(SAM, without=range(6)),  # the bias is the first leaf
}
METHODS |= {f"{name}+saner": with_saner(method) for name, method in METHODS.items()}
