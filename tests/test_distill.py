"Distillation: the teacher sees what the student sees, changes nothing but the loss, and survives a stop."
import subprocess
import sys

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.training import GradientAccumulation

from conftest import ROOT
from imgcls_nb.augment import mixing
from imgcls_nb.data import digits, textures
from imgcls_nb.distill import Distillation, distillation_loss, for_teacher, frozen_teacher
from imgcls_nb.evaluate import predict_probabilities
from imgcls_nb.image import Preprocessing, normalize
from imgcls_nb.run import InputError
from imgcls_nb.train import image_learner, train

DATA = digits().split()


def student(seed=0, **options): return image_learner(DATA, 'small_cnn', size=8, seed=seed, **options)


def fit(learn, epochs=2, *callbacks, **options):
    with learn.no_bar(), learn.no_logging(): return train(learn, epochs, callbacks=callbacks, **options)


def same(first, second):
    pairs = zip(first.model.state_dict().values(), second.model.state_dict().values())
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.fixture(scope='module')
def teacher(): return fit(student(1), 4)


class Listen(Callback):
    "Keeps what the student and the teacher are given in training."
    def __init__(self, distillation): self.heard, self.distillation = [], distillation
    def before_fit(self):
        self.hook = self.distillation.teacher.register_forward_pre_hook(lambda _, inputs: self.heard.append(inputs[0].clone()))
        self.asked = []
    def after_pred(self):
        if self.training: self.asked.append(self.xb[0].clone())
    def after_fit(self): self.hook.remove()


def test_loss_by_hand():
    torch.manual_seed(0)
    a, b = torch.randn(5, 3), torch.randn(5, 3)
    p, q = (b / 3).softmax(1).numpy(), (a / 3).softmax(1).numpy()
    assert np.isclose(distillation_loss(a, b, 3.0), 9 * (p * np.log(p / q)).sum(1).mean(), rtol=1e-5)
    assert distillation_loss(a, a) == pytest.approx(0, abs=1e-6)


def test_no_weight_is_no_teacher_and_full_weight_is_no_labels(teacher):
    from dataclasses import replace
    assert same(fit(student(), 2), fit(student(), 2, Distillation(teacher, weight=0)))
    wrong = DATA.items['label'].where(DATA.items['split'] != 'train', '3')
    for label in DATA.classes: wrong[DATA.items.index[(DATA.items['split'] == 'train') & (DATA.items['label'] == label)][0]] = label
    blind = image_learner(replace(DATA, items=DATA.items.assign(label=wrong)), 'small_cnn', size=8, seed=0)
    taught = fit(student(), 2, Distillation(teacher, weight=1))
    assert same(fit(blind, 2, Distillation(teacher, weight=1)), taught)
    assert not same(taught, fit(student(), 2))


@pytest.mark.parametrize('mix', ['none', 'mixup', 'cutmix'])
def test_the_teacher_sees_the_same_batch_and_stays_as_it_was(teacher, mix):
    distillation = Distillation(teacher)
    before = {name: value.clone() for name, value in distillation.teacher.state_dict().items()}
    listen = Listen(distillation)
    fit(student(), 1, distillation, listen, *mixing(mix))
    assert len(listen.heard) == len(listen.asked) > 10
    assert all(torch.equal(a, b) for a, b in zip(listen.heard, listen.asked))
    assert not distillation.teacher.training and not any(p.requires_grad for p in distillation.teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in distillation.teacher.state_dict().items())


def test_the_recorded_loss_is_the_blend(teacher):
    class Check(Callback):
        order = 5
        def after_loss(self):
            if not self.training: return
            with torch.no_grad(): soft = distillation_loss(self.pred, teacher.model.eval()(self.xb[0]), 2.0)
            usual = learn.loss_func(self.pred, *self.yb)
            assert torch.isclose(self.loss, 0.7 * usual + 0.3 * soft, rtol=1e-4) and self.loss_grad.requires_grad
            checked.append(True)
    learn, checked = student(balance='weights'), []
    fit(learn, 1, Distillation(teacher, 2.0, 0.3), Check())
    assert len(checked) > 10


@pytest.mark.parametrize('balance', ['weights', 'focal', 'sampler'])
def test_works_beside_other_losses_and_accumulation(teacher, balance):
    learn = fit(student(balance=balance), 2, Distillation(teacher, weight=0.5), GradientAccumulation(128), *mixing('mixup'))
    found, targets = predict_probabilities(learn)
    assert np.isfinite(found).all() and (found.argmax(1) == targets).mean() > 0.3


def test_other_sizes_channels_and_normalisation():
    data = textures()
    pixels = data.pixels(data.where('test')[:6], Preprocessing(64, 64, channels=1))
    own, theirs = Preprocessing(64, 64, channels=1, mean=(0.3,), std=(0.2,)), Preprocessing(32, 32, 3, mean=(0.5,) * 3, std=(0.25,) * 3)
    seen = for_teacher(torch.from_numpy(normalize(pixels, own)), own, theirs)
    exact = torch.from_numpy(normalize(data.pixels(data.where('test')[:6], theirs), theirs))
    assert seen.shape == exact.shape and (seen - exact).abs().mean() < 0.1 * exact.std()  # another resampling, the same picture
    grey = for_teacher(torch.from_numpy(normalize(np.repeat(pixels, 3, 3), theirs)), Preprocessing(64, 64, 3, mean=(0.5,) * 3, std=(0.25,) * 3), own)
    assert torch.allclose(grey, torch.from_numpy(normalize(pixels, own)), atol=1e-4)


def test_goes_on_after_a_stop_and_refuses_another_teacher(teacher, tmp_path):
    class Stop(Callback):
        order = 200
        def after_epoch(self):
            if self.epoch == 1: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): fit(student(), 4, Distillation(teacher), Stop(), resume=tmp_path/'kept')
    with pytest.raises(InputError, match='another training'): fit(student(), 4, Distillation(student(7)), resume=tmp_path/'kept')
    went_on = fit(student(), 4, Distillation(teacher), resume=tmp_path/'kept')
    assert same(went_on, fit(student(), 4, Distillation(teacher)))


def test_what_cannot_be_is_said_in_a_sentence(teacher):
    with pytest.raises(InputError, match='above 0'): Distillation(teacher, temperature=0)
    with pytest.raises(InputError, match='between 0 and 1'): Distillation(teacher, weight=2)
    other = image_learner(textures(), 'small_cnn', size=8)
    with pytest.raises(InputError, match='must be the same'): fit(other, 1, Distillation(teacher))


def test_a_bare_network_teaches_too(teacher):
    assert same(fit(student(), 1, Distillation(teacher)), fit(student(), 1, Distillation(teacher.model)))


PROCESSES = '''
import sys
import torch
from imgcls_nb.data import digits
from imgcls_nb.distill import Distillation
from imgcls_nb.distributed import across_processes, is_first_process
from imgcls_nb.train import image_learner, train
torch.set_num_threads(1)
data = digits().split()
teacher = image_learner(data, 'lenet', size=28, augment='none', seed=5, batch_size=64)
learn = image_learner(data, 'lenet', size=28, augment='none', batch_size=64)
with across_processes(learn), learn.no_bar(), learn.no_logging():
    train(learn, 1, callbacks=(Distillation(teacher, weight=0.7),))
if is_first_process(): torch.save(learn.model.state_dict(), sys.argv[1])
'''


@pytest.mark.slow
def test_two_processes_learn_what_one_does(tmp_path):
    from test_distributed import LAUNCH
    script = tmp_path/'distill.py'
    script.write_text(PROCESSES)
    for count in (1, 2):
        launch = [*LAUNCH, str(count)] if count > 1 else []
        done = subprocess.run([sys.executable, *launch, str(script), str(tmp_path/f'{count}.pt')], cwd=ROOT, text=True,
                              capture_output=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = [torch.load(tmp_path/f'{count}.pt', weights_only=True) for count in (1, 2)]
    assert all(torch.allclose(one[name], two[name], atol=1e-3) for name in one)


def test_a_frozen_teacher_is_good_at_what_the_student_sees():
    from dataclasses import replace
    data = textures()
    few = data.items.groupby(['label', 'split']).cumcount() < np.where(data.items['split'] == 'train', 8, 6)
    small = image_learner(replace(data, items=data.items[few].reset_index(drop=True)), 'small_cnn', size=32, batch_size=16)
    listener, right = Distillation(frozen_teacher(small, size=64, passes=2)), []
    for x, y in small.dls[2]:
        right += (listener.answers(x, small.dls.train.dataset.preprocessing).argmax(1) == y).tolist()
    assert np.mean(right) > 0.6 and len(right) > 30
