"Shared by all tests: the command as a subprocess, a folder of real and broken images, one finished run."
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from filelock import FileLock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT/'tools'))
sys.path.insert(0, str(Path(__file__).resolve().parent))
IMGCLS = shutil.which('imgcls', path=str(Path(sys.executable).parent))  # the command as it is installed
# A shell that starts pytest in the background has it ignore Ctrl-C, and so would every command that the tests start.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN: signal.signal(signal.SIGINT, signal.default_int_handler)
CORES = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
# Tests run side by side, and PyTorch's threads wait for each other by spinning: together they must not want more than all cores.
if workers := os.environ.get('PYTEST_XDIST_WORKER_COUNT'): os.environ.setdefault('OMP_NUM_THREADS', str(max(1, CORES // int(workers))))
OFFLINE = dict(HF_HUB_OFFLINE='1', PYTHONWARNINGS='default')
COMMAND = dict(OFFLINE, PYTHONUTF8='1')


def pytest_xdist_auto_num_workers(config) -> int:
    "Every core, four at most: each worker may hold a notebook's kernel and a PyTorch of its own."
    return min(4, CORES)


ENVIRONMENT = dict(os.environ)


def imgcls(*args, cwd=None, timeout=600) -> subprocess.CompletedProcess:
    "Run the command in a process of its own; stdout and stderr come back as text."
    if not hasattr(os, 'fork') or _changed(): return bare_imgcls(*args, cwd=cwd, timeout=timeout)
    with TemporaryDirectory() as folder:
        said = [Path(folder)/name for name in ('stdout', 'stderr')]
        job = dict(args=[*map(str, args)], cwd=str(cwd or os.getcwd()), environment={**os.environ, **COMMAND},
                   stdout=str(said[0]), stderr=str(said[1]), timeout=timeout)
        warm = _warm_process()
        warm.stdin.write(json.dumps(job) + '\n')
        warm.stdin.flush()
        code = int(warm.stdout.readline())
        assert code != -signal.SIGALRM, f'imgcls {" ".join(map(str, args))} took more than {timeout} s'
        return subprocess.CompletedProcess([IMGCLS, *args], code, *[path.read_text('utf-8') for path in said])


def bare_imgcls(*args, cwd=None, timeout=600, **environment: str) -> subprocess.CompletedProcess:
    "Run the command as a user does, from a bare interpreter."
    return subprocess.run([IMGCLS, *map(str, args)], cwd=cwd, timeout=timeout, text=True, capture_output=True, encoding='utf-8',
                          env={**os.environ, **COMMAND, **environment})


def _changed() -> bool:
    "Whether a test has changed the environment, some of which is read by imports; imports themselves add to it."
    names = [name for name in {*os.environ, *ENVIRONMENT} if not name.startswith(('PYTEST_', 'KMP_', 'TORCHINDUCTOR_'))]
    return any(os.environ.get(name) != ENVIRONMENT.get(name) for name in names)


@cache
def _warm_process() -> subprocess.Popen:
    "A process that forks for each command; it ends with its stdin, and so with this one."
    return subprocess.Popen([sys.executable, Path(__file__).with_name('warm.py')], stdin=subprocess.PIPE,
                            stdout=subprocess.PIPE, text=True, env={**ENVIRONMENT, **COMMAND})


def assert_sentence(result: subprocess.CompletedProcess, *words: str, code: int = 2) -> None:
    "A failed command says what is wrong in one sentence on stderr, and nothing else looks like a crash."
    assert result.returncode == code, result.stderr
    assert 'Traceback' not in result.stderr + result.stdout
    complaint = [line for line in result.stderr.splitlines() if line.startswith('imgcls: ')]
    assert len(complaint) == 1, result.stderr
    for word in words: assert word in complaint[0], complaint[0]


def assert_no_leftovers(folder: Path) -> None:
    "Nothing half-written anywhere below a folder."
    assert not [path for path in folder.rglob('*') if '.partial-' in path.name]


@pytest.fixture(scope='session')
def digits_run(tmp_path_factory) -> dict:
    "`imgcls run digits --json`, once for all workers, each of which has a copy: what it printed, and where."
    own = tmp_path_factory.getbasetemp()
    shared, folder = (own.parent if 'PYTEST_XDIST_WORKER' in os.environ else own)/'one run of digits', own/'digits'
    with FileLock(f'{shared}.lock'):
        if not (shared/'said.json').exists():
            shared.mkdir(exist_ok=True)
            result = bare_imgcls('run', 'digits', '--json', cwd=shared, OMP_NUM_THREADS=str(CORES))  # the others wait for it
            assert result.returncode == 0, result.stderr
            (shared/'said.json').write_text(result.stdout)
    shutil.copytree(shared, folder)
    summary = json.loads((folder/'said.json').read_text())
    return dict(summary, folder=folder, bundle=str(folder/summary['bundle']), run=str(folder/summary['run']))


@pytest.fixture(scope='session')
def photo_folder(tmp_path_factory) -> Path:
    "Photographs in every mode, odd names, and broken files, in folders with spaces and Chinese characters."
    from samples import make_photo_folder
    return make_photo_folder(tmp_path_factory.mktemp('photos')/'我的 photos')


def free_port() -> int:
    "A port that nobody uses now."
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]


def is_answering(port: int) -> bool:
    "Whether a service says that it is ready."
    try:
        with socket.create_connection(('127.0.0.1', port), 5) as s:
            s.sendall(b'GET /ready HTTP/1.0\r\n\r\n')
            return s.recv(65536).startswith(b'HTTP/1.1 200')
    except OSError: return False


@contextmanager
def started(command: list, port: int, stderr: Path, **environment: str):
    "A service as a process; at the end it is told to stop, and its log holds no traceback."
    with stderr.open('w') as log:
        process = subprocess.Popen([*map(str, command)], stdout=subprocess.DEVNULL, stderr=log,
                                   env={**os.environ, **OFFLINE, **environment})
    deadline = time.monotonic() + 60
    try:
        while not is_answering(port):
            assert process.poll() is None and time.monotonic() < deadline, f'the service did not start: {stderr.read_text()}'
            time.sleep(0.05)
        yield process
        process.terminate()
        assert process.wait(40) in (0, -signal.SIGTERM, 130), stderr.read_text()
    finally:
        if process.poll() is None: process.kill()
        process.wait()
    assert 'Traceback' not in stderr.read_text(), stderr.read_text()


def serving(bundle, port: int, stderr: Path, *options, **environment: str):
    "`imgcls serve` as a process."
    return started([IMGCLS, 'serve', bundle, '--port', port, *options], port, stderr, **environment)


@pytest.fixture
def project_copy(tmp_path) -> Path:
    "The project's sources in another folder, so that nothing is written into this one."
    target = tmp_path/'project'
    target.mkdir()
    for name in ('settings.ini', 'pyproject.toml', 'README.md', 'LICENSE', '_quarto.yml'): shutil.copy2(ROOT/name, target)
    for name in ('nbs', 'imgcls_nb', 'tools'):
        shutil.copytree(ROOT/name, target/name, symlinks=True, ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints'))
    return target
