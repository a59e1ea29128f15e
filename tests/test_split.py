"Splits keep together what belongs together, near their shares, and do not move what was split before."
import io

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image

from dataclasses import replace

from imgcls_nb.data import from_arrays
from imgcls_nb.run import InputError
from samples import patch


def noise(count: int, seed: int = 0, side: int = 16) -> np.ndarray:
    "Different grey pictures, large enough to have near-duplicates."
    return np.random.default_rng(seed).integers(0, 256, (count, side, side), dtype=np.uint8)


def brighter(images: np.ndarray) -> np.ndarray:
    "The same pictures with other pixels."
    return (images * 0.9 + 20).round().astype(np.uint8)


def split_of(data) -> dict:
    return dict(zip(data.items['digest'], data.items['split']))


@settings(max_examples=25, deadline=None)
@given(groups=st.integers(8, 60), classes=st.integers(2, 4), seed=st.integers(0, 99))
def test_a_group_is_in_one_split_and_every_class_in_all(groups, classes, seed):
    rng = np.random.default_rng(seed)
    group = np.concatenate([np.repeat(np.arange(groups), 3), rng.integers(0, groups, 200)])
    labels = rng.permutation(np.arange(len(group)) % classes)
    data = from_arrays(noise(len(group), seed), labels, groups=group).split(seed=seed)
    assert (data.items.groupby('group')['split'].nunique() == 1).all()
    assert (data.counts()[['train', 'valid', 'test']] > 0).all().all()


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 99))
def test_shares_of_groups(seed):
    group = np.repeat(np.arange(800), 2)
    data = from_arrays(noise(1600, seed), np.arange(1600) % 2, groups=group).split(seed=seed)
    shares = data.items['split'].value_counts(normalize=True)
    assert abs(shares['train'] - 0.70) < 0.06 and abs(shares['valid'] - 0.15) < 0.05 and abs(shares['test'] - 0.15) < 0.05


@settings(max_examples=15, deadline=None)
@given(count=st.integers(12, 80), copies=st.integers(1, 12), seed=st.integers(0, 99))
def test_near_duplicates_are_found_and_stay_together(count, copies, seed):
    originals = noise(count, seed)
    images = np.concatenate([originals, brighter(originals[:copies])])
    data = from_arrays(images, np.arange(len(images)) % 2).split(seed=seed)
    cluster, splits = data.near_duplicates(), data.items['split'].to_numpy()
    assert len(set(cluster)) == count
    for k in range(copies): assert cluster[k] == cluster[count + k] and splits[k] == splits[count + k]


@settings(max_examples=12, deadline=None)
@given(before=st.integers(20, 80), after=st.integers(1, 60), grouped=st.booleans(), seed=st.integers(0, 99))
def test_an_earlier_split_is_kept_whatever_arrives(before, after, grouped, seed):
    "New pictures, copies of old ones, and pictures between two old ones."
    rng, old_images = np.random.default_rng(seed), noise(before, seed)
    newcomers = np.concatenate([noise(after, seed + 1000), brighter(old_images[:after]), old_images[:after // 2]])
    images = np.concatenate([old_images, newcomers])
    groups = rng.integers(0, 12, len(images)) if grouped else None
    labels = np.arange(len(images)) % 2
    old = from_arrays(old_images, labels[:before], groups=groups[:before] if grouped else None).split(seed=seed)
    new = from_arrays(images, labels, groups=groups).split(seed=seed + 1, previous=old)
    earlier, now = split_of(old), split_of(new)
    assert {digest: now[digest] for digest in earlier} == earlier
    assert len(new) + len(new.set_aside) == len(images)
    assert {finding.kind for finding in new.set_aside} <= {'bridge'}


def test_without_twins_and_groups_later_images_move_no_earlier_ones():
    images, labels = noise(900), np.arange(900) % 3
    first, all_of_them = from_arrays(images[:600], labels[:600]).split(), from_arrays(images, labels).split()
    assert (first.items['split'].to_numpy() == all_of_them.items['split'].to_numpy()[:600]).all()


def test_groups_that_arrive_later_move_none():
    images, labels, groups = noise(900), np.arange(900) % 3, np.arange(900) // 6
    first = from_arrays(images[:600], labels[:600], groups=groups[:600]).split()
    everything = from_arrays(images, labels, groups=groups).split()
    assert (first.items['split'].to_numpy() == everything.items['split'].to_numpy()[:600]).all()


def test_a_bridge_between_two_splits_is_set_aside():
    left, right = [np.asarray(patch('grass', seed, 64).convert('L'), float) for seed in (1, 2)]
    chain = np.stack([(share * right + (1 - share) * left).round() for share in np.linspace(0, 1, 21)]).astype(np.uint8)
    old = from_arrays(np.concatenate([chain[[0, 20]], noise(40, side=64)]), ['a', 'b'] * 21).scan()
    assert len(set(old.near_duplicates())) == 42 and len(set(from_arrays(chain, ['a'] * 21).scan().near_duplicates())) == 1
    old = replace(old, items=old.items.assign(split=['train', 'test', *old.split().items['split'][2:]]))
    images = np.concatenate([chain, noise(40, side=64)])
    new = from_arrays(images, ['a'] * 20 + ['b'] + ['a', 'b'] * 20).split(previous=old)
    assert len(new.set_aside) == 19 and split_of(new) == split_of(old)


def recoded(image: Image.Image, format: str, **options) -> Image.Image:
    "The same picture after saving and opening."
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return Image.open(buffer).convert('RGB')


@pytest.mark.parametrize('change', [lambda x: recoded(x, 'JPEG', quality=75), lambda x: recoded(x, 'WEBP', quality=75),
                                    lambda x: x.resize((60, 60)).resize((96, 96)), lambda x: x.point(lambda v: int(v * 0.85))],
                         ids=['jpeg', 'webp', 'resized', 'darker'])
def test_copies_of_photographs_are_recognised(change):
    originals = [patch(name, seed) for name in ('brick', 'grass', 'gravel', 'coffee', 'chelsea') for seed in range(8)]
    pictures = [np.asarray(picture) for image in originals for picture in (image, change(image))]
    cluster = from_arrays(np.stack(pictures), ['x'] * len(pictures)).scan().near_duplicates()
    assert (cluster[::2] == cluster[1::2]).mean() >= 0.9
    assert len(set(cluster[::2])) >= 39, 'different pictures were taken for the same'


def test_pictures_that_show_nothing():
    "Blank pictures of one colour are copies of each other, and of no other colour."
    def colour(*rgb): return np.full((16, 16, 3), rgb, np.uint8)
    images = np.stack([colour(200, 0, 0), colour(201, 0, 0), colour(0, 200, 0), colour(90, 90, 90), colour(0, 0, 0)])
    cluster = from_arrays(images, ['x'] * 5).scan().near_duplicates()
    assert cluster.tolist() == [0, 0, 1, 2, 3]


def test_colour_counts():
    "The same picture in another colour is another picture: colour may be the label."
    grey = np.asarray(patch('brick', 5).convert('L'))
    red, blue = np.zeros((2, 96, 96, 3), np.uint8)
    red[..., 0], blue[..., 2] = grey, grey
    assert len(set(from_arrays(np.stack([red, blue]), ['red', 'blue']).scan().near_duplicates())) == 2


def test_many_copies_of_one_picture_take_no_time():
    "Three thousand nearly equal pictures are one cluster, not four million comparisons."
    picture = np.asarray(patch('brick', 1, 32).convert('L')).astype(int)
    images = (picture + np.random.default_rng(0).integers(-1, 2, (3000, 32, 32))).clip(0, 255).astype(np.uint8)
    assert len(set(from_arrays(images, ['x'] * 3000).scan().near_duplicates())) == 1


def test_too_few_groups_are_named():
    data = from_arrays(noise(40), ['a', 'b'] * 20, groups=np.arange(40) % 2)
    with pytest.raises(InputError, match="'a' has 1 group, and every class needs at least 3"): data.split()
    with pytest.raises(InputError, match='40 images but 3 groups'): from_arrays(noise(40), ['a', 'b'] * 20, groups=[1, 2, 3])
