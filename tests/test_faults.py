"Bad input and bad luck: one clear sentence, a code that is not 0, nothing half-written."
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from PIL import Image

from conftest import IMGCLS, OFFLINE, assert_no_leftovers, assert_sentence, imgcls


def make_classes(root, **counts):
    "A folder with small grey pictures, each different."
    for label, count in counts.items():
        (root/label).mkdir(parents=True)
        for i in range(count): Image.effect_noise((16, 16), 20 + i).save(root/label/f'{i}.png')
    return root


@pytest.fixture
def copied_bundle(digits_run, tmp_path):
    "A bundle that a test may damage."
    return shutil.copytree(digits_run['bundle'], tmp_path/'bundle')


def test_unknown_source(tmp_path):
    assert_sentence(imgcls('run', 'digitz', cwd=tmp_path), "'digitz'", 'digits')
    assert not list(tmp_path.iterdir())


def test_a_file_as_source(tmp_path):
    (tmp_path/'table.csv').write_text('a,b')
    assert_sentence(imgcls('run', 'table.csv', cwd=tmp_path), 'table.csv', 'folder')


def test_an_empty_folder(tmp_path):
    (tmp_path/'empty').mkdir()
    assert_sentence(imgcls('run', 'empty', cwd=tmp_path), 'holds no images')
    assert_sentence(imgcls('data', 'empty', cwd=tmp_path), 'holds no images')


def test_one_class_only(tmp_path):
    make_classes(tmp_path/'photos', cats=5)
    assert_sentence(imgcls('run', 'photos', cwd=tmp_path), 'one class', 'cats')


def test_one_image_a_class(tmp_path):
    make_classes(tmp_path/'photos', cats=1, dogs=1)
    assert_sentence(imgcls('run', 'photos', cwd=tmp_path), 'cats', 'at least 3')


def test_nothing_but_broken_files(tmp_path):
    for label in ('cats', 'dogs'):
        (tmp_path/'photos'/label).mkdir(parents=True)
        (tmp_path/'photos'/label/'1.jpg').write_bytes(b'')
    assert_sentence(imgcls('run', 'photos', cwd=tmp_path), 'can be opened')


def test_classes_that_clash_in_lower_case(tmp_path):
    make_classes(tmp_path/'photos', Cats=5, cats=5)
    assert_sentence(imgcls('run', 'photos', cwd=tmp_path), "'Cats'", "'cats'")


def test_no_permission_to_write(tmp_path):
    (tmp_path/'file').write_text('')
    assert_sentence(imgcls('run', 'digits', '--runs', tmp_path/'file'/'runs', cwd=tmp_path), '--runs')
    if os.path.isdir('/proc/1'): assert_sentence(imgcls('run', 'digits', '--runs', '/proc/1/runs', cwd=tmp_path), '--runs')


@pytest.mark.parametrize('option', [['--arch', 'resnet1'], ['--augment', 'upside-down'], ['--metric', 'f2'], ['--target', '98'],
                                    ['--size', '2', '--arch', 'simple_cnn'], ['--edits', 'no log']])
def test_options_that_make_no_sense(option, tmp_path):
    assert_sentence(imgcls('run', 'digits', '--epochs', '1', *option, cwd=tmp_path))
    assert_no_leftovers(tmp_path)
    assert not list(tmp_path.rglob('log.csv')), 'nothing is trained before it is refused'


@pytest.mark.parametrize('option, words', [('arch', 'resnet1'), ('augment', 'none, digits'), ('balance', 'oversample'), ('mix', 'cutmix')])
def test_a_name_that_nothing_has_leaves_no_run_behind(option, words, tmp_path):
    from imgcls_nb.cli import main
    from imgcls_nb.run import InputError
    import contextlib
    import io
    with contextlib.redirect_stderr(io.StringIO()) as said:
        assert main(['run', 'digits', f'--{option}', 'upside-down-resnet1', '--runs', str(tmp_path/'runs')]) == InputError.exit_code
    assert words in said.getvalue() and not (tmp_path/'runs').exists()


def test_an_unknown_architecture_names_the_nearest(tmp_path):
    assert_sentence(imgcls('run', 'digits', '--arch', 'resnet_18', cwd=tmp_path), 'resnet18')


def test_weights_that_are_not_at_hand(tmp_path):
    result = imgcls('run', 'textures', '--arch', 'efficientnet_lite0', cwd=tmp_path)
    assert_sentence(result, 'efficientnet_lite0', 'tf_efficientnet_lite0', 'padding')


@pytest.mark.parametrize('args', [[], ['run', 'digits', '--epochs', '0'], ['predict', 'somewhere'], ['dance']])
def test_wrong_arguments(args):
    result = imgcls(*args)
    assert result.returncode == 2 and result.stderr.startswith('usage:') and 'Traceback' not in result.stderr


FULL_DISK = '''
import resource, sys
import imgcls_nb.export as module
honest = module.export
def on_a_full_disk(*args):
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    return honest(*args)
module.export = on_a_full_disk
from imgcls_nb.cli import main
sys.exit(main(sys.argv[1:]))
'''


@pytest.mark.skipif(sys.platform == 'win32', reason='no file size limits on Windows')
def test_the_disk_fills_up_at_export(tmp_path):
    "The kernel refuses to write beyond a limit, as it does on a full disk."
    result = subprocess.run([sys.executable, '-c', FULL_DISK, 'run', 'digits', '--epochs', '1'], cwd=tmp_path, text=True,
                            capture_output=True, env={**os.environ, **OFFLINE})
    assert_sentence(result, 'disk is full', code=1)
    run = tmp_path/'runs'/'digits'
    assert not (run/'bundle').exists() and (run/'metrics.json').exists()
    assert json.loads((run/'run.json').read_text())['state'] == 'failed'
    assert_no_leftovers(tmp_path)


@pytest.mark.skipif(sys.platform == 'win32', reason='signals work differently on Windows')
@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_interrupted_in_training(number, tmp_path):
    process = subprocess.Popen([IMGCLS, 'run', 'digits', '--epochs', '500'], cwd=tmp_path,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **OFFLINE})
    log, deadline = tmp_path/'runs'/'digits'/'log.csv', time.monotonic() + 120
    while not log.exists() and time.monotonic() < deadline: time.sleep(0.2)
    process.send_signal(number)
    try: stdout, stderr = process.communicate(timeout=60)
    finally: process.kill()
    assert_sentence(subprocess.CompletedProcess([], process.returncode, stdout, stderr), 'interrupted', 'digits', code=130)
    record = json.loads((tmp_path/'runs'/'digits'/'run.json').read_text())
    assert record['state'] == 'interrupted' and record['stage'] == 'train'
    assert not (tmp_path/'runs'/'digits'/'bundle').exists()
    assert_no_leftovers(tmp_path)


@pytest.mark.skipif(sys.platform == 'win32', reason='signals work differently on Windows')
def test_killed_in_training(tmp_path):
    "Nobody can tidy up after kill -9, but every part that is there is whole."
    process = subprocess.Popen([IMGCLS, 'run', 'digits', '--epochs', '500'], cwd=tmp_path,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, **OFFLINE})
    run, deadline = tmp_path/'runs'/'digits', time.monotonic() + 120
    while not (run/'checkpoint').exists() and time.monotonic() < deadline: time.sleep(0.1)
    process.kill()
    process.communicate()
    from safetensors.numpy import load_file
    assert load_file(run/'checkpoint'/'model.safetensors')
    assert json.loads((run/'run.json').read_text())['stage'] == 'train'
    assert len((run/'log.csv').read_text().splitlines()) >= 2


@pytest.mark.parametrize('name', ['model.onnx', 'model.safetensors', 'README.md'])
def test_a_changed_byte_in_a_bundle(copied_bundle, digits_run, name):
    data = bytearray((copied_bundle/name).read_bytes())
    data[len(data) // 2] ^= 1
    (copied_bundle/name).write_bytes(data)
    assert_sentence(imgcls('predict', copied_bundle, 'any.png'), name, 'checksum')
    assert_sentence(imgcls('serve', copied_bundle), name, 'checksum')


def test_a_bundle_of_the_future(copied_bundle):
    record = json.loads((copied_bundle/'bundle.json').read_text())
    (copied_bundle/'bundle.json').write_text(json.dumps({**record, 'format_version': 99, 'news': 1}))
    assert_sentence(imgcls('predict', copied_bundle, 'any.png'), '99', 'Update')


def test_a_bundle_without_a_file(copied_bundle):
    (copied_bundle/'model.onnx').unlink()
    assert_sentence(imgcls('predict', copied_bundle, 'any.png'), 'model.onnx', 'missing')


def test_no_bundle_at_all(tmp_path):
    assert_sentence(imgcls('predict', tmp_path, 'any.png'), 'bundle.json')
    assert_sentence(imgcls('predict', tmp_path/'nowhere', 'any.png'), 'bundle.json')


def test_an_image_that_is_not_there(digits_run):
    assert_sentence(imgcls('predict', digits_run['bundle'], 'nowhere.png'), 'nowhere.png', code=1)


def test_an_unknown_runtime(digits_run):
    assert_sentence(imgcls('predict', digits_run['bundle'], 'any.png', '--runtime', 'tensorrt'), 'tensorrt', 'onnx')


def test_a_port_that_is_taken(digits_run):
    import socket
    with socket.socket() as taken:
        taken.bind(('127.0.0.1', 0))
        taken.listen()
        assert_sentence(imgcls('serve', digits_run['bundle'], '--port', taken.getsockname()[1]), '--port')
