"""Eighteen faults, each planted on purpose in a small training, and trainings without a fault.

    python tests/faults_planted.py digits      # or textures: every fault, and what the doctor says first; or healthy
"""
import contextlib
import io
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from fastai.callback.core import Callback
from fastai.optimizer import SGD
from fastai.vision.augment import Normalize, aug_transforms
from torch import nn

import imgcls_nb.all
from imgcls_nb.balance import long_tail
from imgcls_nb.data import ImageSet, digits, textures
from imgcls_nb.diagnose import Watch, diagnose, observe
from imgcls_nb.models import ResNet, conv_block
from imgcls_nb.train import TrainingError, image_learner, train


@dataclass(frozen=True)
class Setting:
    "A data set and a network, both small enough to train in seconds."
    data: Callable[[], ImageSet]
    size: int
    network: Callable[[int], nn.Module] | None  # instead of small_cnn, from the number of classes
    epochs: int
    images: int = 600  # in the training split


def small_resnet(classes: int) -> nn.Module:
    return ResNet(classes, 1, blocks=(1, 1), width=12, stem=conv_block)


SETTINGS = dict(digits=Setting(lambda: digits().split(), 8, None, 6), textures=Setting(textures, 24, small_resnet, 6))


def fewer(data: ImageSet, count: int, seed: int = 0) -> ImageSet:
    "At most `count` training images."
    rows = np.random.default_rng(seed).permutation(data.where('train'))[count:]
    return replace(data, items=data.items.drop(data.items.index[rows]).reset_index(drop=True))


def bare(data: ImageSet) -> ImageSet:
    "Without what a scan has found, for tables whose pictures change."
    return replace(data, items=data.items[['image', 'label', 'split']].copy())


def learner(s: Setting, data=None, network=None, **options):
    "An untrained learner of a setting."
    data = fewer(s.data(), s.images) if data is None else data
    learn = image_learner(data, 'small_cnn', size=s.size, **dict(augment='none', batch_size=32, device='cpu') | options)
    torch.manual_seed(options.get('seed', 0))
    if make := network or s.network: learn.model = make(len(data.classes))
    return learn


def fit(learn, epochs: int, rate: float = 1e-2, *callbacks):
    "Train with `Watch`, quietly; one that diverges stays as it is then."
    with learn.no_bar(), learn.no_logging():
        try: train(learn, epochs, rate, (Watch(5), *callbacks))
        except TrainingError: pass
    return learn


def deep(classes: int, activation=nn.Sigmoid, depth: int = 10, scale: float = 1.0) -> nn.Module:
    "Many plain convolutions without normalisation."
    layers = [nn.Conv2d(1, 16, 3, padding=1, stride=2), activation()]
    for _ in range(depth): layers += [nn.Conv2d(16, 16, 3, padding=1), activation()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, classes))
    for layer in model:
        if isinstance(layer, nn.Conv2d) and scale != 1: layer.weight.data *= scale
    return model


def thin(classes: int) -> nn.Module:
    return nn.Sequential(conv_block(1, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1, classes))


class TrainWhileValidating(Callback):
    def before_validate(self): self.model.train()


def overfitting(s): return fit(learner(s, fewer(s.data(), 50), batch_size=8), 5 * s.epochs)
def underfitting(s): return fit(learner(s, network=thin), s.epochs)
def rate_too_high(s): return fit(learner(s), s.epochs, 3.0)
def rate_too_low(s): return fit(learner(s), s.epochs, 1e-6)
def vanishing(s): return fit(learner(s, network=deep), s.epochs)
def exploding(s): return fit(learner(s, network=partial(deep, activation=nn.ReLU, depth=6, scale=10.0)), s.epochs, 1e-3)
def tiny_batches(s): return fit(learner(s, fewer(s.data(), 200), batch_size=2), 2)


def diverged(s):
    learn = learner(s, network=partial(deep, activation=nn.LeakyReLU, depth=4, scale=3.0))
    learn.opt_func = partial(SGD, mom=0.9)
    return fit(learn, s.epochs, 30.0)


def dead_units(s):
    learn = learner(s)
    norms = [m for m in learn.model.modules() if isinstance(m, nn.BatchNorm2d)]
    torch.nn.init.constant_(norms[1].bias, -8.0)
    return fit(learn, s.epochs, 1e-3)


def frozen(s):
    learn = learner(s)
    learn.create_opt()
    learn.freeze()
    for p in [p for m in learn.model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()]: p.requires_grad_(False)
    return fit(learn, s.epochs)


def slow_input(s):
    learn = learner(s)
    dataset, prompt = learn.dls.train.dataset, learn.dls.train.dataset.batch
    def batch(indices):
        time.sleep(0.004 * len(indices))  # as if each picture were large and opened from a slow disk
        return prompt(indices)
    dataset.batch = batch
    return fit(learn, 2)


def imbalance(s): return fit(learner(s, long_tail(s.data(), 60)), s.epochs)


def label_noise(s):
    data = bare(s.data())
    rng, labels = np.random.default_rng(0), data.items['label'].to_numpy(object).copy()
    wrong = rng.random(len(labels)) < 0.25
    labels[wrong] = [rng.choice([c for c in data.classes if c != label]) for label in labels[wrong]]
    return fit(learner(s, replace(data, items=data.items.assign(label=labels))), s.epochs)


def leak(s):
    data = bare(s.data())
    copies = data.items.iloc[data.where('train')[::4]].assign(split='valid')
    items = np.concatenate([data.items.to_numpy(object), copies.to_numpy(object)])
    return fit(learner(s, replace(data, items=type(copies)(items, columns=copies.columns))), s.epochs)


def shortcut(s):
    data = bare(s.data())
    numbers = data.targets(np.arange(len(data)))
    arrays = data.arrays.astype(float).copy()
    for image, k in zip(data.items['image'], numbers): arrays[image] = arrays[image] * 0.3 + 15 * k
    return fit(learner(s, fewer(replace(data, arrays=arrays.clip(0, 255).astype(np.uint8)), s.images)), s.epochs)


def normalization(s):
    learn = learner(s)
    after = learn.dls.valid.after_batch.fs
    for tfm in [t for t in after if isinstance(t, Normalize)]: after[after.index(tfm)] = Normalize.from_stats([0.0], [1 / 255], cuda=False)
    return fit(learn, s.epochs)


def evaluation_mode(s): return fit(learner(s), s.epochs, 1e-2, TrainWhileValidating())


def training_transforms(s):
    learn = learner(s)
    learn.dls.valid.dataset.split_idx = 0
    learn.dls.valid.after_batch.fs[1:1] = aug_transforms(size=s.size, max_rotate=40, p_affine=1.0)
    return fit(learn, s.epochs)


def slow_inference(s):
    return fit(learner(s, fewer(s.data(), 100), network=lambda k: ResNet(k, 1, blocks=(3, 4, 6, 3), width=16, stem=conv_block)), 1)


FAULTS = {'overfitting': overfitting, 'underfitting': underfitting, 'learning rate too high': rate_too_high,
          'learning rate too low': rate_too_low, 'diverged': diverged, 'vanishing gradients': vanishing,
          'exploding gradients': exploding, 'dead ReLUs': dead_units, 'batch normalisation with tiny batches': tiny_batches,
          'slow input': slow_input, 'imbalance': imbalance, 'label noise': label_noise, 'leakage': leak, 'shortcut': shortcut,
          'wrong normalisation': normalization, 'frozen layers': frozen, 'evaluation as in training': evaluation_mode,
          'slow inference': slow_inference}
BUDGET_MS = {'slow inference': 1.0}  # what the planted slow network cannot keep, and small_cnn can


def two_classes(data: ImageSet) -> ImageSet:
    "The first two classes alone."
    kept = data.items['label'].isin(data.classes[:2])
    return replace(data, items=data.items[kept].reset_index(drop=True), classes=data.classes[:2])


def pretrained(data: ImageSet):
    learn = image_learner(fewer(data, 300), 'tf_efficientnet_lite0', size=64, batch_size=16, augment='none', device='cpu')
    return fit(learn, 2, 2e-3)


DIGITS, TEXTURES = SETTINGS['digits'], SETTINGS['textures']
HEALTHY = {
    'digits, seed 0': lambda: fit(learner(DIGITS, DIGITS.data()), 6),
    'digits, seed 1': lambda: fit(learner(DIGITS, DIGITS.data(), seed=1), 6),
    'digits, seed 2, augmented': lambda: fit(learner(DIGITS, DIGITS.data(), seed=2, augment='digits', batch_size=64), 12),
    'digits, simple_cnn': lambda: fit(image_learner(DIGITS.data(), 'simple_cnn', size=8, augment='none', device='cpu'), 12, 3e-3),
    'digits, lenet': lambda: fit(image_learner(DIGITS.data(), 'lenet', size=16, augment='none', device='cpu'), 12, 3e-3),
    'digits, mildly imbalanced': lambda: fit(learner(DIGITS, long_tail(DIGITS.data(), 4)), 10),
    'digits, two classes': lambda: fit(learner(DIGITS, two_classes(DIGITS.data())), 8),
    'textures, small_cnn': lambda: fit(learner(replace(TEXTURES, network=None, size=32), TEXTURES.data()), 8),
    'textures, small ResNet': lambda: fit(learner(TEXTURES, TEXTURES.data()), 8),
    'textures, pretrained': lambda: pretrained(TEXTURES.data())}


def plant(name: str, setting: str):
    "Train with one fault: the learner, and what the doctor says."
    learn = FAULTS[name](SETTINGS[setting])
    return learn, diagnose(learn, BUDGET_MS.get(name, 100.0))


REMEDIES = {'overfitting': 'accuracy gap', 'underfitting': 'accuracy', 'learning rate too high': 'accuracy',
            'learning rate too low': 'accuracy', 'diverged': 'accuracy', 'vanishing gradients': 'accuracy',
            'exploding gradients': 'accuracy', 'dead ReLUs': 'dead channels', 'slow input': 'waiting, ms', 'imbalance': 'balanced accuracy',
            'wrong normalisation': 'accuracy', 'frozen layers': 'accuracy', 'slow inference': 'latency, ms'}  # and what each should change
LESS_IS_BETTER = 'accuracy gap', 'dead channels', 'waiting, ms', 'latency, ms'


def figure(learn, what: str) -> float:
    "The figure that a remedy should change."
    e = observe(learn)
    return {'accuracy': e.valid_accuracy or 0.0, 'accuracy gap': (e.train_accuracy or 0) - (e.valid_accuracy or 0),
            'dead channels': e.dead_share, 'waiting, ms': e.step_ms[0], 'latency, ms': e.latency_ms,
            'balanced accuracy': float(np.mean(list(e.recalls.values()) or [0]))}[what]


def mend(name: str, setting: str) -> dict:
    "Plant a fault, run the remedy as it is printed, and measure before and after."
    (learn, found), what = plant(name, setting), REMEDIES[name]
    space = dict(vars(imgcls_nb.all), learn=learn, data=learn.dls.train.dataset.data)
    remedy = next(d.remedy for d in found if d.name == name)
    before = figure(learn, what)
    with learn.no_bar(), learn.no_logging(), contextlib.redirect_stdout(io.StringIO()): exec(remedy, space)
    after = figure(space['learn'], what)
    return dict(fault=name, figure=what, before=before, after=after, better=bool(after < before if what in LESS_IS_BETTER else after > before))


def main() -> None:
    warnings.simplefilter('ignore')
    setting, *names = sys.argv[1:]
    if setting == 'remedies':
        for name in names or REMEDIES: print(mend(name, 'digits'), flush=True)
        return
    if setting == 'healthy':
        for name in names or HEALTHY:
            start, learn = time.perf_counter(), HEALTHY[name]()
            found = diagnose(learn)
            print(f'{"BAD " if found.serious else "ok  "} {name:30} {time.perf_counter() - start:5.1f} s, valid '
                  f'{learn.watched["valid_accuracy"]:.1%} {[(d.name, d.severity, d.evidence) for d in found]}', flush=True)
        return
    for name in names or FAULTS:
        start = time.perf_counter()
        learn, found = plant(name, setting)
        mark = 'ok  ' if name in found.names[:2] else 'MISS'
        print(f'{mark} {name:38} {time.perf_counter() - start:5.1f} s  {[(d.name, d.severity) for d in found]}', flush=True)
        if name in found.names: print('        ', found[found.names.index(name)].evidence, flush=True)
        w = learn.watched
        if mark == 'MISS': print('        ', {k: w.get(k) for k in ('train_accuracy', 'valid_accuracy', 'frozen_share', 'wait_s', 'compute_s', 'evaluation_random')})


if __name__ == '__main__': main()
