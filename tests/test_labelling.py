"Labelling and cleaning: the log loses nothing, the widgets do what they say, and a real browser agrees."
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from types import SimpleNamespace

import nbformat
import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image

from imgcls_nb.data import ImageSet, from_arrays
from imgcls_nb.labelling import (Edit, EditLog, State, class_keys, clean_grid, edited, label_grid, label_loss, only_labelled,
                                 pixel_digest, thumbnail, unlabelled)
from imgcls_nb.run import InputError


def squares(count: int, labels=None) -> ImageSet:
    "Different grey pictures of 8 × 8 pixels."
    images = np.random.default_rng(0).integers(0, 256, (count, 8, 8), dtype=np.uint8)
    return from_arrays(images, [''] * count if labels is None else labels)


@pytest.fixture
def log(tmp_path) -> EditLog: return EditLog(tmp_path/'labels.jsonl')


@pytest.fixture
def folder(tmp_path):
    "Ten unlabelled files: one broken, one with a name that is also HTML, one deeper down."
    root = tmp_path/'images'
    (root/'deep er').mkdir(parents=True)
    names = [f'{i}.png' for i in range(7)] + ['<img src=x onerror=alert(1)>.png', '猫 & "quote".png', 'deep er/8.png']
    for i, name in enumerate(names): Image.fromarray(np.full((20, 30), 20 * i, np.uint8)).save(root/name)
    (root/'3.png').write_bytes((root/'3.png').read_bytes()[:40])
    return root


# The log

IMAGES = st.sampled_from(['a.jpg', '猫.jpg', 'line\nbreak\u2028.jpg', '7'])
LABELS = st.sampled_from(['cat', 'dog', 'Größe "M"', '\\n'])
STEPS = st.lists(st.one_of(st.tuples(st.just('label'), IMAGES, LABELS), st.tuples(st.just('set_aside'), IMAGES, LABELS),
                           st.tuples(st.just('restore'), IMAGES), st.tuples(st.just('many'), st.lists(IMAGES, max_size=4), LABELS),
                           st.just(('undo',)), st.just(('reopen',))), max_size=25)


def model_state(decisions: list[list[tuple]], image: str) -> State | None:
    "What a plain list of decisions says about an image."
    label, aside, known = None, None, False
    for action, name, value in (edit for decision in decisions for edit in decision):
        if name != image: continue
        known = True
        if action == 'label': label, aside = value, None
        else: aside = value
    return State(label, aside, None) if known else None


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS)
def test_any_sequence_replays_as_a_plain_model_does(steps, tmp_path_factory):
    log, decisions = EditLog(tmp_path_factory.mktemp('log')/'log.jsonl'), []
    for action, *values in steps:
        if action == 'label':
            log.label(*values)
            decisions.append([('label', *values)])
        elif action == 'set_aside':
            log.set_aside(*values)
            decisions.append([('set_aside', *values)])
        elif action == 'restore':
            log.restore(*values)
            decisions.append([('restore', values[0], None)])
        elif action == 'many':
            log.record([Edit('', 'label', image, '', values[1]) for image in values[0]])
            if values[0]: decisions.append([('label', image, values[1]) for image in values[0]])
        elif action == 'undo':
            undone, expected = log.undo(), decisions.pop() if decisions else []
            assert [edit.image for edit in undone] == [image for _, image, _ in expected]
        else: log = EditLog(log.path)
    for opened in (log, EditLog(log.path)):
        for image in ('a.jpg', '猫.jpg', 'line\nbreak\u2028.jpg', '7'): assert opened.state(image) == model_state(decisions, image)
        assert not opened.findings() and len(opened.path.read_bytes().splitlines() if log.path.exists() else []) == len(opened)


def test_a_log_torn_at_any_byte_keeps_every_whole_line(tmp_path):
    whole = EditLog(tmp_path/'whole.jsonl')
    for i in range(3): whole.label(f'猫{i}.jpg', 'Größe')
    content = whole.path.read_bytes()
    for cut in range(0, len(content), 5):
        path = tmp_path/'torn.jsonl'
        path.write_bytes(content[:cut])
        torn, lines = EditLog(path), content[:cut].count(b'\n')
        assert torn.edits == whole.edits[:lines]
        assert len(torn.findings()) == (content[:cut][-1:] not in (b'', b'\n'))
        torn.label('after.jpg', 'cat')
        again = EditLog(path)
        if content[cut:cut + 1] == b'\n' and cut: continue  # only the end of the line was missing, and now it is there
        assert again.edits[:-1] == whole.edits[:lines] and again.state('after.jpg').label == 'cat'
        assert [finding.kind for finding in again.findings()] == ['torn_line'] * len(torn.findings())


def test_damaged_lines_are_reported_with_their_number(log):
    for image in 'abc': log.label(image, 'cat')
    lines = log.path.read_bytes().splitlines(keepends=True)
    bad = [b'{"time": "x", "action": "delete", "image": "a", "reason": "", "id": "1.0"}\n', b'\xff\xfe\n', b'[1]\n', b'null\n', b'\n']
    log.path.write_bytes(lines[0] + b''.join(bad) + lines[1] + lines[2])
    damaged = EditLog(log.path)
    assert len(damaged) == 3 and [f.image for f in damaged.findings()] == [f'labels.jsonl, line {n}' for n in (2, 3, 4, 5)]


WRITER = """
import sys
from imgcls_nb.labelling import EditLog
path, name, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
log = EditLog(path)
print('ready', flush=True)
sys.stdin.readline()
for i in range(count):
    log.label(f'{name}-{i}.jpg', name * 50)
    print(i, flush=True)
"""


def test_two_writers_at_once_and_a_third_that_is_killed(tmp_path):
    path = tmp_path/'shared.jsonl'
    def start(name, count):
        return subprocess.Popen([sys.executable, '-c', WRITER, path, name, str(count)], text=True,
                                stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    writers = {'one': start('one', 150), 'two': start('two', 150), 'victim': start('victim', 1_000_000)}
    for writer in writers.values(): assert writer.stdout.readline() == 'ready\n'
    for writer in writers.values():
        writer.stdin.write('\n')
        writer.stdin.flush()
    promised = [int(writers['victim'].stdout.readline()) for _ in range(40)]
    writers['victim'].send_signal(signal.SIGKILL)
    promised += [int(line) for line in writers['victim'].stdout if line.endswith('\n')]
    for name in ('one', 'two'):
        assert writers[name].communicate()[0].count('\n') == 150 and writers[name].returncode == 0
    assert writers['victim'].wait() == -signal.SIGKILL
    log = EditLog(path)
    written = Counter(edit.new for edit in log.edits)
    assert written['one' * 50] == written['two' * 50] == 150 and len(log.findings()) <= 1
    assert all(log.state(f'victim-{i}.jpg') for i in promised) and written['victim' * 50] <= len(promised) + 1


def test_undo_leaves_what_another_notebook_adds(log):
    log.label('a', 'cat')
    other = EditLog(log.path)
    other.label('b', 'dog')
    assert [edit.image for edit in log.undo()] == ['a'] and log.undo() == [] and log.state('b').label == 'dog'
    assert [edit.image for edit in other.undo()] == ['b'] and other.undo() == []


def test_a_file_that_is_no_log_is_refused_and_left_alone(tmp_path):
    for content in (b'\xff\xd8\xff\xe0', b'image,label\n', b'{"name": "package"}', b'\n'):
        path = tmp_path/'photo.jpg'
        path.write_bytes(content)
        with pytest.raises(InputError, match='is not a log of edits'): EditLog(path)
        assert path.read_bytes() == content
    with pytest.raises(InputError, match='cannot be read'): EditLog(tmp_path)


def test_what_cannot_be_written_is_said_and_does_not_count(tmp_path):
    if not os.path.exists('/dev/full'): pytest.skip('needs /dev/full')
    log = EditLog(tmp_path/'labels.jsonl')
    log.label('a', 'cat')
    log.path.unlink()
    log.path.symlink_to('/dev/full')
    with pytest.raises(InputError, match='The last decision is not saved'): log.label('b', 'dog')
    (tmp_path/'file').write_text('')
    with pytest.raises(InputError, match='cannot be'): EditLog(tmp_path/'file'/'log.jsonl').label('a', 'cat')


def test_labels_and_classes_are_checked(log):
    for label in ('', ' \t'):
        with pytest.raises(InputError): log.label('a', label)
        with pytest.raises(InputError): log.add_class(label)
    log.add_class(' Cat ')
    for twin in ('cat', 'CAT', 'Cat'):
        with pytest.raises(InputError, match="class 'Cat' already"): log.add_class(twin)
    with pytest.raises(InputError, match="class 'dog' already"): log.add_class('Dog', known=['dog'])
    assert EditLog(log.path).classes() == ['Cat']
    log.undo()
    assert log.classes() == []


# Replay

def test_replay_labels_sets_aside_and_reports(log):
    data = squares(6, list('aabbcc'))
    log.record([Edit('', 'relabel', '0', 'a', 'd', digest=pixel_digest(data.open(0))), Edit('', 'relabel', '1', 'a', 'b'),
                Edit('', 'set_aside', '2', reason='blurred'), Edit('', 'relabel', '3', 'b', 'a', digest='0' * 64),
                Edit('', 'set_aside', '77', reason='gone'), Edit('', 'restore', '4')])
    for table in (data, data.scan()):
        result = log.apply(table)
        assert list(result.items['label']) == list('dbcc') and result.classes == ('b', 'c', 'd')
        assert {(f.kind, f.image) for f in result.set_aside} == {('set_aside', '2'), ('changed', '3'), ('missing', '77')}
        again = log.apply(result)
        assert again.items.equals(result.items) and again.set_aside == result.set_aside
        assert [result.open(row).tobytes() for row in range(4)] == [data.open(row).tobytes() for row in (0, 1, 4, 5)]
    assert list(log.apply(data, verify=False).items['label']) == list('dbacc')
    assert list(data.items['label']) == list('aabbcc')


def test_a_moved_image_is_reported_with_its_new_name(log):
    data = squares(3, list('abc')).scan()
    log.label('9', 'b', digest=data.items['digest'].iloc[2])
    assert 'the same pixels are in 2' in log.apply(data).set_aside[0].evidence


def test_the_code_makes_the_same_table(log):
    data = squares(5, list('aabbc'))
    log.label('0', "it's \"b\"")
    log.set_aside('3', 'line\nbreak')
    names = {'data': data}
    exec(log.as_code(), names)
    assert names['data'].items.equals(log.apply(data).items) and names['data'].set_aside == log.apply(data).set_aside
    assert list(edited(data, {}).items['label']) == list('aabbc')


def test_the_digest_is_that_of_the_scan(folder):
    data = unlabelled(folder)
    scanned = data.scan()
    rows = [list(data.items['image']).index(image) for image in scanned.items['image']]
    assert [thumbnail(data, row).digest for row in rows] == list(scanned.items['digest'])


def test_unlabelled_lists_everything_and_reports_the_rest(folder):
    (folder/'notes.txt').write_text('x')
    (folder/'no suffix').write_bytes((folder/'0.png').read_bytes())
    (folder/'.hidden.png').write_bytes(b'x')
    data = unlabelled(folder)
    assert len(data) == 11 and data.classes == () and [f.image for f in data.set_aside] == ['notes.txt']
    assert [f.kind for f in only_labelled(data).set_aside] == ['not_an_image'] + ['no_label'] * 11
    for wrong in (folder/'0.png', folder/'nowhere'):
        with pytest.raises(InputError, match='is not a folder'): unlabelled(wrong)
    (folder/'empty').mkdir()
    with pytest.raises(InputError, match='holds no images'): unlabelled(folder/'empty')


# The widgets, driven in Python

def test_label_by_click_select_undo_and_reopen(folder, log):
    data = unlabelled(folder)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob('*')}
    grid = label_grid(data, ['cat', 'dog'], log, page_size=4)
    first = [grid.name(row) for row in grid.on_page()]
    grid.class_buttons['cat'].click()
    grid.cells[2].button.click()
    grid.cells[3].button.click()
    grid.class_buttons['dog'].click()
    assert [grid.label_of(row) for row in grid.on_page()] == ['cat', '', 'dog', 'dog']
    grid.undo_button.click()
    assert [grid.label_of(row) for row in grid.on_page()] == ['cat', '', '', ''] and 'and 1 more' in grid.message.value
    for _ in range(3): grid.class_buttons['dog'].click()
    assert grid.page == 1 and grid.status.value.endswith('4 of 10 done, 6 to do · page 2 of 3')
    again = label_grid(data, ['cat', 'dog'], EditLog(log.path), page_size=4)
    assert again.page == 0 and again.current == again.on_page()[1]  # passed over before
    again.class_buttons['dog'].click()
    assert again.page == 1 and [again.log.state(name).label for name in first] == ['cat', 'dog', 'dog', 'dog']
    again.previous.click()
    assert [again.name(row) for row in again.on_page()] == first and '✓ cat' in again.cells[0].button.description
    again.next.click(), again.next.click(), again.next.click()
    assert again.page == 2 and [cell.box.layout.display for cell in again.cells] == [None, None, 'none', 'none']
    again.work.click()
    assert again.page == 1
    assert {path: path.stat().st_mtime_ns for path in folder.rglob('*')} == before


def test_unlabelled_first_and_new_classes(log):
    grid = label_grid(squares(6, ['a', '', 'b', '', 'a', '']), log=log, page_size=3)
    assert list(grid.on_page()) == [1, 3, 5] and list(grid.class_buttons) == ['a', 'b']
    grid.new_class.value = 'B '
    grid.add.click()
    assert 'There is a class' in grid.message.value and len(log) == 0
    grid.new_class.value = 'c'
    grid.add.click()
    grid.class_buttons['c'].click()
    assert grid.class_buttons['c'].description == 'c (1)'
    assert list(label_grid(grid.data, log=log.path).class_buttons) == ['a', 'b', 'c']


def test_keys_label_backspace_undoes_and_fast_typing_is_kept(log):
    grid = label_grid(squares(10), ['cat', 'dog', 'cow'], log, page_size=4)
    assert grid.key_of == dict(cat='c', dog='d', cow='o')
    for text in ('c', 'cd', 'cd ', 'cd D', 'cd Do', 'cd Do-c'): grid.keys.value = text
    labels = [grid.label_of(row) for row in range(8)]
    assert labels == ['cat', 'dog', '', 'dog', 'cow', '', 'cat', ''] and log.state('5').aside
    grid.keys.value = 'cd D'
    assert [grid.label_of(row) for row in range(8)] == ['cat', 'dog', '', 'dog', '', '', '', ''] and log.state('5') is None
    grid.keys.value = 'cd Dz'
    assert 'No class has the key z' in grid.message.value
    grid.keys.value = 'cd D'
    grid.keys.value = ''
    assert log.images() == []
    grid.keys.value = 'c'
    grid.next.click()
    grid.class_buttons['dog'].click()
    assert grid.keys.value == '' and log.state('0').label == 'cat'


def test_set_aside_and_restore(log):
    grid = label_grid(squares(4), ['a'], log)
    grid.reason.value = 'blurred'
    grid.aside_button.click()
    assert log.state('0').aside == 'blurred' and grid.caption(0) == 'set aside' and grid.current == 1
    grid.restore_button.click()
    assert 'Select images' in grid.message.value
    grid.cells[0].button.click()
    grid.restore_button.click()
    assert log.state('0').aside is None and grid.caption(0) == '✓ ?' and grid.todo[0]


def test_a_broken_image_shows_as_such_and_names_are_escaped(folder, log):
    grid = label_grid(unlabelled(folder), ['<b>'], log)
    broken = [cell for cell in grid.cells if cell.button.tooltip.startswith('3.png ')]
    assert len(broken) == 1 and Image.open(io.BytesIO(broken[0].image.value)).size == (96, 96)
    row = [grid.name(row) for row in grid.rows].index('<img src=x onerror=alert(1)>.png')
    grid.cells[row].button.click()
    grid.class_buttons['<b>'].click()
    assert '<b>' not in grid.message.value and '<img' not in grid.message.value
    assert len(grid.picture().axes) == 16


def test_an_image_that_changed_is_shown_as_changed(folder, log):
    data = unlabelled(folder)
    label_grid(data, ['cat'], log).class_buttons['cat'].click()
    name = log.images()[0]
    Image.fromarray(np.full((9, 9), 255, np.uint8)).save(folder/name)
    grid = label_grid(data, ['cat'], log)
    row = [grid.name(row) for row in grid.rows].index(name)
    assert grid.caption(row) == 'changed: cat?'
    assert [f.kind for f in log.apply(data).set_aside] == ['changed']


def test_a_full_disk_shows_nothing_as_done(log):
    if not os.path.exists('/dev/full'): pytest.skip('needs /dev/full')
    log.path.symlink_to('/dev/full')
    grid = label_grid(squares(3), ['a'], log)
    grid.class_buttons['a'].click()
    assert 'not saved' in grid.message.value and grid.label_of(0) == '' and grid.current == 0


def test_more_classes_than_buttons(log):
    classes = [f'class {i}' for i in range(100)]
    grid = label_grid(squares(3), classes, log)
    grid.choice.value = 'class 77'
    grid.choices.children[1].click()
    assert grid.label_of(0) == 'class 77' and len(class_keys(classes)) == 36


def test_the_cleaner_orders_filters_and_keeps_everything(log):
    data = squares(12, list('aabbccaabbcc'))
    order = np.arange(12.0)
    grid = clean_grid(data, log, order, page_size=4)
    assert list(grid.on_page()) == [11, 10, 9, 8] and 'c · 11.0' in grid.cells[0].button.description
    grid.class_buttons['a'].click()
    grid.right.click()
    grid.aside_button.click()
    grid.show_class.value = 'a'
    assert list(grid.rows) == [7, 6, 1, 0]
    grid.class_buttons['b'].click()
    grid.show_class.value = 'c'
    assert list(grid.rows) == [11, 10, 5, 4] and grid.current == 5 and grid.cells[0].button.description == '✓ a'
    grid.show_class.value = None
    assert [grid.label_of(row) for row in (11, 10, 7)] == ['a', 'c', 'b'] and log.state('9').aside
    grid.rest_right.click()
    assert grid.page == 1 and grid.todo.sum() == 7
    grid.undo_button.click()
    assert grid.page == 0 and grid.todo.sum() == 8
    again = clean_grid(data, EditLog(log.path), order, page_size=4)
    assert again.current == 8 and again.todo.sum() == 8
    result = log.apply(data)
    assert len(result) == 11 and list(result.items['label'])[-2:] == ['c', 'a']
    grid.keys.value = ' '
    assert log.state('8').label == 'b' and log.standing('8')[-1].reason == 'looked at'


def test_the_loss_is_the_cross_entropy_of_the_given_label():
    data = squares(3, ['a', 'b', ''])
    data.classes = ('a', 'b')
    loss = label_loss(data, np.array([[0.5, 0.5], [1, 0], [0.1, 0.9]]))
    assert np.allclose(loss, [np.log(2), -np.log(1e-12), 0])
    with pytest.raises(InputError, match='3 images and 2 classes'): label_loss(data, np.ones((3, 3)))
    with pytest.raises(InputError, match='one number for each'): clean_grid(data, 'x.jsonl', [1, 2])


def test_a_million_rows_open(log):
    label = np.where(np.arange(1_000_000) % 2, '', 'cat')
    items = pd.DataFrame(dict(image=[f'{i:07}.jpg' for i in range(1_000_000)], label=label, split=''))
    data = ImageSet(items, ('cat', 'dog'), root=log.path.parent)
    log.label('0500001.jpg', 'dog')
    grid = label_grid(data, log=log)
    grid.class_buttons['dog'].click()
    assert grid.label_of(1) == 'dog' and grid.label_of(500001) == 'dog' and not grid.todo[500001]


# A real browser

BROWSER = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome', 'Chrome'))), None)
FLAGS = ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking',
         '--disable-component-update', '--disable-sync']
SHOW_GRID = """import os
from pathlib import Path
from imgcls_nb.data import digits
from imgcls_nb.labelling import label_grid
from dataclasses import replace
Path('pid').write_text(str(os.getpid()))
data = digits()
data = replace(data, items=data.items.assign(label='').head(30), classes=())
grid = label_grid(data, ['zero', 'one', 'other'], 'labels.jsonl', page_size=12)
grid"""


@pytest.fixture
def jupyterlab(tmp_path):
    "A JupyterLab on a free port of this machine, with a notebook that shows a grid; its own settings folder."
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(SHOW_GRID)])
    nb.metadata['kernelspec'] = dict(name='python3', display_name='Python 3', language='python')
    root = tmp_path/'lab'
    root.mkdir()
    nbformat.write(nb, root/'label.ipynb')
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    folders = {name: str(tmp_path/name.lower()) for name in ('JUPYTER_CONFIG_DIR', 'JUPYTER_DATA_DIR', 'JUPYTER_RUNTIME_DIR',
                                                             'JUPYTERLAB_SETTINGS_DIR', 'JUPYTERLAB_WORKSPACES_DIR', 'IPYTHONDIR')}
    command = [sys.executable, '-m', 'jupyterlab', '--no-browser', '--allow-root', '--ServerApp.ip=127.0.0.1', f'--port={port}',
               '--ServerApp.port_retries=0', '--IdentityProvider.token=secret', f'--ServerApp.root_dir={root}',
               '--LabApp.expose_app_in_browser=True']
    quiet = tmp_path/'jupyterlab_settings_dir'/'@jupyterlab'/'apputils-extension'/'notification.jupyterlab-settings'
    quiet.parent.mkdir(parents=True)
    quiet.write_text('{"fetchNews": "false", "checkForUpdates": false}')
    output = (tmp_path/'lab.log').open('w')
    server = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **folders})
    url = f'http://127.0.0.1:{port}'
    try:
        wait_for(lambda: urllib.request.urlopen(f'{url}/api?token=secret', timeout=5), 60, lambda: (tmp_path/'lab.log').read_text())
        yield SimpleNamespace(root=root, url=f'{url}/lab/tree/label.ipynb?token=secret&reset')
    finally:
        server.terminate()  # which shuts its kernels down
        try: server.wait(20)
        except subprocess.TimeoutExpired: server.kill()
        output.close()


def wait_for(what, seconds: float, explain=str):
    "Until it returns something true; errors of a connection count as not yet."
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if found := what(): return found
        except OSError: pass
        time.sleep(0.1)
    raise AssertionError(f'nothing after {seconds} s: {explain()}')


def show_grid(page, url: str) -> None:
    "Open the notebook, run its cell, and wait for the grid."
    page.goto(url)
    page.wait_for_selector('.jp-NotebookPanel .jp-Cell', timeout=60_000)
    page.wait_for_function('window.jupyterapp && window.jupyterapp.shell.currentWidget && '
                           'window.jupyterapp.shell.currentWidget.sessionContext?.session?.kernel?.status === "idle"', timeout=60_000)
    page.evaluate('window.jupyterapp.commands.execute("notebook:run-all-cells")')
    page.wait_for_selector('.imgcls-cell button:has-text("?")', timeout=60_000)


def captions(page) -> list[str]:
    return [text.strip() for text in page.locator('.imgcls-cell button').all_inner_texts()]


@pytest.mark.skipif(BROWSER is None, reason='no Chromium or Chrome is installed')
def test_label_undo_kill_reopen_in_a_browser(jupyterlab):
    sync_api = pytest.importorskip('playwright.sync_api')
    log = jupyterlab.root/'labels.jsonl'
    def lines(): return [json.loads(line) for line in log.read_text(encoding='utf-8').splitlines()] if log.exists() else []
    with sync_api.sync_playwright() as playwright, playwright.chromium.launch(executable_path=BROWSER, args=FLAGS) as browser:
        page = browser.new_page(viewport=dict(width=1000, height=900))
        show_grid(page, jupyterlab.url)
        page.click('button[title="label as zero"]')  # the current image
        page.wait_for_selector('.imgcls-cell button:has-text("✓ zero")')
        page.locator('.imgcls-cell button').nth(3).click()  # two that are selected
        page.locator('.imgcls-cell button').nth(4).click()
        page.wait_for_selector('.imgcls-selected >> nth=1')
        page.click('button[title="label as other"]')
        page.wait_for_selector('.imgcls-cell button:has-text("✓ other") >> nth=1')
        page.click('button[title="take back the latest decision"]')
        page.wait_for_selector('.imgcls-cell button:has-text("✓ other")', state='detached')
        keys = page.locator('input[placeholder="type keys here"]')
        keys.press_sequentially('thz')  # the current image is the first of the two: other, no class's key, zero
        page.wait_for_selector('.imgcls-cell button:has-text("✓ zero") >> nth=1')
        keys.press('Backspace')
        wait_for(lambda: len(lines()) == 8, 20, lambda: str(lines()))
        expected = ['✓ zero', '?', '?', '✓ other'] + ['?'] * 8
        wait_for(lambda: captions(page) == expected, 20, lambda: str(captions(page)))
        os.kill(int((jupyterlab.root/'pid').read_text()), signal.SIGKILL)
        page.close()
        page = browser.new_page(viewport=dict(width=1000, height=900))
        show_grid(page, jupyterlab.url)
        wait_for(lambda: captions(page) == expected, 20, lambda: str(captions(page)))
        if folder := os.environ.get('IMGCLS_SCREENSHOTS'): page.screenshot(path=f'{folder}/grid.png')
    assert [edit['action'] for edit in lines()] == ['label', 'label', 'label', 'undo', 'undo', 'label', 'label', 'undo']
