"""The grid, its rounds, the choice, the criteria and the suspects, by hand."""

import numpy as np
import pytest

from examples.frozen_features import choose, criteria, fit, grid, report, suspects
from examples.frozen_features.config import Config
from examples.frozen_features.grid import Setting
from examples.frozen_features.search import Result, scores
from examples.frozen_features.train import predicted
from tests.examples.frozen_features.frozen_data import features

SGD = Setting("mlp", "sgd", 0.0, 1e-3, 0.02)
SAM = Setting("mlp", "sam", 0.1, 1e-3, 0.02)
LINEAR = Setting("linear", "sgd", 0.0, 1e-3, 0.02)


def result(setting, correct, rung=0, seed=0, rows=100, **measures):
    correct = np.array(correct, bool)
    measures = {"held_out": correct.mean(), "clean_accuracy": np.nan} | measures
    return Result(setting, rung, seed, rows, measures, correct, np.array([correct.mean()]))


def test_the_grid_has_no_point_twice():
    points = grid.settings(Config())
    assert len(set(points)) == len(points) == 68
    assert {p.rho for p in points if p.method == "sgd"} == {0.0}
    assert not any(p.head == "linear" and p.method == "jsam" for p in points)
    (one,) = {p.rho for p in grid.settings(Config(methods=("1-sam",), radii=(0.5,)))}
    assert one == pytest.approx(0.05)


def test_every_loss_goes_with_every_method_and_has_its_strength():
    points = grid.settings(Config(losses=("cross_entropy", "sce")))
    assert len(set(points)) == len(points) == 2 * 68
    robust = next(p for p in points if p.loss == "sce" and p.method == "saner")
    assert (robust.recipe(8).loss, robust.knobs.strength) == ("sce", 0.5)
    assert robust.label == "SANER + SCE linear ρ=0.1 decay=0.001"
    assert len({p.family for p in points}) == 14


def test_few_rows_get_more_seeds_and_many_rows_get_more_rows():
    assert [(r.rows, r.seeds) for r in grid.rungs(1000, 60)] == [
        (1000, (0,)),
        (1000, (1, 2)),
        (1000, (3, 4)),
    ]
    assert [(r.rows, r.seeds) for r in grid.rungs(42_501, 60)] == [
        (5312, (0,)),
        (15_937, (0,)),
        (42_501, (0,)),
    ]


@pytest.mark.parametrize("rows", [4000, 4001, 10_666, 10_667, 19_999, 20_000])
def test_no_round_trains_what_an_earlier_one_has_trained(rows):
    trained = [(r.rows, seed) for r in grid.rungs(rows, 60) for seed in r.seeds]
    assert len(set(trained)) == len(trained)
    assert trained[-1][0] == rows


def test_survivors_are_the_best_and_those_for_comparison():
    values = {SGD: 0.1, SAM: 0.9, LINEAR: 0.2}
    assert grid.survivors(values, 0, keep=1) == [SGD, SAM, LINEAR]
    assert grid.survivors(values, 1, keep=1) == [SAM, LINEAR]


def test_scores_pool_the_seeds_on_the_same_rows_only():
    runs = [
        result(SGD, [1, 1, 1, 1], rows=50),
        result(SGD, [0, 0, 0, 1], rung=1, rows=100),
        result(SAM, [0, 1, 0, 1], rung=1, rows=100),
        result(SAM, [1, 1, 1, 1], rung=2, seed=1, rows=100),
        result(SGD, [0, 0, 0, 0], rung=2, seed=1, rows=100),
    ]
    assert scores(runs) == {SGD: 0.125, SAM: 0.75}
    diverged = result(SAM, [1], rung=3, held_out=np.nan)
    assert scores([diverged]) == {SAM: -np.inf}


def test_the_choice_and_its_intervals_by_hand():
    hits = np.array([1] * 60 + [0] * 40)
    other = np.array([1] * 50 + [0] * 50)
    choice = choose.choose([result(SAM, hits), result(SGD, other)])
    assert choice.setting == SAM
    assert choice.runner_up == SGD
    half = 1.96 * np.sqrt(0.6 * 0.4 / 99)
    np.testing.assert_allclose(choice.interval, [0.6 - half, 0.6 + half], rtol=1e-6)
    half = 1.96 * np.sqrt(0.1 * 0.9 / 99)
    np.testing.assert_allclose(choice.lead_interval, [0.1 - half, 0.1 + half], rtol=1e-6)
    assert choice.sure
    assert not choose.choose([result(SAM, hits), result(SGD, hits)]).sure
    alone = choose.choose([result(SAM, hits)])
    assert alone.runner_up is None
    assert alone.sure


def test_a_setting_that_diverged_is_neither_chosen_nor_in_the_way():
    diverged = dict.fromkeys(criteria.MEASURES, np.nan)
    good = {"clean_accuracy": 0.7, "canaries": 0.2, "small_loss": 0.4, "gap": -0.1}
    good |= {"fitted": 0.9, "memorized": 0.5}
    runs = [result(SGD, [1, 1], **diverged), result(LINEAR, [0, 1], **good)]
    choice = choose.choose(runs)
    assert (choice.setting, choice.runner_up) == (LINEAR, None)
    assert {row.name: row.regret for row in choose.compare_criteria(runs)}["held_out"] == 0
    fast = result(SGD._replace(rate=0.1), [0, 1], **good)
    rows = {cells[0]: cells for cells in report.table_rows([*runs, fast])}
    assert rows["mlp"][2:6] == ("-", "0.001", "0.1", "50.0")
    with pytest.raises(ValueError, match=r"--learning-rates: 0.02: every setting diverged\. Give"):
        choose.choose(runs[:1])


def test_logits_that_are_not_finite_measure_nothing_but_test_logits_do_not_choose():
    data = features(rows=12)
    parts = criteria.Split(np.arange(8), np.arange(8, 12), np.array([0]), data.labels)
    given = data, parts, parts.train
    for bad in range(3):
        logits = [np.zeros((8, 3)), np.zeros((4, 3)), np.zeros((12, 3))]
        assert np.isfinite(criteria.measure(*given, *logits)["held_out"])
        logits[bad][2, 1] = np.nan
        measured = criteria.measure(*given, *logits)
        if bad == 2:
            without = criteria.measure(*given, *logits[:2], None)
            assert np.isnan(measured.pop("clean_accuracy"))
            assert measured == {name: without[name] for name in measured}
        else:
            assert all(map(np.isnan, measured.values()))
    found = predicted(np.array([[[0.0, 1.0]], [[np.nan, np.nan]], [[np.inf, 0.0]]]))
    assert found.tolist() == [[1], [-1], [-1]]


def sentences(results, setting):
    """What is said of a choice among these runs."""
    choice = choose.Choice(setting, 0.5, (0.4, 0.6), results[0].setting, 0.0, (-0.1, 0.1))
    data = features()._replace(clean_labels=None)
    chosen = fit.Fitted(setting, None, np.zeros((120, 3)), {})
    outcome = fit.Outcome(Config(), data, results, choice, [], chosen, None)
    return report.sentences(outcome)


def test_an_edge_of_the_grid_is_one_of_the_same_method():
    """1-SAM takes a tenth of the radii."""
    config = Config(methods=("sam", "1-sam"), radii=(0.1, 0.3), decays=(0.0, 1e-3, 1e-2))
    results = [result(setting, [1, 0]) for setting in grid.settings(config)]
    by_place = {(s.method, s.rho, s.decay): s for s in (r.setting for r in results)}
    said = sentences(results, by_place["1-sam", 0.03, 1e-3])
    edges = [line for line in said if "that was tried" in line]
    assert edges == ["Its radius 0.03 is the largest that was tried: widen --radii there."]
    said = sentences(results, by_place["sam", 0.1, 1e-2])
    assert [line for line in said if "that was tried" in line] == [
        "Its radius 0.1 is the smallest that was tried: widen --radii there.",
        "Its decay 0.01 is the largest that was tried: widen --decays there.",
    ]
    # Nothing is below 0.
    assert not any("decay 0 " in line for line in sentences(results, by_place["sam", 0.1, 0.0]))


def test_a_learning_rate_is_named_where_there_are_several():
    runs = [result(SGD, [1, 0]), result(SGD._replace(rate=0.1), [1, 1])]
    said = sentences(runs, runs[1].setting)
    assert said[0] == "Chosen: SGD mlp decay=0.001 rate=0.1."
    assert "Runner-up: SGD mlp decay=0.001 rate=0.02." in said
    assert (
        "Its learning rate 0.1 is the largest that was tried: widen --learning-rates there." in said
    )
    assert report.columns(runs)[3:5] == ("decay", "rate")
    assert sentences(runs[:1], SGD)[0] == "Chosen: SGD mlp decay=0.001."


def test_criteria_are_compared_by_their_regret():
    runs = [
        result(SGD, [1, 0], clean_accuracy=0.9, canaries=0.1, small_loss=0.5, gap=-0.2),
        result(SAM, [1, 1], clean_accuracy=0.7, canaries=0.2, small_loss=0.4, gap=np.nan),
    ]
    rows = {row.name: row for row in choose.compare_criteria(runs)}
    assert (rows["held_out"].setting, rows["small_loss"].setting) == (SAM, SGD)
    assert rows["held_out"].regret == pytest.approx(0.2)
    assert rows["small_loss"].regret == 0
    assert rows["held_out"].correlation == pytest.approx(-1)
    assert rows["gap"].setting == SGD
    runs[1].measures["clean_accuracy"] = np.nan  # its test logits are not finite
    rows = {row.name: row for row in choose.compare_criteria(runs)}
    assert (rows["held_out"].setting, rows["held_out"].regret) == (SAM, None)
    assert rows["small_loss"].regret == 0


def test_the_split_is_stratified_and_canaries_are_wrong_on_purpose():
    data = features(rows=300)
    parts = criteria.split(data, 0.2, 0.1, seed=0)
    assert np.intersect1d(parts.train, parts.held_out).size == 0
    assert len(parts.train) + len(parts.held_out) == 300
    for c in range(3):
        share = (data.labels[parts.held_out] == c).sum() / (data.labels == c).sum()
        assert share == pytest.approx(0.2, abs=0.01)
    changed = np.flatnonzero(parts.labels != data.labels)
    np.testing.assert_array_equal(changed, parts.canaries)
    assert len(changed) == round(0.1 * len(parts.train))
    assert np.isin(parts.canaries, parts.train).all()


def test_measures_by_hand():
    data = features(rows=12, wrong=0.25)
    labels = data.labels.copy()
    labels[0] = (labels[0] + 1) % 3
    parts = criteria.Split(np.arange(8), np.arange(8, 12), np.array([0]), labels)
    rows = np.arange(8)
    # It predicts the observed label of every row, whatever the canary says.
    logits = 10.0 * np.eye(3)[data.labels]
    measured = criteria.measure(data, parts, rows, logits[rows], logits[8:], None)
    wrong = data.labels != data.clean_labels
    assert measured["held_out"] == 1
    assert measured["canaries"] == 1
    assert measured["fitted"] == 1
    assert measured["gap"] == 0
    assert measured["clean_accuracy"] == (~wrong[8:]).mean()
    assert measured["memorized"] == 1
    test = criteria.measure(
        data, parts, rows, logits[rows], logits[8:], 10.0 * np.eye(3)[data.test_labels]
    )
    assert test["clean_accuracy"] == 1


def test_separation_is_one_for_two_points_and_low_for_one_heap():
    assert criteria.separation(np.array([0, 0, 1, 1, 1])) == pytest.approx(1)
    heap = np.random.default_rng(0).normal(size=10_000)
    assert criteria.separation(heap) == pytest.approx(2 / np.pi, abs=0.02)
    assert criteria.separation(np.ones(5)) == 0


def test_suspects_are_ranked_by_their_margin():
    p = np.array([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6], [0.4, 0.35, 0.25]])
    found = suspects.rank(np.log(p), np.array([0, 0, 1]))
    assert found.row.tolist() == [1, 2, 0]
    assert found.observed.tolist() == [0, 1, 0]
    assert found.suggested.tolist() == [2, 0, 1]
    np.testing.assert_allclose(found.confidence, [0.6, 0.4, 0.2], rtol=1e-6)
    np.testing.assert_allclose(found.margin, [0.5, 0.05, -0.5], rtol=1e-6)
    lines = suspects.as_csv(found, ("a,b", "=c", "d")).splitlines()
    assert lines[0] == "row,observed,suggested,confidence,margin"
    assert lines[1] == '1,"a,b",d,0.600000,0.500000'
    assert lines[2].startswith("2,'=c,")


def test_precision_counts_the_wrong_labels_at_the_top():
    order = np.array([0.9, 0.8, 0.1, 0.7])
    assert suspects.precision_at(order, np.array([1, 0, 1, 1], bool), 3) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"methods": ("adam",)}, ["--methods: 'adam'", "Choose from sgd"]),
        ({"methods": ()}, ["--methods: ()", "at least one"]),
        ({"radii": (0.1, 0.1)}, ["--radii", "once"]),
        ({"radii": (-1.0,)}, ["--radii: -1.0", "at least 0"]),
        ({"decays": (np.inf,)}, ["--decays: inf"]),
        ({"learning_rates": (0.0,)}, ["--learning-rates: 0.0", "positive"]),
        ({"epochs": 0}, ["--epochs: 0"]),
        ({"validation_share": 1.0}, ["--validation-share: 1.0"]),
        ({"canary_share": 0.7}, ["--canary-share: 0.7"]),
        ({"seed": -1}, ["--seed: -1"]),
        ({"soft": True, "methods": ("ncsam",)}, ["ncsam", "--soft"]),
        ({"losses": ("mae",)}, ["--losses: 'mae'", "Choose from cross_entropy, gce"]),
        ({"losses": ("gce", "gce")}, ["--losses", "once"]),
        ({"losses": ("sce",), "methods": ("sgd", "ncsam")}, ["--losses", "ncsam"]),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, words):
    with pytest.raises(ValueError) as caught:
        Config(**settings)
    for word in words:
        assert word in str(caught.value)


def test_settings_that_the_data_does_not_allow_are_refused():
    with pytest.raises(ValueError, match="--soft: True"):
        Config(soft=True).fitted_to(features())
    with pytest.raises(ValueError, match=r"Of 20 rows it leaves too few for 3 classes"):
        Config().fitted_to(features(rows=20))
    config = Config().fitted_to(features())
    assert (config.epochs, config.batch_size, config.hidden) == (60, 64, 256)
