"""The panels: their populations, and frequencies of sampled votes against the formulas."""

import numpy as np
import pytest

from musicrl_jax.arena.listeners import MEASUREMENTS, Panel, judging_panel, training_panel

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def measured():
    """Returns measurements of both clips of 200 pairs."""
    return RNG.normal(size=(2, 200, len(MEASUREMENTS)))


def test_judges_are_other_listeners_with_more_measurements():
    training, judging = training_panel(), judging_panel()
    alone = set(judging.weights) - set(training.weights)
    assert len(alone) >= 3 and set(training.weights) < set(judging.weights)
    ignored = training.listeners()[:, [MEASUREMENTS.index(name) for name in alone]]
    np.testing.assert_array_equal(ignored, 0)
    assert (judging.listeners() > 0).all()
    both = np.concatenate([training.listeners(), judging.listeners()])
    assert len(np.unique(both, axis=0)) == training.size + judging.size


def test_listeners_differ_and_are_the_same_each_time():
    panel = training_panel()
    np.testing.assert_array_equal(panel.listeners(), training_panel().listeners())
    np.testing.assert_allclose(panel.listeners().sum(axis=1), sum(panel.weights.values()))
    assert panel.listeners().std(axis=0)[MEASUREMENTS.index("consonance")] > 0.1


# --- choices ---


def test_a_choice_is_logistic_in_the_utilities():
    panel = training_panel(noise=2.0)
    for difference in (0.0, 1.0, -3.0):
        a, b = np.full(200_000, difference), np.zeros(200_000)
        choices = panel.choose(a, b, np.random.default_rng(1))
        edge = panel.indifference
        for_a, for_b = (1 / (1 + np.exp(edge - side * difference / 2)) for side in (1, -1))
        expected = {"a": for_a, "b": for_b, "abstain": 1 - for_a - for_b}
        for choice, share in expected.items():
            assert (choices == choice).mean() == pytest.approx(share, abs=0.005)


@pytest.mark.parametrize(
    "panel", [training_panel(), judging_panel(), training_panel(noise=4.0)], ids=str
)
def test_agreement_is_that_of_sampled_votes(panel, measured):
    a, b = (panel.utilities(each) for each in measured)
    rng = np.random.default_rng(2)
    same = both = 0
    for _ in range(40):
        one, other = rng.permuted(np.tile(np.arange(panel.size)[:, None], (1, 200)), axis=0)[:2]
        first, second = (
            panel.choose(a[who, range(200)], b[who, range(200)], rng) for who in (one, other)
        )
        decided = (first != "abstain") & (second != "abstain")
        same, both = same + (first == second)[decided].sum(), both + decided.sum()
    assert same / both == pytest.approx(panel.agreement(a, b), abs=0.02)
    assert 0.5 < panel.agreement(a, b) < 1


def test_more_noise_is_less_agreement(measured):
    utilities = [training_panel().utilities(each) for each in measured]
    agreements = [training_panel(noise=noise).agreement(*utilities) for noise in (0.1, 1.0, 10.0)]
    assert agreements[0] > 0.7 > agreements[2] > 0.5
    assert agreements == sorted(agreements, reverse=True)


# --- ratings ---


def test_ratings_go_from_one_to_five_and_real_clips_get_four():
    panel = judging_panel()
    rng = np.random.default_rng(3)
    ratings = [panel.rate(np.full(20_000, utility), rng) for utility in (-40.0, 0.0, 40.0)]
    assert (ratings[0] == 1).all() and (ratings[2] == 5).all()
    assert set(np.unique(ratings[1])) <= {1, 2, 3, 4, 5} and abs(ratings[1].mean() - 4) < 0.1


def test_raters_agree_about_as_often_as_voters(measured):
    """People do on 60 to 70 % of pairs; whole points with half of this noise would give 80 %."""
    panel = judging_panel()
    # Clips of one prompt differ less than clips of different prompts.
    a, b = (panel.utilities(0.6 * each) for each in measured)
    rng = np.random.default_rng(4)
    same = both = 0
    for _ in range(40):
        who = np.array([rng.choice(panel.size, 2, replace=False) for _ in range(a.shape[1])]).T
        first, second = (panel.rate(each[who, np.arange(200)], rng) for each in (a, b))
        one, other = np.sign(first - second)
        decided = (one != 0) & (other != 0)
        same, both = same + (one == other)[decided].sum(), both + decided.sum()
    assert abs(same / both - panel.agreement(a, b)) < 0.05


# --- limits of what can be predicted, and settings ---


@pytest.mark.parametrize("panel", [training_panel(), judging_panel()], ids=str)
def test_the_ceiling_is_that_of_a_guess_by_the_majority(panel, measured):
    """The majority of 20,000 sampled votes on a pair predicts these votes."""
    a, b = (panel.utilities(each)[:, :20] for each in measured)
    rng = np.random.default_rng(2)
    right = decided = 0
    for pair in range(20):
        who = rng.integers(panel.size, size=20_000)
        chosen = panel.choose(a[who, pair], b[who, pair], rng)
        counts = np.array([(chosen == side).sum() for side in "ab"])
        right, decided = right + counts.max(), decided + counts.sum()
    assert panel.ceiling(a, b) == pytest.approx(right / decided, abs=0.005)
    assert panel.agreement(a, b) < panel.ceiling(a, b)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"weights": {"composer": 1.0}}, r"Panel\.weights: 'composer' is none of"),
        ({"weights": {}}, "Panel odd: weights"),
        ({"weights": {"beat": -1.0}}, "Panel odd: weights"),
        ({"noise": 0.0}, r"Panel odd: noise = 0\.0 must be above 0"),
        ({"size": 1}, "Panel odd: noise"),
        ({"spread": -0.1}, "Panel odd: noise"),
    ],
)
def test_a_wrong_panel_is_refused(changes, complaint):
    with pytest.raises(ValueError, match=complaint):
        Panel(**{"name": "odd", "weights": {"beat": 1.0}, **changes})
