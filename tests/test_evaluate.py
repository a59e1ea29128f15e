"Every figure equals scikit-learn's, and intervals hold what they promise."
import warnings

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from sklearn import metrics as sk

from imgcls_nb import evaluate as ev
from imgcls_nb.run import InputError


def answers(seed: int, count: int, classes: int, present: int):
    "Random targets (some classes may not occur) and probabilities."
    rng = np.random.default_rng(seed)
    probabilities = rng.dirichlet(np.ones(classes), count)
    return rng.integers(0, present, count), probabilities.astype(np.float32)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), count=st.integers(2, 80), classes=st.integers(2, 6), absent=st.integers(0, 3))
def test_metrics_equal_scikit_learn(seed, count, classes, absent):
    targets, probabilities = answers(seed, count, classes, max(1, classes - absent))
    predictions = probabilities.argmax(1)
    matrix = ev.confusion_matrix(targets, predictions, classes)
    assert (matrix == sk.confusion_matrix(targets, predictions, labels=range(classes))).all()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        assert ev.balanced_accuracy(matrix) == pytest.approx(sk.balanced_accuracy_score(targets, predictions))
        seen = np.union1d(targets, predictions)
        assert ev.f1_macro(matrix) == pytest.approx(sk.f1_score(targets, predictions, labels=seen, average='macro'))
    assert ev.log_loss(targets, probabilities) == pytest.approx(
        sk.log_loss(targets, probabilities.astype(float), labels=range(classes)), rel=1e-4)


def test_auroc_equals_scikit_learn():
    targets, probabilities = answers(0, 200, 4, 4)
    probabilities = probabilities / probabilities.sum(1, keepdims=True)
    expected = sk.roc_auc_score(targets, probabilities, multi_class='ovr')
    assert ev.auroc_macro(targets, probabilities) == pytest.approx(expected)


def test_wilson_holds_its_promise():
    "Over simulated test sets the interval holds the true accuracy about as often as it says."
    rng = np.random.default_rng(0)
    for truth, count in [(0.98, 270), (0.9, 50), (0.5, 30)]:
        found = [ev.wilson_interval(int(k), count) for k in rng.binomial(count, truth, 2000)]
        coverage = np.mean([e.low <= truth <= e.high for e in found])
        assert 0.92 <= coverage <= 0.98, (truth, count, coverage)


@pytest.mark.parametrize('right', [0, 27])
def test_wilson_at_the_ends(right):
    estimate = ev.wilson_interval(right, 27)
    assert 0 <= estimate.low <= estimate.value <= estimate.high <= 1 and estimate.high - estimate.low > 0.05


@pytest.mark.parametrize('classes, present', [(2, 2), (2, 1), (5, 3), (100, 100)])
def test_a_measurement_of_anything_has_ordered_intervals(classes, present):
    targets, probabilities = answers(1, 150, classes, present)
    for name, estimate in ev.measure(targets, probabilities).items():
        if not np.isnan(estimate.value): assert estimate.low <= estimate.high, name


def test_what_cannot_be_measured_is_refused():
    targets, probabilities = answers(2, 10, 3, 3)
    probabilities[3, 1] = np.nan
    with pytest.raises(InputError, match='not numbers'): ev.measure(targets, probabilities)
    with pytest.raises(InputError, match='no images'): ev.measure(targets[:0], probabilities[:0])
    with pytest.raises(InputError): ev.measure(targets[:5], probabilities)


def test_odd_class_names_do_no_harm(tmp_path):
    "Names with HTML, mathematics and Chinese in them reach the report as text."
    from imgcls_nb.data import from_arrays
    names = ['<script>alert(1)</script>', 'price $x_1$', '砖 块']
    images = np.random.default_rng(0).integers(0, 256, (60, 8, 8), dtype=np.uint8)
    data = from_arrays(images, np.array(names)[np.arange(60) % 3]).split()
    rows = data.where('test')
    probabilities = np.random.default_rng(1).dirichlet(np.ones(3), len(rows)).astype(np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        page = ev.report_html(ev.Report(data, rows, data.targets(rows), probabilities))
    assert '<script>alert' not in page and '&lt;script&gt;' in page and '砖 块' in page
