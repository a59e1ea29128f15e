"""Run notebooks from a bare kernel, cell by cell, as a reader does.

    python tools/run_notebooks.py                        # every notebook, cells without a flag
    python tools/run_notebooks.py --save 02_data         # and keep the outputs in the notebook
    python tools/run_notebooks.py --flags "slow gpu"     # cells with these flags too
"""
import argparse
import os
import re
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT/'nbs').glob('*.ipynb'))
FLAGS = re.search(r'^tst_flags = (.*)$', (ROOT/'settings.ini').read_text(encoding='utf-8'), re.M)[1].split()
NEVER = re.compile(r'^#\|\s*eval:\s*false', re.M)


def flags_of(cell: dict) -> set[str]:
    "The flags that a code cell has; none for prose, which may speak of them."
    if cell['cell_type'] != 'code': return set()
    return {flag for flag in FLAGS if re.search(rf'^#\|\s*{flag}\s*$', cell['source'], re.M)}


def has_flag(path: Path, flag: str) -> bool:
    "Whether a notebook has a cell with this flag."
    return any(flag in flags_of(cell) for cell in nbformat.read(path, as_version=4).cells)


def wanted(cell: dict, flags: list[str]) -> bool:
    "Whether a cell runs where these flags are given."
    return cell['cell_type'] == 'code' and not NEVER.search(cell['source']) and flags_of(cell) <= set(flags)


def run_notebook(path: Path, flags: list[str] = (), timeout: int = 600) -> dict:
    "Run a notebook's cells in a fresh kernel; raises `CellExecutionError` with the failing cell's source."
    nb = nbformat.read(path, as_version=4)
    part = nbformat.from_dict({**nb, 'cells': []})
    part['cells'] = [cell for cell in nb.cells if wanted(cell, flags)]
    os.environ.setdefault('PYDEVD_DISABLE_FILE_VALIDATION', '1')
    NotebookClient(part, timeout=timeout, kernel_name='python3', store_widget_state=False,
                   resources={'metadata': {'path': str(path.parent)}}).execute()
    return nb


def cleaned(nb: dict) -> dict:
    "Outputs as a reader should see them: no warnings or progress on stderr, no widget state, no execution times."
    for cell in nb['cells']:
        if cell['cell_type'] != 'code': continue
        cell['metadata'].pop('execution', None)
        cell['outputs'] = [o for o in cell['outputs'] if o.get('name') != 'stderr'
                           and 'application/vnd.jupyter.widget-view+json' not in o.get('data', {})]
    nb['metadata'].pop('widgets', None)
    nb['metadata'].pop('language_info', None)
    return nb


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('names', nargs='*', help='02_data, 06_train, …; all by default')
    parser.add_argument('--flags', default='', help=f'space-separated, of {" ".join(FLAGS)}')
    parser.add_argument('--only', metavar='FLAG', help='only notebooks that have cells with this flag, and those cells too')
    parser.add_argument('--save', action='store_true', help='keep the outputs in the notebooks')
    args = parser.parse_args()
    flags, failed = [*args.flags.split(), *([args.only] if args.only else [])], 0
    for path in NOTEBOOKS:
        if args.names and path.stem not in args.names: continue
        if args.only and not has_flag(path, args.only): continue
        start = time.perf_counter()
        try: nb = run_notebook(path, flags)
        except CellExecutionError as error:
            failed += 1
            print(f'{path.stem}: failed\n{error}', flush=True)
            continue
        if args.save: nbformat.write(cleaned(nb), path)
        print(f'{path.stem}: {time.perf_counter() - start:.0f} s', flush=True)
    return 1 if failed else 0


if __name__ == '__main__': sys.exit(main())
