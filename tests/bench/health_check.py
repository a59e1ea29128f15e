"""How long, and how much memory, the health check takes: against reading each image once, in one run.

    IMGCLS_MIRROR=… python tests/bench/health_check.py cifar10      # or any folder of images
"""
import argparse
import shutil
import sys
from pathlib import Path

from cold_start import measure

READING = '''
import sys, numpy as np
from imgcls_nb.sources import load_images
data = load_images(sys.argv[1])
for row in range(len(data)): np.asarray(data.open(row, 'RGB'))
'''


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('source', help="a data set's name, or a folder")
    parser.add_argument('--runs', type=int, default=3)
    args = parser.parse_args()
    imgcls = shutil.which('imgcls', path=str(Path(sys.executable).parent))
    commands = {'imgcls data': [imgcls, 'data', args.source], 'reading alone': [sys.executable, '-c', READING, args.source]}
    found = {name: [] for name in commands}
    for _ in range(args.runs):  # in turn, so that a slower moment meets both
        for name, command in commands.items(): found[name].append(measure(command))
    print(f'{"":14} {"seconds":>8} {"least":>7} {"most":>7} {"MB":>6}')
    for name, runs in found.items():
        seconds, megabytes = sorted(run[0] for run in runs), max(run[1] for run in runs)
        print(f'{name:14} {seconds[len(seconds) // 2]:8.1f} {seconds[0]:7.1f} {seconds[-1]:7.1f} {megabytes:6.0f}')
    ratios = sorted(a[0] / b[0] for a, b in zip(*found.values()))
    print(f'The health check takes {ratios[len(ratios) // 2]:.2f} times as long as reading alone '
          f'({ratios[0]:.2f} to {ratios[-1]:.2f}).')


if __name__ == '__main__': main()
