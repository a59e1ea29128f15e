"The app in the notebook, and the folder for a container host."
import html
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image

from conftest import assert_no_leftovers, assert_sentence, imgcls
from imgcls_nb import apps
from imgcls_nb.apps import _packages, answer_cards, predictor_app, serving_requirements, space
from imgcls_nb.bundle import Prediction, load_bundle, write_bundle
from imgcls_nb.client import Client
from imgcls_nb.run import ImgclsError, InputError
from samples import encoded, patch, truncated_jpeg

HEAVY = {'torch', 'torchvision', 'fastai', 'timm', 'pandas', 'matplotlib', 'scikit-learn', 'scikit-image', 'ipywidgets'}


def digit(i: int = 3) -> bytes:
    "A real scanned digit as a PNG."
    import numpy as np
    from sklearn.datasets import load_digits
    return encoded(Image.fromarray((load_digits().images[i] / 16 * 255).round().astype(np.uint8)), 'PNG')


# The app

def choose(app, *files: tuple[str, bytes]) -> str:
    "What the browser does when somebody has chosen files; the page after it, without tags."
    upload, page = app.children
    upload.value = [dict(name=name, type='', size=len(data), content=memoryview(data), last_modified=datetime.now(timezone.utc))
                    for name, data in files]
    return ' '.join(html.unescape(re.sub('<[^>]*>', ' ', page.value)).split())


def test_the_app_says_what_the_predictor_says(digits_run):
    predictor = load_bundle(digits_run['bundle']).predictor()
    for source in (digits_run['bundle'], Path(digits_run['bundle']), load_bundle(digits_run['bundle']), predictor):
        app = predictor_app(source, top=2)
        text = choose(app, ('a digit.png', digit()), ('图.png', digit(5)))
        for data in (digit(), digit(5)):
            for label, probability in predictor(data, top=2).top: assert f'{label} {probability:.1%}' in text
        assert 'a digit.png' in text and '图.png' in text
        assert app.children[1].value.count('<img') == 2
    assert choose(app) == 'Nothing chosen yet.'


def test_the_app_takes_several_files_of_images():
    upload, page = predictor_app(lambda *_: None).children
    assert upload.multiple and upload.accept == 'image/*' and page.value == 'Nothing chosen yet.'


def test_one_broken_file_does_not_hide_the_others(digits_run):
    text = choose(predictor_app(digits_run['bundle']), ('cut.jpg', truncated_jpeg()), ('list.txt', b'milk'), ('zero.png', b''), ('7.png', digit(7)))
    assert text.count('No answer') == 3 and '7.png' in text and '%' in text
    for sentence in ('cut.jpg is cut off', 'list.txt is not an image', 'zero.png is empty'): assert sentence in text


@pytest.mark.parametrize('reason, words', [('low probability', 'No class is probable enough'), ('unlike the training images', 'unlike those')])
def test_not_sure_is_said_with_its_reason(reason, words):
    doubtful = Prediction('cat', 0.4, (('cat', 0.4), ('dog', 0.3)), False, reason)
    text = answer_cards(lambda *_: doubtful, [('a.png', encoded(patch('brick', 1), 'PNG'))])
    sure = answer_cards(lambda *_: Prediction('cat', 0.9, (('cat', 0.9),)), [('a.png', encoded(patch('brick', 1), 'PNG'))])
    assert 'Not sure' in text and words in text and 'opacity:.45' in text
    assert 'Not sure' not in sure and 'opacity' not in sure


def test_names_from_outside_cannot_run():
    nasty = '<img src=x onerror=alert(1)>'
    page = answer_cards(lambda *_: Prediction(nasty, 0.5, ((nasty, 0.5),), False, 'low probability'), [(nasty, encoded(patch('brick', 1), 'PNG')), (nasty, b'x')])
    assert '<img src=x' not in page and page.count('&lt;img') >= 4


def test_a_service_that_is_away_is_a_sentence_in_the_app():
    with Client('http://127.0.0.1:9', timeout=0.2) as client: text = choose(predictor_app(client), ('7.png', digit()))
    assert 'No answer http://127.0.0.1:9 cannot be reached' in text


def test_a_bomb_is_refused_before_it_is_drawn(digits_run):
    from test_images import png_that_claims
    assert 'No answer large.png claims more than' in choose(predictor_app(digits_run['bundle']), ('large.png', png_that_claims(60_000, 60_000)))


def test_the_module_loads_no_widgets():
    code = 'import sys, imgcls_nb.apps; print({"ipywidgets", "IPython"} & set(sys.modules))'
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == 'set()'


# The list

def closure(names: set[str]) -> set[str]:
    "The named distributions and all that they bring, worked out on its own."
    found, left = set(), set(names)
    while left:
        name = left.pop()
        found.add(name)
        try: needs = metadata.requires(name) or []
        except metadata.PackageNotFoundError: continue
        parsed = [Requirement(text) for text in needs]
        left |= {canonicalize_name(r.name) for r in parsed if r.marker is None or r.marker.evaluate({'extra': ''})} - found
    return found


def listed(folder: Path) -> dict[str, Requirement]:
    lines = [line.split('#')[0] for line in (folder/'requirements.txt').read_text(encoding='utf-8').splitlines()]
    return {canonicalize_name(r.name): r for r in map(Requirement, lines)}


def test_lower_bounds_are_the_librarys_own():
    own = {canonicalize_name(r.name): r for r in map(Requirement, metadata.requires('imgcls_nb')) if r.marker is None}
    lines = serving_requirements(['PIL', 'numpy', 'json', 'imgcls_nb', 'no_such_module'])
    assert [line.split('  #')[0] for line in lines] == [f'numpy{own["numpy"].specifier}', f'pillow{own["pillow"].specifier}']


def test_what_another_requirement_brings_is_left_out():
    assert [line.split('>')[0] for line in serving_requirements(['fastapi', 'starlette', 'anyio'])] == ['fastapi']
    assert serving_requirements(['starlette']) == [f'starlette>={metadata.version("starlette")}  # tried with {metadata.version("starlette")}']


# The folder

@pytest.fixture(scope='module')
def folder(digits_run, tmp_path_factory) -> Path:
    return space(digits_run['bundle'], tmp_path_factory.mktemp('spaces')/'my 空间')


def test_the_folder_is_whole(folder, digits_run):
    names = {path.name for path in folder.iterdir()}
    assert names == {'.dockerignore', 'Dockerfile', 'README.md', 'app.py', 'bundle', 'imgcls_nb', 'requirements.txt'}
    assert_no_leftovers(folder.parent)
    assert not list(folder.rglob('__pycache__')) and not list(folder.rglob('*.pyc'))
    assert load_bundle(folder/'bundle').record == load_bundle(digits_run['bundle']).record
    modules = {path.stem for path in (folder/'imgcls_nb').glob('*.py')}
    assert {'bundle', 'serve', 'run', 'image', 'runtimes', 'cli'} <= modules and not {'train', 'data', 'export', 'all', 'apps', '_modidx'} & modules
    for path in (folder/'imgcls_nb').glob('*.py'): assert path.read_bytes() == Path(apps.__file__).with_name(path.name).read_bytes()


def test_the_list_holds_what_serving_takes_and_no_more(folder):
    names = set(listed(folder))
    assert {'fastapi', 'uvicorn', 'numpy', 'pillow', 'onnxruntime', 'pydantic', 'python-multipart'} <= names
    assert not closure(names) & HEAVY, closure(names) & HEAVY
    for name, requirement in listed(folder).items(): assert requirement.specifier.contains(metadata.version(name)), name


def test_the_page_is_read_by_the_hub(folder):
    from huggingface_hub import SpaceCard
    data = SpaceCard((folder/'README.md').read_text(encoding='utf-8')).data
    assert (data.title, data.sdk, data.app_port) == ('digits', 'docker', 7860)


def instructions(folder: Path) -> list[tuple[str, str]]:
    return [tuple(line.split(' ', 1)) for line in (folder/'Dockerfile').read_text(encoding='utf-8').splitlines()]


def environment(folder: Path) -> dict[str, str]:
    return dict(pair.split('=', 1) for word, rest in instructions(folder) if word == 'ENV' for pair in shlex.split(rest))


def command(folder: Path, word: str) -> list[str]:
    "The exec form of CMD or HEALTHCHECK, which is a JSON array."
    [rest] = [rest for name, rest in instructions(folder) if name == word]
    found = json.loads(rest[rest.index('['):])
    assert all(isinstance(part, str) for part in found)
    return found


def test_the_recipe(folder):
    steps, names = instructions(folder), [name for name, _ in instructions(folder)]
    assert steps[0] == ('FROM', f'python:{sys.version_info.major}.{sys.version_info.minor}-slim')
    assert set(names) <= {'FROM', 'ENV', 'RUN', 'WORKDIR', 'COPY', 'USER', 'EXPOSE', 'HEALTHCHECK', 'CMD'}
    assert ('USER', '1000') in steps and any('--uid 1000' in rest for name, rest in steps if name == 'RUN')
    assert names.index('USER') > max(i for i, name in enumerate(names) if name == 'RUN'), 'nothing runs as root after the building'
    assert names.index('USER') < names.index('CMD') == len(names) - 1
    copies = [i for i, name in enumerate(names) if name == 'COPY']
    install = next(i for i, (name, rest) in enumerate(steps) if name == 'RUN' and 'pip install' in rest)
    assert copies[0] < install < copies[1] and '--no-cache-dir' in steps[install][1], 'a new bundle installs nothing again'
    assert command(folder, 'CMD')[0] == command(folder, 'HEALTHCHECK')[0] == 'python'
    assert environment(folder)['PYTHONDONTWRITEBYTECODE'] == '1' and ('EXPOSE', environment(folder)['PORT']) in steps


def test_what_the_image_leaves_out_is_not_needed(folder, digits_run, tmp_path):
    ignored = (folder/'.dockerignore').read_text(encoding='utf-8').split()
    assert 'README.md' in ignored and not {'bundle', 'app.py', 'imgcls_nb', 'requirements.txt'} & set(ignored)
    assert '*.md' not in ignored and '**/README.md' not in ignored, "the bundle's own card is checked when it is opened"


GUARD = '''
"Nothing but the standard library, the folder itself and the closure of the list can be imported."
import sys
ALLOWED = set({allowed!r})
class Guard:
    def find_spec(self, name, path=None, target=None):
        top = name.partition('.')[0]
        if top in ALLOWED or top in sys.stdlib_module_names or top.startswith('_sysconfigdata'): return None
        raise ModuleNotFoundError(f'{{name}} is forbidden here', name=name)
sys.meta_path.insert(0, Guard())
'''


def serving(folder: Path, port: int, python=sys.executable, pythonpath: str | None = None, clean: bool = False, **more):
    "The recipe's CMD with the recipe's environment, as a process."
    env = {**(dict(PATH=os.environ['PATH']) if clean else os.environ), **environment(folder), 'PORT': str(port), **more}
    env.pop('PYTHONPATH', None)
    if pythonpath: env['PYTHONPATH'] = pythonpath
    _, *args = command(folder, 'CMD')
    return subprocess.Popen([python, *args], cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def check_it_serves(folder: Path, process, port: int, python=sys.executable) -> str:
    "It answers as the bundle does, its health is seen, and SIGTERM ends it; what it said comes back."
    health = [python, *command(folder, 'HEALTHCHECK')[1:]]
    env = {**os.environ, 'PORT': str(port), 'http_proxy': 'http://127.0.0.1:9'}
    try:
        with Client(f'http://127.0.0.1:{port}') as client:
            assert client.ready(wait=60), process.communicate(timeout=5)[0] if process.poll() is not None else 'it does not get ready'
            assert client(digit()).as_dict() == load_bundle(folder/'bundle').predictor()(digit()).as_dict()
        assert subprocess.run(health, env=env, capture_output=True).returncode == 0
    finally:
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=30)[0]
    assert process.returncode in (0, -15, 130) and 'Traceback' not in said, said
    assert subprocess.run(health, env=env, capture_output=True).returncode != 0
    return said


def test_it_serves_with_nothing_but_what_is_listed(folder, tmp_path):
    names, packages = closure(set(listed(folder))), _packages()
    allowed = {module for module, owners in packages.items() if {canonicalize_name(owner) for owner in owners} & names} | {'imgcls_nb'}
    (tmp_path/'sitecustomize.py').write_text(GUARD.format(allowed=sorted(allowed)))
    for module in ('torch', 'fastai', 'pandas'):  # the guard works
        result = subprocess.run([sys.executable, '-c', f'import {module}'], env={**os.environ, 'PYTHONPATH': str(tmp_path)}, capture_output=True, text=True)
        assert 'is forbidden here' in result.stderr
    port = apps._free_port()
    before = sorted(folder.rglob('*'))
    check_it_serves(folder, serving(folder, port, pythonpath=str(tmp_path)), port)
    assert sorted(folder.rglob('*')) == before, 'nothing is written'


def test_it_runs_the_modules_of_the_folder(folder, tmp_path):
    code = 'import app, imgcls_nb.serve; print(imgcls_nb.serve.__file__)'
    result = subprocess.run([sys.executable, '-B', '-c', code], cwd=folder, capture_output=True, text=True, check=True)
    assert Path(result.stdout.strip()).parent == folder/'imgcls_nb'


READ_ONLY = '''
"A file system that is read-only but for devices and one folder for temporary files, also for root."
import os, sys
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
def audit(event, args):
    if event == 'open' and isinstance(args[0], (str, bytes)): path, writes = os.fsdecode(args[0]), args[2] & WRITES
    elif event in ('os.mkdir', 'os.rename', 'os.remove', 'os.link', 'os.symlink'): path, writes = os.fsdecode(args[0]), True
    else: return
    if writes and not path.startswith(('/dev/', {temporary!r})): raise OSError(30, 'Read-only file system', path)
sys.addaudithook(audit)
'''


def test_it_serves_from_a_read_only_file_system(folder, tmp_path):
    (tmp_path/'guard').mkdir()
    (tmp_path/'tmp').mkdir()
    (tmp_path/'guard'/'sitecustomize.py').write_text(READ_ONLY.format(temporary=str(tmp_path/'tmp')))
    env = {**os.environ, 'PYTHONPATH': str(tmp_path/'guard')}
    result = subprocess.run([sys.executable, '-c', f'open({str(tmp_path/"x")!r}, "w")'], env=env, capture_output=True, text=True)
    assert 'Read-only file system' in result.stderr, 'the guard works'
    port = apps._free_port()
    check_it_serves(folder, serving(folder, port, pythonpath=str(tmp_path/'guard'), TMPDIR=str(tmp_path/'tmp')), port)


@pytest.mark.parametrize('there', ['folder', 'file', 'link'])
def test_nothing_is_replaced(digits_run, tmp_path, there):
    target = tmp_path/'there'
    if there == 'folder': target.mkdir()
    elif there == 'file': target.write_text('mine')
    else: target.symlink_to(tmp_path/'nowhere')
    with pytest.raises(InputError, match='there already'): space(digits_run['bundle'], target)
    assert list(tmp_path.iterdir()) == [target]


def test_a_service_that_does_not_start_leaves_no_folder(digits_run, tmp_path, monkeypatch):
    monkeypatch.setattr(apps, '_APP', 'raise SystemExit("imgcls: it has no mind to.")')
    with pytest.raises(ImgclsError, match='does not start: imgcls: it has no mind to'): space(digits_run['bundle'], tmp_path/'space')
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_leaves_no_folder_and_no_process(digits_run, tmp_path):
    process = subprocess.Popen([sys.executable, '-c', f'import sys; from imgcls_nb.cli import main; sys.exit(main(["space", {digits_run["bundle"]!r}, "space"]))'],
                               cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 30
    while not list(tmp_path.glob('.space.partial-*/app.py')) and time.monotonic() < deadline: time.sleep(0.005)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    assert 'interrupted' in process.communicate(timeout=40)[1] and process.returncode == 130
    assert list(tmp_path.iterdir()) == []


def test_the_licence_of_a_bundle_is_on_its_page(digits_run, tmp_path):
    from huggingface_hub import SpaceCard
    bundle = load_bundle(digits_run['bundle'])
    files = {name: (bundle.folder/name).read_bytes() for name in bundle.record.checksums if name != 'README.md'}
    record = bundle.record.model_copy(update=dict(licence='apache-2.0', name='digits: "odd" \\ name\n---\nsdk: static'))
    page = apps._page(write_bundle(tmp_path/'licensed', record, files))
    data = SpaceCard(page).data
    assert data.license == 'apache-2.0' and data.sdk == 'docker' and data.title.startswith('digits: "odd"')


def test_a_bundle_for_a_gpu_is_refused(digits_run, tmp_path):
    bundle = load_bundle(digits_run['bundle'])
    name = next(iter(bundle.record.runtimes))
    runtimes = {name: bundle.record.runtimes[name].model_copy(update=dict(engine='cuda'))}
    files = {file: (bundle.folder/file).read_bytes() for file in bundle.record.checksums if file != 'README.md'}
    other = write_bundle(tmp_path/'gpu', bundle.record.model_copy(update=dict(runtimes=runtimes, preferred=name)), files)
    with pytest.raises(InputError, match='GPU'): space(other, tmp_path/'space')


def test_the_command(digits_run, tmp_path):
    result = imgcls('space', digits_run['bundle'], 'space', '--json', cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found['folder'] == 'space' and any(line.startswith('onnxruntime') for line in found['requirements'])
    assert set(found['bytes']) == {str(path.relative_to(tmp_path/'space')) for path in (tmp_path/'space').rglob('*') if path.is_file()}
    assert_sentence(imgcls('space', digits_run['bundle'], 'space', cwd=tmp_path), 'there already')
    assert_sentence(imgcls('space', tmp_path, 'other', cwd=tmp_path), 'bundle.json')


@pytest.mark.slow
def test_it_serves_from_a_fresh_environment(folder, tmp_path):
    "The one test here that takes packages from an index."
    subprocess.run([sys.executable, '-m', 'venv', tmp_path/'fresh'], check=True)
    python = tmp_path/'fresh'/'bin'/'python'
    install = subprocess.run([python, '-m', 'pip', 'install', '-q', '--no-cache-dir', '-r', folder/'requirements.txt'], capture_output=True, text=True)
    if install.returncode and re.search('No matching distribution|connection|resolve', install.stderr): pytest.skip('no package index')
    assert install.returncode == 0, install.stderr
    names = {line.split('==')[0].lower() for line in subprocess.run([python, '-m', 'pip', 'list', '--format=freeze'], capture_output=True, text=True, check=True).stdout.split()}
    assert not names & HEAVY
    port = apps._free_port()
    check_it_serves(folder, serving(folder, port, python, clean=True), port, python)
    megabytes = sum(path.stat().st_size for path in (tmp_path/'fresh').rglob('*') if path.is_file()) / 1e6
    assert megabytes < 400, megabytes
