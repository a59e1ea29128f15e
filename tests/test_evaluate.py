"Every figure equals scikit-learn's, and intervals hold what they promise."
import warnings

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings, strategies as st
from scipy.stats import norm, t
from sklearn import metrics as sk
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_auroc, multiclass_matthews_corrcoef

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
        assert ev.precision_macro(matrix) == pytest.approx(
            sk.precision_score(targets, predictions, labels=seen, average='macro', zero_division=0))
        assert ev.matthews(matrix) == pytest.approx(sk.matthews_corrcoef(targets, predictions), abs=1e-12)
        precision, recall, f1, support = sk.precision_recall_fscore_support(
            targets, predictions, labels=range(classes), zero_division=np.nan)
    table = ev.per_class(targets, probabilities, tuple(map(str, range(classes))))
    for name, expected in [('images', support), ('precision', precision), ('recall', recall)]:
        np.testing.assert_allclose(table[name], expected, err_msg=name)
    both = (matrix.sum(0) + matrix.sum(1)) > 0
    np.testing.assert_allclose(table['f1'][both], np.nan_to_num(f1)[both])
    for name in ('precision', 'recall', 'f1'):
        some = table[table[name].notna()]
        assert (some[f'{name} from'] <= some[name]).all() and (some[name] <= some[f'{name} to']).all()
    assert ev.log_loss(targets, probabilities) == pytest.approx(
        sk.log_loss(targets, probabilities.astype(float), labels=range(classes)), rel=1e-4)


def with_ties(probabilities: np.ndarray) -> np.ndarray:
    "The same, rounded to quarters, so that many are equal."
    rounded = np.round(4 * probabilities) + 0.25
    return rounded / rounded.sum(1, keepdims=True)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), count=st.integers(4, 80), classes=st.integers(2, 6), absent=st.integers(0, 3), ties=st.booleans())
def test_scores_equal_scikit_learn_and_torchmetrics(seed, count, classes, absent, ties):
    "AUROC, average precision and top-k, with ties and with classes that do not occur."
    targets, probabilities = answers(seed, count, classes, max(1, classes - absent))
    if ties: probabilities = with_ties(probabilities)
    precise, areas = ev.average_precision_each(targets, probabilities), ev.auroc_each(targets, probabilities)
    for k in range(classes):
        truth = targets == k
        if not truth.any(): assert np.isnan(precise[k]) and np.isnan(areas[k])
        elif truth.all(): assert np.isnan(areas[k]) and precise[k] == pytest.approx(1)
        else:
            assert areas[k] == pytest.approx(sk.roc_auc_score(truth, probabilities[:, k]))
            assert precise[k] == pytest.approx(sk.average_precision_score(truth, probabilities[:, k]))
    for k in range(1, classes):
        expected = np.mean([t in sorted(range(classes), key=lambda c: (row[c], c))[-k:] for t, row in zip(targets, probabilities)])
        assert ev.in_top(targets, probabilities, k).mean() == expected
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # torchmetrics warns about absent classes
        torched = multiclass_auroc(torch.tensor(probabilities), torch.tensor(targets), classes, average='none').numpy()
    known = ~np.isnan(areas)
    np.testing.assert_allclose(areas[known], torched[known], atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), count=st.integers(5, 60), classes=st.integers(2, 5))
def test_matthews_and_top_k_equal_torchmetrics(seed, count, classes):
    targets, probabilities = answers(seed, count, classes, classes)
    assume(len(set(targets)) > 1 and len(set(probabilities.argmax(1))) > 1)  # else 0, as in scikit-learn; torchmetrics differs
    matrix = ev.confusion_matrix(targets, probabilities.argmax(1), classes)
    expected = multiclass_matthews_corrcoef(torch.tensor(probabilities), torch.tensor(targets), classes)
    assert ev.matthews(matrix) == pytest.approx(float(expected), abs=1e-6)
    top = multiclass_accuracy(torch.tensor(probabilities), torch.tensor(targets), classes, average='micro', top_k=2)
    assert ev.in_top(targets, probabilities, 2).mean() == pytest.approx(float(top))


def test_auroc_intervals_are_those_of_the_pairs():
    "The standard error on log odds equals DeLong's, computed pair by pair."
    rng = np.random.default_rng(0)
    truth = rng.random(120) < 0.3
    score = np.round(rng.normal(truth.astype(float)), 1)
    won = (score[truth][:, None] > score[~truth]) + 0.5 * (score[truth][:, None] == score[~truth])
    parts = np.array([won.mean(1).var(ddof=1) / truth.sum(), won.mean(0).var(ddof=1) / (~truth).sum()])
    degrees = parts.sum()**2 / (parts**2 / np.array([truth.sum() - 1, (~truth).sum() - 1])).sum()
    error = t.ppf(0.975, degrees) * np.sqrt(parts.sum())
    found = ev.auroc_interval(truth.astype(int), np.stack([-score, score], 1))
    odds = np.log(won.mean() / (1 - won.mean())) + np.array([-1, 1]) * error / won.mean() / (1 - won.mean())
    assert found.value == pytest.approx(won.mean())
    assert [found.low, found.high] == pytest.approx(list(1 / (1 + np.exp(-odds))))


def made_up(classes: int, accuracy: float, imbalance: float) -> np.ndarray:
    "The true share of every pair of class and answer."
    sizes = np.geomspace(1, 1 / imbalance, classes)
    table = np.full((classes, classes), accuracy)
    table[~np.eye(classes, dtype=bool)] = (1 - accuracy) * np.random.default_rng(5).dirichlet(np.full(classes - 1, 0.5), classes).ravel()
    return table * (sizes / sizes.sum())[:, None]


@pytest.mark.parametrize('classes, accuracy, imbalance, images', [
    (2, 0.98, 1, 27), (2, 0.9, 1, 27), (2, 0.95, 5, 50), (3, 0.98, 1, 60), (5, 0.97, 20, 300), (10, 0.995, 1, 270),
    (10, 0.9, 5, 100)])
def test_intervals_of_matrix_figures_hold_their_promise(classes, accuracy, imbalance, images):
    "Balanced accuracy, precision, F1 and MCC over 1,000 simulated test sets, small ones and high accuracies among them."
    table, rng = made_up(classes, accuracy, imbalance), np.random.default_rng(0)
    truth = [figure(table) for figure in (ev.balanced_accuracy, ev.precision_macro, ev.f1_macro, ev.matthews)]
    drawn = [np.divmod(rng.choice(classes**2, images, p=table.ravel()), classes) for _ in range(1000)]
    found = [ev.matrix_intervals(*pairs, classes, repeats=200).values() for pairs in drawn]
    held = np.mean([[e.low <= true <= e.high for e, true in zip(row, truth)] for row in found], axis=0)
    assert (held >= 0.915).all() and (held <= 0.985).all(), held


@pytest.mark.parametrize('images', [27, 60, 270])
def test_accuracies_near_one_are_held_on_average(images):
    "For one accuracy Wilson's coverage jumps about, counts being whole numbers; over accuracies it is what it says."
    rng = np.random.default_rng(0)
    truths = rng.uniform(0.9, 1, 1000)
    found = [ev.wilson_interval(int(rng.binomial(images, truth)), images) for truth in truths]
    assert 0.92 <= np.mean([e.low <= truth <= e.high for e, truth in zip(found, truths)]) <= 0.98


@pytest.mark.parametrize('images, gap, rare', [(27, 1.5, 0.5), (27, 3.0, 0.5), (270, 3.0, 0.5), (1000, 2.0, 0.05)])
def test_auroc_intervals_hold_their_promise(images, gap, rare):
    rng, held = np.random.default_rng(0), []
    for _ in range(1000):
        truth = rng.random(images) < rare
        if not 0 < truth.sum() < images: continue
        score = rng.normal(gap * truth)
        found = ev.auroc_interval(truth.astype(int), np.stack([-score, score], 1))
        held.append(found.low <= norm.cdf(gap / np.sqrt(2)) <= found.high)
    assert 0.91 <= np.mean(held) <= 0.99  # 92 to 98%, give or take the luck of a thousand draws


def test_log_loss_intervals_hold_their_promise():
    rng, held = np.random.default_rng(0), []
    values = -np.log(rng.dirichlet([8, 1, 0.5], 1_000_000)[:, 0].clip(1e-7))
    for _ in range(300):
        found = ev.mean_interval(rng.choice(values, 100), repeats=300)
        held.append(found.low <= values.mean() <= found.high)
    assert 0.92 <= np.mean(held) <= 0.98


@pytest.mark.parametrize('figure', ['accuracy', 'f1_macro', 'auroc_macro', 'log_loss'])
def test_groups_are_one_witness_each(figure):
    "Ten copies of every image leave the intervals as they are, if they are named as groups."
    targets, probabilities = answers(3, 200, 3, 3)
    probabilities[np.arange(200), targets] += 1
    probabilities /= probabilities.sum(1, keepdims=True)
    once = ev.measure(targets, probabilities)[figure]
    copied = np.repeat(targets, 10), np.repeat(probabilities, 10, axis=0)
    grouped = ev.measure(*copied, np.repeat(np.arange(200), 10))[figure]
    believed = ev.measure(*copied)[figure]
    def width(e): return e.high - e.low
    assert grouped.value == pytest.approx(once.value, abs=1e-6)
    assert width(grouped) == pytest.approx(width(once), rel=0.2) and width(believed) < 0.45 * width(once)


def test_thresholds_meet_what_they_were_chosen_for():
    rng = np.random.default_rng(0)
    for _ in range(50):
        positive = rng.random(60) < 0.3
        positive[:2] = True, False
        scores = np.round(rng.normal(positive.astype(float)), 1)  # with ties
        at = ev.threshold_for_sensitivity(positive, scores, 0.9)
        assert (scores[positive] >= at).mean() >= 0.9
        higher = scores[scores > at]
        assert not len(higher) or (scores[positive] >= higher.min()).mean() < 0.9
        bills = {cut: 5 * (positive & (scores < cut)).sum() + (~positive & (scores >= cut)).sum() for cut in [*scores, np.inf]}
        assert bills[ev.threshold_for_cost(positive, scores, miss=5)] == min(bills.values())


@pytest.mark.parametrize('positive, scores, words', [
    ([True, True], [0.1, 0.2], 'and others'), ([False, False], [0.1, 0.2], 'and others'),
    ([True, False], [0.1, np.nan], 'not numbers'), ([True, False], [0.1], 'scores')])
def test_no_threshold_from_nothing(positive, scores, words):
    with pytest.raises(InputError, match=words):
        ev.threshold_for_sensitivity(np.array(positive), np.array(scores))


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
    targets, probabilities = answers(2, 10, 3, 3)
    with pytest.raises(InputError, match='softmax'): ev.measure(targets, np.log(probabilities))
    with pytest.raises(InputError, match='counted from 0'): ev.measure(targets + 1, probabilities[:, :3])


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
