"A service in trouble: workers that die or hang, bundles that change, a farewell in the middle of work. Nobody's request is lost."
import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field

import psutil
import pytest
from PIL import Image

from conftest import free_port, serving, started
from samples import encoded, patch

PICTURE = encoded(patch('brick', 2, 32), 'PNG')
HANG = 60  # seconds after which something hangs


def asked(path: str = '/predict', data: bytes = PICTURE, headers: str = '') -> bytes:
    return f'POST {path} HTTP/1.1\r\nHost: localhost\r\n{headers}Content-Length: {len(data)}\r\n\r\n'.encode() + data


@dataclass
class Tally:
    "What clients saw: answers by status, what was sent without an answer, and connections that were not accepted."
    answers: Counter = field(default_factory=Counter)
    lost: list = field(default_factory=list)
    refused: int = 0
    bodies: list = field(default_factory=list)  # of the 200s, in order
    without_retry: int = 0  # 503s that do not say when to come again

    async def ask(self, reader, writer, data: bytes) -> bool:
        "One request and its answer; whether the connection goes on."
        try:
            writer.write(data)
            await writer.drain()
            head = (await reader.readuntil(b'\r\n\r\n')).decode().lower()
            length = int(head.partition('content-length: ')[2].split()[0])
            body = await reader.readexactly(length)
        except (OSError, asyncio.IncompleteReadError) as error:
            self.lost.append(repr(error))
            return False
        status = int(head.split()[1])
        self.answers[status] += 1
        if status == 200: self.bodies.append(json.loads(body))
        if status == 503 and 'retry-after: ' not in head: self.without_retry += 1
        return 'connection: close' not in head


async def client(port: int, tally: Tally, until: asyncio.Event, keep_alive: bool, data: bytes = b'') -> None:
    "Asks, one request after the other, until it is told to stop or nobody lets it in any more."
    data = data or asked()
    while not until.is_set():
        try: reader, writer = await asyncio.open_connection('127.0.0.1', port)
        except OSError:
            tally.refused += 1
            return
        while await tally.ask(reader, writer, data) and keep_alive and not until.is_set(): pass
        writer.close()
        await asyncio.sleep(0)


async def under_load(port: int, trouble, clients: int = 8, kinds=(True, False)) -> Tally:
    "What clients see while something happens; half of them keep their connections."
    tally, until = Tally(), asyncio.Event()
    tasks = [asyncio.create_task(client(port, tally, until, kinds[i % len(kinds)])) for i in range(clients)]
    await seen(tally, 50)
    try: await trouble(tally)
    finally: until.set()
    await asyncio.wait_for(asyncio.gather(*tasks), HANG)
    return tally


async def true(condition) -> None:
    "Wait until something is so; it hangs if that takes a minute."
    async def wait():
        while not condition(): await asyncio.sleep(0.02)
    await asyncio.wait_for(wait(), HANG)


async def seen(tally: Tally, count: int) -> None:
    "Wait until there are so many more answers."
    goal = tally.answers.total() + count
    await true(lambda: tally.answers.total() >= goal)


def workers_of(process: subprocess.Popen) -> list[psutil.Process]:
    "A service's workers that live."
    def lives(worker):
        try: return worker.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess: return False
    return [each for each in psutil.Process(process.pid).children() if lives(each)]


def fine(tally: Tally, *, but: tuple[int, ...] = (503,)) -> None:
    "Every request has an answer, and no answer says that the service failed."
    assert not tally.lost, tally.lost[:3]
    assert set(tally.answers) <= {200, *but}, tally.answers
    assert tally.answers[200] > 0 and not tally.without_retry


@pytest.fixture
def start(digits_run, tmp_path):
    "Starts a service with two workers."
    def of(*options, bundle=digits_run['bundle'], **environment):
        port = free_port()
        return port, serving(bundle, port, tmp_path/'stderr', '--workers', 2, '--quiet', *options, **environment)
    return of


def renamed(source, target, name: str):
    "The same bundle under another name."
    shutil.copytree(source, target, dirs_exist_ok=True)
    record = json.loads((target/'bundle.json').read_text())
    record['task']['classes'] = [f'{name}{i}' for i in range(10)]
    (target/'bundle.json').write_text(json.dumps(record))
    return target


def ended(worker) -> bool:
    "Whether a process does nothing more, even where nobody has asked for its exit status yet."
    try: return worker.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess: return True


@pytest.mark.parametrize('how_many', [1, 2])
def test_workers_that_are_killed(start, how_many):
    "One worker, then all of them: their images go to others, or wait for a new worker."
    port, service = start()
    with service as process:
        async def trouble(tally):
            for _ in range(3):
                before = {each.pid for each in workers_of(process)}
                process.send_signal(signal.SIGSTOP)  # all at once: no image may be handed from one victim to the next
                victims = workers_of(process)[:how_many]
                for worker in victims: worker.kill()
                await true(lambda victims=victims: all(ended(worker) for worker in victims))  # on a busy machine it takes its time
                process.send_signal(signal.SIGCONT)
                await true(lambda before=before: len({each.pid for each in workers_of(process)} - before) >= how_many)
                await seen(tally, 50)
        tally = asyncio.run(under_load(port, trouble))
        fine(tally)
        assert len(workers_of(process)) == 2


@pytest.mark.parametrize('workers, patience', [(2, 1), (1, 12)])
def test_a_worker_that_hangs(digits_run, workers, patience):
    "It is stopped, not dead: after `patience` it is ended, and its images are answered by another, be it one that has yet to start."
    from imgcls_nb.workers import WorkerPool
    async def ask():
        pool = WorkerPool(digits_run['bundle'], workers=workers, latency=30, patience=patience)
        await pool.start()
        try:
            victim = pool.processes[0]
            os.kill(victim, signal.SIGSTOP)
            answers = await asyncio.wait_for(asyncio.gather(*[pool.submit(PICTURE) for _ in range(5)]), HANG)
            return answers, pool.restarts, victim in pool.processes
        finally: await pool.stop()
    answers, restarts, still_there = asyncio.run(ask())
    assert [each.status for each in answers] == [200] * 5 and restarts >= 1 and not still_there


@pytest.mark.parametrize('how', ['signal', 'watch'])
def test_another_bundle_under_load(start, digits_run, tmp_path, how):
    "Every answer belongs to one of the two; once the new one has answered and all old work is done, only to the new one."
    served = renamed(digits_run['bundle'], tmp_path/'bundle', 'old')
    port, service = start(*(['--watch'] if how == 'watch' else []), bundle=served)
    with service as process:
        async def trouble(tally):
            if how == 'watch': await asyncio.sleep(2.2)  # it has seen the old one
            new = renamed(digits_run['bundle'], tmp_path/'new', 'new')
            os.replace(new/'bundle.json', served/'bundle.json')
            if how == 'signal': process.send_signal(signal.SIGHUP)
            await true(lambda: tally.bodies[-1]['label'].startswith('new'))
            await seen(tally, 30)  # those that the old workers still had
            tally.swapped = len(tally.bodies)
            await seen(tally, 200)
        tally = asyncio.run(under_load(port, trouble))
        fine(tally)
        names = [body['label'][:3] for body in tally.bodies]
        assert set(names) == {'old', 'new'} and set(names[tally.swapped:]) == {'new'}
        assert all({each['label'][:3] for each in body['top']} == {body['label'][:3]} for body in tally.bodies)


def test_a_bundle_that_is_copied_slowly(start, digits_run, tmp_path):
    "Its record comes first, its model long after; `--watch` refuses the half and serves the whole."
    served = renamed(digits_run['bundle'], tmp_path/'bundle', 'old')
    port, service = start('--watch', bundle=served)
    with service:
        async def trouble(tally):
            new, model = renamed(digits_run['bundle'], tmp_path/'new', 'new'), (served/'model.onnx').read_bytes()
            (served/'model.onnx').unlink()
            os.replace(new/'bundle.json', served/'bundle.json')
            await true(lambda: 'stays as it is' in (tmp_path/'stderr').read_text())
            assert tally.bodies[-1]['label'].startswith('old')
            (served/'model.onnx').write_bytes(model)
            await true(lambda: tally.bodies[-1]['label'].startswith('new'))
        fine(asyncio.run(under_load(port, trouble)))


@pytest.mark.parametrize('damage', ['no JSON', 'no file', 'another file'])
def test_a_broken_bundle_is_not_served(start, digits_run, tmp_path, damage):
    "The old one goes on as if nothing had happened, and the log says why."
    served = renamed(digits_run['bundle'], tmp_path/'bundle', 'old')
    port, service = start(bundle=served)
    with service as process:
        async def trouble(tally):
            if damage == 'no JSON': (served/'bundle.json').write_text('{')
            elif damage == 'no file': (served/'bundle.json').unlink()
            else:
                for path in served.glob('*.onnx'): path.write_bytes(b'rubbish')
            process.send_signal(signal.SIGHUP)
            await true(lambda: 'stays as it is' in (tmp_path/'stderr').read_text())
            await seen(tally, 100)
        tally = asyncio.run(under_load(port, trouble))
        fine(tally)
        assert {body['label'][:3] for body in tally.bodies} == {'old'}


@pytest.mark.parametrize('keep_alive', [True, False])
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_farewell_under_load(start, keep_alive, number):
    "Whoever was let in has an answer, 200 or 503; then nobody is let in, and no process is left."
    port, service = start()
    with service as process:
        family = workers_of(process)
        async def trouble(tally):
            process.send_signal(number)
            await asyncio.to_thread(process.wait, HANG)
        tally = asyncio.run(under_load(port, trouble, 16, (keep_alive,)))
        fine(tally)
        assert tally.refused and not any(each.is_running() for each in family)


async def until_refused(port: int) -> list[bytes]:
    "What `/ready` said, until nobody is let in any more."
    heard, end = [], asyncio.get_running_loop().time() + HANG
    while asyncio.get_running_loop().time() < end:
        try: reader, writer = await asyncio.open_connection('127.0.0.1', port)
        except OSError: return heard
        with contextlib.suppress(OSError):  # let in, and cut off before it could ask
            writer.write(b'GET /ready HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n')
            if head := (await reader.read())[:12]: heard.append(head)
        writer.close()
        await asyncio.sleep(0.02)
    raise AssertionError('the door stays open')


def test_a_guest_who_asks_late(start):
    "Who was let in before the door closed, and is slow to speak, still has an answer; who has one already does not hold it up."
    port, service = start()
    with service as process:
        async def linger():
            tally, before = Tally(), Tally()
            idle, late = [await asyncio.open_connection('127.0.0.1', port) for _ in range(2)]
            await before.ask(*idle, asked())
            process.send_signal(signal.SIGTERM)
            await until_refused(port)
            await asyncio.sleep(1)
            await tally.ask(*late, asked())
            await asyncio.to_thread(process.wait, HANG)
            return tally, before
        tally, before = asyncio.run(linger())
        fine(tally)
        fine(before)


def test_an_idle_service_says_that_it_goes(start):
    "A balancer that asks now and then hears 503 before nobody answers any more."
    port, service = start()
    with service as process:
        process.send_signal(signal.SIGTERM)
        heard = asyncio.run(until_refused(port))
    assert heard.count(b'HTTP/1.1 503') > 1 and heard[-1] == b'HTTP/1.1 503'


def test_workers_let_signals_pass(start):
    "A terminal that is closed, or Ctrl-C, reaches all processes; the workers leave it to the service."
    port, service = start()
    with service as process:
        family = workers_of(process)
        for worker in family:
            for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM): worker.send_signal(number)
        async def ask():
            tally = Tally()
            door = await asyncio.open_connection('127.0.0.1', port)
            for _ in range(10): await tally.ask(*door, asked())
            door[1].close()
            return tally
        assert asyncio.run(ask()).answers == {200: 10} and workers_of(process) == family


def test_more_than_can_be_done(start):
    "Five times as many at once as may wait: some are answered, the others are told when to come again; then all is as before."
    port, service = start('--latency', '30ms')
    with service:
        async def flood():
            tally = Tally()
            async def one():
                reader, writer = await asyncio.open_connection('127.0.0.1', port)
                await tally.ask(reader, writer, asked(data=large))
                writer.close()
            large = encoded(Image.effect_noise((700, 700), 60), 'PNG')
            await asyncio.wait_for(asyncio.gather(*[one() for _ in range(300)]), HANG)
            after = Tally()
            reader, writer = await asyncio.open_connection('127.0.0.1', port)
            for _ in range(20): await after.ask(reader, writer, asked())
            writer.close()
            return tally, after
        tally, after = asyncio.run(flood())
        fine(tally)
        assert tally.answers[503] > 0 and tally.answers.total() == 300
        assert after.answers == {200: 20} and not after.lost


def test_too_many_connections(digits_run, tmp_path):
    "Who comes when the house is full is told so; when others have gone, there is room again."
    port = free_port()
    program = ('import sys, imgcls_nb.server as server; server.MAX_CONNECTIONS = 20; from imgcls_nb.serve import ServiceOptions; '
               'server.serve(sys.argv[1], port=int(sys.argv[2]), options=ServiceOptions(workers=1), quiet=True)')
    with started([sys.executable, '-c', program, digits_run['bundle'], port], port, tmp_path/'stderr'):
        async def crowd():
            tally, doors = Tally(), [await asyncio.open_connection('127.0.0.1', port) for _ in range(60)]
            await asyncio.wait_for(asyncio.gather(*[tally.ask(*door, asked()) for door in doors]), HANG)
            for _, writer in doors: writer.close()
            for _ in range(HANG * 10):
                after = Tally()
                reader, writer = await asyncio.open_connection('127.0.0.1', port)
                await after.ask(reader, writer, asked())
                writer.close()
                if after.answers[200]: return tally
                await asyncio.sleep(0.1)
            raise AssertionError('there is no room again')
        tally = asyncio.run(crowd())
        fine(tally)
        assert tally.answers == {200: 20, 503: 40}


def test_keys(start):
    "Who has none is refused before anything is read; who has one is not; some places are open to all."
    port, service = start(IMGCLS_API_KEYS='first-key,zweiter-schlüssel')
    with service:
        async def ask(path, headers=''):
            tally = Tally()
            reader, writer = await asyncio.open_connection('127.0.0.1', port)
            await tally.ask(reader, writer, asked(path, headers=headers))
            writer.close()
            return next(iter(tally.answers))
        def status(*args): return asyncio.run(ask(*args))
        for wrong in ('', 'Authorization: Bearer\r\n', 'Authorization: Bearer first\r\n', 'Authorization: Basic first-key\r\n',
                      'Authorization: Bearer first-key2\r\n', 'Authorization: first-key\r\n', 'X-Api-Key: first-key\r\n',
                      'Authorization: Bearer \r\n', 'Authorization: Bearer first-key,zweiter-schlüssel\r\n'):
            for path in ('/predict', '/info', '/metrics', '/openapi.json', '/nothing', '//predict', '/Predict', '/predict/', '/health/../predict'):
                assert status(path, wrong) == 401, (path, wrong)
        for right in ('Authorization: Bearer first-key\r\n', 'Authorization: bearer first-key\r\n', 'Authorization: Bearer zweiter-schlüssel\r\n'):
            assert status('/predict', right) == 200
        assert {status(path) for path in ('/health', '/ready', '/')} == {405}  # they take GET only, and no key
