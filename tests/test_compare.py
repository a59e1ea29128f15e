"Two classifiers on the same images: the figures agree with others' formulas, runs are matched by content, and parts do not leak."
import json
import shutil

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from conftest import imgcls
from imgcls_nb.compare import compare_predictions, compare_runs, fold_splits, images_needed, paired_interval
from imgcls_nb.data import digits, from_arrays
from imgcls_nb.run import InputError, create_run


def answers(rng, count, classes, skill):
    "Targets, and probabilities of two classifiers that are right with the given chances."
    targets = rng.integers(0, classes, count)
    probabilities = []
    for chance in skill:
        p = rng.dirichlet(np.ones(classes), count)
        right = rng.random(count) < chance
        best = p.argmax(1)
        rows = np.flatnonzero(right)
        p[rows, best[rows]], p[rows, targets[rows]] = p[rows, targets[rows]], p[rows, best[rows]]
        probabilities.append(p)
    return targets, *probabilities


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 80), st.integers(2, 6))
def test_counts_and_p_value(seed, count, classes):
    targets, first, second = answers(np.random.default_rng(seed), count, classes, (0.7, 0.8))
    found = compare_predictions(targets, first, second, repeats=20)
    right = [p.argmax(1) == targets for p in (first, second)]
    assert found.images == count and found.only_second - found.only_first == right[1].sum() - right[0].sum()
    assert np.isclose(found.accuracy.value, right[1].mean() - right[0].mean())
    assert found.accuracy.low <= found.accuracy.value <= found.accuracy.high
    disagree = found.only_first + found.only_second
    assert found.p_value == (binomtest(found.only_first, disagree).pvalue if disagree else 1.0)
    losses = [-np.log(np.clip(p[np.arange(count), targets], 1e-15, 1)).mean() for p in (first, second)]
    assert np.isclose(found.log_loss.value, losses[1] - losses[0])


@given(st.integers(0, 50), st.integers(0, 50), st.integers(0, 500))
def test_the_interval_turns_with_the_order(first, second, agree):
    count = first + second + agree
    if not count: return
    one, other = paired_interval(first, second, count), paired_interval(second, first, count)
    assert np.isclose(one.low, -other.high) and np.isclose(one.value, -other.value)
    assert -1 <= one.low <= one.value <= one.high <= 1 and one.low < one.high


def test_groups_of_one_are_no_groups():
    targets, first, second = answers(np.random.default_rng(0), 400, 5, (0.8, 0.85))
    formula = compare_predictions(targets, first, second, repeats=2).accuracy
    resampled = compare_predictions(targets, first, second, np.arange(400), repeats=2000).accuracy
    assert np.isclose(formula.value, resampled.value) and abs(formula.low - resampled.low) < 0.01 and abs(formula.high - resampled.high) < 0.01


def test_the_same_classifier_twice():
    targets, first, _ = answers(np.random.default_rng(0), 100, 3, (0.8, 0.8))
    found = compare_predictions(targets, first, first, repeats=50)
    assert found.verdict == 'No difference seen' and found.p_value == 1 and found.accuracy.low < 0 < found.accuracy.high


@pytest.mark.parametrize('difference, disagree', [(0, 0.1), (0.2, 0.1), (0.1, 1.5)])
def test_impossible_questions(difference, disagree):
    with pytest.raises(InputError, match='cannot be'): images_needed(difference, disagree)


def test_parts_keep_groups_and_copies_together():
    data = digits().scan()
    data.items['group'] = [f'writer {i // 3}' for i in range(len(data))]
    seen = []
    for part in fold_splits(data):
        split_of = part.items.groupby('group')['split'].nunique()
        assert split_of.max() == 1 and set(part.items['split']) == {'train', 'valid', 'test'}
        seen += list(part.where('test'))
    assert sorted(seen) == list(range(len(data)))


def test_too_few_for_the_parts():
    few = from_arrays(np.random.default_rng(0).integers(0, 255, (12, 8, 8), dtype=np.uint8), list('aaaaaaaaaabb'), name='few')
    with pytest.raises(InputError, match="'b' has 2 distinct"): fold_splits(few.scan())


def made_run(folder, digests, labels, probabilities, classes, group=None):
    "A run's folder with the two files that a comparison reads."
    run = create_run('run', folder)
    items = pd.DataFrame(dict(image=range(len(digests)), label=labels, split='test', digest=digests))
    if group is not None: items['group'] = group
    items.to_csv(run.items, index=False)
    np.savez(run.predictions, rows=np.arange(len(digests)), targets=[classes.index(label) for label in labels],
             probabilities=np.asarray(probabilities, np.float32), classes=np.array(classes))
    return run.folder


def test_runs_are_matched_by_content_and_classes_by_name(tmp_path):
    first = made_run(tmp_path/'1', ['p', 'q', 'q', 'r'], ['a', 'b', 'b', 'a'], [[.9, .1], [.2, .8], [.6, .4], [.9, .1]], ['a', 'b'])
    second = made_run(tmp_path/'2', ['q', 's', 'p', 'q'], ['b', 'a', 'a', 'b'], [[.7, .3], [.1, .9], [.8, .2], [.9, .1]], ['b', 'a'])
    found = compare_runs(first, second)
    assert found.images == 3  # p and the two q; r and s were tested in one alone
    assert (found.both_right, found.only_first, found.only_second, found.both_wrong) == (1, 1, 1, 0)


def test_runs_that_cannot_be_compared(tmp_path):
    two = [[.9, .1]] * 2
    first = made_run(tmp_path/'1', ['p', 'q'], ['a', 'b'], two, ['a', 'b'])
    other_classes = made_run(tmp_path/'2', ['p', 'q'], ['a', 'c'], two, ['a', 'c'])
    other_images = made_run(tmp_path/'3', ['x', 'y'], ['a', 'b'], two, ['a', 'b'])
    other_labels = made_run(tmp_path/'4', ['p', 'q'], ['b', 'b'], two, ['a', 'b'])
    unfinished = create_run('run', tmp_path/'5').folder
    damaged = made_run(tmp_path/'6', ['p', 'q'], ['a', 'b'], two, ['a', 'b'])
    (damaged/'predictions.npz').write_bytes(b'not an archive')
    for second, sentence in [(other_classes, 'same classes'), (other_images, 'no test image in common'), (other_labels, 'labels of 1 '),
                             (unfinished, 'no predictions yet'), (damaged, 'cannot be read'), (tmp_path, 'is not a run')]:
        with pytest.raises(InputError, match=sentence): compare_runs(first, second)


def test_the_command(digits_run, tmp_path):
    "A real run against a copy of it whose classifier has forgotten ten answers."
    worse = tmp_path/'worse run'
    shutil.copytree(digits_run['run'], worse)
    with np.load(worse/'predictions.npz') as kept: parts = dict(kept)
    parts['probabilities'][:10] = np.roll(parts['probabilities'][:10], 1, axis=1)
    np.savez(worse/'predictions.npz', **parts)
    result = imgcls('compare', worse, digits_run['run'], '--json', cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found['only_second'] >= 9 and found['accuracy']['low'] > 0 and found['verdict'].startswith('The second is better')
    shown = imgcls('compare', digits_run['run'], digits_run['run'], cwd=tmp_path)
    assert shown.returncode == 0 and 'No difference seen.' in shown.stdout
    wrong = imgcls('compare', digits_run['run'], tmp_path/'nothing', cwd=tmp_path)
    assert wrong.returncode != 0 and 'is not a run' in wrong.stderr and 'Traceback' not in wrong.stderr
