"Slices equal counting by hand and raise no false alarms; corruptions are what they say, and robustness is measured in front of the preprocessing."
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import false_discovery_control
from skimage import data as photographs

from imgcls_nb.compare import paired_interval
from imgcls_nb.data import digits, from_arrays, textures
from imgcls_nb.evaluate import Report, report_html, wilson_interval
from imgcls_nb.image import Preprocessing
from imgcls_nb.run import InputError
from imgcls_nb.slices import (CORRUPTIONS, STRENGTHS, Robustness, adjusted_p_values, compare_robustness, corrupt, cut_column,
                              difference_interval, find_slices, measure_slices, plot_robustness, plot_slices, plot_strengths,
                              robustness, sharpness, slice_facts, slice_sections)


@pytest.fixture(scope='module')
def tested():
    "A report on digits from two hospitals; in one of them every third answer is wrong."
    data = digits().split()
    hospital = np.random.default_rng(0).choice(['north', 'south', 'east'], len(data))
    data.items['hospital'], data.items['dose'] = hospital, np.random.default_rng(1).normal(size=len(data))
    rows = data.where('test')
    targets = data.targets(rows)
    wrong = (hospital[rows] == 'south') & (np.arange(len(rows)) % 3 == 0)
    answers = np.where(wrong, (targets + 1) % 10, targets)
    return Report(data, rows, targets, (np.eye(10)[answers] * 0.9 + 0.01).astype(np.float32))


def test_figures_equal_a_groupby(tested):
    found, right = find_slices(tested, 'hospital'), tested.answers == tested.targets
    by_hand = pd.Series(right).groupby(tested.data.items['hospital'].to_numpy()[tested.rows]).agg(['sum', 'count', 'mean'])
    for row in found.table.itertuples():
        hand = by_hand.loc[row.slice]
        assert row.images == hand['count'] and np.isclose(row.accuracy, hand['mean'])
        interval = wilson_interval(int(hand['sum']), int(hand['count']))
        assert np.isclose([row.accuracy, found.table['from'][row.Index]], [interval.value, interval.low]).all()
        rest = (right.sum() - hand['sum']) / (len(right) - hand['count'])
        assert np.isclose(row.difference, hand['mean'] - rest)
    assert found.members.sum() == len(right) and not found.members.all(axis=0).any()


def test_a_planted_slice_is_found_first(tested):
    found = find_slices(tested)
    assert (found.table['fact'][0], found.table['slice'][0]) == ('hospital', 'south')
    assert found.table['same classes'][0] == 1  # the classes are not harder: all others are right
    assert set(found.findings().query('difference < 0')['fact']) == {'hospital'}
    assert found.findings()['difference'].is_monotonic_increasing
    assert {'class', 'brightness', 'sharpness', 'contrast', 'hospital', 'dose'} <= set(found.table['fact'])


def test_classes_explain_a_slice_that_is_full_of_a_hard_one():
    classes = np.repeat(['easy', 'hard'], 500)
    right = np.where(classes == 'easy', np.arange(1000) % 50 > 0, np.arange(1000) % 4 > 0)
    night = np.where((np.arange(1000) % 5 == 0) ^ (classes == 'hard'), 'night', 'day')
    row = measure_slices(right, {'time': night}, classes).table.query('slice == "night"').iloc[0]
    assert row['adjusted'] < 0.001 and abs(row['same classes'] - row['accuracy']) < 0.03


def test_no_false_alarms():
    "On random slices, a finding in fewer than 5% of the searches, with either correction."
    rng, alarms = np.random.default_rng(0), {'holm': 0, 'benjamini_hochberg': 0}
    for _ in range(200):
        right = rng.random(300) < 0.93
        columns = {f'coin {i}': rng.integers(0, 3, 300) for i in range(4)} | {f'number {i}': rng.normal(size=300) for i in range(4)}
        for correction in alarms: alarms[correction] += len(measure_slices(right, columns, correction=correction).findings()) > 0
    assert max(alarms.values()) < 0.05 * 200, alarms


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40))
def test_corrections(p_values):
    p = np.array(p_values)
    holm, generous = adjusted_p_values(p), adjusted_p_values(p, 'benjamini_hochberg')
    assert (holm >= p).all() and (holm <= 1).all() and (holm + 1e-12 >= generous).all()
    assert np.allclose(generous, false_discovery_control(p))
    assert (np.diff(holm[np.argsort(p, kind='stable')]) >= -1e-12).all()


@given(st.integers(0, 60), st.integers(1, 60), st.integers(0, 60), st.integers(1, 60))
def test_the_interval_turns_with_the_order(right, count, right_rest, count_rest):
    right, right_rest = min(right, count), min(right_rest, count_rest)
    one, other = difference_interval(right, count, right_rest, count_rest), difference_interval(right_rest, count_rest, right, count)
    assert np.isclose(one.low, -other.high) and one.low <= one.value <= one.high and -1 - 1e-9 <= one.low and one.high <= 1 + 1e-9


def test_newcombes_own_example():
    "56 of 70 against 48 of 80: method 10 of Newcombe (1998) gives 0.0524 to 0.3339."
    found = difference_interval(56, 70, 48, 80)
    assert np.allclose([found.value, found.low, found.high], [0.2, 0.0524, 0.3339], atol=5e-5)


def test_cutting():
    numbers = np.r_[np.arange(100.0), [np.nan] * 20, np.inf, -np.inf]
    cut = cut_column(numbers)
    assert (cut[100:120] == 'no value').all() and set(cut[120:]) == {'no value'}
    assert sorted(pd.Series(cut).value_counts()) == [22, 25, 25, 25, 25]
    assert set(cut_column(['a'] * 10 + ['b'] * 9 + [''] * 10)) == {'a', 'others', 'no value'}
    assert set(cut_column([f'name {i % 40}' for i in range(4000)])) >= {'others'} and len(set(cut_column([f'name {i % 40}' for i in range(4000)]))) == 21
    assert set(cut_column([True, False] * 20)) == {'True', 'False'}


def test_two_halves_are_one_test():
    right = np.arange(200) % 10 > 0
    halves = np.where(np.arange(200) < 100, 'a', 'b')
    once, twice = measure_slices(right, {'x': halves}), measure_slices(right, {'x': halves, 'y': halves, 'z': halves == 'a'})
    assert np.allclose(once.table['adjusted'], once.table['p']) and np.allclose(twice.table['adjusted'], once.table['p'][0])


def test_sharpness_falls_with_blur():
    cat = Image.fromarray(photographs.chelsea())
    sharp = [sharpness(corrupt(cat, 'defocus_blur', s)) for s in (0, *STRENGTHS)]
    assert (np.diff(sharp) < 0).all() and sharpness(Image.new('L', (9, 9), 7)) == 0


def test_hostile_slices(tested):
    count = len(tested.rows)
    for by, words in [('nowhere', "no column 'nowhere'"), ({'x': [np.nan] * count}, "'x'"), ({'x': [1] * count}, "'x'"),
                      ({'x': range(count - 1)}, f'{count - 1} values for {count} images'), ({}, 'Nothing to slice by'),
                      ({'x': [f'unique {i}' for i in range(count)]}, "'x'")]:
        with pytest.raises(InputError, match=words): find_slices(tested, by)
    with pytest.raises(InputError, match='makes no slices'): find_slices(tested, {'good': [0, 1] * (count // 2) + [0] * (count % 2), 'x': [np.nan] * count})
    with pytest.raises(InputError, match='no images'): measure_slices([], {'x': []})
    with pytest.raises(InputError, match='Unknown correction'): find_slices(tested, 'hospital', correction='bonferroni?')
    with pytest.raises(InputError, match='not scanned'): slice_facts(digits(), [0])


def test_one_class_alone():
    right = np.arange(100) % 7 > 0
    with pytest.raises(InputError, match='Nothing to slice by'): measure_slices(right, {'class': ['cat'] * 100})
    found = measure_slices(right, {'half': np.arange(100) < 50}, ['cat'] * 100)
    assert len(found.table) == 2 and np.isfinite(found.table['same classes']).all()


PICTURES = dict(grey=Image.fromarray(textures().arrays[100]), colour=Image.fromarray(photographs.chelsea()).resize((96, 80)),
                tiny=Image.fromarray(digits().arrays[0]), wide=Image.fromarray(photographs.astronaut()).resize((500, 375)),
                one=Image.new('RGB', (1, 1), (200, 100, 50)), strip=Image.new('L', (300, 2), 99))
TEXTURES = [Image.fromarray(pixels) for pixels in textures().arrays[::140]]


@pytest.mark.parametrize('kind', CORRUPTIONS)
@pytest.mark.parametrize('name', PICTURES)
def test_a_corruption_keeps_kind_size_and_seed(kind, name):
    picture = PICTURES[name]
    pixels = np.array(picture)
    for strength in (1, 5):
        spoiled = corrupt(picture, kind, strength, (3, 4))
        assert (spoiled.size, spoiled.mode) == (picture.size, picture.mode)
        array = corrupt(pixels, kind, strength, (3, 4))
        assert array.dtype == np.uint8 and np.array_equal(array, np.asarray(spoiled))
    assert np.array_equal(np.asarray(picture), pixels) and corrupt(picture, kind, 0) == picture


@pytest.mark.parametrize('kind', CORRUPTIONS)
def test_stronger_is_farther(kind):
    def distance(pictures, s):
        return np.mean([np.abs(np.asarray(corrupt(p, kind, s, i), float) - np.asarray(p)).mean() for i, p in enumerate(pictures)])
    least = -0.5 if kind == 'rotation' else 0  # a picture turned by 24° is about as far away as one turned by 30°
    for pictures in ([PICTURES['colour']], TEXTURES):
        assert (np.diff([distance(pictures, s) for s in (0, *STRENGTHS)]) > least).all()
    assert (np.diff([distance([Image.fromarray(x) for x in digits().arrays[:60]], s) for s in (0, *STRENGTHS)]) >= 0).all()


def test_hostile_corruptions():
    grey = PICTURES['grey']
    for arguments, words in [((grey, 'rain', 1), 'Unknown corruption'), ((grey, 'haze', 6), 'strength of 6'),
                             ((grey, 'haze', 1.5), 'strength of 1.5'), ((grey.convert('RGBA'), 'haze', 1), 'mode RGBA'),
                             ((np.zeros((4, 4), float), 'haze', 1), 'float64'), ((np.zeros((4, 4, 2), np.uint8), 'haze', 1), r'\[4, 4, 2\]')]:
        with pytest.raises(InputError, match=words): corrupt(*arguments)


def bright_or_dark():
    "Twelve pictures of 40 × 30 pixels, and a function that calls those brighter than the middle `light`."
    images = np.stack([np.full((30, 40), 40 + 15 * i, np.uint8) for i in range(12)])
    data = from_arrays(images, ['dark' if i < 6 else 'light' for i in range(12)], ['test'] * 12)
    seen = []
    def predict(pixels):
        seen.append(pixels.shape)
        light = pixels.mean(axis=(1, 2, 3)) > 122
        return np.stack([~light, light], 1).astype(np.float32)
    return data, predict, seen


def test_robustness_of_any_function():
    data, predict, seen = bright_or_dark()
    p, done = Preprocessing(16, 16, 1), []
    found = robustness(predict, data, np.arange(12), p, ['brightness', 'rotation'], [1, 5], progress=lambda *state: done.append(state))
    assert all(shape[1:] == (16, 16, 1) for shape in seen) and done[-1] == (12, 12)
    assert found.clean.all() and found.grid().loc['rotation'].tolist() == [1, 1, 1]
    by_hand = [np.mean([(min(255, 40 + 15 * i + round(25.5 * s)) > 122) == (i >= 6) for i in range(12)]) for s in (1, 5)]
    assert np.allclose(found.grid().loc['brightness', [1, 5]], by_hand) and found.right.shape == (2, 2, 12)
    table = found.table()
    assert len(table) == 5 and (table['from'] <= table['accuracy']).all() and (table['accuracy'] <= table['to']).all()
    assert found.mean().low <= found.mean().value == found.right.mean() <= found.mean().high


def test_robustness_is_the_same_again_and_for_a_part():
    "What happens to a picture depends on its row, not on which others are measured."
    data = digits().split()
    rows, p = data.where('test')[:40], Preprocessing(8, 8, 1)
    def predict(pixels): return pixels.reshape(len(pixels), -1)[:, 20:30].astype(float)
    whole, part = [robustness(predict, data, r, p, ['gaussian_noise', 'haze'], [3]) for r in (rows, rows[10:20])]
    assert np.array_equal(whole.right[..., 10:20], part.right)


def test_hostile_robustness():
    data, predict, _ = bright_or_dark()
    p = Preprocessing(8, 8, 1)
    for rows, kinds, strengths, words in [([], ['haze'], [1], 'nothing to measure'), ([0], [], [1], 'nothing to measure'),
                                          ([0], ['rain'], [1], 'Unknown corruption'), ([0], ['haze'], [9], 'strength of 9')]:
        with pytest.raises(InputError, match=words): robustness(predict, data, rows, p, kinds, strengths)
    one, other = [robustness(predict, data, range(12), p, ['haze'], s) for s in ([1], [2])]
    with pytest.raises(InputError, match='can be compared'): compare_robustness(one, other)


def test_a_comparison_is_paired():
    rng = np.random.default_rng(0)
    right = rng.random((2, 3, 200)) < 0.7
    better = right.copy()
    better[0] |= rng.random((3, 200)) < 0.3
    first, second = [Robustness(('haze', 'jpeg'), (1, 2, 3), np.ones(200, bool), r) for r in (right, better)]
    gains = compare_robustness(first, second)
    assert gains.loc['haze', 'from'] > 0 and (gains.loc[['jpeg', 'none'], 'difference'] == 0).all()
    same = paired_interval(0, 0, 200)  # shares of 0 and 1: the interval of chapter 07a
    assert np.allclose(gains.loc['none', ['from', 'to']].astype(float), [same.low, same.high], atol=1e-4)
    assert np.isclose(gains.loc['all kinds', 'difference'], better.mean() - right.mean())


def test_sections_go_into_the_report(tested):
    rng = np.random.default_rng(0)
    measured = Robustness(('haze', 'jpeg'), (1, 5), np.ones(50, bool), rng.random((2, 2, 50)) < 0.5)
    sections = slice_sections(tested, measured)
    page = report_html(tested, extra=sections)
    assert all(heading in page for heading, _ in sections) and 'alt="Accuracy by slice. hospital: south' in page
    assert all(len(html) < 1_000_000 for _, html in sections)
    for figure in (plot_slices(find_slices(tested)), plot_robustness(measured), plot_strengths({'one': measured, 'two': measured})):
        assert figure.get_axes()
    assert plot_slices(find_slices(tested)).get_axes()[0].get_xlabel() == 'accuracy, % (95% interval)'
    assert plot_slices(find_slices(tested), label='sensitivity').get_axes()[0].get_xlabel() == 'sensitivity, % (95% interval)'
    few = Report(tested.data, tested.rows[:6], tested.targets[:6], tested.probabilities[:6])
    assert slice_sections(few) == []


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from(sorted(CORRUPTIONS)), st.integers(1, 5), st.booleans())
def test_any_size(width, height, kind, strength, grey):
    pixels = np.random.default_rng(width).integers(0, 256, (height, width) if grey else (height, width, 3), np.uint8)
    assert corrupt(pixels, kind, strength).shape == pixels.shape


@pytest.mark.slow
def test_robustness_of_an_exported_model(digits_run):
    "A bundle's predictor is measured as a learner is; at strength 0 it is what the run has reported."
    from imgcls_nb.bundle import load_bundle
    predictor, data = load_bundle(digits_run['bundle']).predictor(), digits().split()
    found = robustness(predictor.probabilities, data, data.where('test'), predictor.preprocessing, ['rotation', 'haze'], [1, 5])
    assert found.clean.mean() == digits_run['accuracy']
    grid = found.grid()
    assert grid.loc['haze', 5] < 0.5 < 0.9 < grid.loc['rotation', 1]
