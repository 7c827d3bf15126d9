"""The recorder of training dynamics against a slow and obvious one, and the ranking of suspects."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score

import optax_sam
from optax_sam import _cost, label_noise
from optax_sam.diagnostics import (
    TrainingDynamics,
    auroc,
    rank_suspects,
    record_batch,
    record_epoch,
    start_recording,
    training_dynamics,
)

EPOCHS, SIZE, CLASSES = 5, 11, 4
GENERATOR = np.random.default_rng(0)
LOGITS = GENERATOR.normal(size=(EPOCHS, SIZE, CLASSES)).astype(np.float32)
LABELS = GENERATOR.integers(CLASSES, size=SIZE)


def by_hand(logits, labels):
    """The statistics of one example from its logits in every epoch, as the papers define them."""
    losses, margins, probabilities, hits = [], [], [], []
    for z in logits.astype(np.float64):
        p = np.exp(z) / np.exp(z).sum()
        losses.append(-np.log(p[labels]))
        margins.append(z[labels] - np.delete(z, labels).max())
        probabilities.append(p[labels])
        hits.append(z.argmax() == labels)
    forgotten = sum(before and not after for before, after in itertools.pairwise(hits))
    return TrainingDynamics(
        len(hits),
        np.mean(losses),
        np.mean(margins),
        np.mean(probabilities),
        np.std(probabilities),
        np.mean(hits),
        forgotten,
    )


EXPECTED = TrainingDynamics(*np.transpose([by_hand(LOGITS[:, i], LABELS[i]) for i in range(SIZE)]))


def assert_expected(recording):
    for name, value in training_dynamics(recording)._asdict().items():
        np.testing.assert_allclose(value, getattr(EXPECTED, name), rtol=2e-5, atol=1e-6)


@jax.tree_util.Partial
def look_up(logits, rows):
    """A network whose parameters are its logits; it is compiled once for all epochs."""
    return logits[rows]


class TestRecording:
    def test_the_example_is_worth_something(self):
        assert EXPECTED.forgetting_events.max() >= 2
        assert len(set(EXPECTED.agreement)) > 2

    def test_batches_of_training_steps(self):
        """In another order each epoch, the last batch padded with -1."""
        recording = start_recording(LABELS)
        generator = np.random.default_rng(1)
        step = jax.jit(record_batch)
        for logits in LOGITS:
            order = np.append(generator.permutation(SIZE), -1)
            for indices in order.reshape(3, 4):
                recording = step(recording, logits[indices], indices)
        assert_expected(recording)

    @pytest.mark.parametrize("chunk_size", [1, 4, SIZE, 1000])
    def test_passes_over_the_data(self, chunk_size):
        recording = start_recording(LABELS)
        for logits in LOGITS:
            recording = record_epoch(
                recording, look_up, logits, np.arange(SIZE), chunk_size=chunk_size
            )
        assert_expected(recording)

    def test_the_labels_are_copied(self):
        """The recording may be donated, and the labels are the caller's."""
        labels = jnp.array([0, 1, 1], jnp.int32)
        jax.jit(lambda recording: recording, donate_argnums=0)(start_recording(labels))
        assert not labels.is_deleted()

    def test_a_plain_function_is_read_anew_in_each_epoch_and_compiled_once_for_its_chunks(self):
        """As that of nnx, whose function closes over the model."""
        shapes = []

        def network(_, rows):
            shapes.append(rows.shape)
            return logits[rows]

        recording = expected = start_recording(LABELS)
        for logits in jnp.asarray(LOGITS[:2]):
            recording = record_epoch(recording, network, None, np.arange(SIZE), chunk_size=4)
            expected = record_batch(expected, logits, np.arange(SIZE))
        jax.tree.map(np.testing.assert_array_equal, recording, expected)
        assert shapes == [(4,)] * 2

    def test_a_partial_is_an_argument_and_not_a_reason_to_compile(self):
        traces = []

        def network(scale, logits, rows):
            traces.append(scale)
            return scale * logits[rows]

        recording = start_recording(LABELS)
        for logits in LOGITS:
            apply_fn = jax.tree_util.Partial(network, jnp.ones([]))
            recording = record_epoch(recording, apply_fn, logits, np.arange(SIZE), chunk_size=4)
        assert len(traces) == 1
        assert_expected(recording)

    def test_in_the_training_step_it_multiplies_no_matrix(self):
        tx = optax.chain(optax_sam.sam(0.1), optax.sgd(0.1))

        def network(params, inputs):
            logits = inputs @ params
            return logits, logits

        def step(params, inputs, labels, recording, indices, record):
            objective = optax_sam.Objective(network, inputs, labels, has_aux=True)
            (_, logits), grads = jax.value_and_grad(objective, has_aux=True)(params)
            updates, _ = tx.update(grads, tx.init(params), params, loss_fn=objective)
            if record:
                recording = record_batch(recording, logits, indices)
            return optax.apply_updates(params, updates), recording

        arguments = (
            jnp.ones((3, CLASSES)), jnp.ones((SIZE, 3)), LABELS, start_recording(LABELS),
            np.arange(SIZE),
        )  # fmt: skip
        without, recorded = (
            _cost.multiplications(jax.make_jaxpr(step, static_argnums=5)(*arguments, record))
            for record in (False, True)
        )
        assert recorded == without
        assert without.most > 0

    @pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
    def test_a_batch_that_is_spread_over_devices(self, kind):
        mesh = jax.make_mesh((4,), ("data",), axis_types=(kind,))
        sharding = NamedSharding(mesh, PartitionSpec("data"))
        batch = jax.device_put((LOGITS[0, :4], np.arange(4)), sharding)
        with jax.set_mesh(mesh):
            spread = jax.jit(record_batch)(start_recording(LABELS), *batch)
        alone = record_batch(start_recording(LABELS), LOGITS[0, :4], np.arange(4))
        jax.tree.map(np.testing.assert_array_equal, spread, alone)

    def test_half_precision_is_measured_in_single(self):
        logits = jnp.asarray([[12.0, 0.0], [0.0, 12.0]], jnp.float16)
        recording = record_batch(start_recording([0, 0]), logits, np.arange(2))
        assert recording.loss.dtype == jnp.float32
        np.testing.assert_allclose(recording.loss, np.log1p(np.exp([-12, 12])), atol=1e-6)

    def test_what_was_never_seen_has_no_statistics(self):
        indices = np.array([3, 5, -1, -1])
        recording = record_batch(start_recording(LABELS), LOGITS[0, :4], indices)
        dynamics = training_dynamics(recording)
        seen = [3, 5]
        for values in (dynamics.loss, dynamics.margin, dynamics.confidence, dynamics.agreement):
            assert np.isfinite(values).nonzero()[0].tolist() == seen
        np.testing.assert_allclose(
            dynamics.loss[3], by_hand(LOGITS[:1, 0], LABELS[3]).loss, rtol=1e-5
        )
        assert dynamics.variability[3] == 0
        assert sorted(rank_suspects(recording).examples) == seen

    def test_a_class_without_a_logit_is_nan_where_nobody_can_look(self):
        labels = np.where(np.arange(SIZE) == 2, CLASSES, LABELS)
        recording = jax.jit(record_batch)(start_recording(labels), LOGITS[0, :4], np.arange(4))
        assert np.isnan(recording.loss).nonzero()[0].tolist() == [2]

    def test_logits_with_nan_predict_nothing_and_come_first_among_the_suspects(self):
        """Not class 0, as argmax has it: a network that has diverged has learned no label."""
        logits = LOGITS[0, :4].copy()
        logits[1] = np.nan
        recording = record_batch(start_recording(np.zeros(SIZE, int)), logits, np.arange(4))
        assert not recording.agrees[1]
        suspects = rank_suspects(recording)
        assert suspects.examples[0] == 1
        assert (np.diff(suspects.scores[1:]) <= 0).all()


class TestSuspects:
    @pytest.fixture
    def recording(self):
        recording = start_recording(LABELS)
        for logits in LOGITS:
            recording = record_epoch(recording, look_up, logits, np.arange(SIZE))
        return recording

    @pytest.mark.parametrize(
        ("by", "sign"), [("margin", 1), ("loss", -1), ("confidence", 1), ("agreement", 1)]
    )
    def test_order(self, recording, by, sign):
        suspects = rank_suspects(recording, by)
        values = sign * getattr(EXPECTED, by)
        np.testing.assert_allclose(-suspects.scores, values[suspects.examples], rtol=1e-5)
        assert (np.diff(suspects.scores) <= 0).all()
        assert sorted(suspects.examples) == list(range(SIZE))
        assert (suspects.labels == LABELS[suspects.examples]).all()
        last = LOGITS[-1].copy()
        last[np.arange(SIZE), LABELS] = -np.inf
        assert (suspects.suggestions == last.argmax(1)[suspects.examples]).all()

    def test_what_was_never_learned_counts_as_forgotten_most(self, recording):
        suspects = rank_suspects(recording, "forgetting_events")
        never = np.flatnonzero(EXPECTED.agreement == 0)
        assert len(never)
        assert set(suspects.examples[: len(never)]) == set(never)
        rest = EXPECTED.forgetting_events[suspects.examples[len(never) :]]
        assert (np.diff(rest) <= 0).all()

    def test_finds_wrong_labels_of_digits_in_one_training_run(self):
        """A linear softmax of 64 pixels, 40 % wrong labels: AUROC 0.997."""
        data = load_digits()
        noisy = label_noise.symmetric(data.target, 0.4, num_classes=10, seed=0)
        inputs = data.data.astype(np.float32) / 16

        @jax.jit
        def train(params, recording):
            objective = optax_sam.Objective(lambda w, x: x @ w, inputs, jnp.asarray(noisy.labels))
            recording = record_batch(recording, inputs @ params, np.arange(len(inputs)))
            return params - 2 * jax.grad(objective)(params), recording

        params, recording = jnp.zeros((64, 10)), start_recording(noisy.labels)
        for _ in range(100):
            params, recording = train(params, recording)
        suspects = rank_suspects(recording)
        assert auroc(suspects.scores, noisy.changed[suspects.examples]) > 0.97
        found = suspects.suggestions[:300] == data.target[suspects.examples[:300]]
        assert found.mean() > 0.9


class TestAuroc:
    def test_is_that_of_scikit_learn(self):
        generator = np.random.default_rng(0)
        scores, wrong = generator.integers(20, size=200), generator.random(200) < 0.3
        assert auroc(scores, wrong) == pytest.approx(roc_auc_score(wrong, scores))

    @pytest.mark.parametrize("seed", range(3))
    def test_is_the_share_of_pairs_in_the_right_order(self, seed):
        generator = np.random.default_rng(seed)
        scores, wrong = generator.integers(4, size=12), generator.random(12) < 0.4
        pairs = [(a > b) + 0.5 * (a == b) for a in scores[wrong] for b in scores[~wrong]]
        assert auroc(scores, wrong) == pytest.approx(np.mean(pairs))

    def test_infinite_scores_are_scores_and_nan_is_passed_on(self):
        wrong = np.array([True, False, False])
        assert auroc([np.inf, 1.0, -np.inf], wrong) == 1
        assert np.isnan(auroc([np.nan, 1.0, 2.0], wrong))

    @pytest.mark.parametrize("wrong", [np.zeros(3, bool), np.ones(3, bool)])
    def test_without_two_kinds_there_is_none(self, wrong):
        assert np.isnan(auroc(np.arange(3.0), wrong))


def test_excluded_classes_leave_a_confident_example_above_suspicion():
    """By logits of minus infinity: its margin is infinite, and stays it."""
    excluded = -jnp.inf
    recording = start_recording(jnp.array([0, 1]))
    sure = jnp.array([[0.0, excluded, excluded], [excluded, excluded, 0.0]])
    recording = record_batch(recording, sure, jnp.arange(2))
    assert recording.rival.tolist() == [1, 2]  # never its own label
    unsure = jnp.array([[0.0, 1.0, 2.0], [0.0, 1.0, 2.0]])
    recording = record_batch(recording, unsure, jnp.arange(2))
    assert recording.margin.tolist() == [jnp.inf, -jnp.inf]
    assert rank_suspects(recording).examples.tolist() == [1, 0]
    lost = record_batch(recording, jnp.full((2, 3), jnp.nan), jnp.arange(2))
    assert np.isnan(lost.margin).all()
