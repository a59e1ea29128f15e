"""What `Watch` costs: the same training with and without it, in turn, and the ratio of the seconds.

    python tests/bench/watching.py          # digits, small_cnn at 8 and at 32 pixels
"""
import statistics
import time
import warnings

from imgcls_nb.data import digits
from imgcls_nb.diagnose import Watch
from imgcls_nb.train import image_learner, train


def seconds(data, size: int, *callbacks) -> float:
    "One training of as many epochs as the recipe takes, 24."
    learn = image_learner(data, 'small_cnn', size=size, augment='none', device='cpu')
    with learn.no_bar(), learn.no_logging():
        start = time.process_time()
        train(learn, None, 1e-2, callbacks)
    return time.process_time() - start


def main(repeats: int = 3) -> None:
    warnings.simplefilter('ignore')
    data = digits().split().scan()
    seconds(data, 8)  # warms up
    print(f'{"pixels":>6} {"without, s":>11} {"with, s":>9} {"ratio":>7} {"least":>7} {"most":>7}')
    for size in (8, 32):
        pairs = [(seconds(data, size), seconds(data, size, Watch())) for _ in range(repeats)]
        ratios = sorted(b / a for a, b in pairs)
        print(f'{size:6} {statistics.median(a for a, _ in pairs):11.2f} {statistics.median(b for _, b in pairs):9.2f} '
              f'{statistics.median(ratios):7.3f} {ratios[0]:7.3f} {ratios[-1]:7.3f}', flush=True)


if __name__ == '__main__': main()
