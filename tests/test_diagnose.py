"The doctor: rules on plain numbers, planted faults, healthy trainings, what a run's folder tells, and odd cases."
import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from faults_planted import BUDGET_MS, FAULTS, HEALTHY, REMEDIES, fit, learner, mend, plant, SETTINGS, two_classes
from imgcls_nb.data import digits, from_arrays
from imgcls_nb.diagnose import RULES, TINY_BATCH, Evidence, Watch, _count_findings, diagnose, observe_run
from imgcls_nb.run import InputError, create_run
from imgcls_nb.train import TrainingError, image_learner, train

from conftest import assert_sentence, imgcls

QUICK = ['vanishing gradients', 'frozen layers', 'wrong normalisation', 'diverged', 'imbalance']
QUICK_HEALTHY = ['digits, seed 0', 'digits, two classes']


@pytest.mark.parametrize('name', [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in FAULTS])
@pytest.mark.parametrize('setting', ['digits', pytest.param('textures', marks=pytest.mark.slow)])
def test_a_planted_fault_is_named_first_or_second(name, setting):
    found = plant(name, setting)[1]
    assert name in found.names[:2]
    compile(found[found.names.index(name)].remedy, 'remedy', 'exec')


@pytest.mark.parametrize('name', [pytest.param(name, marks=() if name in QUICK_HEALTHY else pytest.mark.slow) for name in HEALTHY])
def test_nothing_serious_is_said_about_a_healthy_training(name):
    assert diagnose(HEALTHY[name]()).serious == []


@pytest.mark.slow
@pytest.mark.parametrize('name', REMEDIES)
def test_a_remedy_runs_as_printed_and_helps(name):
    assert mend(name, 'digits')['better']


def test_no_evidence_gives_no_diagnosis():
    assert not [rule for rule in RULES if rule(Evidence()) is not None]
    assert set(BUDGET_MS) <= set(FAULTS) and len(FAULTS) >= 16


def test_the_figures_are_said_in_sentences():
    def said(**evidence): return diagnose(Evidence(trained=True, **evidence))[0].evidence
    assert said(broken_tensors=1) == '1 tensor of weights is not finite'
    assert said(broken_tensors=2, diverged=dict(loss='nan', step=3, learning_rate=0.1)) == (
        'the loss became nan at step 3, learning rate 0.1; 2 tensors of weights are not finite')
    assert said(diverged=dict(loss='nan', step=3, learning_rate=0.1)) == 'the loss became nan at step 3, learning rate 0.1'
    assert said(batch_norm=True, batch_size=2).startswith(f'2 images in a batch; at {TINY_BATCH} or fewer')
    assert not diagnose(Evidence(trained=True, batch_norm=True, batch_size=TINY_BATCH + 1))
    table = digits().split()
    twice = pd.concat([table.items, table.items[table.items['split'] == 'train'].head(2).assign(split='test')], ignore_index=True)
    found = _count_findings(replace(table, items=twice).scan().check())['leak']
    assert found[0] == 2 and re.fullmatch(r'(\d+): is listed twice; splits: test, train', found[1])
    assert said(findings=dict(leak=found)).startswith('2 findings, such as: ')
    shortcut = dict(kind='shortcut', image='brightness', evidence='alone it tells the class', remedy='')
    assert said(findings=_count_findings([shortcut])) == '1 finding: brightness: alone it tells the class'


def test_watching_changes_no_weight_and_its_record_is_json():
    def weights(*callbacks):
        learn = image_learner(digits().split(), 'small_cnn', size=8, augment='digits', device='cpu')
        with learn.no_bar(), learn.no_logging(): train(learn, 2, 1e-2, callbacks)
        return torch.cat([p.flatten() for p in learn.model.state_dict().values()]), learn
    plain, watched = weights()[0], weights(Watch(3))
    assert torch.equal(plain, watched[0])
    record = watched[1].watched
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert record['steps'] == 2 * len(watched[1].dls.train) == len(record['losses'])


def test_a_learner_without_training_or_with_broken_weights():
    learn = learner(SETTINGS['digits'])
    found = diagnose(learn)
    assert not found and 'not been trained' in found.not_seen[0] and 'Not looked at' in found._repr_html_()
    with torch.no_grad(): next(learn.model.parameters()).fill_(float('nan'))
    assert diagnose(learn).names == ['diverged']


def test_ten_images_two_classes_one_epoch():
    pixels = np.random.default_rng(0).integers(0, 255, (10, 8, 8), dtype=np.uint8)
    data = from_arrays(pixels, list('ab' * 5), ['train'] * 6 + ['valid'] * 2 + ['test'] * 2)
    learn = fit(image_learner(data, 'small_cnn', size=8, augment='none', batch_size=3, device='cpu'), 1)
    assert isinstance(diagnose(learn).names, list)
    assert not diagnose(fit(learner(SETTINGS['digits'], two_classes(digits().split())), 1)).names[2:]


def test_the_doctor_reads_a_finished_run(digits_run, tmp_path):
    result = imgcls('doctor', digits_run['run'], '--json')
    found = json.loads(result.stdout)
    assert result.returncode == 0 and found['not_seen'] == []
    assert not [d for d in found['diagnoses'] if d['severity'] == 'serious']
    old = shutil.copytree(digits_run['run'], tmp_path/'old')
    (old/'diagnostics.json').unlink()
    result = imgcls('doctor', old)
    assert result.returncode == 0 and 'diagnostics.json is not there' in result.stdout


def test_a_run_that_serves_with_another_normalisation_is_found(digits_run, tmp_path):
    run = shutil.copytree(digits_run['run'], tmp_path/'run')
    record = json.loads((run/'bundle'/'bundle.json').read_text())
    record['preprocessing'] |= dict(mean=[0.0], std=[1.0])
    (run/'bundle'/'bundle.json').write_text(json.dumps(record))
    assert diagnose(observe_run(run)).names[0] == 'wrong normalisation'


def test_a_diverged_run_leaves_enough_for_a_diagnosis(tmp_path):
    result = imgcls('run', 'digits', '--arch', 'simple_cnn', '--epochs', '1', '--learning-rate', '1e30', cwd=tmp_path)
    assert_sentence(result, 'The loss became', code=1)
    found = json.loads(imgcls('doctor', tmp_path/'runs'/'digits', '--json').stdout)
    assert found['diagnoses'][0]['name'] == 'diverged' and any('failed' in text for text in found['not_seen'])


def test_what_is_no_run_gets_a_sentence(tmp_path):
    assert_sentence(imgcls('doctor', tmp_path), 'is not a run')
    run = create_run('empty', tmp_path)
    found = diagnose(observe_run(run))
    assert not found and any('running' in text for text in found.not_seen)
    for part in ('diagnostics.json', 'log.csv', 'items.csv', 'predictions.npz'): (run.folder/part).write_text('{')
    assert imgcls('doctor', run.folder).returncode == 0
    with pytest.raises(InputError): observe_run(tmp_path/'nowhere')


def test_divergence_is_noted_before_training_stops():
    learn = learner(SETTINGS['digits'])
    with learn.no_bar(), learn.no_logging(), pytest.raises(TrainingError):
        learn.loss_func = lambda logits, y: logits.sum() * float('nan')
        train(learn, 1, 1e-2, (Watch(),))
    assert learn.watched['diverged']['step'] == 0 and diagnose(learn).names[0] == 'diverged'
