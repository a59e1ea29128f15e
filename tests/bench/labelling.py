"""What a large table costs in the label grid: opening it and one click, beside a table of a thousand rows, in one run.

    python tests/bench/labelling.py [--rows 1000000] [--decisions 10000]
"""
import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
from imgcls_nb.data import ImageSet
from imgcls_nb.labelling import EditLog, label_grid


def table(count: int, root: Path) -> ImageSet:
    "So many images, of which a third has a label; no file is opened before its page is shown."
    names = [f'{row % 997:03}/{row:07}.jpg' for row in range(count)]
    label = np.where(np.arange(count) % 3, '', 'cat')
    return ImageSet(pd.DataFrame(dict(image=names, label=label, split='')), ('cat', 'dog'), root=root)


def seconds(data: ImageSet, log: Path) -> tuple[float, float]:
    "To open the grid, and for one click."
    start = time.perf_counter()
    grid = label_grid(data, log=log)
    opened = time.perf_counter()
    grid.class_buttons['dog'].click()
    return opened - start, time.perf_counter() - opened


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rows', type=int, default=1_000_000)
    parser.add_argument('--decisions', type=int, default=10_000, help='already in the log')
    parser.add_argument('--turns', type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root, found = Path(folder), {}
        tables = {count: table(count, root) for count in (1000, args.rows)}
        for count, data in tables.items():
            log = EditLog(root/f'{count}.jsonl')
            for turn in range(args.decisions): log.label(data.items['image'].iat[turn % count], 'dog')
        for _ in range(args.turns):  # in turn, so that a slower moment meets both
            for count, data in tables.items(): found.setdefault(count, []).append(seconds(data, root/f'{count}.jsonl'))
    print(f'{"rows":>10} {"open, s":>9} {"click, ms":>10}')
    for count, turns in found.items():
        opened, clicked = map(statistics.median, zip(*turns))
        print(f'{count:10,} {opened:9.3f} {1000 * clicked:10.1f}')
    ratios = [[large[i] / small[i] for small, large in zip(*found.values())] for i in range(2)]
    print(f'{args.rows // 1000:,} times the rows: {statistics.median(ratios[0]):.1f} times the seconds to open, '
          f'{statistics.median(ratios[1]):.1f} times those of a click.')


if __name__ == '__main__': main()
