"The table of images: splits keep their promises, findings find what is planted."
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image

from imgcls_nb.data import from_arrays, from_folder
from imgcls_nb.image import Preprocessing
from imgcls_nb.run import InputError
from imgcls_nb.sources import load_images

P = Preprocessing(16, 16, 1)


def noise(count: int, seed: int = 0) -> np.ndarray:
    "Different grey pictures."
    return np.random.default_rng(seed).integers(0, 256, (count, 6, 6), dtype=np.uint8)


@settings(max_examples=25, deadline=None)
@given(counts=st.lists(st.integers(3, 120), min_size=2, max_size=5), seed=st.integers(0, 99))
def test_every_class_is_in_every_split(counts, seed):
    labels = np.repeat([f'class {i}' for i in range(len(counts))], counts)
    data = from_arrays(noise(len(labels), seed), labels).split(seed=seed)
    assert (data.counts()[['train', 'valid', 'test']] > 0).all().all()


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 99))
def test_proportions(seed):
    data = from_arrays(noise(2000, seed), np.arange(2000) % 2).split(seed=seed)
    shares = data.items['split'].value_counts(normalize=True)
    assert abs(shares['train'] - 0.70) < 0.05 and abs(shares['valid'] - 0.15) < 0.04 and abs(shares['test'] - 0.15) < 0.04


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 99))
def test_later_images_move_no_earlier_ones(seed):
    images, labels = noise(900, seed), np.arange(900) % 3
    before, after = from_arrays(images[:600], labels[:600]).split(), from_arrays(images, labels).split()
    assert (before.items['split'].to_numpy() == after.items['split'].to_numpy()[:600]).all()


def test_copies_stay_together():
    images = noise(60)
    data = from_arrays(np.concatenate([images, images, images]), np.tile(np.arange(60) % 2, 3)).split()
    assert (data.items.groupby('digest')['split'].nunique() == 1).all()


def test_the_split_depends_on_the_seed_and_on_nothing_else():
    data = load_images('digits')
    assert (data.split(seed=1).items['split'] == data.split(seed=1).items['split']).all()
    assert (data.split(seed=1).items['split'] != data.split(seed=2).items['split']).any()
    shuffled = from_arrays(data.arrays[::-1], data.items['label'][::-1]).split(seed=1)
    assert (shuffled.items['split'][::-1].to_numpy() == data.split(seed=1).items['split'].to_numpy()).all()


@pytest.fixture
def split_tree(tmp_path):
    "A data set that came with its own splits."
    for split, count in (('train', 30), ('val', 6), ('test', 6)):
        for label in ('1', '01', 'None'):
            (tmp_path/split/label).mkdir(parents=True)
            for i, image in enumerate(noise(count, len(split) + len(label))):
                Image.fromarray(image).save(tmp_path/split/label/f'{i}.png')
    return tmp_path


def test_official_splits_are_kept(split_tree):
    data = from_folder(split_tree).split()
    assert data.classes == ('01', '1', 'None')
    assert dict(data.items['split'].value_counts()) == dict(train=90, valid=18, test=18)


def test_a_missing_split_is_cut_from_the_training_images(split_tree):
    import shutil
    shutil.rmtree(split_tree/'val')
    data = from_folder(split_tree).split()
    counts = data.items['split'].value_counts()
    assert counts['test'] == 18 and 3 <= counts['valid'] <= 30 and counts.sum() == 108


def test_folders_inside_a_class_belong_to_it(tmp_path):
    for folder in ('cats/black', 'cats/white/small', 'dogs'):
        (tmp_path/folder).mkdir(parents=True)
        for i, image in enumerate(noise(4, len(folder))): Image.fromarray(image).save(tmp_path/folder/f'{i}.png')
    data = from_folder(tmp_path)
    assert dict(data.items['label'].value_counts()) == dict(cats=8, dogs=4)


def test_batches_hold_the_right_pixels_and_labels():
    data = load_images('digits').split()
    dls = data.dataloaders(P, batch_size=32)
    images, targets = next(iter(dls[2]))
    rows = dls[2].dataset.rows[:32]
    assert [data.classes[t] for t in targets] == list(data.items['label'].iloc[rows])
    expected = (np.stack([P(data.open(row, 'L')) for row in rows]).transpose(0, 3, 1, 2) / 255 - 0.5) / 0.5
    assert np.abs(images.cpu().numpy() - expected).max() < 1e-6


def test_in_memory_and_from_files_give_the_same_batches():
    data = load_images('digits').split()
    memory, files = [next(iter(data.dataloaders(P, memory_limit=limit)[1])) for limit in (2e9, 0)]
    assert (memory[0] == files[0]).all() and (memory[1] == files[1]).all()


def test_every_training_image_is_seen_and_small_sets_still_give_batches():
    data = from_arrays(noise(20), ['a', 'b'] * 10).split()
    dls = data.dataloaders(P, batch_size=64)
    assert len(dls.train) >= 1 and len(list(dls.train)) >= 1


@pytest.mark.parametrize('images, labels', [(np.zeros((2, 4, 4)), 'ab'), (np.zeros((2, 4), np.uint8), 'ab'),
                                            (np.zeros((3, 4, 4), np.uint8), 'ab')])
def test_arrays_of_the_wrong_kind(images, labels):
    with pytest.raises(InputError): from_arrays(images, list(labels))


def test_the_fingerprint_follows_the_content():
    data = load_images('digits').split()
    assert data.fingerprint() == load_images('digits').split().fingerprint()
    assert data.fingerprint() != load_images('digits').split(seed=1).fingerprint()


def random_cut(image):
    "A random square of four pixels."
    left, top = np.random.randint(0, image.width - 3), np.random.randint(0, image.height - 3)
    return image.crop((left, top, left + 4, top + 4))


@pytest.mark.parametrize('memory_limit', [2e9, 0])
def test_the_same_seed_gives_the_same_images_with_any_number_of_workers(memory_limit):
    "Order, random cuts of single pictures and augmentation of batches, epoch after epoch."
    from fastai.torch_core import set_seed
    from fastai.vision.augment import aug_transforms
    data = load_images('digits').split()

    def epochs(workers, seed, item_tfm=random_cut):
        set_seed(seed)
        train = data.dataloaders(P, aug_transforms(max_rotate=30), 128, memory_limit, item_tfm=item_tfm, seed=seed, workers=workers).train
        return [np.stack([images.cpu().numpy() for images, _ in train]) for _ in range(2)]

    alone, helped, other = epochs(0, 3), epochs(2, 3), epochs(0, 4)
    assert (alone[0] == helped[0]).all() and (alone[1] == helped[1]).all()
    assert (alone[0] != alone[1]).any() and (alone[0] != other[0]).any()
    assert (epochs(0, 3, None)[0] == epochs(2, 3, None)[0]).all()
