"Two processes, started for real by Accelerate, train as one does; and what would spoil that is refused."
import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from conftest import ROOT, assert_sentence, imgcls

SCRIPT = '''
import json, os, sys
from dataclasses import replace
import torch
from fastai.callback.core import Callback
from imgcls_nb.data import digits
from imgcls_nb.distributed import across_processes, is_first_process
from imgcls_nb.train import EpochLog, image_learner, model_bytes, train

torch.set_num_threads(1)
folder, case, killed_at = sys.argv[1], sys.argv[2], int(sys.argv[3])
rank = int(os.environ.get('RANK', 0))

class Kill(Callback):
    order, done = 1000, 0
    def after_batch(self):
        if not self.training: return
        self.done += 1
        if self.done == killed_at: os.kill(os.getpid(), 9)

class EveryLoss(Callback):
    "The loss of each step, averaged over the processes."
    def before_fit(self): self.values = []
    def after_batch(self):
        if self.training: self.values.append(float(self.learn.to_detach(self.loss)))

data = digits().split(seed=rank if case == 'other images' else 0)
learn = image_learner(data, 'lenet', size=28, augment='none', seed=rank if case == 'other seed' else 0,
                      batch_size=63 if case == 'uneven' else 64, balance='sampler' if case == 'sampler' else 'none')
losses = EveryLoss()
with across_processes(learn), learn.no_bar(), learn.no_logging():
    train(learn, 3, callbacks=(EpochLog(folder + '/log.csv'), losses, Kill()), resume=folder + '/checkpoint')
if is_first_process():
    with learn.no_bar(): probabilities, targets = learn.get_preds(2)
    with open(folder + '/weights', 'wb') as file: file.write(model_bytes(learn.model))
    json.dump(dict(losses=losses.values, tested=len(targets),
                   probabilities=probabilities.tolist()), open(folder + '/out.json', 'w'))
'''
LAUNCH = ['-m', 'accelerate.commands.accelerate_cli', 'launch', '--multi_gpu', '--num_machines', '1', '--mixed_precision', 'no',
          '--dynamo_backend', 'no', '--main_process_port', '0', '--num_processes']


def start(folder, processes: int, case: str = '', killed_at: int = 0) -> subprocess.CompletedProcess:
    folder.mkdir(exist_ok=True)
    (folder/'train.py').write_text(SCRIPT)
    launch = [*LAUNCH, str(processes)] if processes > 1 else []
    return subprocess.run([sys.executable, *launch, str(folder/'train.py'), str(folder), case, str(killed_at)],
                          text=True, capture_output=True, timeout=300, cwd=ROOT)


def results(folder) -> dict: return json.loads((folder/'out.json').read_text())


@pytest.mark.parametrize('case', ['', 'sampler'])
def test_two_processes_train_as_one_does(case, tmp_path):
    for processes in (1, 2):
        done = start(tmp_path/str(processes), processes, case)
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = results(tmp_path/'1'), results(tmp_path/'2')
    assert len(one['losses']) == len(two['losses']) == 57 and one['losses'][-1] < 0.7 * one['losses'][0]
    assert np.abs(np.subtract(one['losses'], two['losses'])).max() < 1e-4
    logs = [pd.read_csv(tmp_path/name/'log.csv').drop(columns='seconds') for name in '12']
    assert len(logs[0]) == 3 and np.allclose(*logs, atol=5e-3)  # accuracy may step by one image
    assert one['tested'] == two['tested'] > 200  # afterwards the first process predicts alone, each image once
    assert np.allclose(one['probabilities'], two['probabilities'], atol=1e-3)


@pytest.mark.parametrize('case, sentence', [('other seed', 'do not have the same'), ('other images', 'do not have the same images'),
                                            ('uneven', 'take batch_size=62')])
def test_processes_that_do_not_fit_together(case, sentence, tmp_path):
    done = start(tmp_path, 2, case)
    assert done.returncode != 0 and sentence in done.stderr and not (tmp_path/'out.json').exists()


@pytest.mark.slow
def test_two_processes_killed_and_resumed(tmp_path):
    assert start(tmp_path/'whole', 2).returncode == 0
    assert start(tmp_path/'cut', 2, killed_at=45).returncode != 0  # both, in the third epoch
    assert start(tmp_path/'cut', 2).returncode == 0
    assert (tmp_path/'cut'/'weights').read_bytes() == (tmp_path/'whole'/'weights').read_bytes()


def test_layers_are_put_back_after_training():
    "`SyncBatchNorm` is for GPUs; what it learned is kept, and it goes when the training ends."
    import torch
    from torch import nn

    from imgcls_nb.distributed import _put_back
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    before, layers = model[1], dict(model.named_modules())
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert isinstance(converted[1], nn.SyncBatchNorm)
    with torch.no_grad(): converted[1].running_mean.fill_(3), converted[1].weight.fill_(2)
    _put_back(converted, layers)
    assert converted[1] is before and before.running_mean.eq(3).all() and before.weight.eq(2).all()


def test_the_command_is_for_one_process(tmp_path, monkeypatch):
    "Started by a launcher, each process would make a run of its own."
    monkeypatch.setenv('WORLD_SIZE', '2')
    assert_sentence(imgcls('run', 'digits', cwd=tmp_path), 'across_processes')
    assert not (tmp_path/'runs').exists()
