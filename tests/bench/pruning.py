"""ResNet-18 beside the same network with half its multiply-adds, as ONNX on the CPU: time at batch 1, and how many times as fast.

    python tests/bench/pruning.py [--network resnet18] [--keep 0.5] [--edges 32 64 128 224] [--threads 1 2] [--turns 60]

The weights are random, since time does not depend on them; what pruning costs in accuracy is measured in chapter 10a.
The two take turns; a ratio stands with the interval that nine of ten turns fall into.
"""
import argparse
from functools import partial

import numpy as np
from imgcls_nb.bundle import Preprocessing
from imgcls_nb.export import to_onnx
from imgcls_nb.models import create_model
from imgcls_nb.prune import prune_channels
from imgcls_nb.runtimes import open_session, run_session
from imgcls_nb.variants import graph_cost, time_in_turns


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--network', default='resnet18')
    parser.add_argument('--keep', type=float, default=0.5, help='the share of the multiply-adds that pruning leaves')
    parser.add_argument('--edges', type=int, nargs='+', default=[32, 64, 128, 224], help='pixels')
    parser.add_argument('--threads', type=int, nargs='+', default=[1, 2])
    parser.add_argument('--turns', type=int, default=60)
    args = parser.parse_args()
    print(f'{args.network}, {args.keep:.0%} of the multiply-adds kept')
    print(f'{"pixels":>8} {"threads":>8} {"multiply-adds":>14} {"whole, ms":>10} {"pruned, ms":>11} {"times as fast":>14}')
    for edge in args.edges:
        preprocessing = Preprocessing(edge, edge, channels=1)
        whole = create_model(args.network, 10, 1, (edge, edge)).eval()
        graphs = [to_onnx(net, preprocessing) for net in (whole, prune_channels(whole, (1, edge, edge), args.keep))]
        costs = [graph_cost(graph)['multiply_adds'] for graph in graphs]
        pixels = np.zeros((1, edge, edge, 1), np.uint8)
        for threads in args.threads:
            sessions = [open_session(graph, threads=threads) for graph in graphs]
            calls = {i: partial(run_session, session, pixels) for i, session in enumerate(sessions)}
            times = time_in_turns(calls, args.turns)
            ratios = np.median(times[0], axis=1)/np.median(times[1], axis=1)
            low, middle, high = np.quantile(ratios, (0.05, 0.5, 0.95))
            print(f'{edge:8} {threads:8} {costs[1]/costs[0]:14.1%} {np.median(times[0]):10.2f} {np.median(times[1]):11.2f} '
                  f'{middle:7.2f} ({low:.2f} to {high:.2f})')


if __name__ == '__main__': main()
