"The main job, from source images to a proven bundle, through the command a user types."
import csv
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from conftest import IMGCLS, OFFLINE, assert_no_leftovers, assert_sentence, imgcls
from samples import BROKEN, MODES

PARTS = {'run.json', 'items.csv', 'log.csv', 'diagnostics.json', 'checkpoint', 'predictions.npz', 'report.html', 'metrics.json', 'bundle'}


def tree(folder: Path) -> dict[str, str]:
    "Every file below a folder with its checksum."
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in folder.rglob('*') if path.is_file()}


def test_digits_reach_their_accuracy(digits_run):
    assert digits_run['accuracy'] >= 0.98
    low, high = digits_run['accuracy_ci']
    assert low < digits_run['accuracy'] < high or digits_run['accuracy'] == high == 1
    assert digits_run['test_images'] >= 240


def test_the_run_folder_is_complete(digits_run):
    run = Path(digits_run['run'])
    assert {path.name for path in run.iterdir()} == PARTS
    assert_no_leftovers(run)
    record = json.loads((run/'run.json').read_text(encoding='utf-8'))
    assert record['state'] == 'finished' and record['source'] == 'digits' and record['seed'] == 0
    assert {'python', 'torch', 'fastai', 'timm', 'onnxruntime'} <= record['versions'].keys()
    assert record['hardware']['cores'] >= 1
    items = list(csv.DictReader((run/'items.csv').open(encoding='utf-8')))
    assert len(items) == 1797 and {row['split'] for row in items} == {'train', 'valid', 'test'}


def test_the_split_is_about_70_15_15(digits_run):
    rows = list(csv.DictReader((Path(digits_run['run'])/'items.csv').open(encoding='utf-8')))
    shares = {name: sum(row['split'] == name for row in rows) / len(rows) for name in ('train', 'valid', 'test')}
    assert abs(shares['train'] - 0.70) < 0.04 and abs(shares['valid'] - 0.15) < 0.03 and abs(shares['test'] - 0.15) < 0.03


def test_the_export_agrees_with_the_trained_model(digits_run):
    record = json.loads((Path(digits_run['bundle'])/'bundle.json').read_text(encoding='utf-8'))
    parity = record['runtimes']['onnx']['parity']
    assert parity['max_difference'] <= 1e-4
    assert parity['same_class'] == parity['images'] == digits_run['test_images']


def test_the_recorded_predictions_come_from_the_bundle(digits_run):
    "The figure in bundle.json is not taken on trust: the stored probabilities are computed again from raw pixels."
    from imgcls_nb.bundle import load_bundle
    from imgcls_nb.sources import load_images
    bundle = load_bundle(digits_run['bundle'])
    stored = np.load(Path(digits_run['run'])/'predictions.npz')
    pixels = load_images('digits').pixels(stored['rows'], bundle.preprocessing)
    found = bundle.predictor().probabilities(pixels)
    assert np.abs(found - stored['probabilities']).max() <= 1e-4
    assert len(set(found.argmax(1))) == 10, 'an untrained network would make this test empty'
    assert (found.argmax(1) == stored['targets']).mean() == pytest.approx(digits_run['accuracy'])


def test_int8_is_measured(digits_run):
    int8 = digits_run['int8']
    assert int8['bytes'] < digits_run['runtimes']['onnx']['bytes'] / 2
    assert int8['kept'] == ('onnx-int8' in digits_run['runtimes'])
    assert int8['latency_ms'] > 0 and 0.9 < int8['accuracy']['value'] <= 1


def test_the_report_needs_nothing_else(digits_run):
    page = (Path(digits_run['run'])/'report.html').read_text(encoding='utf-8')
    assert len(page) < 5_000_000 and page.count('data:image/png;base64,') >= 5
    assert 'http://' not in page and 'https://' not in page and '<script' not in page
    for heading in ('Confusion matrix', 'ROC', 'Mistakes', 'Runtimes', 'Training', 'onnx'): assert heading in page
    assert page.count('<img ') == page.count('alt="')


@pytest.fixture(scope='module')
def photo_run(photo_folder, tmp_path_factory):
    "A run over photographs of every mode, with the folder as it was before and after."
    folder, before = tmp_path_factory.mktemp('run of photos'), tree(photo_folder)
    result = imgcls('run', photo_folder, '--arch', 'small_cnn', '--epochs', '3', '--json', cwd=folder)
    assert result.returncode == 0, result.stderr
    return dict(json.loads(result.stdout), folder=folder, before=before, after=tree(photo_folder))


def test_nothing_in_the_source_folder_changes(photo_run):
    assert photo_run['before'] == photo_run['after']


def test_every_mode_is_used_and_broken_files_are_set_aside(photo_run):
    rows = list(csv.DictReader((photo_run['folder']/photo_run['run']/'items.csv').open(encoding='utf-8')))
    used = {Path(row['image']).name for row in rows if row['split']}
    aside = {Path(row['image']).name: row['set_aside'] for row in rows if row['set_aside']}
    expected = {f'{name}.{suffix}' for name, (_, suffix) in MODES.items()}
    assert expected | {'really a png.jpg', 'no suffix', 'turned.jpg', 'animated.gif'} <= used
    assert {name: reason.split(':')[0] for name, reason in aside.items()} == BROKEN


def test_predict_labels_files_and_folders(photo_run, photo_folder):
    bundle = photo_run['folder']/photo_run['bundle']
    result = imgcls('predict', bundle, photo_folder/'Green grass', '--json')
    assert result.returncode == 0, result.stderr
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(answers) == 24 and {a['label'] for a in answers} <= {'砖 块', 'Green grass', 'gravel é'}
    assert all(a['top'][0]['label'] == a['label'] for a in answers)


def test_predict_goes_on_after_a_broken_file(photo_run, photo_folder):
    bundle, first = photo_run['folder']/photo_run['bundle'], photo_folder/'砖 块'
    result = imgcls('predict', bundle, first/'cut off.jpg', first/'turned.jpg')
    assert_sentence(result, 'cut off.jpg', code=1)
    assert 'turned.jpg' in result.stdout.replace('\n', '')


def test_predict_sorts_copies(photo_run, photo_folder, tmp_path):
    bundle = photo_run['folder']/photo_run['bundle']
    result = imgcls('predict', bundle, photo_folder/'Green grass', '--sort-into', tmp_path/'sorted', '--json')
    assert result.returncode == 0
    assert sum(1 for path in (tmp_path/'sorted').rglob('*') if path.is_file()) == 24


def test_data_lists_findings(photo_folder):
    result = imgcls('data', photo_folder, '--json')
    assert result.returncode == 0, result.stderr
    findings = json.loads(result.stdout)
    assert all(set(finding) == {'kind', 'image', 'evidence', 'remedy'} for finding in findings)
    found = {Path(f['image']).name: f['kind'] for f in findings}
    assert BROKEN.items() <= found.items()
    assert found['really a png.jpg'] == 'misnamed'


def test_data_takes_labels_from_names_from_a_table_and_from_a_log(tmp_path):
    from PIL import Image
    from imgcls_nb.labelling import EditLog
    (tmp_path/'my photos').mkdir()
    for i in range(4): Image.linear_gradient('L').rotate(17 * i).save(tmp_path/'my photos'/f'猫_{i}.png')
    for i in range(4): Image.radial_gradient('L').rotate(17 * i).crop((i, 0, 200, 200)).save(tmp_path/'my photos'/f'dog_{i}.png')
    by_name = ['data', 'my photos', '--pattern', r'(?P<label>\w+?)_\d', '--out', 'table.csv', '--json']
    result = imgcls(*by_name, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    labels = [row['label'] for row in csv.DictReader((tmp_path/'table.csv').open(encoding='utf-8'))]
    assert sorted(labels) == ['dog'] * 4 + ['猫'] * 4
    EditLog(tmp_path/'edits.jsonl').label('dog_1.png', 'puppy')
    table = ['data', 'table.csv', '--images', 'my photos', '--edits', 'edits.jsonl', '--out', 'edited.csv', '--json']
    result = imgcls(*table, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    edited = {row['image']: row['label'] for row in csv.DictReader((tmp_path/'edited.csv').open(encoding='utf-8'))}
    assert edited['dog_1.png'] == 'puppy' and edited['dog_2.png'] == 'dog' and edited['猫_0.png'] == '猫'
    assert_sentence(imgcls('data', 'my photos', '--pattern', '(', cwd=tmp_path), 'no regular expression')

    bare = EditLog(tmp_path/'bare.jsonl')  # a folder without class folders: all labels come from the log
    for name in ('猫_0.png', '猫_1.png', 'dog_0.png', 'dog_1.png'): bare.label(name, name.split('_')[0])
    assert_sentence(imgcls('data', 'my photos', cwd=tmp_path), 'no images in class folders')
    result = imgcls('data', 'my photos', '--edits', 'bare.jsonl', '--out', 'bare.csv', '--json', cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    rows = list(csv.DictReader((tmp_path/'bare.csv').open(encoding='utf-8')))
    assert Counter(row['label'] for row in rows if row['label']) == {'猫': 2, 'dog': 2}
    assert len(rows) == 8


def test_data_has_nothing_against_digits():
    assert json.loads(imgcls('data', 'digits', '--json').stdout) == []


def test_a_missed_target_is_said_and_strict_fails(tmp_path):
    args = ['run', 'digits', '--epochs', '1', '--target', '1.0', '--strict', '--json']
    result = imgcls(*args, cwd=tmp_path)
    assert result.returncode == 1, result.stderr
    [requirement] = json.loads(result.stdout)['requirements']
    assert requirement['met'] is False and requirement['measured'] < 1


DAMAGE = '''
import sys, numpy as np, onnx
import imgcls_nb.export as export
from onnx import numpy_helper
honest = export.to_onnx
def damaged(*args):
    model = onnx.load_from_string(honest(*args))
    weight = max(model.graph.initializer, key=lambda t: np.prod(t.dims))
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * 1.5, weight.name))
    return model.SerializeToString()
export.to_onnx = damaged
from imgcls_nb.cli import main
sys.exit(main(sys.argv[1:]))
'''


def test_a_damaged_export_leaves_no_bundle(tmp_path):
    import os
    result = subprocess.run([sys.executable, '-c', DAMAGE, 'run', 'digits', '--epochs', '4'], cwd=tmp_path, text=True,
                            capture_output=True, env={**os.environ, **OFFLINE})
    assert_sentence(result, 'disagrees', 'No bundle was written', code=1)
    run = tmp_path/'runs'/'digits'
    assert not (run/'bundle').exists()
    assert json.loads((run/'run.json').read_text())['state'] == 'failed'
    assert_no_leftovers(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize('seed', [1, 2])
def test_other_seeds_reach_it_too(seed, tmp_path):
    summary = json.loads(imgcls('run', 'digits', '--json', '--seed', seed, cwd=tmp_path).stdout)
    assert summary['accuracy'] >= 0.98


@pytest.mark.slow
def test_photographs_are_fine_tuned(photo_folder, tmp_path):
    summary = json.loads(imgcls('run', photo_folder, '--json', cwd=tmp_path).stdout)
    assert summary['accuracy'] >= 0.8
    record = json.loads((tmp_path/summary['bundle']/'bundle.json').read_text(encoding='utf-8'))
    assert record['architecture'] == 'tf_efficientnet_lite0' and record['recipe']['pretrained']
    assert record['runtimes']['onnx']['parity']['max_difference'] <= 1e-4


def kill_after_an_epoch(run: Path, *command: str) -> None:
    "Start `imgcls` beside the folder `runs`, and kill it as soon as the run has a checkpoint."
    process = subprocess.Popen([IMGCLS, *command], cwd=run.parent.parent, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               env={**os.environ, **OFFLINE})
    try:
        while process.poll() is None and not (run/'checkpoint').exists(): time.sleep(0.02)
    finally:
        process.kill()
        process.wait()


def test_a_killed_run_goes_on_to_the_same_weights(tmp_path):
    options = ['run', 'digits', '--size', '16', '--epochs', '8', '--mix', 'mixup', '--json']
    whole = imgcls(*options, '--runs', tmp_path/'whole', cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    run = tmp_path/'runs'/'digits'
    kill_after_an_epoch(run, *options)
    assert not (run/'bundle').exists(), 'the run ended before it could be killed'
    resumed = imgcls('run', '--resume', run, '--json', cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    weights = [(folder/'bundle'/'model.safetensors').read_bytes() for folder in (run, tmp_path/'whole'/'digits')]
    assert weights[0] == weights[1]
    assert json.loads(resumed.stdout)['accuracy'] == json.loads(whole.stdout)['accuracy']
    logs = [[row['valid_loss'] for row in csv.DictReader((folder/'log.csv').open())] for folder in (run, tmp_path/'whole'/'digits')]
    assert len(logs[0]) == 8 and logs[0] == logs[1]
    assert_sentence(imgcls('run', '--resume', run, cwd=tmp_path), 'is finished')


def test_a_run_goes_on_with_its_own_images_alone(photo_folder, tmp_path):
    shutil.copytree(photo_folder, tmp_path/'photos')
    run = tmp_path/'runs'/'photos'
    kill_after_an_epoch(run, 'run', 'photos', '--arch', 'small_cnn', '--size', '32', '--epochs', '400')
    used = next(row['image'] for row in csv.DictReader((run/'items.csv').open(encoding='utf-8')) if row['split'])
    (tmp_path/'photos'/used).unlink()
    assert_sentence(imgcls('run', '--resume', run, cwd=tmp_path), 'have changed')
    assert_sentence(imgcls('run', '--resume', tmp_path/'photos', cwd=tmp_path), 'not a run')
    assert_sentence(imgcls('run', cwd=tmp_path), 'Name a source')


def test_step_by_step_is_the_same_as_all_at_once(photo_run, photo_folder):
    folder, whole = photo_run['folder'], Path(photo_run['folder'], photo_run['run'])
    trained = imgcls('train', photo_folder, '--arch', 'small_cnn', '--epochs', '3', '--name', 'steps', '--json', cwd=folder)
    steps = folder/'runs'/'steps'
    assert trained.returncode == 0, trained.stderr
    assert json.loads(trained.stdout)['epochs'] == 3 and not (steps/'metrics.json').exists()
    assert_sentence(imgcls('compress', steps, cwd=folder), 'imgcls export')
    seconds, watched = json.loads((steps/'run.json').read_text())['stage_seconds']['train'], (steps/'diagnostics.json').read_bytes()

    evaluated = imgcls('evaluate', steps, '--json', cwd=folder)
    assert evaluated.returncode == 0, evaluated.stderr
    assert json.loads(evaluated.stdout)['metrics'] == photo_run['metrics']
    assert (steps/'report.html').exists() and not (steps/'bundle').exists()
    assert json.loads((steps/'run.json').read_text())['stage_seconds']['train'] == seconds  # nothing is trained again
    assert (steps/'diagnostics.json').read_bytes() == watched

    exported = imgcls('export', steps, '--json', cwd=folder)
    assert exported.returncode == 0, exported.stderr
    assert list(json.loads(exported.stdout)['runtimes']) == ['onnx']
    weights = [(each/'bundle'/'model.safetensors').read_bytes() for each in (steps, whole)]
    assert weights[0] == weights[1]
    assert_sentence(imgcls('train', '--resume', steps, cwd=folder), 'is finished')
    assert_sentence(imgcls('evaluate', folder, cwd=folder), 'not a run')


def test_a_training_that_was_cut_off_is_not_evaluated(tmp_path):
    run = tmp_path/'runs'/'digits'
    kill_after_an_epoch(run, 'train', 'digits', '--arch', 'simple_cnn', '--epochs', '200')
    assert_sentence(imgcls('evaluate', run, cwd=tmp_path), 'imgcls train --resume')
