"""Requests per second and waiting times of a service, beside a plain FastAPI endpoint, LitServe and BentoML, in one run.

    python tests/bench/serving.py                        # closed loop: LeNet on digits, 32 clients, every peer that is installed
    python tests/bench/serving.py --network small_cnn    # the same with a network that computes for longer
    python tests/bench/serving.py --part photos          # tf_efficientnet_lite0, 500 × 375 JPEG, beside the bare limit
    python tests/bench/serving.py --part overload        # open loop at three times the capacity
    pip install litserve bentoml                         # the peers; whichever is missing is left out, and said so

All sides run the same ONNX file and get the same bytes. The clients live in a process of their own: one connection each, kept
open, one request at a time (closed loop), or requests at fixed times whatever comes back (open loop). Turns alternate, so that
a machine that slows down slows all. Errors are counted; a median over the turns is printed.
"""
import argparse
import asyncio
import contextlib
import io
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
from PIL import Image, ImageOps

from imgcls_nb.bundle import load_bundle
from imgcls_nb.image import load_pixels

IMGCLS = sys.executable, '-c', 'import sys; from imgcls_nb.cli import main; sys.exit(main())'
COMMON = '''
import io, json, os, numpy as np, onnxruntime
from PIL import Image
record = json.load(open(os.environ["RECORD"])); p, classes = record["preprocessing"], record["task"]["classes"]
options = onnxruntime.SessionOptions(); options.intra_op_num_threads = int(os.environ["THREADS"])
def load(): return onnxruntime.InferenceSession(os.environ["MODEL"], options)
def pixels(body):
    image = Image.open(io.BytesIO(body)).convert("L" if p["channels"] == 1 else "RGB").resize((p["width"], p["height"]))
    return np.asarray(image).reshape(p["height"], p["width"], p["channels"])
def said(row): k = int(row.argmax()); return dict(label=classes[k], probability=float(row[k]))
'''
PLAIN = COMMON + '''
from fastapi import FastAPI, Request
import uvicorn
app, session = FastAPI(), load()
@app.get("/health")
async def health(): return dict(status="ok")
@app.post("/predict")
async def predict(request: Request):
    return said(session.run(["probabilities"], {"pixels": pixels(await request.body())[None]})[0][0])
uvicorn.run(app, port=int(os.environ["PORT"]), log_level="warning", access_log=False)
'''
LITSERVE = COMMON + '''
import litserve
from fastapi import Body
from typing import Annotated
class Classifier(litserve.LitAPI):
    def setup(self, device): self.session = load()
    def decode_request(self, request: Annotated[bytes, Body()]): return pixels(request)
    def batch(self, inputs): return np.stack(inputs)
    def predict(self, batch):
        batch = batch if batch.ndim == 4 else batch[None]
        found = self.session.run(["probabilities"], {"pixels": batch})[0]
        return found if BATCH > 1 else found[0]
    def unbatch(self, output): return list(output)
    def encode_response(self, output): return said(output)
BATCH = int(os.environ.get("BATCH", 1))
if __name__ == "__main__":
    api = Classifier(max_batch_size=BATCH, batch_timeout=0.002 if BATCH > 1 else 0.0)
    litserve.LitServer(api, accelerator="cpu", workers_per_device=int(os.environ["WORKERS"])).run(
        port=int(os.environ["PORT"]), generate_client_file=False, log_level="warning", access_log=False)
'''
BENTOML = COMMON + '''
import bentoml
from pathlib import Path
@bentoml.service(workers=2, traffic=dict(timeout=60), logging=dict(access=dict(enabled=False)))
class Classifier:
    def __init__(self): self.session = load()
    @bentoml.api(route="/predict")
    def predict(self, image: Path) -> dict:
        return said(self.session.run(["probabilities"], {"pixels": pixels(Path(image).read_bytes())[None]})[0][0])
'''


def free_port() -> int:
    "A port that nobody listens on."
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]


def as_form(image: bytes, name: str) -> tuple[bytes, str]:
    "A form with one file, and its content type."
    head = f'--bench\r\nContent-Disposition: form-data; name="{name}"; filename="a.png"\r\nContent-Type: image/png\r\n\r\n'
    return head.encode() + image + b'\r\n--bench--\r\n', 'multipart/form-data; boundary=bench'


class Side:
    "One service as a process."
    def __init__(self, name, command, folder, environment, field=None, ready='/health'):
        self.name, self.field, self.port, self.ready = name, field, free_port(), ready
        self.command = [each.format(port=self.port) for each in command]
        self.log = open(Path(folder)/f'{name}.log', 'wb')
        self.environment = {**os.environ, **environment, 'PORT': str(self.port), 'BENTOML_DO_NOT_TRACK': 'true'}
        self.folder = folder

    def __enter__(self):
        start = time.perf_counter()
        self.process = subprocess.Popen(self.command, cwd=self.folder, env=self.environment, stdout=self.log,
                                        stderr=subprocess.STDOUT, start_new_session=True)
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f'http://127.0.0.1:{self.port}{self.ready}', timeout=1):
                self.seconds_to_ready = time.perf_counter() - start
                return self
            if self.process.poll() is not None or time.perf_counter() - start > 90:
                self.__exit__()
                raise RuntimeError(f'{self.name} did not start:\n{Path(self.log.name).read_text()[-2000:]}')
            time.sleep(0.01)

    def __exit__(self, *_):
        with contextlib.suppress(ProcessLookupError): os.killpg(self.process.pid, signal.SIGTERM)
        try: self.process.wait(10)
        except subprocess.TimeoutExpired: os.killpg(self.process.pid, signal.SIGKILL)

    def memory(self) -> list[float]:
        "Resident MB of the process and of each of its children."
        found = []
        for each in [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(True)]:
            with contextlib.suppress(psutil.Error): found.append(each.memory_info().rss / 1e6)
        return found

    def request(self, image: bytes) -> bytes:
        "The bytes of one whole HTTP request."
        body, kind = as_form(image, self.field) if self.field else (image, 'application/octet-stream')
        return (f'POST /predict HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: {kind}\r\n'
                f'Content-Length: {len(body)}\r\n\r\n').encode() + body


class Client(asyncio.Protocol):
    "One connection that sends, waits for the whole answer, and sends again."
    def __init__(self, requests, until, found):
        self.requests, self.until, self.found, self.place, self.buffer = requests, until, found, 0, b''
        self.done = asyncio.get_running_loop().create_future()

    def connection_made(self, transport): self.transport = transport; self.send()

    def send(self):
        self.place += 1
        self.start = time.perf_counter()
        self.transport.write(self.requests[self.place % len(self.requests)])

    def data_received(self, data):
        self.buffer += data
        head, mark, body = self.buffer.partition(b'\r\n\r\n')
        if not mark: return
        lower = head.lower()
        if b'content-length:' in lower:
            if len(body) < int(lower.split(b'content-length:')[1].split(b'\r\n')[0]): return
        elif not body.endswith(b'0\r\n\r\n'): return
        now = time.perf_counter()
        self.found.append((int(head[9:12]), now - self.start))
        self.buffer = b''
        if now < self.until: self.send()
        else: self.transport.close()

    def connection_lost(self, exc):
        if time.perf_counter() < self.until: self.found.append((0, 0.0))
        if not self.done.done(): self.done.set_result(None)


async def closed_loop(port, requests, clients, seconds):
    "Every client asks again as soon as it is answered."
    found, until = [], time.perf_counter() + seconds
    made = [await asyncio.get_running_loop().create_connection(lambda i=i: Client(requests[i:] + requests[:i], until, found), '127.0.0.1', port)
            for i in range(clients)]
    await asyncio.wait([client.done for _, client in made], timeout=seconds + 30)
    return found


async def open_loop(port, requests, rate, seconds):
    "A request every 1/rate seconds on a connection of a pool, whatever has come back; latency counts from its time."
    found, start, free, tasks = [], time.perf_counter(), [], set()

    async def ask(place, due):
        try:
            while free and time.perf_counter() - free[-1][2] > 20: free.pop()[1].close()  # the service closes what is idle
            reader, writer, _ = free.pop() if free else (*await asyncio.open_connection('127.0.0.1', port), 0)
            writer.write(requests[place % len(requests)])
            head = (await asyncio.wait_for(reader.readuntil(b'\r\n\r\n'), 30)).lower()
            await reader.readexactly(int(head.split(b'content-length:')[1].split(b'\r\n')[0]))
            found.append((int(head[9:12]), time.perf_counter() - due, due - start))
            if b'connection: close' in head: writer.close()
            else: free.append((reader, writer, time.perf_counter()))
        except (OSError, asyncio.IncompleteReadError, asyncio.TimeoutError): found.append((0, 0.0, due - start))

    for place in range(int(rate * seconds)):
        due = start + place / rate
        if (wait := due - time.perf_counter()) > 0: await asyncio.sleep(wait)
        tasks.add(task := asyncio.create_task(ask(place, due)))
        task.add_done_callback(tasks.discard)
    if tasks: await asyncio.wait(tasks, timeout=30)
    return found


def load(job: dict) -> None:
    "Run a loop in this process, with uvloop where there is one; the parent calls it through a fresh process."
    import base64
    requests = [base64.b64decode(each) for each in job['requests']]
    work = (closed_loop(job['port'], requests, job['clients'], job['seconds']) if job['kind'] == 'closed'
            else open_loop(job['port'], requests, job['rate'], job['seconds']))
    try: from uvloop import run
    except ImportError: from asyncio import run
    Path(job['out']).write_text(json.dumps(run(work)))


def drive(side: Side, images: list[bytes], **job) -> list:
    "Have a fresh process ask a service."
    import base64
    job |= dict(port=side.port, requests=[base64.b64encode(side.request(each)).decode() for each in images])
    with tempfile.TemporaryDirectory() as folder:
        job['out'] = str(Path(folder)/'found.json')
        subprocess.run([sys.executable, __file__, '--load'], input=json.dumps(job), text=True, check=True)
        return json.loads(Path(job['out']).read_text())


def summary(found: list, seconds: float) -> dict:
    "Requests per second, percentiles in ms, and what went wrong."
    times = np.array([each[1] for each in found if each[0] == 200]) * 1000
    p50, p95, p99 = np.percentile(times, [50, 95, 99]) if len(times) else [float('nan')] * 3
    return {'requests/s': len(times) / seconds, 'p50 ms': p50, 'p95 ms': p95, 'p99 ms': p99,
            'errors': sum(each[0] != 200 for each in found)}


def our_side(bundle, folder, *more):
    "The service of this library, as its command starts it."
    command = [*IMGCLS, 'serve', str(bundle), '--runtime', 'onnx', '--port', '{port}', '--quiet', *more]
    return Side('imgcls serve', command, folder, {}, ready='/ready')


def sides(bundle, folder, threads):
    "Every service that can be started here."
    environment = dict(RECORD=str(Path(bundle)/'bundle.json'), MODEL=str(Path(bundle)/'model.onnx'), THREADS=str(threads))
    for name, code in (('plain', PLAIN), ('lit', LITSERVE), ('bento', BENTOML)): (Path(folder)/f'{name}.py').write_text(code)
    yield our_side(bundle, folder)
    yield Side('plain FastAPI', [sys.executable, 'plain.py'], folder, environment)
    for name, workers, batch in (('LitServe', '1', '1'), ('LitServe, 2 workers', '2', '1'), ('LitServe, batches of 8', '2', '8')):
        yield Side(name, [sys.executable, 'lit.py'], folder, environment | dict(WORKERS=workers, BATCH=batch))
    yield Side('BentoML', [sys.executable, '-m', 'bentoml', 'serve', 'bento:Classifier', '--port', '{port}'], folder,
               environment, field='image', ready='/readyz')


def print_rows(rows: dict) -> None:
    "A table of medians over the turns."
    print(f'{"":26}' + ''.join(f'{key:>12}' for key in next(iter(rows.values()))))
    for name, row in rows.items(): print(f'{name:26}' + ''.join(f'{value:12,.1f}' for value in row.values()), flush=True)


def digits_part(options, folder):
    "Framework overhead: a small network, raw PNG where a service takes it, 32 clients."
    from sklearn.datasets import load_digits
    images = [encoded(Image.fromarray((each / 16 * 255).astype(np.uint8)), 'PNG') for each in load_digits().images[:200]]
    rows = compare(list(sides(options.digits or small_bundle(folder, options.network), folder, 1)), images, options)
    print_rows(rows)
    ours = rows['imgcls serve']
    for name, row in rows.items():
        if row is not ours: print(f'imgcls serve / {name}: {ours["requests/s"] / row["requests/s"]:.2f} times the requests, '
                                  f'p99 {ours["p99 ms"]:.1f} against {row["p99 ms"]:.1f} ms')


def compare(services, images, options) -> dict:
    "Medians over the turns; one service runs at a time, so that none takes the processors of another."
    found = {}
    for turn in range(options.turns):
        for side in services if turn % 2 == 0 else services[::-1]:
            try:
                with side:
                    drive(side, images, kind='closed', clients=options.clients, seconds=2)  # warm-up
                    one = summary(drive(side, images, kind='closed', clients=options.clients, seconds=options.seconds), options.seconds)
                    one['MB'], one['start s'] = sum(side.memory()), side.seconds_to_ready
            except RuntimeError as error:
                if turn == 0: print(f'left out: {str(error)[-400:]}')
                continue
            found.setdefault(side.name, []).append(one)
            time.sleep(1)
    if not found: raise SystemExit('No service could be started.')
    return {name: {key: statistics.median(one[key] for one in turns) for key in turns[0]} for name, turns in found.items()}


def encoded(image, format='JPEG') -> bytes:
    file = io.BytesIO()
    image.save(file, format, **(dict(quality=90) if format == 'JPEG' else {}))
    return file.getvalue()


def photos() -> list[bytes]:
    "JPEG files, 500 × 375."
    from skimage import data
    return [encoded(ImageOps.fit(Image.fromarray(getattr(data, name)()).convert('RGB'), (500, 375)))
            for name in ('astronaut', 'chelsea', 'coffee', 'rocket', 'retina', 'hubble_deep_field')]


def bare_limit(bundle, images, seconds) -> float:
    "Images per second of decoding and ONNX Runtime alone: one session and one thread for each processor, no HTTP."
    import onnxruntime
    bundle, cores = load_bundle(bundle), os.cpu_count()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    sessions = [onnxruntime.InferenceSession(str(bundle.folder/'model.onnx'), options) for _ in range(cores)]
    until = time.perf_counter() + seconds

    def run(session):
        count = 0
        while time.perf_counter() < until:
            pixels = load_pixels(images[count % len(images)], bundle.preprocessing)
            session.run(['probabilities'], {'pixels': pixels[None]})
            count += 1
        return count

    with ThreadPoolExecutor(cores) as pool: return sum(pool.map(run, sessions)) / seconds


def photos_part(options, folder):
    "A real network on real files, beside what the machine can do without a service."
    bundle, images = options.lite0 or zoo(folder), photos()
    ratios, rows = [], []
    with our_side(bundle, folder, '--latency', '10s') as side:
        drive(side, images, kind='closed', clients=16, seconds=3)
        for _ in range(options.turns):
            limit = bare_limit(bundle, images, options.seconds)
            row = summary(drive(side, images, kind='closed', clients=16, seconds=options.seconds), options.seconds)
            ratios.append(row['requests/s'] / limit)
            rows.append(row | {'limit': limit, 'share %': 100 * ratios[-1]})
        print_rows({f'turn {i}': row for i, row in enumerate(rows)})
        print(f'share of the bare limit: {statistics.median(ratios):.1%}; ready after {side.seconds_to_ready:.2f} s; '
              f'MB of each process: {", ".join(f"{each:.0f}" for each in side.memory())}')


def overload_part(options, folder):
    "Three times what the service can do, for a minute: memory, refusals, waiting times, and how soon it recovers."
    bundle, images, budget = options.lite0 or zoo(folder), photos(), options.latency
    with our_side(bundle, folder, '--latency', f'{budget:g}s') as side:
        drive(side, images, kind='closed', clients=16, seconds=3)
        capacity = summary(drive(side, images, kind='closed', clients=16, seconds=10), 10)['requests/s']
        memory, stop = [], time.perf_counter() + options.overload_seconds
        with ThreadPoolExecutor(1) as pool:
            job = pool.submit(drive, side, images, kind='open', rate=3 * capacity, seconds=options.overload_seconds)
            while time.perf_counter() < stop:
                memory.append(sum(side.memory()))
                time.sleep(1)
            found = job.result()
        after = summary(drive(side, images, kind='closed', clients=4, seconds=3), 3)
        accepted = np.array([each[1] for each in found if each[0] == 200])
        print(f'capacity {capacity:.0f}/s, asked {3 * capacity:.0f}/s for {options.overload_seconds:g} s: '
              f'{dict(Counter(each[0] for each in found))} by status (0: no answer)')
        print(f'accepted: {len(accepted) / options.overload_seconds:.0f}/s, p50 {np.percentile(accepted, 50):.3f} s, '
              f'p99 {np.percentile(accepted, 99):.3f} s, budget {budget:g} s')
        half = memory[5:len(memory) // 2], memory[len(memory) // 2:]
        print(f'memory, MB: first half at most {max(half[0]):.0f}, second half at most {max(half[1]):.0f}')
        print(f'right after: {after["requests/s"]:.0f}/s with 4 clients, p99 {after["p99 ms"]:.0f} ms, errors {after["errors"]}')


def small_bundle(folder, network):
    "A small network, trained on digits for a moment, in a process of its own: what it leaves must not disturb."
    code = ('from pathlib import Path; from imgcls_nb.all import *; from imgcls_nb.sources import load_images;'
            'learn = image_learner(load_images("digits").split(), ' + repr(network) + ', seed=0);\n'
            'with learn.no_bar(), learn.no_logging(): train(learn, epochs=2)\n'
            f'export(learn, evaluate(learn), Path({str(folder)!r})/"digits")')
    subprocess.run([sys.executable, '-c', code], check=True, capture_output=True)
    return Path(folder)/'digits'


def zoo(folder):
    "tf_efficientnet_lite0 with its ImageNet weights."
    subprocess.run([*IMGCLS, 'export', '--zoo', 'tf_efficientnet_lite0', '--out', str(Path(folder)/'lite0')],
                   check=True, capture_output=True)
    return Path(folder)/'lite0'


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--part', choices=['digits', 'photos', 'overload'], default='digits')
    parser.add_argument('--turns', type=int, default=3)
    parser.add_argument('--seconds', type=float, default=6)
    parser.add_argument('--clients', type=int, default=32)
    parser.add_argument('--latency', type=float, default=1)
    parser.add_argument('--overload-seconds', type=float, default=60)
    parser.add_argument('--network', default='lenet', help='trained on digits for a moment; lenet costs next to nothing, so services are compared')
    parser.add_argument('--digits', help='a bundle, instead of a small network trained now')
    parser.add_argument('--lite0', help='a bundle, instead of tf_efficientnet_lite0 exported now')
    parser.add_argument('--load', action='store_true', help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load: return load(json.load(sys.stdin))
    with tempfile.TemporaryDirectory() as folder:
        dict(digits=digits_part, photos=photos_part, overload=overload_part)[options.part](options, folder)


if __name__ == '__main__': main()
