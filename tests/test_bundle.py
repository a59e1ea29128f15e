"What a bundle must refuse: damage, tricks with files, records made to break the reader, graphs that reach outside, pickles."
import json
import os
import pickle
import re
import shutil
import sys
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from conftest import ROOT
from imgcls_nb.bundle import (FORMAT_VERSION, BundleRecord, CalibrationRecord, Decision, Figure, Parity, Predictor, Runtime,
                              add_runtime, bundle_schema, load_bundle, model_card, sha256, write_bundle)
from imgcls_nb.run import InputError
from imgcls_nb.runtimes import check_self_contained, open_engine, open_session

CLASSES = ['cat', 'dog', 'owl']
PIXELS = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 1), dtype=np.uint8)


def linear(nodes=(), initializers=(), imports=(), outputs=(), classes=3) -> bytes:
    "A graph from 4 × 4 grey pixels to probabilities, with more in it if asked."
    weight = np.random.default_rng(1).normal(size=(16, classes)).astype(np.float32)
    steps = [helper.make_node('Cast', ['pixels'], ['values'], to=TensorProto.FLOAT), helper.make_node('Flatten', ['values'], ['rows']),
             helper.make_node('Mul', ['rows', 'scale'], ['scaled']), helper.make_node('MatMul', ['scaled', 'weight'], ['logits']),
             helper.make_node('Softmax', ['logits'], ['probabilities'])]
    values = [numpy_helper.from_array(np.float32(1 / 255), 'scale'), numpy_helper.from_array(weight, 'weight')]
    graph = helper.make_graph([*steps, *nodes], 'linear', initializer=[*values, *initializers],
                              inputs=[helper.make_tensor_value_info('pixels', TensorProto.UINT8, ['batch', 4, 4, 1])],
                              outputs=[helper.make_tensor_value_info('probabilities', TensorProto.FLOAT, ['batch', classes]), *outputs])
    opsets = [helper.make_opsetid('', 17), *(helper.make_opsetid(name, 1) for name in imports)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()


GRAPH = linear()


def runtime(**fields) -> Runtime:
    parity = Parity(images=5, max_difference=0.0, same_class=5)
    return Runtime(**dict(file='model.onnx', bytes=len(GRAPH), parity=parity, latency_ms=0.1, latency_ms_p95=0.2) | fields)


def record(**fields) -> BundleRecord:
    preprocessing = dict(height=4, width=4, channels=1, fit='crop', crop_fraction=1.0, interpolation='bilinear', mean=[0.0], std=[1.0])
    return BundleRecord(**dict(
        name='pets', created='2026-01-01T00:00:00+00:00', task=dict(classes=CLASSES, metric='accuracy'), preprocessing=preprocessing,
        architecture='linear', metrics={}, data=dict(name='pets'), recipe={}, versions={}, machine={}, runtimes=dict(onnx=runtime()),
        checksums={}) | fields)


@pytest.fixture
def bundle(tmp_path):
    return write_bundle(tmp_path/'pets', record(), {'model.onnx': GRAPH, 'second.onnx': linear(classes=3) + b''})


def with_graph(folder, graph: bytes, **fields):
    "A bundle whose checksums are right and whose graph is not what it should be."
    return write_bundle(folder, record(**fields), {'model.onnx': graph})


def rewrite(bundle, change) -> None:
    "Change `bundle.json` in place."
    path = bundle.folder/'bundle.json'
    raw = json.loads(path.read_text(encoding='utf-8'))
    change(raw)
    path.write_text(json.dumps(raw), encoding='utf-8')


def refused(folder, *words) -> str:
    "The sentence that a folder is refused with."
    with pytest.raises(InputError) as found: load_bundle(folder).predictor()
    sentence = str(found.value)
    assert '\n' not in sentence and len(sentence) < 1000
    for word in words: assert word in sentence, sentence
    return sentence


# Formats

def test_three_formats_are_read_and_a_fourth_is_not(bundle):
    assert load_bundle(bundle.folder).record.format_version == FORMAT_VERSION == 3
    def older(raw):
        raw['format_version'] = 1
        for name in ('calibration', 'licence'): del raw[name]
        for name in ('decision', 'engine', 'half'): del raw['runtimes']['onnx'][name]
        raw['runtimes']['onnx']['accuracy'] = dict(value=0.5, low=0.4, high=0.6)
    rewrite(bundle, older)
    old = load_bundle(bundle.folder)
    assert old.record.format_version == 1 and old.record.runtimes['onnx'].engine == 'onnxruntime'
    assert old.predictor().probabilities(PIXELS).shape == (5, 3)
    again = add_runtime(old, 'second', runtime(file='second.onnx'), GRAPH)
    assert json.loads((again.folder/'bundle.json').read_text())['format_version'] == 3  # it holds fields that 1 did not have
    rewrite(bundle, lambda raw: raw.update(format_version=4))
    refused(bundle.folder, 'format 4', 'pip install -U imgcls_nb')


def test_no_labelled_images_no_accuracy(bundle):
    card = model_card(bundle.record)
    assert 'Nothing was measured' in card and '| – |' in card and 'model-index' not in card
    assert bundle.predictor().predict([])  == []


def test_tiny_figures_are_numbers_for_every_reader_of_the_card():
    import yaml
    tiny = Figure(value=1e-05, low=0, high=2e-05)
    card = model_card(record(name='worth 1e-05, "they" say', metrics=dict(error=tiny)))
    index = yaml.safe_load(card.split('---')[1])['model-index'][0]
    assert index['results'][0]['metrics'][0]['value'] == 1e-05 and index['name'] == 'worth 1e-05, "they" say'


def test_the_card_tells_of_every_threshold():
    def section(**fields): return model_card(record(**fields)).partition('## When it says not sure')[2].partition('##')[0]
    decision = Decision(probability=0.8, familiarity=None, promise=None, sure=Figure(value=0.9, low=0.8, high=1.0), precision=None)
    fitted = CalibrationRecord(temperature=1.5, images=9, error_before=0.2, error_after=0.1, error_by_chance=0.1, turned_away=0.01)
    runtimes = dict(onnx=runtime(), second=runtime(decision=decision))
    assert section().strip() == 'Never: no calibration was fitted.'
    assert 'Never' not in section(runtimes=runtimes) and '| second | 0.8000 |' in section(runtimes=runtimes)
    both = section(runtimes=runtimes, calibration=fitted)
    assert 'Temperature 1.5' in both and '| second | 0.8000 |' in both and 'No calibration' not in both


def test_an_unknown_engine_is_one_sentence(bundle):
    rewrite(bundle, lambda raw: raw['runtimes']['onnx'].update(engine='abacus'))
    refused(bundle.folder, 'abacus', 'onnxruntime')


def test_the_schema_accepts_what_is_written(bundle):
    schema = bundle_schema()
    assert set(schema['properties']) == set(json.loads((bundle.folder/'bundle.json').read_text()))
    assert schema['additionalProperties'] is False and 'onnxruntime' in json.dumps(schema)
    json.dumps(schema)


# Files

def test_damaged_truncated_longer_empty(bundle):
    path = bundle.folder/'model.onnx'
    for content in (GRAPH[:-1], GRAPH + b'\0', b'', GRAPH[:100] + bytes([GRAPH[100] ^ 1]) + GRAPH[101:]):
        path.write_bytes(content)
        refused(bundle.folder, 'model.onnx', 'checksum differs')


def test_swapped_and_renamed(tmp_path):
    other = linear(nodes=[helper.make_node('Identity', ['logits'], ['unused'])])
    bundle = write_bundle(tmp_path/'pets', record(), {'model.onnx': GRAPH, 'second.onnx': other})
    (bundle.folder/'model.onnx').rename(bundle.folder/'third.onnx')
    refused(bundle.folder, 'model.onnx', 'missing')
    (bundle.folder/'second.onnx').rename(bundle.folder/'model.onnx')
    (bundle.folder/'third.onnx').rename(bundle.folder/'second.onnx')
    refused(bundle.folder, 'checksum differs')


def test_links_are_refused_wherever_they_lead(bundle, tmp_path):
    path = bundle.folder/'model.onnx'
    path.rename(tmp_path/'outside.onnx')
    for target in (tmp_path/'outside.onnx', bundle.folder/'second.onnx', '/etc/passwd', 'nowhere', 'model.onnx'):
        path.symlink_to(target)
        refused(bundle.folder, 'model.onnx', 'link')
        path.unlink()
    shutil.copy(tmp_path/'outside.onnx', path)
    (bundle.folder/'bundle.json').rename(tmp_path/'outside.json')
    (bundle.folder/'bundle.json').symlink_to(tmp_path/'outside.json')
    refused(bundle.folder, 'bundle.json', 'link')


@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='a system without pipes')
@pytest.mark.parametrize('name', ['model.onnx', 'bundle.json'])
def test_pipes_and_folders_do_not_make_it_wait(bundle, name):
    path = bundle.folder/name
    path.unlink()
    os.mkfifo(path)
    refused(bundle.folder, name, 'not a plain file')
    path.unlink()
    path.mkdir()
    refused(bundle.folder, name, 'not a plain file')


def test_a_folder_of_devices_is_no_bundle(bundle):
    if not os.path.exists('/dev/zero'): pytest.skip('a system without devices')
    from pathlib import Path

    from imgcls_nb.bundle import _read_plain
    with pytest.raises(InputError, match='not a plain file'): _read_plain(Path('/dev/zero'), 10)


@pytest.mark.parametrize('name', ['model.onnx', 'bundle.json', 'README.md'])
def test_a_sparse_terabyte_is_refused_at_once(bundle, name):
    try: os.truncate(bundle.folder/name, 10**12)
    except OSError: pytest.skip('the file system allows no such file')
    refused(bundle.folder, name, 'larger than')


HOSTILE_NAMES = ['../model.onnx', '/etc/passwd', 'a/b', 'a\\b', 'C:model', '..', '.', '', ' ', '.hidden', 'model.onnx ', 'model.onnx.',
                 'bundle.json', 'BUNDLE.JSON', 'a\0b', 'a\nb', 'model\u202exnno.', 'model.onnx\u200b', '\ud800', '\ufeffx', 'é' * 200, 'x' * 300,
                 'model\u2024onnx', 'mode\u217c.onnx', 'ﬁle.onnx', 'e\u0301.onnx']


@pytest.mark.parametrize('name', HOSTILE_NAMES)
def test_hostile_names(bundle, name):
    def change(raw): raw['checksums'][name] = raw['checksums']['model.onnx']; raw['runtimes']['onnx']['file'] = name
    rewrite(bundle, change)
    refused(bundle.folder)
    outside = name in ('bundle.json', '..') or '/' in name
    if outside: refused(bundle.folder, 'outside the bundle')


def test_another_record_that_names_a_file_without_a_checksum(bundle):
    (bundle.folder/'extra.onnx').write_bytes(GRAPH)
    rewrite(bundle, lambda raw: raw['runtimes']['onnx'].update(file='extra.onnx'))
    refused(bundle.folder, 'has no file in the bundle')


def test_what_was_checked_is_what_runs(bundle):
    "A file that is exchanged after the bundle was opened is not run."
    opened = load_bundle(bundle.folder)
    (bundle.folder/'model.onnx').write_bytes(linear(nodes=[helper.make_node('Identity', ['logits'], ['unused'])]))
    with pytest.raises(InputError, match='checksum differs'): opened.predictor()


def test_a_file_exchanged_while_it_is_opened(bundle, monkeypatch):
    "Between the check and the engine nothing reads the path again."
    import imgcls_nb.bundle as module
    seen = []
    def exchange(engine, data, *rest):
        (bundle.folder/'model.onnx').write_bytes(b'evil')
        seen.append(type(data))
        return open_engine(engine, data, *rest)
    monkeypatch.setattr(module, 'open_engine', exchange)
    assert bundle.predictor().probabilities(PIXELS).shape == (5, 3) and seen == [bytes]


# Records

def test_deep_long_and_huge(bundle):
    path = bundle.folder/'bundle.json'
    text = path.read_text(encoding='utf-8')
    for value in ('[' * 100_000 + ']' * 100_000, '{"a":' * 40 + '1' + '}' * 40, '[' * 500 + ']' * 500, '1' * 5000, '1e999', '-1e999', 'NaN',
                  'Infinity', '"\\ud800"x', '{"a": 1, "a": }'):
        path.write_text(text.replace('"recipe": {}', f'"recipe": {{"x": {value}}}'), encoding='utf-8')
        try: assert load_bundle(bundle.folder).predictor()
        except InputError as error: assert '\n' not in str(error)
        else: assert value in ('1e999', '-1e999'), value[:20]
    for content in (b'', b'\xff\xfe', b'[]', b'null', b'1', b'{}', b'{"format_version": 1}', b'{"format_version": 1e0}', b'\0' * 100,
                    b'{"format_version": ' + b'9' * 4000 + b'}', b'{"format_version": true}', text.encode('utf-16')):
        path.write_bytes(content)
        refused(bundle.folder)


def places(value, path=()):
    "The path of every value inside nested dictionaries and lists."
    for key, child in (value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()):
        yield path + (key,)
        yield from places(child, path + (key,))


JSON = st.recursive(st.none() | st.booleans() | st.integers(-10**30, 10**30) | st.floats() | st.text(max_size=20)
                    | st.sampled_from([0, -1, 1e308, 10**400, 'model.onnx', '../x', 'onnx', 'openvino', 'litert', '\ud800', '\u202e', 2**63]),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3), max_leaves=6)
FULL = record(metrics=dict(accuracy=Figure(value=0.9, low=0.8, high=1.0)), notes=['a note'], licence='mit',
              runtimes=dict(onnx=runtime(accuracy=Figure(value=0.9, low=0.8, high=1.0)), second=runtime(engine='openvino')),
              calibration=dict(temperature=1.5, images=10, error_before=0.1, error_after=0.05, error_by_chance=0.07, turned_away=0.02))


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    "A bundle whose record is written over and over, and the record as it was."
    folder = write_bundle(tmp_path_factory.mktemp('fuzz')/'pets', FULL, {'model.onnx': GRAPH}).folder
    return SimpleNamespace(folder=folder, original=(folder/'bundle.json').read_bytes())


@settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_no_record_gives_a_traceback(place, data):
    "Any value anywhere: the bundle works, or it is refused with one sentence."
    raw = json.loads(place.original)
    *parents, last = data.draw(st.sampled_from(list(places(raw))))
    inner = raw
    for key in parents: inner = inner[key]
    if data.draw(st.booleans()): inner[last] = data.draw(JSON)
    elif isinstance(inner, dict): inner[data.draw(st.text(max_size=8))] = inner.pop(last)
    else: inner.append(data.draw(JSON))
    (place.folder/'bundle.json').write_text(json.dumps(raw), encoding='utf-8')
    works_or_says_why(place.folder)


def works_or_says_why(folder) -> bool:
    "Whether a bundle opens and answers; anything but `InputError` fails the test."
    try:
        bundle = load_bundle(folder)
        bundle._repr_markdown_(), repr(bundle), model_card(bundle.record), bundle_schema()
        for name in bundle.record.runtimes:
            answers = Predictor(bundle, name, threads=1).answers(PIXELS[:2])
            assert len(answers) == 2 and answers[0].label in bundle.classes and json.dumps(answers[0].as_dict())
    except InputError as error:
        assert '\n' not in str(error) and len(str(error)) < 2000
        return False
    return True


@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_no_bytes_give_a_traceback(place, data):
    "The same for the text itself: bytes removed, doubled, changed."
    text = bytearray(place.original)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(text) - 1))
        text[at:at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3) | st.sampled_from([b'"', b'{', b'\xff', b'1e999']))
    (place.folder/'bundle.json').write_bytes(text)
    works_or_says_why(place.folder)


# Graphs

def external(location: str):
    "A tensor that says that it lies in another file."
    tensor = TensorProto(name='secret', data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    for key, value in dict(location=location, offset='0', length='16').items():
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
    return tensor


@pytest.mark.parametrize('engine', ['onnxruntime', 'openvino'])
@pytest.mark.parametrize('where', ['inside', 'above', 'absolute', 'memory'])
def test_a_graph_may_not_read_other_files(tmp_path, engine, where, monkeypatch):
    if engine == 'openvino': pytest.importorskip('openvino')
    folder = tmp_path/'pets'
    location = {'inside': 'secret.bin', 'above': '../secret.bin', 'absolute': str(tmp_path/'secret.bin'), 'memory': '*/_ORT_MEM_ADDR_/*'}[where]
    (tmp_path/'secret.bin').write_bytes(np.arange(4, dtype=np.float32).tobytes())
    monkeypatch.chdir(tmp_path)
    node = helper.make_node('Identity', ['secret'], ['leak'])
    output = helper.make_tensor_value_info('leak', TensorProto.FLOAT, [4])
    graph = linear([node], [external(location)], outputs=[output])
    bundle = with_graph(folder, graph, runtimes=dict(onnx=runtime(engine=engine)))
    shutil.copy(tmp_path/'secret.bin', folder)
    refused(folder, 'model.onnx', 'other files')
    assert bundle


def test_a_file_hidden_deep_in_a_graph_is_found():
    "In a constant, in a branch of a condition, in a function: wherever a tensor may be."
    constant = helper.make_node('Constant', [], ['c'], value=external('x'))
    branch = helper.make_graph([constant], 'branch', [], [helper.make_tensor_value_info('c', TensorProto.FLOAT, [4])])
    condition = helper.make_node('If', ['yes'], ['chosen'], then_branch=branch, else_branch=branch)
    for graph in (linear([constant]), linear([condition], [numpy_helper.from_array(np.array(True), 'yes')])):
        with pytest.raises(InputError, match='other files'): check_self_contained(graph)
        with pytest.raises(InputError, match='other files'): open_session(graph)
    named = linear([helper.make_node('Identity', ['logits'], ['location'])])
    check_self_contained(named)  # the word alone is no crime
    with pytest.raises(InputError, match='cannot|can be read'): check_self_contained(b'location, but no graph')


@pytest.mark.parametrize('engine', ['onnxruntime', 'openvino'])
def test_operators_that_no_engine_knows(tmp_path, engine):
    if engine == 'openvino': pytest.importorskip('openvino')
    node = helper.make_node('RunProgram', ['logits'], ['strange'], domain='evil')
    output = helper.make_tensor_value_info('strange', TensorProto.FLOAT, ['batch', 3])
    with_graph(tmp_path/'pets', linear([node], imports=['evil'], outputs=[output]), runtimes=dict(onnx=runtime(engine=engine)))
    refused(tmp_path/'pets', 'model.onnx', 'not a model that')


def test_a_compiled_program_in_a_graph_is_refused():
    "`EPContext` names a file with machine code for one device."
    node = helper.make_node('EPContext', ['logits'], ['x'], domain='com.microsoft', ep_cache_context='/tmp/engine', embed_mode=0)
    with pytest.raises(InputError, match='other files'): open_session(linear([node], imports=['com.microsoft']))


@pytest.mark.parametrize('engine', ['onnxruntime', 'openvino'])
@pytest.mark.parametrize('content', [b'', b'x', b'\x08', GRAPH[:200], b'ORTM' * 10, b'\0\0\0\0ORTM' + b'\0' * 64, b'<?xml version="1.0"?><net/>', b'\x80\x04.'])
def test_what_is_no_graph(tmp_path, engine, content):
    if engine == 'openvino': pytest.importorskip('openvino')
    with_graph(tmp_path/'pets', content, runtimes=dict(onnx=runtime(engine=engine)))
    refused(tmp_path/'pets', 'model.onnx')


def test_graphs_that_do_not_fit_or_stop(tmp_path):
    with_graph(tmp_path/'four', linear(classes=4))
    refused(tmp_path/'four', 'does not fit')
    wrong = [helper.make_node('Gather', ['weight', 'index'], ['row'])]
    index = numpy_helper.from_array(np.array([99]), 'index')
    familiar = [helper.make_node('ReduceSum', ['row'], ['total'], keepdims=0), helper.make_node('ReduceMean', ['logits'], ['mean'], axes=[1], keepdims=0),
                helper.make_node('Add', ['mean', 'total'], ['familiarity'])]
    output = helper.make_tensor_value_info('familiarity', TensorProto.FLOAT, ['batch'])
    with_graph(tmp_path/'stops', linear(wrong + familiar, [index], outputs=[output]))
    try: predictor = load_bundle(tmp_path/'stops').predictor()  # newer versions find out here
    except InputError: return
    with pytest.raises(InputError, match='stopped while it ran'): predictor.probabilities(PIXELS)


def test_as_many_answers_as_images(tmp_path):
    "A graph that says `[batch, 3]` and gives a single row."
    first = helper.make_node('Slice', ['logits', 'zero', 'one', 'zero'], ['top'])
    graph = helper.make_graph(
        [helper.make_node('Cast', ['pixels'], ['values'], to=1), helper.make_node('Flatten', ['values'], ['rows']),
         helper.make_node('MatMul', ['rows', 'weight'], ['logits']), first, helper.make_node('Softmax', ['top'], ['probabilities'])], 'one',
        [helper.make_tensor_value_info('pixels', TensorProto.UINT8, ['batch', 4, 4, 1])],
        [helper.make_tensor_value_info('probabilities', TensorProto.FLOAT, ['some', 3])],
        [numpy_helper.from_array(np.ones((16, 3), np.float32), 'weight'), *(numpy_helper.from_array(np.array([v]), n) for n, v in [('zero', 0), ('one', 1)])])
    with_graph(tmp_path/'one', helper.make_model(graph, opset_imports=[helper.make_opsetid('', 17)], ir_version=8).SerializeToString())
    with pytest.raises(InputError, match='1 answers for 5 images'): load_bundle(tmp_path/'one').predictor().probabilities(PIXELS)


# Pickles

def test_no_line_of_the_library_unpickles():
    forbidden = re.compile(r'\b(c?pickle|cloudpickle|dill|joblib|shelve|marshal|torch\.hub|load_learner)\b|allow_pickle\s*=\s*True|weights_only\s*=\s*False')
    for path in sorted((ROOT/'imgcls_nb').glob('*.py')):
        text = path.read_text(encoding='utf-8')
        code = re.sub(r'#.*|"""[\s\S]*?"""|\'\'\'[\s\S]*?\'\'\'|"[^"\n]*"|\'[^\'\n]*\'', '', text)
        found = forbidden.search(code)
        assert not found, f'{path.name}: {found[0]}'
        for call in re.finditer(r'torch\.load\(([^()]|\([^()]*\))*\)', text): assert 'weights_only=True' in call[0], f'{path.name}: {call[0]}'
        for call in re.finditer(r'np\.load\(([^()]|\([^()]*\))*\)', text): assert 'allow_pickle=False' in call[0] or 'allow_pickle' not in call[0]
    assert forbidden.search('import pickle') and forbidden.search('np.load(x, allow_pickle=True)')


class Trap:
    "Makes a file when it is unpickled."
    def __init__(self, path): self.path = path
    def __reduce__(self): return open, (str(self.path), 'w')


def test_the_trap_works(tmp_path):
    pickle.loads(pickle.dumps(Trap(tmp_path/'sprung'))).close()
    assert (tmp_path/'sprung').exists()


def trapped(name: str, path) -> bytes:
    "A file of some kind with the trap in it."
    import io

    import torch
    buffer = io.BytesIO()
    if name.endswith('.npy'): np.save(buffer, np.array([Trap(path)], dtype=object), allow_pickle=True)
    elif name.endswith(('.pth', '.pt2')): torch.save(dict(weight=Trap(path)), buffer)
    elif name.endswith('.npz'):
        with zipfile.ZipFile(buffer, 'w') as archive: archive.writestr('images.npy', trapped('x.npy', path))
    else: return pickle.dumps(Trap(path))
    return buffer.getvalue()


@pytest.mark.parametrize('engine', ['onnxruntime', 'openvino', 'litert'])
@pytest.mark.parametrize('name', ['best_model.pth', 'model.npy', 'model.pt2', 'model.pkl', 'model.npz'])
def test_a_trap_in_a_bundle_is_not_sprung(tmp_path, name, engine):
    data = trapped(name, tmp_path/'sprung')
    write_bundle(tmp_path/'pets', record(runtimes=dict(onnx=runtime(file=name, engine=engine))), {name: data, 'best_model.pth': data})
    refused(tmp_path/'pets')
    assert not (tmp_path/'sprung').exists()


def test_a_trap_among_images_and_weights_is_not_sprung(tmp_path):
    from imgcls_nb.sources import load_images
    for name in ('x.npy', 'x.npz'):
        (tmp_path/name).write_bytes(trapped(name, tmp_path/'sprung'))
        with pytest.raises(InputError): load_images(tmp_path/name)
    assert not (tmp_path/'sprung').exists()


def test_opening_a_bundle_imports_nothing_that_unpickles(bundle):
    "No PyTorch, and so no `torch.load`, in a process that opens a bundle and asks it."
    import subprocess
    code = (f'import sys, numpy; from imgcls_nb.bundle import load_bundle; load_bundle({str(bundle.folder)!r}).predictor()'
            '.probabilities(numpy.zeros((1, 4, 4, 1), numpy.uint8)); print(sorted({"torch", "openvino", "ai_edge_litert", "onnx"} & set(sys.modules)))')
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == '[]'


def test_checksums_are_of_the_bytes(bundle):
    assert bundle.record.checksums['model.onnx'] == sha256(GRAPH)
