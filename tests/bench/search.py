"""Does the search beat random search at equal cost? More seeds than the chapter's cells can afford.

    python tests/bench/search.py --seeds 3 8 --epochs 60

Both get the same number of training epochs; every network is timed again in turns; the test images judge the fronts. About
forty seconds of processor time for each seed. With the defaults, on two cores of an AMD EPYC, the Gaussian process was ahead
by 5.5 on the test images (95%: 1.7 to 9.3) and by 6.8 on the validation images (2.6 to 11.0).
"""
import argparse
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from imgcls_nb.data import digits
from imgcls_nb.image import Preprocessing
from imgcls_nb.runtimes import open_session, run_session
from imgcls_nb.search import Genotype, ProxyImages, SearchedCNN, _timing_graph, hypervolume, proxy_training, right_answers, search_architecture
from imgcls_nb.train import margin_of_error
from imgcls_nb.variants import time_in_turns


def tested(images, proxy, name: str, seed: int) -> float:
    "Test accuracy of a network, trained as in the search."
    genotype, rows = Genotype.from_name(name), images.where('test')
    torch.manual_seed(seed)
    model, size = SearchedCNN(genotype, len(images.classes)), Preprocessing(genotype.resolution, genotype.resolution, channels=1)
    for _ in proxy_training(model, proxy.at(genotype.resolution), seed=seed): pass
    pixels = torch.from_numpy(images.pixels(rows, size)).permute(0, 3, 1, 2)
    return float(right_answers(model, (pixels, torch.from_numpy(images.targets(rows)))).mean())


def retime(names: list[str]) -> dict[str, float]:
    "Milliseconds of each network, all before the same clock."
    calls = {}
    for name in names:
        side = Genotype.from_name(name).resolution
        session = open_session(_timing_graph(Genotype.from_name(name), 10, 1), threads=1)
        calls[name] = partial(run_session, session, np.zeros((1, side, side, 1), np.uint8))
    return {name: np.median(values, 1).min() for name, values in time_in_turns(calls, turns=10).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--seeds', type=int, nargs=2, default=(3, 8), help='first, and one after the last')
    parser.add_argument('--epochs', type=int, default=60, help='of training, for each search')
    args = parser.parse_args()
    images, methods = digits().split().scan(), dict(random=dict(sampler='random', stop_beaten=False), gp=dict(sampler='gp'))
    proxy, found = ProxyImages(images), {}
    with tempfile.TemporaryDirectory() as work:
        for seed in range(*args.seeds):
            for name, options in methods.items():
                result = search_architecture(images, Path(work)/f'{name}-{seed}', None, seed=seed, all_epochs=args.epochs,
                                             latencies=Path(work)/'latencies', **options)
                front = result.front
                found[name, seed] = front.assign(test=[tested(images, proxy, g, seed) for g in front.genotype],
                                                 cost=result.table.processor_s.sum())
    milliseconds = retime(sorted({g for front in found.values() for g in front.genotype}))
    rows = [dict(method=name, seed=seed, networks=len(front), processor_s=front.cost.iloc[0],
                 validation=hypervolume(front.assign(latency_ms=front.genotype.map(milliseconds))),
                 test=hypervolume(front.assign(latency_ms=front.genotype.map(milliseconds), accuracy=front.test)))
            for (name, seed), front in found.items()]
    table = pd.DataFrame(rows).set_index(['method', 'seed'])
    print(table.round(2).to_string())
    for column in ('validation', 'test'):
        gain = (table.loc['gp', column] - table.loc['random', column]).to_numpy()
        half = margin_of_error(gain)
        print(f'{column}: gp {gain.mean():+.1f} ({gain.mean() - half:+.1f} to {gain.mean() + half:+.1f}) above random, {len(gain)} seeds')


if __name__ == '__main__': main()
