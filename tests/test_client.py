"The Python client, over real HTTP: against the service, and against services that are busy, away, strict or no services at all."
import asyncio
import gc
import io
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from email.utils import formatdate
from pathlib import Path

import pytest
import uvicorn
from PIL import Image, ImageCms

from conftest import IMGCLS, OFFLINE, assert_sentence, imgcls
from imgcls_nb import client as module
from imgcls_nb.client import Client, ServiceError
from imgcls_nb.image import ImageError, Limits
from imgcls_nb.run import InputError
from samples import MODES, encoded, in_mode, patch, rotated_exif, truncated_jpeg

KEY = 'Zx81-a-secret-key'


class Service:
    "A small ASGI app on a port of its own: answers by a list, and keeps what it was asked."
    def __init__(self, *replies):
        self.replies, self.asked, self.times, self.at_once, self.most = list(replies), [], [], 0, 0
        self.server = uvicorn.Server(uvicorn.Config(self, port=0, log_level='critical', lifespan='off'))
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started: time.sleep(0.005)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f'http://127.0.0.1:{self.port}'

    async def __call__(self, scope, receive, send):
        body = b''
        while True:
            message = await receive()
            body += message.get('body', b'')
            if not message.get('more_body'): break
        self.times.append(time.monotonic())
        self.asked.append(dict(path=scope['path'], query=scope['query_string'].decode(), method=scope['method'], body=body,
                               headers={k.decode(): v.decode() for k, v in scope['headers']}, peer=scope['client']))
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        reply = self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]
        if callable(reply): reply = await reply(self.asked[-1])
        status, headers, content = reply
        self.at_once -= 1
        content = json.dumps(content).encode() if isinstance(content, dict) else content
        await send(dict(type='http.response.start', status=status, headers=[(k.encode(), v.encode()) for k, v in headers.items()]))
        await send(dict(type='http.response.body', body=content))

    def stop(self):
        self.server.should_exit = True
        self.thread.join()


def good(label='7', **more): return 200, {}, dict(label=label, probability=0.9, sure=True, reason=None, top=[
    dict(label=label, probability=0.9), dict(label='1', probability=0.06), dict(label='2', probability=0.04)], runtime='onnx', milliseconds=1, **more)


def address(listening: socket.socket) -> str: return f'http://127.0.0.1:{listening.getsockname()[1]}'


def busy(after='0'): return 503, {'retry-after': after}, dict(error='The service is busy.')


@pytest.fixture
def service():
    "Makes services, and ends them."
    made = []
    def make(*replies):
        made.append(Service(*replies))
        return made[-1]
    yield make
    for one in made: one.stop()


@pytest.fixture(scope='module')
def real(digits_run):
    "The service that the bundle of the test session gives, its address and a predictor of the same bundle."
    from imgcls_nb.bundle import load_bundle
    from imgcls_nb.serve import create_app
    server = uvicorn.Server(uvicorn.Config(create_app(digits_run['bundle']), port=0, log_level='critical'))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started: time.sleep(0.01)
    with Client(address(server.servers[0].sockets[0])) as client:
        yield client, load_bundle(digits_run['bundle']).predictor()
    server.should_exit = True
    thread.join()


# Against the real service

@pytest.mark.parametrize('name', MODES)
def test_it_answers_as_the_bundle_does_in_every_mode(real, name, tmp_path):
    client, predictor = real
    mode, suffix = MODES[name]
    image = in_mode(patch('brick', 3), mode)
    file = tmp_path/f'图 {name}.{suffix}'
    image.save(file)
    expected = predictor(image).as_dict()
    assert client(image).as_dict() == expected
    for source in (file, str(file), file.read_bytes()): assert client(source).as_dict() == predictor(source).as_dict()


def test_a_turn_and_a_colour_profile_are_applied_once(real):
    client, predictor = real
    image = patch('coffee', 1)
    image.paste('white', (0, 0, 96, 40))
    turned, profiled = image.copy(), image.copy()
    turned.info['exif'] = rotated_exif().tobytes()
    profiled.info['icc_profile'] = ImageCms.ImageCmsProfile(ImageCms.createProfile('LAB')).tobytes()
    for one in (turned, profiled): assert client(one).as_dict() == predictor(one).as_dict()
    assert client(turned).as_dict() != client(image).as_dict(), 'the turn counts'
    sent = Image.open(io.BytesIO(module._encode(turned)))
    assert not sent.info and image.size == sent.size[::-1]
    assert turned.info, 'the image that was given is as it was'


@pytest.mark.parametrize('data', [b'', b'hello', b'GIF89a' + bytes(20), truncated_jpeg()])
def test_a_refusal_is_the_error_that_the_bundle_raises(real, data):
    client, predictor = real
    with pytest.raises(ImageError) as local: predictor(data)
    with pytest.raises(ImageError) as remote: client(data)
    assert str(remote.value) == str(local.value)


def test_what_the_service_alone_refuses_is_an_image_error_too(real):
    with pytest.raises(ImageError, match='10,000,000 bytes'): real[0](b'\0' * 11_000_000)


@pytest.mark.parametrize('source, kind', [('nowhere.png', 'missing'), ('.', 'unreadable')])
def test_a_file_that_cannot_be_read_is_not_sent(service, source, kind):
    other = service(good())
    with Client(other.url) as client, pytest.raises(ImageError) as error: client(source)
    assert error.value.kind == kind and not other.asked


def test_a_limit_of_the_client_holds_before_sending(service):
    other = service(good())
    with Client(other.url) as client, pytest.raises(ImageError): client(b'12345', limits=Limits(max_bytes=4))
    assert not other.asked


def test_many_keep_their_order_and_one_error_loses_nothing(real):
    client, predictor = real
    images = [encoded(patch('grass', i), 'PNG') for i in range(20)]
    images[7] = b'no picture'
    found = client.predict(images, errors='return', workers=5)
    assert isinstance(found[7], ImageError)
    assert [one.as_dict() for i, one in enumerate(found) if i != 7] == [predictor(data).as_dict() for i, data in enumerate(images) if i != 7]
    with pytest.raises(ImageError, match='not an image'): client.predict(images)
    with pytest.raises(InputError, match='raise or return'): client.predict(images, errors='ignore')
    assert client.predict([]) == []
    with pytest.raises(InputError, match='At least one'): client.predict(images, workers=0)


def test_what_is_served(real):
    client, predictor = real
    assert client.ready() and client.classes == predictor.classes and client.info()['name'] == 'digits'


# Against services of all kinds

def test_top(service):
    other = service(good())
    with Client(other.url) as client:
        assert client(b'x', top=1).top == (('7', 0.9),) and len(client(b'x', top=2).top) == 2
    assert [one['query'] for one in other.asked] == ['top=1', 'top=2']


def test_an_answer_that_is_not_sure(service):
    status, headers, reply = good()
    reply.update(sure=False, reason='unlike the training images')
    with Client(service((status, headers, reply)).url) as client: answer = client(b'x')
    assert not answer.sure and answer.reason == 'unlike the training images' and answer.text == 'not sure (perhaps 7)'


def test_it_waits_as_long_as_it_is_asked_to(service):
    other = service(busy('1'), good())
    with Client(other.url) as client: assert client(b'x').label == '7'
    assert len(other.times) == 2 and other.times[1] - other.times[0] >= 1


def test_a_date_says_when_too(service):
    other = service(busy(formatdate(time.time() + 2, usegmt=True)), good())
    with Client(other.url) as client: client(b'x')
    assert other.times[1] - other.times[0] >= 0.9  # the date has whole seconds


@pytest.mark.parametrize('header', ['', 'soon', '-5', 'inf', 'nan', '1e9', 'Mon, 99 Foo 2020', '0'])
def test_an_odd_retry_after_is_no_reason_to_wait(header):
    assert module._asked_pause(header) == 0


def test_it_is_not_asked_again_after_the_time(service):
    other = service(busy('0'))
    begin = time.monotonic()
    with Client(other.url, timeout=1) as client, pytest.raises(ServiceError, match='busy') as error: client(b'x')
    assert error.value.status == 503 and time.monotonic() - begin < 5 and len(other.asked) > 1


@pytest.mark.parametrize('after', ['120', '9' * 400])
def test_a_pause_that_is_too_long_is_not_begun(service, after):
    other = service(busy(after))
    begin = time.monotonic()
    with Client(other.url, timeout=5) as client, pytest.raises(ServiceError): client(b'x')
    assert time.monotonic() - begin < 4 and len(other.asked) == 1


@pytest.mark.parametrize('status', [400, 401, 403, 404, 405, 408, 409, 413, 415, 422, 429, 499, 500, 502])
def test_every_other_status_is_final(service, status):
    other = service((status, {'retry-after': '0'}, dict(error='Because of this.')))
    with Client(other.url) as client, pytest.raises(InputError, match='Because of this') as error: client(b'x')
    assert len(other.asked) == 1 and isinstance(error.value, ImageError) == (status in (413, 415, 422))
    if isinstance(error.value, ServiceError): assert error.value.status == status


def test_pauses_are_random_and_grow():
    random.seed(0)
    first, later = [module._pause(1) for _ in range(200)], [module._pause(5000) for _ in range(200)]
    assert 0.1 <= min(first) < max(first) <= 0.2 and 2.5 <= min(later) and 4 < max(later) <= 5 and len(set(first)) == 200
    assert min(module._pause(1, asked=2) for _ in range(200)) >= 2


def test_a_service_that_comes_back_is_found_again(service):
    other = service(good())
    with Client(other.url) as client:
        assert client(b'x').label == '7'
        other.stop()
        later = []
        def come_back():
            time.sleep(0.3)
            server = uvicorn.Server(uvicorn.Config(other, port=other.port, log_level='critical', lifespan='off'))
            later.append(server)
            server.run()
        thread = threading.Thread(target=come_back, daemon=True)
        thread.start()
        assert client(b'y').label == '7', 'the connection that was kept open is dead'
        later[0].should_exit = True
        thread.join()


def test_a_connection_that_is_cut_is_made_again():
    "The first two requests meet a server that hangs up without a word."
    content = json.dumps(good()[2]).encode()
    with socket.create_server(('127.0.0.1', 0)) as listening:
        def serve():
            for number in range(3):
                connection, _ = listening.accept()
                connection.recv(65536)
                if number == 2:
                    connection.sendall(b'HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n' % len(content) + content)
                connection.close()
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        with Client(address(listening)) as client: assert client(b'x').label == '7'
        thread.join()


def test_a_reply_that_never_ends_is_cut_off():
    "One byte now and then keeps every single read within its limit."
    with socket.create_server(('127.0.0.1', 0)) as listening:
        def serve():
            connection, _ = listening.accept()
            try:
                connection.sendall(b'HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n')
                while True:
                    connection.sendall(b' ')
                    time.sleep(0.05)
            except OSError: connection.close()
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        begin = time.monotonic()
        with Client(address(listening), timeout=0.5) as client, \
                pytest.raises(ServiceError, match='too long'): client(b'x')
        assert time.monotonic() - begin < 5
        thread.join()


def test_a_service_that_is_silent_is_left_in_time():
    with socket.create_server(('127.0.0.1', 0)) as listening:
        begin = time.monotonic()
        with Client(address(listening), timeout=0.5) as client, \
                pytest.raises(ServiceError, match='cannot be reached'): client(b'x')
        assert 0.4 < time.monotonic() - begin < 5


def test_nobody_there():
    begin = time.monotonic()
    with Client('http://127.0.0.1:9') as client, pytest.raises(InputError, match=r'^http://127.0.0.1:9 cannot be reached'): client(b'x')
    assert time.monotonic() - begin < 20, 'it gives up long before its thirty seconds'
    with Client('http://no-such-host.invalid') as client:
        begin = time.monotonic()
        with pytest.raises(ServiceError, match='cannot be reached'): client.info()
    assert not Client('http://127.0.0.1:9').ready()


@pytest.mark.parametrize('reply', [
    (200, {}, b'<html>hello</html>'), (200, {}, b'[]'), (200, {}, b'null'), (200, {}, {}), (200, {}, dict(label='7')),
    (200, {}, dict(label='7', probability='high', sure=True, reason=None, top=[])), (200, {}, b'[' * 100_000), (200, {}, b'\xff\xfe'),
    (301, {'location': 'https://elsewhere.example/'}, b''), (502, {}, b'<html>Bad gateway</html>'), (204, {}, b''),
    (422, {}, dict(detail=[dict(loc=['query'])])), (200, {'content-encoding': 'gzip'}, b'no gzip')])
def test_something_else_at_that_port(service, reply):
    other = service(reply)
    with Client(other.url) as client, pytest.raises(ServiceError) as error: client(b'x')
    assert 'is it the address of an imgcls service?' in str(error.value) or 'cannot be reached' in str(error.value)
    assert '\n' not in str(error.value) and 'elsewhere' not in str(error.value) and len(other.asked) == 1


def test_a_reply_without_a_limit_is_refused(service):
    other = service((200, {}, b' ' * 11_000_000))
    with Client(other.url) as client, pytest.raises(ServiceError): client(b'x')


def test_a_reason_cannot_play_tricks_with_the_terminal(service):
    other = service((400, {}, dict(error='red \x1b[31m\r\nroot: \u202egnp' + 'x' * 5000)))
    with Client(other.url) as client, pytest.raises(ServiceError) as error: client(b'x')
    assert str(error.value).isprintable() and len(str(error.value)) < 700


@pytest.mark.parametrize('variable', ['HTTP_PROXY', 'http_proxy', 'ALL_PROXY'])
def test_a_proxy_is_not_asked_about_this_machine(service, monkeypatch, variable):
    monkeypatch.setenv(variable, 'http://127.0.0.1:9')
    other = service(good())
    with Client(other.url) as client: assert client(b'x').label == '7'
    with Client(other.url.replace('127.0.0.1', 'localhost')) as client: assert client(b'x').label == '7'


def test_a_proxy_is_used_for_other_machines(service, monkeypatch):
    proxy = service(good())
    monkeypatch.setenv('HTTP_PROXY', proxy.url)
    with Client('http://far.example:8000') as client: assert client(b'x').label == '7'
    assert proxy.asked[0]['headers']['host'] == 'far.example:8000'


# The key

def test_the_key_is_sent_and_never_shown(service, capfd, caplog):
    caplog.set_level('DEBUG')
    other = service((401, {}, dict(error='This service asks for a key.')))
    client = Client(other.url, key=KEY + '\n')
    with pytest.raises(ServiceError, match='asks for a key') as error: client(b'x')
    away = Client('http://127.0.0.1:9', key=KEY, timeout=0.3)
    with pytest.raises(ServiceError) as unreachable: away(b'x')
    assert other.asked[0]['headers']['authorization'] == f'Bearer {KEY}'
    import traceback
    shown = ''.join(traceback.format_exception(error.value)) + ''.join(traceback.format_exception(unreachable.value))
    shown += repr(client) + str(client) + repr(vars(client)) + repr(client._http.headers) + caplog.text + ''.join(capfd.readouterr())
    assert KEY not in shown


@pytest.mark.parametrize('key', ['', '  ', 'two words', 'line\nbreak', 'ключ', 'a\x00b'])
def test_a_bad_key_is_refused_without_showing_it(key):
    with pytest.raises(InputError, match='key') as error: Client('http://127.0.0.1:8000', key=key)
    assert not key.strip() or key not in str(error.value)


@pytest.mark.parametrize('url', ['', 'localhost:8000', 'ftp://host', 'http://', '/predict', 'http://host:99999', 'http://host:port',
                                 'http://me:word@host', 'http://host/?a=b', 'http://[::1', 'http://a b/'])
def test_an_address_that_is_none(url):
    with pytest.raises(InputError) as error: Client(url)
    assert 'word' not in str(error.value).replace('password', '')


def test_an_address_with_a_folder(service):
    other = service(good())
    with Client(other.url + '/digits/ ') as client: client(b'x')
    assert other.asked[0]['path'] == '/digits/predict'


# Many at once

def test_a_few_at_once_on_connections_that_stay_open(service):
    async def slowly(asked):
        await asyncio.sleep(0.02)
        return good(asked['body'].decode())
    other = service(slowly)
    with Client(other.url) as client:
        found = client.predict([str(i).encode() for i in range(40)], workers=4)
    assert [one.label for one in found] == [str(i) for i in range(40)]
    assert 2 <= other.most <= 4 and len({asked['peer'] for asked in other.asked}) <= 4


def test_a_long_list_is_not_read_ahead_of_the_answers(service):
    other, read = service(good()), []
    def endless():
        while True:
            read.append(1)
            yield b'x'
    with Client(other.url) as client:
        answers = client.stream(endless(), workers=3)
        for _ in range(5): assert next(answers).label == '7'
        answers.close()
    assert len(read) <= 5 + 6


def test_threads_share_a_client(service):
    async def echo(asked): return good(asked['body'].decode())
    other, found = service(echo), {}
    with Client(other.url) as client:
        threads = [threading.Thread(target=lambda i=i: found.__setitem__(i, client(str(i).encode()).label)) for i in range(20)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
    assert found == {i: str(i) for i in range(20)}


def test_no_connection_is_left_behind(service):
    other = service(good())
    with Client(other.url) as client: client.predict([b'x'] * 20)
    gc.collect()
    deadline = time.monotonic() + 5
    while other.server.server_state.connections and time.monotonic() < deadline: time.sleep(0.01)
    assert not other.server.server_state.connections


# Ready, info

def test_ready_waits(service):
    other = service((503, {}, dict(error='Not yet.')), (503, {}, dict(error='Not yet.')), (200, {}, dict(status='ready')))
    with Client(other.url) as client:
        assert not client.ready() and client.ready(wait=5)
    assert {asked['path'] for asked in other.asked} == {'/ready'}


def test_ready_and_info_of_an_older_service(service):
    async def older(asked):
        if asked['path'] != '/health': return 404, {}, dict(error='There is nothing at this address.')
        return 200, {}, dict(status='ok', name='old', classes=['a', 'b'], runtime='onnx')
    with Client(service(older).url) as client:
        assert client.ready() and client.info()['name'] == 'old' and client.classes == ('a', 'b')


def test_info_waits_for_a_busy_service_and_classes_are_asked_for_once(service):
    other = service(busy('0'), (200, {}, dict(name='x', classes=['a'])))
    with Client(other.url) as client: assert client.classes == ('a',) and client.classes == ('a',)
    assert len(other.asked) == 2


# The command

def predict(*args, key=None, **options):
    env = {**os.environ, **OFFLINE, 'PYTHONUTF8': '1', **({'IMGCLS_API_KEY': key} if key else {})}
    return subprocess.run([IMGCLS, 'predict', *map(str, args)], capture_output=True, text=True, encoding='utf-8', timeout=120, env=env, **options)


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> Path:
    "Three pictures and a text."
    root = tmp_path_factory.mktemp('to predict')
    for i in range(3): patch('brick', i).save(root/f'图 {i}.png')
    (root/'text.png').write_text('no picture')
    return root


@pytest.mark.parametrize('options', [[], ['--json'], ['--top', '1']])
def test_the_command_prints_the_same_for_a_bundle_and_a_service(real, digits_run, folder, options):
    local, remote = predict(digits_run['bundle'], folder, *options), predict('--url', real[0].url, folder, *options)
    assert remote.stdout == local.stdout and remote.stderr == local.stderr and remote.returncode == local.returncode == 1


def test_the_command_sorts_the_same(real, digits_run, folder, tmp_path):
    predict(digits_run['bundle'], folder, '--sort-into', tmp_path/'local')
    predict(folder, '--sort-into', tmp_path/'remote', '--url', real[0].url)
    names = [sorted(str(path.relative_to(tmp_path/which)) for path in (tmp_path/which).rglob('*.png')) for which in ('local', 'remote')]
    assert names[0] == names[1] and len(names[0]) == 3


def test_every_name_is_an_image_where_an_address_is_given(service, folder):
    other, one = service(good()), folder/'图 0.png'
    for args in (['--url', other.url, one], [one, '--url', other.url], ['--url', other.url, '--json', one, one], [one, one, '--url', other.url]):
        result = predict(*args)
        assert result.returncode == 0, result.stderr
    assert len(other.asked) == 6
    result = predict('--url', other.url, '-', '--json', input=f'{one}\n{one}\n')
    assert result.returncode == 0 and len(result.stdout.splitlines()) == 2


def test_without_an_address_the_first_name_is_a_bundle_as_ever(digits_run, folder):
    assert predict(digits_run['bundle'], '--json', folder/'图 0.png').returncode == 0
    result = predict(digits_run['bundle'])
    assert result.returncode == 2 and 'images' in result.stderr


def test_the_command_takes_its_key_from_the_environment_alone(service, folder):
    async def strict(asked):
        if asked['headers'].get('authorization') == f'Bearer {KEY}': return good()
        return 401, {}, dict(error='This service asks for a key.')
    other, one = service(strict), folder/'图 0.png'
    assert predict('--url', other.url, one, key=KEY).returncode == 0
    for key in (None, 'wrong'):
        result = predict('--url', other.url, one, key=key)
        assert_sentence(result, 'asks for a key')
        assert 'wrong' not in result.stderr
    assert '--key' not in imgcls('predict', '--help').stdout


def test_a_service_that_is_away_ends_the_command_at_once(folder):
    result = predict('--url', 'http://127.0.0.1:9', *[folder/'图 0.png'] * 50)
    assert_sentence(result, 'http://127.0.0.1:9', 'cannot be reached')


def test_an_interrupt_does_not_wait_for_a_silent_service(folder):
    with socket.create_server(('127.0.0.1', 0)) as listening:
        process = subprocess.Popen([IMGCLS, 'predict', '--url', address(listening), *[str(folder/'图 0.png')] * 20], stderr=subprocess.PIPE, text=True)
        held = [listening.accept() for _ in range(4)]
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        begin = time.monotonic()
        assert 'imgcls: interrupted.' in process.communicate(timeout=20)[1] and process.returncode == 130
        assert time.monotonic() - begin < 5
        for connection, _ in held: connection.close()


def test_a_runtime_cannot_be_chosen_from_afar(service, folder):
    assert_sentence(predict('--url', service(good()).url, '--runtime', 'onnx', folder), '--runtime')


def test_the_command_with_an_address_loads_no_training_stack_and_no_runtime(service, folder):
    code = ('import sys; from imgcls_nb.cli import main\n'
            f'assert main(["predict", "--url", {service(good()).url!r}, {str(folder/"图 0.png")!r}]) == 0\n'
            'assert not {m.split(".")[0] for m in sys.modules} & {"torch", "fastai", "matplotlib", "pandas", "sklearn", "onnxruntime"}')
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
