"Every engine behind one interface: the same answers, only the chosen one imported, an absent one named in a sentence."
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from imgcls_nb.run import InputError
from imgcls_nb.runtimes import (ENGINES, Engine, Port, check_self_contained, open_engine, open_session, register_engine, run_outputs,
                                run_session, time_calls)
from test_bundle import GRAPH, PIXELS, linear, record, runtime

MANY = np.random.default_rng(2).integers(0, 256, (130, 4, 4, 1), dtype=np.uint8)


def engine_or_skip(name):
    if problem := ENGINES[name].problem(): pytest.skip(problem)
    return name


@pytest.mark.parametrize('name', ['onnxruntime', 'openvino', 'cuda', 'tensorrt'])
def test_engines_agree_and_say_what_they_take(name):
    engine = open_engine(engine_or_skip(name), GRAPH, threads=1)
    assert engine.takes == (Port('pixels', 'uint8', (None, 4, 4, 1)),) and engine.gives == (Port('probabilities', 'float32', (None, 3)),)
    expected = run_session(open_session(GRAPH), MANY)
    for size in (1, 7, 64, 200): assert np.abs(engine.outputs(MANY, size)['probabilities'] - expected).max() < 1e-5
    assert np.abs(engine.outputs(MANY[:, ::-1])['probabilities'] - run_session(open_session(GRAPH), MANY[:, ::-1])).max() < 1e-5  # not contiguous


@pytest.mark.parametrize('name', ['onnxruntime', 'openvino'])
def test_results_are_the_callers_own(name):
    engine = open_engine(engine_or_skip(name), GRAPH)
    first = engine.outputs(MANY[:1])['probabilities']
    kept = first.copy()
    engine.outputs(MANY[1:2])
    assert (first == kept).all()


@pytest.mark.parametrize('name', ['onnxruntime', 'openvino'])
def test_threads_share_an_engine(name):
    engine = open_engine(engine_or_skip(name), GRAPH, threads=1)
    expected = engine.outputs(MANY)['probabilities']
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: engine.outputs(MANY[i:i + 1])['probabilities'][0], list(range(len(MANY))) * 5))
    assert np.abs(np.array(found) - np.concatenate([expected] * 5)).max() < 1e-5


def test_importing_the_module_imports_no_engine():
    code = ('import sys, imgcls_nb.runtimes as r; engines = {"onnxruntime", "openvino", "ai_edge_litert", "torch", "onnx"}\n'
            'print(sorted(engines & set(sys.modules)))\n'
            f'r.open_engine("onnxruntime", {GRAPH!r}); print(sorted(engines & set(sys.modules)))')
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.split('\n')[:2] == ['[]', "['onnxruntime']"]


def test_no_engine_reports_to_its_maker():
    pytest.importorskip('openvino')
    code = ('import sys, multiprocessing as m; m.Process.start = None\n'
            'from imgcls_nb.runtimes import ENGINES; assert ENGINES["openvino"].problem() is None\n'
            'print(sorted(name for name, module in sys.modules.items() if name.startswith("openvino_telemetry") and module))')
    said = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == '[]'


@pytest.mark.parametrize('name, module, pip', [('openvino', 'openvino', 'imgcls_nb[openvino]'), ('litert', 'ai_edge_litert.interpreter', 'ai-edge-litert'),
                                               ('onnxruntime', 'onnxruntime', 'onnxruntime')])
def test_an_absent_engine_says_how_to_install_it(monkeypatch, name, module, pip):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match='pip install') as found: open_engine(name, GRAPH)
    assert pip in str(found.value) and '\n' not in str(found.value)


@pytest.mark.parametrize('name', ['cuda', 'tensorrt'])
def test_an_absent_gpu_is_one_sentence(name):
    if not ENGINES[name].problem(): pytest.skip('there is one')
    with pytest.raises(InputError, match='NVIDIA GPU'): open_engine(name, GRAPH, half=name == 'tensorrt')


def test_a_bundle_of_an_engine_runs_with_it(tmp_path):
    from imgcls_nb.bundle import write_bundle
    engine_or_skip('openvino')
    bundle = write_bundle(tmp_path/'pets', record(runtimes=dict(onnx=runtime(), openvino=runtime(engine='openvino'))), {'model.onnx': GRAPH})
    both = [bundle.predictor(name, threads=1) for name in ('onnx', 'openvino')]
    assert [type(each.engine).__name__ for each in both] == ['OnnxRuntimeEngine', 'OpenVinoEngine']
    first, second = (each.outputs(PIXELS)['probabilities'] for each in both)
    assert np.abs(first - second).max() < 1e-5 and [a.label for a in both[0].answers(PIXELS)] == [a.label for a in both[1].answers(PIXELS)]


def test_sixteen_bits_only_where_there_is_a_switch():
    with pytest.raises(InputError, match='16 bits'): open_engine('onnxruntime', GRAPH, half=True)
    engine_or_skip('openvino')
    half = open_engine('openvino', GRAPH, half=True).outputs(PIXELS)['probabilities']
    assert np.abs(half - run_session(open_session(GRAPH), PIXELS)).max() < 0.05


def test_what_cannot_be_opened(tmp_path):
    with pytest.raises(InputError, match='no engine'): open_engine('abacus', GRAPH)
    with pytest.raises(InputError, match='cannot be read'): open_session(tmp_path/'nothing.onnx')
    with pytest.raises(InputError, match='nothing.onnx'): open_engine('onnxruntime', tmp_path/'nothing.onnx')
    (tmp_path/'x.onnx').write_bytes(b'x')
    with pytest.raises(InputError, match='x.onnx is not a model that ONNX Runtime'): open_session(tmp_path/'x.onnx')
    check_self_contained(GRAPH)
    with pytest.raises(InputError, match='stopped while it ran'): open_engine('onnxruntime', GRAPH).outputs(MANY[:, :2])


def test_one_more_engine():
    "What a plug-in has to write."
    @register_engine('constant')
    class Constant(Engine):
        takes, gives = (Port('pixels', 'uint8', (1, 4, 4, 1)),), (Port('probabilities', 'float32', (1, 3)),)
        def __init__(self, data, threads=None, half=False, name='The data'): self.sizes = []
        def run(self, pixels):
            self.sizes.append(len(pixels))
            return dict(probabilities=np.full((len(pixels), 3), 1 / 3, np.float32))
    try:
        engine = open_engine('constant', b'anything')
        assert engine.outputs(MANY[:4])['probabilities'].shape == (4, 3) and engine.sizes == [1, 1, 1, 1]  # a file for one image at a time
    finally: del ENGINES['constant']


def test_batches_are_put_together_in_order():
    session = open_session(linear())
    assert (run_outputs(session, MANY, 7)['probabilities'] == np.concatenate([run_session(session, MANY[i:i + 7]) for i in range(0, 130, 7)])).all()
    assert time_calls(lambda image: run_session(session, image), MANY, 20).shape == (20,)


@pytest.mark.edge
def test_litert_repeats_the_network():
    "A converted network gives PyTorch's answers, one image at a time and from several threads."
    import torch
    import litert_torch
    torch.manual_seed(0)
    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(16, 3))
        def forward(self, pixels): return self.layers(pixels.permute(0, 3, 1, 2).float() / 255).softmax(1)
    network = Network().eval()
    path_free = litert_torch.convert(network, (torch.from_numpy(MANY[:1]),))
    import os
    import tempfile
    with tempfile.TemporaryDirectory() as folder:
        path_free.export(os.path.join(folder, 'model.tflite'))
        engine = open_engine('litert', open(os.path.join(folder, 'model.tflite'), 'rb').read(), threads=1)
    with torch.inference_mode(): expected = network(torch.from_numpy(MANY)).numpy()
    assert engine.takes[0].shape == (1, 4, 4, 1) and engine.gives == (Port('probabilities', 'float32', (1, 3)),)
    assert np.abs(engine.outputs(MANY)['probabilities'] - expected).max() < 1e-5
    with ThreadPoolExecutor(4) as pool: assert all(np.abs(found['probabilities'] - expected).max() < 1e-5 for found in pool.map(lambda _: engine.outputs(MANY), range(8)))
    for content in (b'', b'x' * 100, GRAPH):
        with pytest.raises(InputError, match='LiteRT can run'): open_engine('litert', content)
