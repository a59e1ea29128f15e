"The classifier on devices: each folder runs by itself and repeats the bundle's answers; the browser's too."
import functools
import hashlib
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading

import numpy as np
import PIL
import pytest
from PIL import Image, ImageCms
from skimage import data as photographs

from conftest import assert_no_leftovers, assert_sentence, imgcls
from imgcls_nb.bundle import load_bundle, write_bundle
from imgcls_nb.cli import main
from imgcls_nb.edge import EDGE_TARGETS, edge_facts, edge_readme, write_edge_folder
from imgcls_nb.image import INTERPOLATIONS, Preprocessing
from imgcls_nb.run import InputError
from imgcls_nb.sources import load_images

PHOTOGRAPHS = 'astronaut chelsea coffee rocket hubble_deep_field immunohistochemistry'.split()
BROWSER = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome', 'chrome'))), None)
NODE = shutil.which('node')


def pictures(folder, seed: int = 0) -> list:
    "Digits, and parts of photographs of many shapes and sizes, as files of the usual kinds."
    rng, digits, found = np.random.default_rng(seed), load_images('digits'), []
    def save(image, name, **options):
        image.save(folder/name, **options)
        found.append(folder/name)
    for row in range(0, 1797, 150): save(digits.open(row, 'L'), f'digit {row}.png')
    for number in range(18):
        photo = Image.fromarray(getattr(photographs, PHOTOGRAPHS[number % 6])()).convert('RGB')
        width, height = (int(side * share) for side, share in zip(photo.size, rng.uniform(0.25, 1, 2)))
        left, top = rng.integers(photo.width - width + 1), rng.integers(photo.height - height + 1)
        part = photo.crop((left, top, left + width, top + height))
        save(part, f'图 {number}.{("png", "jpg", "webp")[number % 3]}', quality=92)
    turned = Image.Exif()
    turned[0x0112] = 6
    save(part, 'turned.jpg', exif=turned.tobytes())
    part.putalpha(Image.linear_gradient('L').resize(part.size))
    save(part, 'transparent.png')
    save(part.convert('RGB').quantize(40), 'palette.png')
    save(part.convert('L'), 'grey.jpg')
    return found


def rare_pictures(folder) -> list:
    "Sixteen bits, CMYK, and a colour space that is not sRGB."
    photo = Image.fromarray(photographs.chelsea())
    Image.fromarray(np.array(photo.convert('L')).astype(np.uint16) * 200).save(folder/'sixteen.png')
    photo.convert('CMYK').save(folder/'cmyk.jpg')
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile('LAB')).tobytes()
    photo.save(folder/'lab profile.png', icc_profile=profile)
    return [folder/'sixteen.png', folder/'cmyk.jpg', folder/'lab profile.png']


def run_script(folder, files: list, python: str = sys.executable) -> list[tuple[str, float]]:
    "What `predict.py` prints, from another folder and without this library in reach."
    environment = {key: value for key, value in os.environ.items() if key != 'PYTHONPATH'} | dict(PYTHONUTF8='1', OMP_NUM_THREADS='1')
    result = subprocess.run([python, '-W', 'ignore', folder/'predict.py', *files], cwd=folder.parent, env=environment, text=True,
                            encoding='utf-8', capture_output=True, timeout=300)
    assert result.returncode == 0, result.stderr
    lines = [line.split('\t') for line in result.stdout.splitlines()]
    assert [line[0] for line in lines] == [str(file) for file in files]
    return [(label, float(percent.rstrip('%')) / 100) for _, label, percent in lines]


def assert_same_answers(found, predictor, files) -> None:
    expected = predictor.predict(files, top=1)
    for (label, probability), answer, file in zip(found, expected, files, strict=True):
        assert label == (answer.label if answer.sure else 'not sure'), file
        assert abs(probability - answer.probability) < 1e-4, file


@pytest.fixture(scope='module')
def files(tmp_path_factory): return pictures(tmp_path_factory.mktemp('我的 pictures'))


@pytest.fixture(scope='module')
def bundle(digits_run): return load_bundle(digits_run['bundle'])


@pytest.fixture(scope='module')
def zoo(tmp_path_factory):
    from imgcls_nb.export import zoo_bundle
    return zoo_bundle('tf_efficientnet_lite0', tmp_path_factory.mktemp('zoo')/'lite0')


def variant(bundle, folder, **changes):
    "The same network with another preprocessing and other thresholds."
    thresholds = {name: changes.pop(name) for name in ('probability', 'familiarity') if name in changes}
    runtimes = {name: one.model_copy(update=dict(decision=one.decision.model_copy(update=thresholds)))
                for name, one in bundle.record.runtimes.items()}
    preprocessing = bundle.record.preprocessing.model_copy(update=changes)
    record = bundle.record.model_copy(update=dict(preprocessing=preprocessing, runtimes=runtimes))
    return write_bundle(folder, record, {name: (bundle.folder/name).read_bytes() for name in bundle.record.checksums})


def test_the_folder_holds_what_it_needs_and_no_more(bundle, tmp_path):
    folder = write_edge_folder(bundle, tmp_path/'new'/'to go', 'onnx', 'onnx')
    assert {path.name for path in folder.iterdir()} == {'model.onnx', 'classifier.json', 'predict.py', 'preprocessing.py',
                                                        'requirements.txt', 'README.md'}
    content = (folder/'model.onnx').read_bytes()
    assert hashlib.sha256(content).hexdigest() == bundle.record.checksums['model.onnx']
    facts = json.loads((folder/'classifier.json').read_text(encoding='utf-8'))
    decision = bundle.record.runtimes['onnx'].decision
    assert facts['classes'] == list(bundle.classes)
    assert facts['sure_from'] == dict(probability=decision.probability, familiarity=decision.familiarity)
    assert Preprocessing(**facts['preprocessing'], mean=bundle.preprocessing.mean, std=bundle.preprocessing.std) == bundle.preprocessing
    assert 'imgcls_nb' not in (folder/'predict.py').read_text() and 'from .' not in (folder/'preprocessing.py').read_text()
    statements = [line for line in (folder/'predict.py').read_text().splitlines() if line and 'import' not in line and line[0] != '"']
    assert len(statements) <= 10
    assert_no_leftovers(tmp_path)


def test_onnx_script_gives_the_answers_of_the_bundle(bundle, files, tmp_path):
    for name in [name for name, one in bundle.record.runtimes.items() if one.engine == 'onnxruntime']:
        folder = write_edge_folder(bundle, tmp_path/name, 'onnx', name)
        found = run_script(folder, files)
        assert_same_answers(found, bundle.predictor(name, threads=1), files)
    labels = [label for label, _ in found]
    assert labels.count('not sure') > 5 and len(set(labels)) > 5, 'photographs are no digits, and digits are'


@pytest.mark.parametrize('changes', [dict(fit='pad'), dict(fit='squash', interpolation='lanczos'), dict(crop_fraction=0.8, interpolation='nearest'),
                                     dict(probability=0.9, familiarity=None), dict(probability=0.9), dict(familiarity=None)])
def test_every_preprocessing_and_threshold(bundle, files, tmp_path, changes):
    other = variant(bundle, tmp_path/'bundle', **changes)
    folder = write_edge_folder(other, tmp_path/'out', 'onnx', 'onnx')
    found = run_script(folder, files)
    assert_same_answers(found, other.predictor('onnx', threads=1), files)
    if 'familiarity' in changes and changes.get('probability') is None: assert 'not sure' not in dict(found)


def test_rare_pictures_too(bundle, tmp_path):
    files = rare_pictures(tmp_path)
    assert_same_answers(run_script(write_edge_folder(bundle, tmp_path/'out', 'onnx', 'onnx'), files), bundle.predictor('onnx', threads=1), files)


def test_a_colour_network(zoo, files, tmp_path):
    folder = write_edge_folder(zoo, tmp_path/'out', 'onnx')
    assert_same_answers(run_script(folder, files), zoo.predictor(threads=1), files)
    assert 'never says "not sure"' in (folder/'README.md').read_text() and 'not sure' not in (folder/'predict.py').read_text()


def test_the_script_needs_three_packages(bundle, files, tmp_path):
    "Whatever else it imports comes with Python, or with these three."
    folder = write_edge_folder(bundle, tmp_path/'out', 'onnx')
    code = (f'import runpy, sys; sys.argv = ["predict.py", {str(files[0])!r}]; sys.path.insert(0, {str(folder)!r})\n'
            f'runpy.run_path({str(folder/"predict.py")!r}); print(*{{name.split(".")[0] for name in sys.modules}})')
    result = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], cwd=tmp_path, capture_output=True, text=True, check=True)
    heavy = {'imgcls_nb', 'torch', 'fastai', 'pandas', 'pydantic', 'fastcore', 'skimage', 'sklearn'}
    assert not heavy & set(result.stdout.splitlines()[-1].split())
    names = [re.split('[<>=]', line)[0] for line in (folder/'requirements.txt').read_text().split()]
    assert names == ['onnxruntime', 'numpy', 'pillow']


def test_without_a_gpu_it_says_so_and_goes_on(bundle, files, tmp_path):
    import onnxruntime
    if 'CUDAExecutionProvider' in onnxruntime.get_available_providers(): pytest.skip('there is a GPU')
    folder = write_edge_folder(bundle, tmp_path/'out', 'onnx')
    result = subprocess.run([sys.executable, folder/'predict.py', files[0]], capture_output=True, text=True, encoding='utf-8')
    assert result.returncode == 0 and 'CUDAExecutionProvider' in result.stderr and result.stdout.count('\n') == 1


def test_refusals(bundle, tmp_path):
    there = tmp_path/'there'
    there.mkdir()
    for target, folder, runtime, words in [
        ('toaster', tmp_path/'new', None, 'litert, onnx, browser'), ('onnx', there, None, 'there already'),
        ('litert', tmp_path/'new', None, '--to tflite'), ('browser', tmp_path/'new', 'tflite', 'onnx-int8'),
        ('onnx', there/'file'/'below', None, 'cannot be written')]:
        (there/'file').write_text('a file')
        with pytest.raises(InputError, match=words): write_edge_folder(bundle, folder, target, runtime)
    assert not (tmp_path/'new').exists() and list(there.iterdir()) == [there/'file']
    assert_no_leftovers(tmp_path)


def test_a_changed_model_is_noticed(bundle, tmp_path):
    copy = shutil.copytree(bundle.folder, tmp_path/'copy')
    opened = load_bundle(copy)
    content = bytearray((copy/'model.onnx').read_bytes())
    content[1000] ^= 1
    (copy/'model.onnx').write_bytes(content)
    with pytest.raises(InputError, match='checksum'): write_edge_folder(opened, tmp_path/'out', 'onnx', 'onnx')
    assert not (tmp_path/'out').exists()


def test_a_failure_leaves_nothing(bundle, tmp_path, monkeypatch):
    import imgcls_nb.edge as edge
    def fail(*args): raise KeyboardInterrupt
    monkeypatch.setattr(edge, 'edge_readme', fail)
    with pytest.raises(KeyboardInterrupt): write_edge_folder(bundle, tmp_path/'out', 'browser')
    assert list(tmp_path.iterdir()) == []


def test_readmes_are_filled_in(bundle):
    for target in EDGE_TARGETS:
        text = edge_readme(edge_facts(bundle, 'onnx'), target)
        assert '$' not in text and 'uint8 [1, 32, 32, 1]' in text and max(map(len, text.splitlines())) <= 130


def test_command(digits_run, files, tmp_path):
    result = imgcls('edge', digits_run['bundle'], tmp_path/'out', '--target', 'onnx')
    assert result.returncode == 0, result.stderr
    assert 'predict.py' in result.stdout
    bundle = load_bundle(digits_run['bundle'])
    assert_same_answers(run_script(tmp_path/'out', files[:3]), bundle.predictor(threads=1), files[:3])
    assert_sentence(imgcls('edge', digits_run['bundle'], tmp_path/'out', '--target', 'onnx'), 'there already')
    assert_sentence(imgcls('edge', tmp_path, tmp_path/'other', '--target', 'browser'), 'not a bundle')


def test_command_takes_a_run_and_prints_json(digits_run, tmp_path, capsys):
    assert main(['edge', digits_run['run'], str(tmp_path/'page'), '--target', 'browser', '--runtime', 'onnx', '--json']) == 0
    found = json.loads(capsys.readouterr().out)
    assert found['folder'] == str(tmp_path/'page') and found['runtime'] == 'onnx' and 'index.html' in found['files']


@pytest.mark.edge
@pytest.mark.parametrize('side, channels', [(28, 1), (32, 3)])
def test_litert_script_gives_the_answers_of_the_bundle(side, channels, files, tmp_path):
    "On the files of the other tests, with and without thresholds."
    from imgcls_nb.export import export_module
    from imgcls_nb.formats import add_format
    from test_export import CLASSES, trained
    model, p, pixels, targets = trained('simple_cnn', side, channels, 60)
    bundle = export_module(model, CLASSES, p, pixels, tmp_path/'b', targets, architecture='simple_cnn')
    with pytest.raises(InputError, match='--to tflite'): write_edge_folder(bundle, tmp_path/'out', 'litert')
    bundle = add_format(bundle, 'tflite', pixels, targets)
    folder = write_edge_folder(bundle, tmp_path/'out', 'litert')
    assert (folder/'model.tflite').read_bytes() == (bundle.folder/'model.tflite').read_bytes()
    found = run_script(folder, files)
    assert_same_answers(found, bundle.predictor('tflite', threads=1), files)
    assert len({label for label, _ in found}) > 3


@pytest.mark.edge
def test_litert_script_is_not_sure(files, tmp_path):
    "A network that says how familiar an image is has two outputs, which only their shapes tell apart."
    from imgcls_nb.calibrate import calibrate
    from imgcls_nb.evaluate import evaluate
    from imgcls_nb.export import export
    from imgcls_nb.formats import add_format
    from imgcls_nb.train import image_learner, train
    data = load_images('digits').split()
    learn = image_learner(data, 'small_cnn', seed=0)
    with learn.no_bar(), learn.no_logging(): train(learn, epochs=2)
    report = evaluate(learn)
    bundle = export(learn, report, tmp_path/'b', calibration=calibrate(learn))
    bundle = add_format(bundle, 'tflite', data.pixels(report.rows, bundle.preprocessing), report.targets)
    found = run_script(write_edge_folder(bundle, tmp_path/'out', 'litert'), files)
    assert_same_answers(found, bundle.predictor('tflite', threads=1), files)
    assert 'not sure' in dict(found)


# The browser

RESIZE = '''
import { pathToFileURL } from 'node:url';
import { readFileSync } from 'node:fs';
const { prepare } = await import(pathToFileURL(process.argv[2]));
const cases = JSON.parse(readFileSync(0, 'utf-8'));
const found = cases.map(({ image, facts }) =>
  Buffer.from(prepare({ ...image, data: Buffer.from(image.data, 'base64') }, facts)).toString('base64'));
console.log(JSON.stringify(found));
'''


@pytest.mark.skipif(NODE is None, reason='node is not installed')
def test_javascript_resizes_as_pillow_does(bundle, tmp_path):
    "Bit for bit, for random pictures of random sizes and every preprocessing."
    import base64
    folder, rng, cases, expected = write_edge_folder(bundle, tmp_path/'out', 'browser'), np.random.default_rng(0), [], []
    for number in range(240):
        channels, fit = int(rng.choice([1, 3])), ('crop', 'squash', 'pad')[number % 3]
        height, width = (int(side) for side in rng.integers(1, 90, 2))
        p = Preprocessing(*(int(side) for side in rng.integers(1, 60, 2)), channels, fit, float(rng.uniform(0.3, 1)),
                          list(INTERPOLATIONS)[number % 4])
        pixels = rng.integers(0, 2 if number % 2 else 256, (height, width, channels), np.uint8) * (255 if number % 2 else 1)
        image = dict(width=width, height=height, channels=channels, data=base64.b64encode(pixels.tobytes()).decode())
        if PIL.__version__ < '13' and height - p.height > max(0, 2 * (width - p.width)): continue  # Pillow 13 takes these rows first
        cases.append(dict(image=image, facts=p.as_dict()))
        expected.append(p(Image.fromarray(pixels[..., 0] if channels == 1 else pixels)).tobytes())
    (tmp_path/'try.mjs').write_text(RESIZE)
    result = subprocess.run([NODE, tmp_path/'try.mjs', folder/'classifier.js'], input=json.dumps(cases), text=True, capture_output=True)
    assert result.returncode == 0, result.stderr
    found = [base64.b64decode(one) for one in json.loads(result.stdout)]
    wrong = [(case['facts'], case['image']['width'], case['image']['height']) for case, a, b in zip(cases, found, expected, strict=True) if a != b]
    assert not wrong, f'{len(wrong)} of {len(cases)}: {wrong[0]}'


def serve_with_node(folder):
    "The folder's own server, on a port that is free; gives the process and the address."
    process = subprocess.Popen([NODE, folder/'server.mjs', '0'], stdout=subprocess.PIPE, text=True)
    return process, process.stdout.readline().split()[-1]


@pytest.mark.skipif(NODE is None, reason='node is not installed')
def test_the_server_gives_this_folder_and_nothing_else(bundle, tmp_path):
    import http.client
    from urllib.parse import urlsplit
    (tmp_path/'secret.txt').write_text('secret')
    folder = write_edge_folder(bundle, tmp_path/'out', 'browser')
    process, address = serve_with_node(folder)
    try:
        def get(path):
            connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=20)
            connection.request('GET', path)
            response = connection.getresponse()
            return response.status, response.read(), dict(response.getheaders())
        status, content, headers = get('/')
        assert status == 200 and b'<!doctype html>' in content and headers['Content-Type'].startswith('text/html')
        assert headers['Cross-Origin-Embedder-Policy'] == 'require-corp'
        assert get('/model.onnx')[1] == (folder/'model.onnx').read_bytes() and get('/app.js?x=1')[2]['Content-Type'] == 'text/javascript'
        for path in ('/../secret.txt', '/..%2fsecret.txt', '/%2e%2e/secret.txt', '/..%5csecret.txt', '//secret.txt', '/absent', '/%', '/%00', '/node_modules'):
            assert get(path)[0] == 404 and b'secret' not in get(path)[1], path
    finally:
        process.terminate()
        process.wait(20)
        process.stdout.close()


def test_names_in_the_page_are_no_markup(bundle, tmp_path):
    task = bundle.record.task.model_copy(update=dict(classes=['<b>', *bundle.classes[1:]]))
    record = bundle.record.model_copy(update=dict(name='<script>alert(1)</script>', task=task))
    other = write_bundle(tmp_path/'b', record, {name: (bundle.folder/name).read_bytes() for name in bundle.record.checksums})
    page = (write_edge_folder(other, tmp_path/'out', 'browser')/'index.html').read_text()
    assert '<script>alert' not in page and '<b>' not in page and '&lt;b&gt;' in page
    addresses = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert addresses == ['data:,', 'style.css', 'app.js'], 'nothing from elsewhere'


@pytest.fixture(scope='module')
def installed(bundle, zoo, tmp_path_factory):
    "Two pages with onnxruntime-web beside them; skipped where it cannot be had."
    if NODE is None or not shutil.which('npm') or BROWSER is None: pytest.skip('node, npm or chromium is not installed')
    pytest.importorskip('playwright')
    folders = {}
    for name, one in (('digits', bundle), ('zoo', zoo)):
        folders[name] = write_edge_folder(one, tmp_path_factory.mktemp('页 pages')/name, 'browser', 'onnx')
    command = [shutil.which('npm'), 'install', '--no-audit', '--no-fund', '--prefer-offline']
    result = subprocess.run(command, cwd=folders['digits'], capture_output=True, text=True, timeout=300)
    if result.returncode: pytest.skip('npm install did not get onnxruntime-web')
    os.symlink(folders['digits']/'node_modules', folders['zoo']/'node_modules')
    return folders


@pytest.fixture(scope='module')
def chromium():
    sync_api = pytest.importorskip('playwright.sync_api')
    with sync_api.sync_playwright() as playwright, playwright.chromium.launch(executable_path=BROWSER, args=['--no-sandbox']) as browser:
        yield browser


CLASSIFY = '''async files => {
  const { load } = await import('./classifier.js'), { classify, threads } = await load();
  const found = [];
  for (const file of files) found.push(await classify(new Blob([Uint8Array.from(atob(file), c => c.charCodeAt(0))])));
  return { threads, isolated: crossOriginIsolated, found };
}'''


def requests_of(page) -> list[str]:
    "The addresses that a page asks for, as they come."
    found = []
    page.on('request', lambda request: found.append(request.url))
    return found


def ask_the_page(page, files) -> dict:
    import base64
    return page.evaluate(CLASSIFY, [base64.b64encode(file.read_bytes()).decode() for file in files])


def assert_the_page_agrees(answers, predictor, files, tolerance) -> None:
    for answer, file in zip(answers, files, strict=True):
        expected = predictor(file, top=1)
        assert answer['label'] == expected.label and answer['sure'] == expected.sure and answer['reason'] == expected.reason, file
        assert abs(answer['probability'] - expected.probability) < tolerance, file


@pytest.mark.network
def test_browser_gives_the_answers_of_the_bundle(installed, chromium, files, bundle, zoo):
    "The same classes and doubts; where files keep every value, the same probabilities."
    for name, one in (('digits', bundle), ('zoo', zoo)):
        process, address = serve_with_node(installed[name])
        try:
            page = chromium.new_page()
            asked = requests_of(page)
            page.goto(address)
            found = ask_the_page(page, files)
            assert found['isolated'] and found['threads'] >= 1
            exact = [k for k, file in enumerate(files) if file.suffix == '.png' and file.stem != 'transparent']
            assert len(exact) > 15 and len(files) > 25
            predictor = one.predictor('onnx', threads=1)
            assert_the_page_agrees(found['found'], predictor, files, 0.03)
            assert_the_page_agrees([found['found'][k] for k in exact], predictor, [files[k] for k in exact], 1e-4)
            assert len(asked) > 5 and all(url.startswith((address, 'blob:', 'data:')) for url in asked), asked
            page.close()
        finally:
            process.terminate()
            process.wait(20)
            process.stdout.close()


@pytest.fixture
def plain_server(installed):
    "Any static server does, without the headers that threads ask for."
    class Quiet(http.server.SimpleHTTPRequestHandler):
        extensions_map = {**http.server.SimpleHTTPRequestHandler.extensions_map, '.mjs': 'text/javascript', '.wasm': 'application/wasm'}
        def log_message(self, *args): pass
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=installed['digits']))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_address[1]}'
    server.shutdown()
    server.server_close()


@pytest.mark.network
def test_the_page_for_people(plain_server, chromium, files, tmp_path):
    "By file, by drop, by keyboard; a bad file in words; without a mistake on the console."
    page, complaints = chromium.new_page(), []
    page.on('pageerror', lambda error: complaints.append(str(error)))
    page.on('console', lambda message: complaints.append(message.text) if message.type == 'error' else None)
    page.goto(plain_server)
    page.wait_for_selector('#state:has-text("Ready")', timeout=60_000)
    assert page.text_content('#state') == 'Ready, on one thread.'
    page.keyboard.press('Tab')
    assert page.evaluate('document.activeElement.id') == 'file'
    page.set_input_files('#file', files[0])
    page.wait_for_selector('#answer .bars')
    assert page.text_content('#answer h2') == '0' and page.locator('#answer .bars li').count() == 3
    bad = tmp_path/'bad.png'
    bad.write_bytes(b'no picture')
    page.set_input_files('#file', bad)
    page.wait_for_selector('#answer .error')
    assert 'not an image' in page.text_content('#answer') and page.is_hidden('#preview')
    drop = '''data => { const transfer = new DataTransfer(), bytes = Uint8Array.from(atob(data), c => c.charCodeAt(0));
      transfer.items.add(new File([bytes], 'photo.jpg', { type: 'image/jpeg' })); return transfer; }'''
    import base64
    transfer = page.evaluate_handle(drop, base64.b64encode(next(f for f in files if f.suffix == '.jpg').read_bytes()).decode())
    page.dispatch_event('body', 'drop', dict(dataTransfer=transfer))
    page.wait_for_selector('#answer h2.doubt')
    assert 'unlike' in page.text_content('#answer')
    assert complaints == []
    page.close()


@pytest.mark.network
def test_the_page_says_what_is_missing(installed, chromium, bundle, tmp_path):
    folder = write_edge_folder(bundle, tmp_path/'out', 'browser')
    process, address = serve_with_node(folder)
    try:
        page = chromium.new_page()
        page.goto(address)
        page.wait_for_selector('#state.error')
        assert 'npm install' in page.text_content('#state') and page.is_disabled('#file')
        page.close()
    finally:
        process.terminate()
        process.wait(20)
        process.stdout.close()
