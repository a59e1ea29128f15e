"The service, over real HTTP, from one command."
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image
from sklearn.datasets import load_digits

from conftest import assert_sentence, free_port, imgcls, serving
from imgcls_nb.run import InputError
from imgcls_nb.serve import ServiceOptions, create_app
from imgcls_nb.server import _InOnePiece
from samples import MODES, encoded, in_mode, patch, truncated_jpeg
from test_images import png_that_claims


@pytest.fixture(scope='module')
def service(digits_run, tmp_path_factory):
    "`imgcls serve` as a process, and a client for it."
    port = free_port()
    with serving(digits_run['bundle'], port, tmp_path_factory.mktemp('service')/'stderr'):
        with httpx.Client(base_url=f'http://127.0.0.1:{port}', timeout=20) as client: yield client


def digit(i: int) -> tuple[bytes, str]:
    "A real scanned digit as a PNG, with its label."
    bunch = load_digits()
    return encoded(Image.fromarray((bunch.images[i] / 16 * 255).round().astype(np.uint8)), 'PNG'), str(bunch.target[i])


def test_health(service):
    answer = service.get('/health')
    assert answer.status_code == 200 and answer.json()['status'] == 'ok' and len(answer.json()['classes']) == 10


def test_it_knows_digits(service):
    right = sum(service.post('/predict', content=data).json()['label'] == label for data, label in map(digit, range(0, 1797, 30)))
    assert right >= 55  # of 60


def test_a_fault_of_our_own_can_be_found_in_the_log(digits_run):
    app = create_app(digits_run['bundle'])
    app.state.service.info = None  # a bug
    answer = TestClient(app, raise_server_exceptions=False).get('/info', headers={'X-Request-ID': 'abc'})
    assert answer.status_code == 500 and answer.json() == dict(error='The service failed; its log says why.')
    assert answer.headers['x-request-id'] == 'abc' and answer.headers['x-content-type-options'] == 'nosniff'
    with pytest.raises(TypeError): TestClient(app).get('/info')


def test_a_form_and_a_raw_body_give_the_same_answer(service):
    data, _ = digit(3)
    raw, form = service.post('/predict', content=data), service.post('/predict', files=dict(file=('名 前.png', data)))
    assert raw.status_code == form.status_code == 200 and raw.json()['top'] == form.json()['top']


def test_the_service_answers_as_the_predictor_does(service, digits_run):
    from imgcls_nb.bundle import load_bundle
    data, _ = digit(7)
    assert service.post('/predict', content=data).json()['top'] == load_bundle(digits_run['bundle']).predictor()(data).as_dict()['top']


@pytest.mark.parametrize('name', MODES)
def test_every_mode_is_answered(service, name):
    mode, suffix = MODES[name]
    format = {'jpg': 'JPEG', 'tiff': 'TIFF'}.get(suffix.lower(), suffix.upper())
    assert service.post('/predict', content=encoded(in_mode(patch('brick', 1), mode), format)).status_code == 200


@pytest.mark.parametrize('data, status', [
    (b'', 422), (b'hello', 415), (truncated_jpeg(), 422), (png_that_claims(60_000, 60_000), 413), (b'\0' * 11_000_000, 413),
    (b'%PDF-1.7', 415), (b'\x89PNG\r\n\x1a\n', None), (b'GIF89a' + b'\xff' * 30, None)])
def test_bad_images_are_refused_with_a_reason(service, data, status):
    answer = service.post('/predict', content=data)
    assert 400 <= answer.status_code < 500 and (status is None or answer.status_code == status), answer.text
    assert len(answer.json()['error']) > 10 and 'Traceback' not in answer.text and '/' not in answer.json()['error']


@pytest.mark.parametrize('request_', [
    dict(files=dict(other=('a.png', b'x'))), dict(data=dict(file='text')),
    dict(content=b'--x\r\nrubbish', headers={'content-type': 'multipart/form-data; boundary=x'}),
    dict(content=b'rubbish', headers={'content-type': 'multipart/form-data'}),
    dict(files=[('file', ('a.png', b'x'))] * 17)])
def test_bad_forms_are_refused_with_a_reason(service, request_):
    answer = service.post('/predict', **request_)
    assert 400 <= answer.status_code < 500 and answer.json()['error'], answer.text


def test_wrong_methods_and_places(service):
    assert service.get('/predict').status_code == 405
    assert service.get('/../../etc/passwd').status_code == 404


def test_a_body_without_an_end_is_cut_off(service):
    "A sender that never says how much is coming is stopped at the limit."
    def forever():
        for _ in range(400): yield b'\0' * 100_000
    try: assert service.post('/predict', content=forever()).status_code == 413
    except httpx.TransportError: pass  # the service may close the connection while more is being sent


def test_many_at_once_and_the_next_one_too(service):
    data, label = digit(5)
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda i: service.post('/predict', content=data if i % 3 else b'rubbish'), range(150)))
    assert {a.status_code for a in answers} == {200, 415}
    assert service.post('/predict', content=data).json()['label'] == label


def test_the_page_stands_alone(service):
    page = service.get('/').text
    assert '<label' in page and 'digits' in page
    assert 'src="http' not in page and 'href="http' not in page and '@import' not in page


def test_the_service_loads_no_training_stack(digits_run):
    code = (f'import sys; from imgcls_nb.serve import create_app; create_app({digits_run["bundle"]!r});'
            'print({m.split(".")[0] for m in sys.modules} & {"torch", "fastai", "matplotlib", "timm"})')
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == 'set()'


def test_a_file_that_is_too_large_is_refused_beside_the_others(service):
    files = [('file', (name, data)) for name, data in [('zeros', b'\0' * 40_000_000), ('seven', digit(7)[0]), ('more', b'\0' * 11_000_000)]]
    answers = service.post('/predict', files=files).json()['answers']
    assert [answer.get('status', 200) for answer in answers] == [413, 200, 413]
    assert answers[1]['label'] == digit(7)[1] and 'larger than' in answers[0]['error']


def test_a_form_is_answered_whole_or_not_begun(digits_run):
    from fastapi.testclient import TestClient

    from imgcls_nb.serve import ServiceOptions, create_app
    large = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 255, (1500, 1500), np.uint8)), 'PNG')
    form = [('file', (f'{i}.png', large)) for i in range(12)]
    with TestClient(create_app(digits_run['bundle'], ServiceOptions(workers=1, latency=0.02))) as client:
        for _ in range(3): assert client.post('/predict', content=large).status_code == 200  # now it knows how long one takes
        reply = client.post('/predict', files=form)
        assert reply.status_code == 200 and ['label' in answer for answer in reply.json()['answers']] == [True] * 12
        with ThreadPoolExecutor(4) as pool: replies = list(pool.map(lambda _: client.post('/predict', files=form), range(8)))
    assert {reply.status_code for reply in replies} == {200, 503}
    assert all(len(reply.json()['answers']) == 12 for reply in replies if reply.status_code == 200)


def test_what_cannot_be_served_is_said_at_once(digits_run):
    assert_sentence(imgcls('serve', digits_run['bundle'], '--port', free_port(), '--runtime', 'nope'), "no runtime 'nope'", 'onnx')


@pytest.mark.parametrize('key', ['', ' ', 'open sesame'])
def test_a_key_is_a_word(digits_run, key):
    with pytest.raises(InputError, match='one word'): create_app(digits_run['bundle'], ServiceOptions(keys=('good', key)))


class Sent(list):
    "A connection that writes down what leaves it, piece by piece."
    write = list.append
    def close(self): self.append('closed')


def test_the_head_of_an_answer_waits_for_its_body():
    cycle = SimpleNamespace(transport=(sent := Sent()), response_started=False)
    connection = _InOnePiece(cycle)
    connection.write(b'100 Continue ')
    cycle.response_started = True
    for piece in (b'head ', b'body ', b'more'): connection.write(piece)
    connection.close()
    assert sent == [b'100 Continue ', b'head body ', b'more', 'closed']


def test_an_answer_that_is_given_up_still_has_its_head():
    connection = _InOnePiece(SimpleNamespace(transport=(sent := Sent()), response_started=True))
    connection.write(b'head')
    connection.close()
    assert sent == [b'head', 'closed']


def test_head_alone_is_answered(service):
    answer = service.head('/')
    assert answer.status_code in (200, 405) and not answer.content
