"To the hub and back, by way of a small hub on this machine: the client is the real one."
import json
import threading
from base64 import b64decode
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import huggingface_hub.constants
import numpy as np
import pytest
from huggingface_hub import ModelCard
from huggingface_hub.repocard import metadata_load
from huggingface_hub.repocard_data import model_index_to_eval_results
from safetensors.numpy import save

from imgcls_nb.bundle import Figure, load_bundle, model_card, sha256, write_bundle
from imgcls_nb.hub import check_card, check_safetensors, from_hub, hub_operations, push_to_hub
from imgcls_nb.run import InputError
from test_bundle import GRAPH, PIXELS, Trap, record

COMMIT = '1' * 40


class SmallHub(BaseHTTPRequestHandler):
    "As much of the hub's interface as one repository needs; its files lie in `server.files`."
    def log_message(self, *args): pass
    def body(self): return self.rfile.read(int(self.headers.get('Content-Length', 0)))

    def reply(self, content, status=200, **headers):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in dict({'Content-Length': len(data)}, **headers).items():
            self.send_header(name.replace('_', '-'), str(value))
        self.end_headers()
        if self.command != 'HEAD': self.wfile.write(data)

    def do_POST(self):
        content, files = self.body(), self.server.files
        self.server.calls.append(self.path)
        if 'preupload' in self.path:
            return self.reply({'files': [dict(path=file['path'], uploadMode='regular', shouldIgnore=False)
                                         for file in json.loads(content)['files']]})
        if self.server.status: return self.reply(dict(error='no'), self.server.status)
        if '/commit/' in self.path:
            for line in map(json.loads, content.splitlines()):
                if line['key'] == 'file': files[line['value']['path']] = b64decode(line['value']['content'])
            return self.reply(dict(commitUrl=f'http://{self.headers["Host"]}/you/digits/commit/' + COMMIT, commitOid=COMMIT))
        return self.reply(dict(url=f'http://{self.headers["Host"]}/you/digits', id='you/digits'))

    def do_GET(self):
        self.server.calls.append(self.path)
        files, name = self.server.files, self.path.rpartition('/')[2]
        if self.server.status: return self.reply(dict(error='no'), self.server.status)
        if self.path.startswith('/api/'):
            return self.reply(dict(id='you/digits', sha=COMMIT, siblings=[
                dict(rfilename=name, size=len(data)) for name, data in files.items()]))
        if name not in files: return self.reply(b'', 404, X_Error_Code='EntryNotFound')
        return self.reply(files[name], ETag=sha256(files[name]), X_Repo_Commit=COMMIT)

    do_HEAD = do_GET


@pytest.fixture
def hub(monkeypatch, tmp_path):
    "A hub with one empty repository."
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', False)
    monkeypatch.chdir(tmp_path)
    server = ThreadingHTTPServer(('127.0.0.1', 0), SmallHub)
    server.files, server.calls, server.status = {}, [], 0
    threading.Thread(target=server.serve_forever, daemon=True).start()
    options = dict(token='hf_no_secret', endpoint=f'http://127.0.0.1:{server.server_port}')
    yield SimpleNamespace(server=server, files=server.files, options=options)
    server.shutdown()
    server.server_close()


FULL = dict(metrics=dict(accuracy=Figure(value=0.9, low=0.8, high=1.0), log_loss=Figure(value=0.3, low=0.2, high=0.4)),
            data=dict(name='pets', source='hf:timm/oxford-iiit-pet'), licence='apache-2.0')


@pytest.fixture
def bundle(tmp_path):
    files = {'model.onnx': GRAPH, 'model.safetensors': save(dict(weight=np.ones(3, np.float32)))}
    return write_bundle(tmp_path/'here'/'pets', record(**FULL), files)


def test_there_and_back(hub, bundle, tmp_path):
    address = push_to_hub(bundle, 'you/pets', **hub.options)
    assert COMMIT in address and set(hub.files) == {'bundle.json', 'README.md', 'model.onnx', 'model.safetensors'}
    hub.files['extra.pkl'] = b'never asked for'
    back = from_hub('you/pets', folder=tmp_path/'back', **hub.options)
    assert back.record == bundle.record and load_bundle(back.folder).record == bundle.record
    assert (back.predictor().probabilities(PIXELS) == bundle.predictor().probabilities(PIXELS)).all()
    assert {path.name for path in back.folder.iterdir()} == {'bundle.json', 'README.md', 'model.onnx', 'model.safetensors'}
    assert not any(path.is_symlink() for path in back.folder.iterdir())
    assert not any('extra.pkl' in call for call in hub.server.calls)
    resolved = [call for call in hub.server.calls if '/resolve/' in call]
    assert resolved and all(f'/resolve/{COMMIT}/' in call for call in resolved)  # one commit, even if somebody pushes meanwhile


def test_the_default_folder_and_a_second_time(hub, bundle, tmp_path):
    push_to_hub(bundle, 'you/pets', **hub.options)
    assert from_hub('you/pets', 'v1', **hub.options).folder.resolve() == tmp_path/'pets'
    assert any('/revision/v1' in call for call in hub.server.calls)
    from_hub('you/pets', **hub.options)  # an older bundle is replaced
    (tmp_path/'pets'/'mine.txt').write_text('notes')
    with pytest.raises(InputError, match='mine.txt'): from_hub('you/pets', **hub.options)


def test_what_changed_on_the_way_is_refused(hub, bundle, tmp_path):
    push_to_hub(bundle, 'you/pets', **hub.options)
    hub.files['model.onnx'] = GRAPH[:-1] + b'x'
    with pytest.raises(InputError, match='checksum differs'): from_hub('you/pets', folder=tmp_path/'back', **hub.options)
    del hub.files['model.onnx']
    with pytest.raises(InputError, match='model.onnx'): from_hub('you/pets', folder=tmp_path/'back', **hub.options)
    hub.files['bundle.json'] = b'{}'
    with pytest.raises(InputError, match='damaged'): from_hub('you/pets', folder=tmp_path/'back', **hub.options)
    assert not (tmp_path/'back').exists() and not list(tmp_path.glob('.back*'))


def test_a_record_that_leads_outside(hub, bundle, tmp_path):
    push_to_hub(bundle, 'you/pets', **hub.options)
    for name in ('../../escaped', '/etc/passwd', '.git', 'a/b'):
        raw = json.loads(hub.files['bundle.json'])
        raw['checksums'][name] = '0' * 64
        hub.files['bundle.json'], before = json.dumps(raw).encode(), hub.files['bundle.json']
        with pytest.raises(InputError, match='outside the bundle'): from_hub('you/pets', folder=tmp_path/'back', **hub.options)
        hub.files['bundle.json'] = before


def test_a_pickle_on_the_hub_is_not_opened(hub, bundle, tmp_path):
    import pickle
    push_to_hub(bundle, 'you/pets', **hub.options)
    hub.files['pytorch_model.bin'] = pickle.dumps(Trap(tmp_path/'sprung'))
    raw = json.loads(hub.files['bundle.json'])
    raw['checksums']['pytorch_model.bin'] = sha256(hub.files['pytorch_model.bin'])
    hub.files['bundle.json'] = json.dumps(raw).encode()
    back = from_hub('you/pets', folder=tmp_path/'back', **hub.options)  # listed, so fetched and compared, as bytes
    assert back.predictor().probabilities(PIXELS).shape == (5, 3) and not (tmp_path/'sprung').exists()


@pytest.mark.parametrize('status, words', [(401, 'who you are'), (403, 'token may not'), (404, 'no such repository'), (500, '500')])
def test_what_the_hub_says_is_one_sentence(hub, bundle, tmp_path, monkeypatch, status, words):
    hub.server.status = status
    monkeypatch.setattr('time.sleep', lambda seconds: None)  # the client tries a 500 again
    for call in (lambda: push_to_hub(bundle, 'you/pets', **hub.options), lambda: from_hub('you/pets', folder=tmp_path/'back', **hub.options)):
        with pytest.raises(InputError, match=words) as found: call()
        assert '\n' not in str(found.value) and 'hf_no_secret' not in str(found.value)


def test_without_a_network_it_says_so(bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
    with pytest.raises(InputError, match='offline'): push_to_hub(bundle, 'you/pets')
    with pytest.raises(InputError, match='offline'): from_hub('you/pets', folder=tmp_path/'back')


@pytest.mark.parametrize('name', ['', 'a/b/c', '../x', 'you/pets.git', 'you/-pets', 'you/pe ts', 'x' * 100])
def test_impossible_names(bundle, name):
    with pytest.raises(InputError): push_to_hub(bundle, name)
    with pytest.raises(InputError): from_hub(name)


def test_only_whole_bundles_are_sent(bundle):
    operations = hub_operations(bundle)
    assert [operation.path_in_repo for operation in operations] == ['README.md', 'bundle.json', 'model.onnx', 'model.safetensors']
    assert operations[2].path_or_fileobj == GRAPH
    (bundle.folder/'model.onnx').write_bytes(b'x')
    with pytest.raises(InputError, match='checksum'): hub_operations(bundle)


def test_safetensors_are_looked_at(tmp_path):
    bundle = write_bundle(tmp_path/'pets', record(**FULL), {'model.onnx': GRAPH, 'model.safetensors': b'not at all'})
    with pytest.raises(InputError, match='safetensors format'): hub_operations(bundle)
    check_safetensors('x', save(dict(a=np.zeros(1))))


def test_the_card_is_what_the_hub_reads(bundle):
    text = (bundle.folder/'README.md').read_text(encoding='utf-8')
    card, facts = check_card(text), metadata_load(bundle.folder/'README.md')
    assert facts['library_name'] == 'imgcls_nb' and facts['pipeline_tag'] == 'image-classification' and facts['license'] == 'apache-2.0'
    assert facts['datasets'] == ['timm/oxford-iiit-pet'] and {'image-classification', 'linear', 'onnx'} <= set(facts['tags'])
    name, results = model_index_to_eval_results(facts['model-index'])
    assert name == 'pets' and {each.metric_type: each.metric_value for each in results} == dict(accuracy=0.9, log_loss=0.3)
    assert [each.metric_value for each in card.data.eval_results] == [0.9, 0.3] and card.data.model_name == 'pets'
    assert ModelCard.load(bundle.folder/'README.md').data.to_dict() == card.data.to_dict()


STRANGE = ['yes', 'null', '1e3', '---', 'a: b', '- x', '"', "'", '#', '{}', '\\', '%', '&a *b', 'a\n---\nb', '\ufeff', '\u2028', '\x85', '\x07', '\ud800',
           '\ufffe', '😀', 'é', '<script>', '| |', '\u202e', '']


@pytest.mark.parametrize('text', STRANGE)
def test_no_name_breaks_the_card(text):
    "Names come from folders, and folders can be called anything."
    full = record(**FULL | dict(name=text, architecture=text, licence=text or None, data=dict(name=text, source=f'hf:{text}')))
    card = check_card(model_card(full))
    assert card.data.library_name == 'imgcls_nb' and len(card.data.eval_results) == 2
    if text.isprintable(): assert card.data.model_name == text


def test_cards_that_the_hub_would_not_understand():
    for text in ('', '# A title', '---\nx: [\n---\n', '---\nlibrary_name: imgcls_nb\n---\n', '---\n- a\n---\n'):
        with pytest.raises(InputError, match='card'): check_card(text)
