"The network of chapter 00 is the same one in PyTorch, in Keras on two backends, and in Flax."
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest

from conftest import ROOT

CELLS = [''.join(cell['source']) for cell in json.loads((ROOT/'nbs'/'00_task.ipynb').read_text(encoding='utf-8'))['cells']]
VERSIONS = {'pytorch': ('in_pytorch', {}), 'keras on tensorflow': ('in_keras', {'KERAS_BACKEND': 'tensorflow'}),
            'keras on jax': ('in_keras', {'KERAS_BACKEND': 'jax'}), 'flax': ('in_flax', {})}


def learned(name: str, path, environment: dict) -> dict:
    "What the chapter's function `name` learns from a task, in a Python of its own."
    [source] = [cell for cell in CELLS if cell.startswith(f'def {name}(')]
    script = f'''
import json, sys
import numpy as np
{source}
task = dict(np.load(sys.argv[1]))
step, predict = {name}(task)
before = predict().tolist()
print(json.dumps(dict(losses=[step(rows) for rows in task['batches']], before=before, after=predict().tolist())))
'''
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', script, str(path)], text=True, capture_output=True, timeout=300,
                          env=os.environ | environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.frameworks
def test_all_learn_the_same(tmp_path):
    "Pictures that are not square in any sense: a wrong order of axes cannot give the same losses."
    rng = np.random.default_rng(1)
    shapes = dict(conv1=(3, 3, 1, 16), conv2=(3, 3, 16, 32), fc1=(128, 64), fc2=(64, 10))
    task = {name: (rng.normal(size=shape) * 0.1).astype('float32') for name, shape in shapes.items()}
    images = rng.random((200, 8, 8, 1), dtype='float32')
    labels = (images[:, :4].sum((1, 2, 3)) * 3).astype('int64') % 10
    np.savez(tmp_path/'task.npz', **task, x=images, y=labels, x_test=images[:50], batches=rng.integers(0, 200, (30, 32)))
    found = {name: learned(function, tmp_path/'task.npz', environment) for name, (function, environment) in VERSIONS.items()}
    for name, result in found.items():
        assert np.allclose(result['losses'], found['pytorch']['losses'], atol=1e-4), name
        assert result['before'] == found['pytorch']['before'] and np.mean(np.equal(result['after'], found['pytorch']['after'])) > 0.95
    assert found['pytorch']['losses'][-1] < found['pytorch']['losses'][0]


def test_the_page_says_what_to_install():
    assert any('pip install "imgcls_nb[frameworks]"' in cell for cell in CELLS)
    flagged = [cell for cell in CELLS if re.search(r'^#\| frameworks$', cell, re.M)]
    assert len(flagged) >= 3
