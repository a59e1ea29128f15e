"Training: the loop and the Learner agree, a killed run goes on to the same bits, and what can go wrong is said in a sentence."
import random
import signal
import subprocess
import sys

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

CPU = torch.device('cpu')
TRAIN = '''
import sys, os
from pathlib import Path
import torch
from fastai.callback.core import Callback
from fastai.callback.training import GradientAccumulation
from dataclasses import replace
from imgcls_nb.data import digits, textures
from imgcls_nb.augment import mixing
from imgcls_nb.train import EpochLog, image_learner, train

torch.set_num_threads(1)
kind, folder, killed_at = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])

class Kill(Callback):
    "Ends the process as a power cut does, after a given number of batches."
    order, done = 1000, 0
    def after_batch(self):
        if not self.training: return
        self.done += 1
        if self.done == killed_at: os.kill(os.getpid(), 9)

def thinned(data, each):
    data = data.scan()
    few = data.items.groupby(['label', 'split']).cumcount() < each
    return replace(data, items=data.items[few].reset_index(drop=True))

if kind == 'from scratch':
    data, options, epochs = thinned(digits().split(), 30), dict(size=8, batch_size=32, balance='sampler'), 4
    callbacks = (*mixing('mixup'), GradientAccumulation(70))
else:
    data, epochs = thinned(textures(), 12), 2
    options, callbacks = dict(architecture='tf_efficientnet_lite0', size=32, batch_size=16), ()
learn = image_learner(data, **options, device=torch.device('cpu'))
with learn.no_bar(), learn.no_logging():
    train(learn, epochs, callbacks=(EpochLog(folder/'log.csv'), Kill(), *callbacks), resume=folder/'checkpoint')
print(len(learn.dls.train))
'''


def run_training(kind, folder, killed_at=0) -> subprocess.CompletedProcess:
    "Train in a process of its own, and kill it after some batches."
    return subprocess.run([sys.executable, '-c', TRAIN, kind, str(folder), str(killed_at)], text=True, capture_output=True, timeout=300)


def kept(folder) -> dict:
    "What must be the same: the bytes of the weights and of all other state, and the log without its times."
    files = {path.name: path.read_bytes() for path in (folder/'checkpoint').iterdir()}
    return files, pd.read_csv(folder/'log.csv').drop(columns='seconds').to_dict()


@pytest.fixture(scope='module', params=['from scratch', 'pretrained'])
def uninterrupted(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp('whole')
    result = run_training(request.param, folder)
    assert result.returncode == 0, result.stderr
    epochs = 4 if request.param == 'from scratch' else 3  # one on the head
    return request.param, epochs * int(result.stdout), folder


def killed_and_resumed(uninterrupted, folder, moments):
    "Kill a training at each of the moments, let it go on each time, and compare with the one that was left alone."
    kind, _, whole = uninterrupted
    for moment in moments:
        result = run_training(kind, folder, moment)
        assert result.returncode in (-signal.SIGKILL, 0), result.stderr
    result = run_training(kind, folder)
    assert result.returncode == 0, result.stderr
    (files, log), (expected_files, expected_log) = kept(folder), kept(whole)
    assert log == expected_log
    assert files['model.safetensors'] == expected_files['model.safetensors']
    assert files['training.safetensors'] == expected_files['training.safetensors']


@pytest.mark.skipif(sys.platform == 'win32', reason='signals work differently on Windows')
@pytest.mark.parametrize('repeat', [0, *[pytest.param(i, marks=pytest.mark.slow) for i in range(1, 5)]])
def test_killed_at_a_random_batch_and_resumed(uninterrupted, repeat, tmp_path):
    steps = uninterrupted[1]
    moment = random.Random(repeat).randrange(steps // 3, steps)  # after the first epoch, so that there is something to go on from
    killed_and_resumed(uninterrupted, tmp_path, [moment])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == 'win32', reason='signals work differently on Windows')
def test_killed_again_and_again(uninterrupted, tmp_path):
    steps = uninterrupted[1]
    killed_and_resumed(uninterrupted, tmp_path, [steps // 2, 3, steps // 3 + 1])


def test_a_kill_between_two_renames_loses_nothing(tmp_path):
    from imgcls_nb.train import _recover
    (tmp_path/'.checkpoint.old.partial-1').mkdir()
    (tmp_path/'.checkpoint.old.partial-1'/'state.json').write_text('{}')
    (tmp_path/'.checkpoint.partial-1').mkdir()
    _recover(tmp_path/'checkpoint')
    assert [path.name for path in tmp_path.iterdir()] == ['checkpoint'] and (tmp_path/'checkpoint'/'state.json').exists()


@pytest.fixture(scope='module')
def few():
    "Thirty digits of each class and split."
    from dataclasses import replace

    from imgcls_nb.data import digits
    data = digits().split()
    chosen = data.items.groupby(['label', 'split']).cumcount() < 30
    return replace(data, items=data.items[chosen].reset_index(drop=True))


def silent(learn, *args, **options):
    from imgcls_nb.train import train
    with learn.no_bar(), learn.no_logging(): return train(learn, *args, **options)


@pytest.fixture
def learn(few):
    from imgcls_nb.train import image_learner
    return image_learner(few, size=8, batch_size=32, device=CPU)


@pytest.mark.parametrize('name', ['state.json', 'model.safetensors', 'training.safetensors'])
def test_a_damaged_checkpoint(few, learn, name, tmp_path):
    from imgcls_nb.run import InputError
    silent(learn, 1, resume=tmp_path/'checkpoint')
    file = tmp_path/'checkpoint'/name
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(InputError, match='delete the folder') as caught: silent(learn, 1, resume=tmp_path/'checkpoint')
    assert str(caught.value).startswith('The checkpoint in')


def test_a_checkpoint_of_another_training(few, learn, tmp_path):
    from imgcls_nb.run import InputError
    silent(learn, 1, resume=tmp_path/'checkpoint')
    with pytest.raises(InputError, match='its epochs is 1, and here it is 2'): silent(learn, 2, resume=tmp_path/'checkpoint')


def test_a_finished_training_is_not_trained_again(few, learn, tmp_path):
    from imgcls_nb.train import EpochLog, image_learner, model_bytes
    silent(learn, 1, callbacks=(EpochLog(tmp_path/'log.csv'),), resume=tmp_path/'checkpoint')
    again, log = image_learner(few, size=8, batch_size=32, device=CPU), (tmp_path/'log.csv').read_bytes()
    silent(again, 1, callbacks=(EpochLog(tmp_path/'log.csv'),), resume=tmp_path/'checkpoint')
    assert model_bytes(again.model) == model_bytes(learn.model) and (tmp_path/'log.csv').read_bytes() == log


def test_the_loop_by_hand_and_the_learner_give_the_same_losses(few):
    "With shuffled batches, dropout and augmentation: every step of three epochs."
    from copy import deepcopy

    import torch.nn.functional as F
    from fastai.callback.core import Callback
    from fastai.optimizer import SGD
    from imgcls_nb.train import image_learner
    losses, steps = [], []

    class Keep(Callback):
        def after_batch(self):
            if self.training: losses.append(self.loss.item())

    def prepared():
        learn = image_learner(few, 'simple_cnn', size=8, batch_size=32, device=CPU)
        learn.opt_func, learn.wd = SGD, 0
        _ = learn.dls.n_inp  # fastai's first look at a batch draws random numbers
        torch.manual_seed(1)
        return learn
    learn = prepared()
    with learn.no_bar(), learn.no_logging(): learn.fit(3, 0.1, cbs=Keep())
    by_hand = prepared()
    model = deepcopy(by_hand.model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        model.train()
        for x, y in by_hand.dls.train:
            loss = F.cross_entropy(model(x.as_subclass(torch.Tensor)), y.as_subclass(torch.Tensor))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            steps.append(loss.item())
        list(by_hand.dls.valid)  # the loader draws a number here too
    assert len(steps) == len(losses) == 3 * len(learn.dls.train)
    assert steps == pytest.approx(losses, abs=1e-5)


def test_a_loss_that_is_not_a_number(few, tmp_path):
    from imgcls_nb.train import EpochLog, TrainingError, image_learner
    learn = image_learner(few, 'simple_cnn', size=8, batch_size=32, device=CPU)
    silent(learn, 1, callbacks=(EpochLog(tmp_path/'log.csv'),), resume=tmp_path/'checkpoint')
    with torch.no_grad(): next(learn.model.parameters()).fill_(float('nan'))
    with pytest.raises(TrainingError, match='^The loss became nan in epoch 1 of 1, training batch 1 of .* learning rate of'):
        silent(learn, 1, callbacks=(EpochLog(tmp_path/'log.csv'),))
    assert len(pd.read_csv(tmp_path/'log.csv')) == 1 and load_file(tmp_path/'checkpoint'/'model.safetensors')


MEMORY = '''
import resource, torch
from pathlib import Path
from imgcls_nb.data import digits
from imgcls_nb.train import TrainingError, image_learner, train
torch.set_num_threads(1)
learn = image_learner(digits().split(), size=96, batch_size=1024, augment='none', device=torch.device('cpu'))
used = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 1_000_000_000, -1))
with learn.no_bar(), learn.no_logging():
    try: train(learn, 1)
    except TrainingError as error: print(error)
'''


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='a limit of the address space')
def test_out_of_memory_names_a_batch_that_fits():
    result = subprocess.run([sys.executable, '-c', MEMORY], text=True, capture_output=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith('Out of memory with 1024 images in a batch on cpu; batch_size='), result.stdout + result.stderr
    assert 2 <= int(result.stdout.split('batch_size=')[1].split()[0]) < 1024


def test_more_classes_than_images(few):
    from dataclasses import replace

    from imgcls_nb.run import InputError
    from imgcls_nb.train import image_learner
    rows = few.items.groupby('split').head(5).reset_index(drop=True)
    with pytest.raises(InputError, match=r'more classes \(10\) than training images \(5\)'): image_learner(replace(few, items=rows))


def test_pictures_too_small_for_an_architecture(few):
    from imgcls_nb.run import InputError
    from imgcls_nb.train import image_learner
    with pytest.raises(InputError, match='simple_cnn cannot take images of 2 × 2 pixels'): image_learner(few, 'simple_cnn', size=2)


def test_seeds_are_kept_and_not_trained_twice(few, tmp_path):
    from imgcls_nb.train import train_seeds
    runs = train_seeds(few, (3, 4), tmp_path, epochs=1, size=8, batch_size=32, device=CPU)
    again = train_seeds(few, (3, 4), tmp_path, epochs=1, size=8, batch_size=32, device=CPU)
    assert (runs.probabilities == again.probabilities).all() and not (runs.probabilities[0] == runs.probabilities[1]).all()
    assert {path.name for path in (tmp_path/'seed-4').iterdir()} == {'log.csv', 'checkpoint', 'predictions.npz'}
    assert runs.mean == pytest.approx(((runs.probabilities.argmax(2) == runs.targets).mean(1)).mean())


def test_an_average_of_the_weights_survives_a_kill(few, tmp_path):
    "Interrupted in the third epoch and resumed: the average at the end is the one of a training left alone."
    from fastai.callback.core import Callback

    from imgcls_nb.averaging import Ema
    from imgcls_nb.train import image_learner, model_bytes

    class Interrupt(Callback):
        def after_batch(self):
            if self.training and self.train_iter == 22: raise KeyboardInterrupt

    def trained(folder, *callbacks):
        learn = image_learner(few, size=8, batch_size=32, device=CPU)
        silent(learn, 4, callbacks=(Ema(0.9), *callbacks), resume=folder)
        return model_bytes(learn.model)

    with pytest.raises(KeyboardInterrupt): trained(tmp_path/'cut', Interrupt())
    assert trained(tmp_path/'cut') == trained(tmp_path/'whole')


def test_an_average_is_not_the_weights_and_changes_nothing_in_training(few):
    import torch

    from imgcls_nb.averaging import Ema
    from imgcls_nb.train import image_learner

    def trained(*callbacks):
        learn = image_learner(few, size=8, batch_size=32, device=CPU)
        silent(learn, 2, 1e-2, callbacks)
        return learn
    plain, averaged = trained(), trained(Ema(0.99))
    assert torch.equal(torch.stack(plain.recorder.losses), torch.stack(averaged.recorder.losses))  # nothing is fed back
    assert plain.recorder.values[-1][1] != averaged.recorder.values[-1][1]  # and validation is the average's


def test_smote_and_an_average_of_the_weights_exclude_each_other():
    from imgcls_nb.averaging import Ema
    from imgcls_nb.data import digits
    from imgcls_nb.run import InputError
    from imgcls_nb.train import image_learner, train
    learn = image_learner(digits().split(), 'lenet', size=28, balance='smote')
    with learn.no_bar(), learn.no_logging(), pytest.raises(InputError, match='leave out one of the two'): train(learn, 1, callbacks=[Ema()])
