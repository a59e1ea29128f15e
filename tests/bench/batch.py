"""Labels for 100,000 small images: a loop over files as the peer, the local engine and Ray, in one run, with a kill in each.

    python tests/bench/batch.py BUNDLE                # a bundle of digits; Ray only where it is installed
"""
import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pyarrow.parquet as pq

LOOP = '''
import json, sys
from pathlib import Path
from imgcls_nb.bundle import load_bundle
predictor = load_bundle(sys.argv[1]).predictor(threads=1)
with open(sys.argv[3], 'w') as out:
    for path in sorted(Path(sys.argv[2]).rglob('*.png')):
        out.write(json.dumps(dict(image=str(path), **predictor(path).as_dict())) + chr(10))
'''
JOB = '''
import sys
from imgcls_nb.scale import predict_many
if __name__ == '__main__':
    predict_many(sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4], 2)
'''


def write_images(folder: Path, images: int) -> None:
    "Digits as files, a thousand in a folder; every picture is written anew, as its own file."
    from imgcls_nb.data import digits
    import io
    data, files = digits(), []
    for number in range(1000):
        file = io.BytesIO()
        data.open(number, 'L').save(file, 'PNG')
        files.append(file.getvalue())
    for number in range(images):
        path = folder/f'{number // 1000:04}'/f'{number:07}.png'
        if number % 1000 == 0: path.parent.mkdir(parents=True)
        path.write_bytes(files[number % 1000])


def watched(command: list[str], begun, stop=lambda: False) -> tuple[float, list[tuple[float, float]]]:
    "Seconds, and (time, megabytes of all its processes) every quarter second once work has `begun()`; killed when `stop()`."
    start, samples = time.perf_counter(), []
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        if stop():
            process.send_signal(signal.SIGKILL)
            break
        total = 0
        for one in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
            try: total += one.memory_info().rss
            except psutil.Error: pass
        if begun(): samples.append((time.perf_counter() - start, total / 1e6))
        time.sleep(0.25)
    code = process.wait()
    if code not in (0, -signal.SIGKILL): raise SystemExit(f'failed with {code}: {command[-4:]}')
    return time.perf_counter() - start, samples


def thirds(samples: list[tuple[float, float]]) -> str:
    "The largest memory in the first and in the last third of the time in which answers were written."
    begin, end = samples[0][0], samples[-1][0]
    first = max(mb for at, mb in samples if at <= begin + (end - begin) / 3)
    last = max(mb for at, mb in samples if at >= end - (end - begin) / 3)
    return f'{first:6.0f} MB at most in the first third, {last:6.0f} MB in the last'


def count(out: Path) -> tuple[int, int, int]:
    "Parts, rows, and different images."
    parts = sorted(out.glob('part-*.parquet'))
    names = [name for part in parts for name in pq.read_table(part, columns=['image'])['image'].to_pylist()]
    return len(parts), len(names), len(set(names))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('bundle')
    parser.add_argument('--images', type=int, default=100_000)
    args = parser.parse_args()
    bundle, engines = os.path.abspath(args.bundle), ['local'] + (['ray'] if importlib.util.find_spec('ray') else [])
    with tempfile.TemporaryDirectory() as home:
        home = Path(home)
        write_images(home/'in', args.images)
        print(f'{args.images:,} images; load of the machine {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors', flush=True)
        seconds, samples = watched([sys.executable, '-c', LOOP, bundle, str(home/'in'), str(home/'loop.jsonl')],
                                   lambda: (home/'loop.jsonl').exists() and (home/'loop.jsonl').stat().st_size)
        print(f'loop  {args.images / seconds:7.0f} images/s  {thirds(samples)}', flush=True)
        for engine in engines: measure(engine, bundle, home, args.images)


def measure(engine: str, bundle: str, home: Path, images: int) -> None:
    "One engine: half, a kill, the other half."
    out = home/engine
    command = [sys.executable, '-c', JOB, bundle, str(home/'in'), str(out), engine]
    half, parts = images // 2000, lambda: len(list(out.glob('part-*.parquet')))
    first, samples = watched(command, lambda: parts() > 0, lambda: parts() >= half)
    print(f'{engine:5} {thirds(samples)}, until the kill', flush=True)
    time.sleep(5)
    there = count(out)
    second, samples = watched(command, lambda: parts() > there[0])
    print(f'{engine:5} {thirds(samples)}, after it', flush=True)
    both = dict(at_the_kill=there, at_the_end=count(out), rows_wanted=json.loads((out/'manifest.json').read_text())['rows'])
    print(f'{engine:5} {images / (first + second):7.0f} images/s, both starts included ({first:.0f} s and {second:.0f} s); (parts, rows, different images): {both}', flush=True)


if __name__ == '__main__': main()
