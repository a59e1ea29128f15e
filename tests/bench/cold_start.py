"""How long, and how much memory, from typing a command to the answer: against the usual PyTorch way, in one run.

    python tests/bench/cold_start.py BUNDLE IMAGE     # a bundle of a timm model or of small_cnn
"""
import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

RUNS = 5
PYTORCH = '''
import json, sys, torch
from PIL import Image
from pathlib import Path
from safetensors.torch import load_file
from torchvision.transforms import v2
folder, image = Path(sys.argv[1]), sys.argv[2]
record = json.loads((folder/'bundle.json').read_text())
p, classes = record['preprocessing'], record['task']['classes']
if record['architecture'] == 'small_cnn':
    from imgcls_nb.models import SmallCNN
    model = SmallCNN(len(classes), p['channels'])
else:
    import timm
    model = timm.create_model(record['architecture'], num_classes=len(classes), in_chans=p['channels'])
model.load_state_dict(load_file(folder/'model.safetensors'))
size = round(p['height'] / p['crop_fraction'])
transform = v2.Compose([v2.Resize(size), v2.CenterCrop(p['height']), v2.ToImage(), v2.ToDtype(torch.float32, scale=True),
                        v2.Normalize(p['mean'], p['std'])])
x = transform(Image.open(image).convert('L' if p['channels'] == 1 else 'RGB'))[None]
with torch.inference_mode(): print(classes[model.eval()(x).softmax(1).argmax().item()])
'''


def measure(command: list[str]) -> tuple[float, float]:
    "Wall seconds and peak memory in megabytes of one process, as the operating system counts them."
    start = time.perf_counter()
    child = os.posix_spawn(command[0], command, os.environ,
                           file_actions=[(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
                                         (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0)])
    _, status, usage = os.wait4(child, 0)
    if os.waitstatus_to_exitcode(status): raise SystemExit(f'failed: {" ".join(command)}')
    return time.perf_counter() - start, usage.ru_maxrss / (1e6 if sys.platform == 'darwin' else 1e3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('bundle')
    parser.add_argument('image')
    args = parser.parse_args()
    imgcls = shutil.which('imgcls', path=str(Path(sys.executable).parent))
    with tempfile.NamedTemporaryFile('w', suffix='.py') as script:
        script.write(PYTORCH)
        script.flush()
        commands = {'imgcls --help': [imgcls, '--help'], 'imgcls predict': [imgcls, 'predict', args.bundle, args.image],
                    'PyTorch eager': [sys.executable, script.name, args.bundle, args.image]}
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
        for turn in range(RUNS + 1):  # in turn, so that a change of the machine's speed meets all; the first is a warm-up
            for name, command in commands.items():
                figures = measure(command)
                if turn: found[name].append(figures)
    print(f'{"":16} {"s, median":>10} {"s, worst":>10} {"MB, worst":>10}')
    for name, figures in found.items():
        seconds, memory = zip(*figures)
        print(f'{name:16} {statistics.median(seconds):10.2f} {max(seconds):10.2f} {max(memory):10.0f}')
    ours, theirs = [[seconds for seconds, _ in found[name]] for name in ('imgcls predict', 'PyTorch eager')]
    ratios = [t / o for o, t in zip(ours, theirs)]
    print(f'PyTorch eager takes {statistics.median(ratios):.1f} times as long as imgcls predict '
          f'({min(ratios):.1f} to {max(ratios):.1f})')


if __name__ == '__main__': main()
