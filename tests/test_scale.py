"Batches that survive a kill, with and without Ray; a service of several processes."
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from conftest import assert_no_leftovers, assert_sentence, imgcls
from imgcls_nb.run import ImgclsError, InputError
from imgcls_nb.scale import predict_many

try: import ray
except ImportError: ray = None
needs_ray = pytest.mark.skipif(ray is None, reason='Ray is not installed: pip install "imgcls_nb[ray]"')
BROKEN = {'day-0/half.png': 'cut', 'day-1/empty.png': 'empty', 'day-2/note.txt': 'not an image'}


@pytest.fixture(scope='module')
def scans(tmp_path_factory) -> Path:
    "Four hundred digits as files in four folders, and three broken ones."
    from imgcls_nb.data import digits
    data, folder = digits(), tmp_path_factory.mktemp('scans')
    for number in range(400):
        path = folder/f'day-{number % 4}'/f'{number:04}.png'
        path.parent.mkdir(exist_ok=True)
        data.open(number, 'L').save(path)
    (folder/'day-0/half.png').write_bytes(path.read_bytes()[:60])
    (folder/'day-1/empty.png').touch()
    (folder/'day-2/note.txt').write_text('scanned on a Friday')
    return folder


def rows(out: Path) -> pd.DataFrame:
    "All parts as one table."
    return pd.concat([pd.read_parquet(path) for path in sorted(Path(out).glob('part-*.parquet'))], ignore_index=True)


@pytest.fixture(scope='module')
def expected(digits_run, scans, tmp_path_factory) -> pd.DataFrame:
    "The whole result, without an interruption, without a pool."
    out = tmp_path_factory.mktemp('expected')
    summary = predict_many(digits_run['bundle'], scans, out, 'local', 1, shard_rows=64)
    assert (summary.images, summary.errors, summary.done_now, summary.shards) == (403, 3, 403, 7)
    return rows(out)


def same(found: pd.DataFrame, expected: pd.DataFrame) -> None:
    "Every row once, and equal."
    assert found['image'].is_unique and len(found) == len(expected)
    pd.testing.assert_frame_equal(found, expected, rtol=1e-4)


def test_each_row_is_the_answer_of_the_predictor(digits_run, scans, expected):
    from imgcls_nb.bundle import load_bundle
    predictor = load_bundle(digits_run['bundle']).predictor()
    for row in expected.iloc[::40].itertuples():
        answer = predictor(scans/row.image)
        assert (answer.label, answer.sure) == (row.label, row.sure) and abs(answer.probability - row.probability) < 1e-3
        assert json.loads(row.top)[0]['label'] == row.label
    broken = expected[expected['error'].notna()]
    assert set(broken['image']) == set(BROKEN) and broken['label'].isna().all()
    assert list(expected.columns) == 'image label probability sure reason top error'.split()


def killed(bundle: str, source: Path, out: Path, engine: str, parts: int = 4) -> int:
    "Start a job in a process of its own, kill it with SIGKILL once some parts are there; gives how many there are."
    code = (f'from imgcls_nb.scale import predict_many\nif __name__ == "__main__":\n'
            f'    predict_many({bundle!r}, {str(source)!r}, {str(out)!r}, {engine!r}, 2, shard_rows=5)\n')
    process = subprocess.Popen([sys.executable, '-c', code], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while process.poll() is None and len(list(out.glob('part-*.parquet'))) < parts and time.monotonic() < deadline: time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    settled = -1
    while settled != (settled := len(list(out.glob('part-*.parquet')))): time.sleep(2)  # workers end a little later
    return settled


@pytest.fixture(scope='module')
def cluster():
    "One Ray on this machine for several tests, since it takes some ten seconds to start."
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.skipif(os.name == 'nt', reason='SIGKILL is not known there')
@pytest.mark.parametrize('engine', ['local', pytest.param('ray', marks=[pytest.mark.ray, needs_ray])])
def test_a_killed_job_goes_on(engine, digits_run, scans, expected, tmp_path):
    there = killed(digits_run['bundle'], scans, tmp_path/'out', engine)
    assert 4 <= there < 81
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path/'out').glob('part-*')}
    summary = predict_many(digits_run['bundle'], scans, tmp_path/'out', 'local', 1, shard_rows=5)
    assert (summary.images, summary.shards, summary.errors) == (403, 81, 3)
    assert 0 < summary.done_now <= 403 - 5 * (there - 1)
    same(rows(tmp_path/'out'), expected)
    assert all((tmp_path/'out'/name).stat().st_mtime_ns == then for name, then in before.items())
    assert_no_leftovers(tmp_path/'out')


@pytest.mark.ray
@needs_ray
def test_ray_gives_the_same_rows(cluster, digits_run, scans, expected, tmp_path):
    summary = predict_many(digits_run['bundle'], scans, tmp_path, processes=2, shard_rows=40)
    assert (summary.images, summary.engine) == (403, 'ray'), 'where Ray runs already, it is used'
    same(rows(tmp_path), expected)
    for path in sorted(tmp_path.glob('part-*'))[2:5]: path.unlink()
    assert predict_many(digits_run['bundle'], scans, tmp_path, 'ray', 2, shard_rows=40).done_now == 120
    same(rows(tmp_path), expected)


def test_tables_are_read_by_row_groups(digits_run, scans, expected, tmp_path):
    paths = [scans/name for name in expected['image']]
    table = pd.DataFrame(dict(path=expected['image'], picture=[path.read_bytes() for path in paths]))
    (tmp_path/'in').mkdir()
    table[:250].to_parquet(tmp_path/'in'/'a.parquet', row_group_size=30)
    table[250:].to_parquet(tmp_path/'in'/'b.parquet', row_group_size=1000)
    summary = predict_many(digits_run['bundle'], tmp_path/'in', tmp_path/'out', 'local', 1, shard_rows=60)
    assert (summary.images, summary.shards, summary.errors) == (403, 6, 3)
    same(rows(tmp_path/'out')[['image', 'label', 'probability', 'sure']], expected[['image', 'label', 'probability', 'sure']])


def test_pairs_of_bytes_and_path_and_missing_bytes(digits_run, scans, expected, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq
    values = [dict(bytes=(scans/name).read_bytes(), path=name) for name in expected['image'][:5]] + [None, dict(bytes=None, path='x')]
    pq.write_table(pa.table(dict(image=values)), tmp_path/'hub.parquet')
    summary = predict_many(digits_run['bundle'], tmp_path/'hub.parquet', tmp_path/'out', 'local', 1)
    found = rows(tmp_path/'out')
    assert summary.errors == 2 and found['label'][:5].tolist() == expected['label'][:5].tolist()
    assert found['image'][6] == 'hub.parquet#6' and 'no bytes' in found['error'][6]


def test_a_list_of_paths_with_odd_names(digits_run, scans, expected, tmp_path):
    odd = tmp_path/'猫 "a"\'.png'
    odd.write_bytes((scans/expected['image'][0]).read_bytes())
    names = [str(odd), str(scans/expected['image'][1]), str(tmp_path/'not there.png')]
    (tmp_path/'list.txt').write_text('\n'.join(names) + '\n\n', encoding='utf-8')
    predict_many(digits_run['bundle'], tmp_path/'list.txt', tmp_path/'out', 'local', 1)
    found = rows(tmp_path/'out')
    assert found['image'].tolist() == names and found['label'][:2].tolist() == expected['label'][:2].tolist()
    assert found['error'].notna().tolist() == [False, False, True]


def test_another_job_is_refused(digits_run, scans, tmp_path):
    import shutil
    def again(bundle=digits_run['bundle'], source=scans/'day-3', **options):
        return predict_many(bundle, source, tmp_path/'out', 'local', 1, **options)
    assert again().done_now == 100 and again().done_now == 0
    other = tmp_path/'other'
    shutil.copytree(digits_run['bundle'], other)
    record = json.loads((other/'bundle.json').read_text())
    used = json.loads((tmp_path/'out'/'manifest.json').read_text())['job']['runtime']
    (other/'bundle.json').write_text(json.dumps(dict(record, name='another')))
    for refused, options in [('bundle', dict(bundle=other)), ('source', dict(source=scans/'day-1')), ('top', dict(top=2)),
                             ('runtime', dict(runtime=next(name for name in record['runtimes'] if name != used))),
                             ('shard_rows', dict(shard_rows=9))]:
        with pytest.raises(InputError, match=f'another {refused}'): again(**options)
    with open(tmp_path/'out'/'shards.jsonl', 'a') as file: file.write('{"names": [], "rows": 0}\n')
    with pytest.raises(InputError, match='has been changed'): again()


@pytest.mark.parametrize('source, words', [('nothing', 'There is nothing'), ('empty', 'No images'), ('a.jpg', 'no folder'),
                                           ('bad.parquet', 'as a Parquet file'), ('text.parquet', 'holds bytes')])
def test_sources_that_cannot_be_used(source, words, digits_run, tmp_path):
    (tmp_path/'empty').mkdir()
    (tmp_path/'a.jpg').touch()
    (tmp_path/'bad.parquet').write_bytes(b'PAR1 and no more')
    pd.DataFrame(dict(a=['x'])).to_parquet(tmp_path/'text.parquet')
    with pytest.raises(InputError, match=words): predict_many(digits_run['bundle'], tmp_path/source, tmp_path/'out', 'local', 1)


def test_places_and_options_that_cannot_be_used(digits_run, scans, tmp_path):
    (tmp_path/'mine.txt').touch()
    with pytest.raises(InputError, match='other files'): predict_many(digits_run['bundle'], scans, tmp_path, 'local', 1)
    with pytest.raises(InputError, match='inside the source'): predict_many(digits_run['bundle'], scans, scans/'out', 'local', 1)
    assert not (scans/'out'/'manifest.json').exists()
    with pytest.raises(InputError, match='no engine'): predict_many(digits_run['bundle'], scans, tmp_path/'out', 'spark')
    with pytest.raises(InputError, match='processes'): predict_many(digits_run['bundle'], scans, tmp_path/'out', 'local', 0)


def test_the_command(digits_run, scans, expected, tmp_path):
    call = 'predict', digits_run['bundle'], scans, '--engine', 'local', '--out', tmp_path/'out'
    result = imgcls(*call, '--json')
    assert result.returncode == 1 and json.loads(result.stdout) == dict(
        images=403, sure=int((expected['sure'] == True).sum()), errors=3, shards=1, done_now=403, engine='local')  # noqa: E712
    same(rows(tmp_path/'out'), expected)
    again = imgcls(*call)
    assert again.returncode == 1 and '403 images' in again.stdout and '0 done now' in again.stdout
    assert_sentence(imgcls(*call, '--top', '1'), 'another top')
    assert_sentence(imgcls(*call[:-2]), '--out')


@pytest.mark.skipif(ray is not None, reason='Ray is installed here')
def test_without_ray_one_sentence_names_the_extra(digits_run, scans, tmp_path):
    from imgcls_nb.scale import serve_app
    with pytest.raises(ImgclsError, match=r'imgcls_nb\[ray\]'): predict_many(digits_run['bundle'], scans, tmp_path/'out', 'ray')
    with pytest.raises(ImgclsError, match=r'imgcls_nb\[ray\]'): serve_app(digits_run['bundle'])
    assert not (tmp_path/'out').exists()


@pytest.mark.ray
@needs_ray
def test_a_replica_dies_and_the_service_answers(cluster, digits_run, scans, expected):
    import socket

    import httpx
    import psutil

    from imgcls_nb.scale import serve_app, stop_serving
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]

    def replicas() -> list:
        "Processes of this Ray that hold a replica."
        found = []
        for child in psutil.Process().children(recursive=True):
            try: found += [child] if 'ServeReplica' in ' '.join(child.cmdline()) else []
            except psutil.Error: pass  # it ended while we looked
        return found

    def ask() -> httpx.Response:
        return httpx.post(f'{address}/predict', content=(scans/expected['image'][0]).read_bytes(), timeout=60)

    try:
        address = serve_app(digits_run['bundle'], replicas=2, port=port, cpus=0.5)
        assert len(first := replicas()) == 2
        assert all(ask().json()['label'] == expected['label'][0] for _ in range(10))
        assert httpx.post(f'{address}/predict', content=b'Dear service', timeout=60).status_code == 415
        first[0].kill()
        statuses, deadline = [], time.monotonic() + 60
        while time.monotonic() < deadline and (len(replicas()) < 2 or len(statuses) < 20):
            statuses.append(ask().status_code)
            time.sleep(0.1)
        assert statuses[-5:] == [200] * 5 and statuses.count(200) > 0.8 * len(statuses), statuses
        assert len(replicas()) == 2 and {one.pid for one in replicas()} != {one.pid for one in first}
    finally: stop_serving()


@pytest.mark.ray
@needs_ray
def test_a_runtime_that_is_not_there_is_refused(digits_run):
    from imgcls_nb.scale import serve_app
    from imgcls_nb.serve import ServiceOptions
    with pytest.raises(InputError, match='no runtime .tensorrt.: it has'): serve_app(digits_run['bundle'], options=ServiceOptions(runtime='tensorrt'))


@pytest.mark.ray
@needs_ray
def test_too_many_requests_are_told_so(cluster, digits_run, tmp_path):
    import socket
    from concurrent.futures import ThreadPoolExecutor

    import httpx
    from skimage import data as photographs
    from PIL import Image

    from imgcls_nb.scale import serve_app, stop_serving
    from imgcls_nb.serve import ServiceOptions
    Image.fromarray(photographs.astronaut()).resize((2048, 2048)).save(tmp_path/'large.png')
    body = (tmp_path/'large.png').read_bytes()
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    try:
        address = serve_app(digits_run['bundle'], replicas=1, port=port, cpus=0.5, ongoing=1, queued=1, options=ServiceOptions(keys=('secret',)))
        assert httpx.post(f'{address}/predict', content=body, timeout=60).status_code == 401
        client = httpx.Client(base_url=address, timeout=60, headers=dict(Authorization='Bearer secret'))
        with ThreadPoolExecutor(12) as pool: replies = list(pool.map(lambda _: client.post('/predict', content=body), range(24)))
        assert {reply.status_code for reply in replies} == {200, 503}
        assert all(not reply.text.startswith('{') for reply in replies if reply.status_code == 503)
        assert client.post('/predict', content=body).status_code == 200
    finally: stop_serving()
