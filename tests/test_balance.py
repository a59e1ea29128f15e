"Imbalance and scale: each function keeps its promise, and every way to balance trains."
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from imgcls_nb.balance import (BALANCE, balance_loader, batch_statistics, channel_statistics, class_weights, draw_by_weight,
                               long_tail, normalized, oversample_rows, sample_weights, smote_features, smote_plan)
from imgcls_nb.data import from_arrays
from imgcls_nb.image import Preprocessing
from imgcls_nb.run import InputError
from imgcls_nb.sources import load_images

P = Preprocessing(8, 8, 1)
CPU = torch.device('cpu')
target_lists = st.lists(st.integers(0, 5), min_size=1, max_size=80).map(np.array)


def drawn(loader, epochs: int = 1) -> np.ndarray:
    "The class numbers of the images that a loader draws."
    labels = loader.dataset.labels.numpy()
    positions = []
    for _ in range(epochs):
        loader.randomize()
        positions += loader.get_idxs()
    return labels[positions]


@pytest.fixture(scope='module')
def small():
    "Digits in three classes of 60, 12 and 3 training images."
    whole = load_images('digits').split()
    kept, sizes = [], {'0': 60, '1': 12, '2': 3}
    for label, size in sizes.items():
        for split, most in (('train', size), ('valid', 8), ('test', 8)):
            kept += list(whole.items.index[(whole.items['label'] == label) & (whole.items['split'] == split)][:most])
    items = whole.items.loc[sorted(kept)]
    return from_arrays(whole.arrays[items['image']], items['label'], list(items['split']), name='small', kind='digits').scan()


@given(targets=target_lists, scheme=st.sampled_from(['inverse', 'effective']), beta=st.floats(0, 0.9999))
def test_class_weights_favour_the_rare_and_average_to_one(targets, scheme, beta):
    weights, counts = class_weights(targets, 6, scheme, beta), np.bincount(targets, minlength=6)
    assert np.isclose(weights[targets].mean(), 1) and (weights > 0).all() and (weights[counts == 0] == 1).all()
    present = np.flatnonzero(counts)
    order = present[np.argsort(counts[present])]
    assert (np.diff(weights[order]) <= 1e-9).all()


@given(targets=target_lists)
def test_inverse_frequency_gives_every_class_the_same_share_of_the_loss(targets):
    shares = np.bincount(targets, class_weights(targets, 6)[targets], minlength=6)
    assert np.ptp(shares[shares > 0]) < 1e-9


@given(targets=target_lists, seed=st.integers(0, 9))
def test_sample_weights_are_probabilities_with_equal_classes(targets, seed):
    own = np.random.default_rng(seed).uniform(0.1, 3, len(targets))
    for weights in (sample_weights(targets), sample_weights(targets, own)):
        totals = np.bincount(targets, weights)
        assert np.isclose(weights.sum(), 1) and np.ptp(totals[np.bincount(targets) > 0]) < 1e-9
    first = targets == targets[0]
    assert np.allclose(weights[first] / own[first], weights[0] / own[0])


@given(targets=target_lists, seed=st.integers(0, 9))
def test_oversampling_keeps_everything_and_levels_the_classes(targets, seed):
    rows = np.arange(100, 100 + len(targets))
    chosen = oversample_rows(rows, targets, seed)
    assert (chosen[:len(rows)] == rows).all() and set(chosen) == set(rows)
    counts = np.bincount(targets[chosen - 100])
    assert set(counts) <= {0, np.bincount(targets).max()}
    assert (oversample_rows(rows, targets, seed) == chosen).all()


@settings(max_examples=40, deadline=None)
@given(targets=target_lists, width=st.integers(1, 4), seed=st.integers(0, 9))
def test_smote_levels_the_classes_and_stays_between_their_points(targets, width, seed):
    features = np.random.default_rng(seed).normal(size=(len(targets), width)).astype(np.float32)
    more, labels = smote_features(features, targets, seed)
    assert more.dtype == features.dtype and (more[:len(features)] == features).all()
    assert (labels[:len(targets)] == targets).all()
    assert set(np.bincount(labels)) <= {0, np.bincount(targets).max()}
    for target in set(targets):
        own, new = features[targets == target], more[len(features):][labels[len(features):] == target]
        assert (new >= own.min(0) - 1e-5).all() and (new <= own.max(0) + 1e-5).all()
    again, _ = smote_features(features, targets, seed)
    assert (again == more).all()


def test_smote_with_too_few_images_uses_the_neighbours_there_are():
    targets = np.repeat([0, 1, 2, 4], [20, 6, 3, 1])
    plan = smote_plan(targets)
    assert plan.to_dict('list') == dict(images=[20, 6, 3, 1], neighbours=[5, 5, 2, 0], added=[0, 14, 17, 19])
    features = np.random.default_rng(0).normal(size=(30, 2))
    more, labels = smote_features(features, targets)
    assert (more[labels == 4] == features[-1]).all() and len(np.unique(more[labels == 2], axis=0)) == 20


@pytest.mark.parametrize('features', [np.zeros((3, 2, 2)), np.zeros((2, 2)), np.full((3, 2), np.nan)])
def test_smote_refuses_what_is_not_a_table_of_features(features):
    with pytest.raises(InputError, match='SMOTE takes finite features'): smote_features(features, np.array([0, 0, 1]))


@pytest.mark.parametrize('call, words', [
    (lambda: class_weights([], 2), 'no images to balance'), (lambda: class_weights([0, 2], 2), 'class number 2 does not exist'),
    (lambda: class_weights([-1, 0], 2), 'class number -1'), (lambda: class_weights([0], 1, 'square'), 'inverse, effective'),
    (lambda: class_weights([0], 1, 'effective', 1), 'below 1'), (lambda: sample_weights([0, 1], [1]), 'one number an image'),
    (lambda: sample_weights([0, 1], [1, -1]), 'not below 0'), (lambda: sample_weights([0, 1], [1, np.nan]), 'finite'),
    (lambda: sample_weights([0, 1], [1, 0]), 'class number 1 have weight 0'), (lambda: oversample_rows([1, 2], [0]), '2 rows but 1'),
    (lambda: smote_plan([0, 1], 0), 'at least 1 neighbour'), (lambda: long_tail(load_images('digits')), 'call split'),
    (lambda: long_tail(load_images('digits').split(), 0.5), '1 or more'),
    (lambda: long_tail(load_images('digits').split(), float('nan')), '1 or more'),
    (lambda: channel_statistics(load_images('digits'), P), 'call split')])
def test_bad_input_gets_one_sentence(call, words):
    with pytest.raises(InputError, match=words) as error: call()
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('ratio', [1, 10, 50, 1e6])
def test_a_long_tail_thins_the_training_split_alone(ratio):
    whole = load_images('digits').split()
    tail = long_tail(whole, ratio, seed=3)
    before, after = whole.counts(), tail.counts()
    assert (after[['valid', 'test']] == before[['valid', 'test']]).all(axis=None)
    assert (after['train'] <= before['train']).all() and after['train'].min() >= 1
    assert after['train'].max() > 0.85 * before['train'].max()
    assert set(tail.items['digest']) <= set(whole.items['digest']) and tail.classes == whole.classes
    assert (long_tail(whole, ratio, seed=3).items['digest'] == tail.items['digest']).all()
    if ratio == 50: assert 30 <= after['train'].max() / after['train'].min() <= 70


def test_a_weighted_loader_draws_all_classes_equally_often(small):
    loader = balance_loader(small.dataloaders(P, device=CPU).train, 'sampler')
    shares = np.bincount(drawn(loader, 60), minlength=3) / (60 * len(loader.dataset))
    assert np.abs(shares - 1 / 3).max() < 0.03 and len(loader) == 1


def test_an_oversampling_loader_repeats_and_leaves_none_out(small):
    loader = small.dataloaders(P, batch_size=16, device=CPU).train
    before = len(loader)
    balance_loader(loader, 'oversample')
    assert np.bincount(drawn(loader)).tolist() == [60, 60, 60] and len(loader) == 11 > before
    assert set(loader.get_idxs()) == set(range(75)) and len(list(loader)) == 11


def test_each_epoch_is_drawn_anew_and_the_seed_repeats_it(small):
    from fastai.torch_core import set_seed
    def epochs(balance):
        set_seed(5)
        loader = balance_loader(small.dataloaders(P, device=CPU).train, balance)
        return [torch.cat([y for _, y in loader]).tolist() for _ in range(2)]
    for balance in ('sampler', 'oversample'):
        first, second = epochs(balance)
        assert first != second and epochs(balance) == [first, second]


def test_a_column_of_weights_is_followed(small):
    from dataclasses import replace
    weight = np.where(small.items['label'] == '0', 0.0, 1.0)
    weighted = replace(small, items=small.items.assign(weight=weight))
    loader = balance_loader(weighted.dataloaders(P, device=CPU).train, 'none')
    assert not (drawn(loader, 5) == 0).any()
    with pytest.raises(InputError, match="take balance='sampler'"):
        balance_loader(weighted.dataloaders(P, device=CPU).train, 'oversample')
    with pytest.raises(InputError, match='one of them more'):
        balance_loader(weighted.dataloaders(P, device=CPU).train, 'sampler')
    with pytest.raises(InputError, match='2 weights but 75'): draw_by_weight(small.dataloaders(P, device=CPU).train, [1, 1])


@pytest.mark.parametrize('balance', list(BALANCE))
def test_the_learner_trains_with_each(small, balance):
    from imgcls_nb.train import image_learner, train
    learn = image_learner(small, size=8, batch_size=16, balance=balance, device=CPU)
    with learn.no_bar(), learn.no_logging():
        train(learn, 4)
        probabilities, targets = learn.get_preds(dl=learn.dls[2])
    assert learn.recipe['balance'] == balance and torch.isfinite(probabilities).all()
    assert (probabilities.argmax(1) == targets).float().mean() > 0.4


def test_with_nothing_to_do_the_learner_is_the_same_as_ever(small):
    from imgcls_nb.train import image_learner, train
    def weights(**options):
        learn = image_learner(small, size=8, device=CPU, **options)
        with learn.no_bar(), learn.no_logging(): train(learn, 1)
        return torch.cat([tensor.flatten().float() for tensor in learn.model.state_dict().values()])
    assert torch.equal(weights(), weights(balance='none')) and not torch.equal(weights(), weights(balance='weights'))


@pytest.mark.parametrize('balance', ['weights', 'sampler', 'oversample', 'smote'])
def test_a_class_without_training_images_is_never_the_answer_and_breaks_nothing(small, balance):
    from imgcls_nb.train import image_learner, train
    rows = ~((small.items['label'] == '2') & (small.items['split'] == 'train'))
    from dataclasses import replace
    absent = replace(small, items=small.items[rows].reset_index(drop=True))
    learn = image_learner(absent, size=8, batch_size=16, balance=balance, device=CPU)
    with learn.no_bar(), learn.no_logging():
        train(learn, 3)
        probabilities, _ = learn.get_preds(dl=learn.dls[2])
    assert torch.isfinite(probabilities).all() and all(np.isfinite(learn.recorder.values[-1]))
    if balance == 'smote': assert probabilities[:, 2].max() < 1e-4


@pytest.mark.parametrize('classes', [2, 3])
def test_the_refitted_head_is_the_fitted_head(small, classes):
    from dataclasses import replace
    from imgcls_nb.train import RefitHead, _inputs_of, _last_layer, image_learner
    from imgcls_nb.transfer import fit_head
    labels = '012'[:classes]
    some = replace(small, items=small.items[small.items['label'].isin(list(labels))].reset_index(drop=True), classes=tuple(labels))
    learn = image_learner(some, size=8, batch_size=16, balance='smote', augment='none', device=CPU)
    assert any(isinstance(callback, RefitHead) for callback in learn.cbs)
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    loader = learn.dls.valid.new(learn.dls.train.dataset)
    features, targets = _inputs_of(_last_layer(learn.model, classes), learn.model, loader)
    assert len(features) == len(learn.dls.train.dataset) and (targets == learn.dls.train.dataset.labels.numpy()).all()
    expected = fit_head(*smote_features(features, targets, 0)).predict_proba(features)
    found = learn.get_preds(dl=loader)[0].numpy()
    assert np.abs(found - expected).max() < 1e-4


def test_a_wrong_name_is_one_sentence(small):
    from imgcls_nb.train import image_learner
    with pytest.raises(InputError, match="Unknown way to balance classes 'smite': one of none, weights, "):
        image_learner(small, balance='smite')


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6), channels=st.integers(1, 3),
       offset=st.floats(-1e6, 1e6), seed=st.integers(0, 99))
def test_merged_statistics_are_those_of_all_pixels(sizes, channels, offset, seed):
    rng = np.random.default_rng(seed)
    batches = [offset + rng.normal(size=(size, 3, 2, channels)) * rng.uniform(0.1, 9) for size in sizes]
    total = batch_statistics(batches[0])
    for batch in batches[1:]: total = total.merge(batch_statistics(batch))
    pixels = np.concatenate(batches).reshape(-1, channels)
    assert total.pixels == len(pixels)
    assert np.allclose(total.mean, pixels.mean(0), rtol=1e-9) and np.allclose(total.std, pixels.std(0), rtol=1e-6)


@pytest.mark.parametrize('batch_size', [1, 7, 10_000])
def test_channel_statistics_read_the_training_images_alone(batch_size):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
    data = from_arrays(images, ['a', 'b'] * 20, ['train'] * 30 + ['test'] * 10)
    told = []
    own = channel_statistics(data, Preprocessing(8, 8, 3), batch_size, lambda done, total: told.append((done, total)))
    assert np.allclose(own.mean, images[:30].mean((0, 1, 2)) / 255) and np.allclose(own.std, images[:30].std((0, 1, 2)) / 255)
    assert told[-1] == (30, 30)
    p = normalized(Preprocessing(8, 8, 3), own)
    assert np.allclose(p.mean, own.mean) and np.allclose(p.std, own.std)


def test_a_constant_channel_cannot_be_normalized():
    data = from_arrays(np.full((4, 8, 8), 7, np.uint8), ['a', 'b'] * 2, ['train'] * 4)
    with pytest.raises(InputError, match='same value in every pixel'): normalized(P, channel_statistics(data, P))


def test_the_command_takes_it_and_the_bundle_records_it(tmp_path):
    import json
    from conftest import imgcls
    result = imgcls('run', 'digits', '--epochs', '1', '--balance', 'weights', '--mix', 'cutmix', '--json', cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    bundle = json.loads((tmp_path/json.loads(result.stdout)['bundle']/'bundle.json').read_text(encoding='utf-8'))
    assert bundle['recipe']['balance'] == 'weights' and bundle['recipe']['mix'] == 'cutmix'
