"""How many images a second reach the network: this library's loaders against fastai's own, in one run.

    python tests/bench/loaders.py                 # CIFAR-10 where IMGCLS_MIRROR has cifar10.tgz, textures as JPEG otherwise
    python tests/bench/loaders.py FOLDER          # a folder with train/ and test/, each with one folder per class

Both sides flip and rotate whole batches with the same fastai transforms and normalise; each line is one epoch over the training
images, the second of two, measured in turn. Reading everything into memory once is timed by itself.
"""
import argparse
import os
import statistics
import tarfile
import tempfile
import time
import warnings
from pathlib import Path

import torch
from fastai.vision.all import ImageDataLoaders, Normalize, aug_transforms

from imgcls_nb.data import ImageSet, from_folder, textures
from imgcls_nb.image import Preprocessing

warnings.filterwarnings('ignore')
MEAN, STD, BATCH = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), 128


def augmentation() -> list:
    "The same on both sides: flips and rotations of 15 degrees."
    return aug_transforms(do_flip=True, max_rotate=15, max_zoom=1, max_lighting=0, max_warp=0, p_affine=1)


def make_folder(target: Path) -> Path:
    "CIFAR-10 from the mirror, or the textures as JPEG files."
    archive = next(Path(os.environ.get('IMGCLS_MIRROR', '/nowhere')).rglob('cifar10.tgz'), None)
    if archive:
        with tarfile.open(archive) as tar: tar.extractall(target, filter='data')
        return next(path.parent for path in target.rglob('train') if path.is_dir())
    data = textures()
    for row, item in enumerate(data.items.itertuples(index=False)):
        folder = target/('train' if item.split == 'train' else 'test')/item.label
        folder.mkdir(parents=True, exist_ok=True)
        data.open(row).save(folder/f'{row}.jpg')
    return target


def thinned(data: ImageSet, every: int) -> ImageSet:
    "Every n-th image, so that the slow side takes no quarter of an hour."
    from dataclasses import replace
    return replace(data, items=data.items.iloc[::every].reset_index(drop=True))


def rate(loader) -> float:
    "Images a second over one whole epoch."
    start, count = time.perf_counter(), 0
    for images, _ in loader: count += len(images)
    return count / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', nargs='?')
    parser.add_argument('--every', type=int, default=5, help='take every n-th image')
    parser.add_argument('--turns', type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.folder) if args.folder else make_folder(Path(temporary))
        data = thinned(from_folder(folder), args.every).split()
        side = int(data.items['width'].median())
        names = data.items[data.items['split'] == 'train']
        p = Preprocessing(side, side, mean=MEAN, std=STD)
        stock = ImageDataLoaders.from_df(names, folder, fn_col='image', label_col='label', valid_pct=0.01, bs=BATCH, seed=0, device='cpu',
                                         batch_tfms=[*augmentation(), Normalize.from_stats(MEAN, STD, cuda=False)])
        start = time.perf_counter()
        memory = data.dataloaders(p, augmentation(), BATCH, device='cpu')
        reading = time.perf_counter() - start
        files = data.dataloaders(p, augmentation(), BATCH, memory_limit=0, device='cpu')
        sides = {'fastai ImageDataLoaders': stock.train, 'imgcls_nb, from files': files.train, 'imgcls_nb, in memory': memory.train}
        found = {name: [] for name in sides}
        for turn in range(args.turns + 1):  # in turn; the first is a warm-up
            for name, loader in sides.items():
                value = rate(loader)
                if turn: found[name].append(value)
    print(f'{len(names):,} training images of {side} pixels, batches of {BATCH}, {torch.get_num_threads()} threads; '
          f'all images read into memory once in {reading:.1f} s')
    print(f'{"":26}{"images/s, median":>18}{"least":>10}{"most":>10}')
    for name, values in found.items(): print(f'{name:26}{statistics.median(values):18,.0f}{min(values):10,.0f}{max(values):10,.0f}')
    base, *others = found
    for name in others:
        ratios = [ours / theirs for ours, theirs in zip(found[name], found[base])]
        print(f'{name}: {statistics.median(ratios):.1f} times fastai ({min(ratios):.1f} to {max(ratios):.1f})')


if __name__ == '__main__': main()
