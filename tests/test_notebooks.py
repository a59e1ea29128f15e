"Every notebook runs from a bare kernel, cell by cell, without a network; and each keeps the house style."
import json
import re

import pytest
from run_notebooks import FLAGS, NEVER, NOTEBOOKS, has_flag, run_notebook

NAMES = [path.stem for path in NOTEBOOKS]
BY_NAME = dict(zip(NAMES, NOTEBOOKS))
PATHS = re.compile(r'(?<![\w.])/(?:home|root|tmp|work|Users|private)/|site-packages')


@pytest.mark.parametrize('name', NAMES)
def test_unflagged_cells_run(name, monkeypatch):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    before = set(BY_NAME[name].parent.iterdir())
    run_notebook(BY_NAME[name], timeout=900)  # the error's message holds the failing cell
    assert set(BY_NAME[name].parent.iterdir()) == before, 'the notebook left files behind'


@pytest.mark.slow
@pytest.mark.parametrize('name', NAMES)
def test_slow_cells_run(name, monkeypatch):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    if not has_flag(BY_NAME[name], 'slow'): pytest.skip('no slow cell')
    run_notebook(BY_NAME[name], ['slow'], timeout=1200)


@pytest.mark.parametrize('name', NAMES)
def test_style(name):
    cells = json.loads(BY_NAME[name].read_text(encoding='utf-8'))['cells']
    first = ''.join(cells[0]['source'])
    assert cells[0]['cell_type'] == 'markdown' and re.match(r'# .+\n\n> .+', first), 'title, then a one-line subtitle'
    code = [''.join(cell['source']) for cell in cells if cell['cell_type'] == 'code']
    never = [source for source in code if NEVER.search(source)]
    assert all('%pip install' in source for source in never) and len(never) <= 1, 'only the install cell is never run'
    for source in code:
        if re.search(r'^#\|\s*export', source, re.M): assert source.count('\n') <= 35, f'a long exported cell:\n{source[:300]}'
        if '#| export' in source: assert max(map(len, source.splitlines())) <= 110, f'a long line:\n{source[:200]}'
        for flag in re.findall(r'^#\|\s*(\w+)\s*$', source, re.M): assert flag in {*FLAGS, 'export', 'hide'}, flag


@pytest.mark.parametrize('name', NAMES)
def test_stored_outputs_are_clean(name):
    cells = json.loads(BY_NAME[name].read_text(encoding='utf-8'))['cells']
    outputs = [output for cell in cells for output in cell.get('outputs', [])]
    assert outputs or name == 'index', 'no stored outputs: run tools/run_notebooks.py --save'
    for output in outputs:
        text = json.dumps({key: value for key, value in output.items() if key != 'metadata'})
        assert output['output_type'] != 'error' and output.get('name') != 'stderr', text[:300]
        text = re.sub(r'"image/png": "[^"]*"', '', text)
        assert not PATHS.search(text), f'a path of a machine: {PATHS.search(text)}'
