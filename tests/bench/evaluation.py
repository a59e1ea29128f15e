"""How long `measure` takes for 10,000 predictions, with every interval, beside scikit-learn for the bare figures.

    python tests/bench/evaluation.py
    python tests/bench/evaluation.py --images 50000 --classes 1000
"""
import argparse
import time
import warnings

import numpy as np
from sklearn import metrics as sk

from imgcls_nb.evaluate import measure, per_class


def predictions(images: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    "Targets and probabilities of a classifier that is right about nine times of ten."
    rng = np.random.default_rng(0)
    targets, logits = rng.integers(0, classes, images), rng.normal(size=(images, classes))
    logits[np.arange(images), targets] += 3 + np.log(classes)
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return targets, (powers / powers.sum(1, keepdims=True)).astype(np.float32)


def bare(targets: np.ndarray, probabilities: np.ndarray) -> dict[str, float]:
    "The same figures from scikit-learn, without an interval."
    answers, labels = probabilities.argmax(1), range(probabilities.shape[1])
    return dict(accuracy=sk.accuracy_score(targets, answers),
                top_k=sk.top_k_accuracy_score(targets, probabilities, k=3, labels=labels),
                balanced_accuracy=sk.balanced_accuracy_score(targets, answers),
                precision_macro=sk.precision_score(targets, answers, average='macro', zero_division=0),
                f1_macro=sk.f1_score(targets, answers, average='macro'), mcc=sk.matthews_corrcoef(targets, answers),
                auroc_macro=sk.roc_auc_score(targets, probabilities / probabilities.sum(1, keepdims=True), multi_class='ovr'),
                log_loss=sk.log_loss(targets, probabilities, labels=labels))


def seconds(action, *args) -> float:
    start = time.perf_counter()
    action(*args)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--images', type=int, default=10_000)
    parser.add_argument('--classes', type=int, default=10)
    args = parser.parse_args()
    warnings.simplefilter('ignore')
    targets, probabilities = predictions(args.images, args.classes)
    groups, names = np.arange(args.images) // 5, tuple(map(str, range(args.classes)))
    rows = {'scikit-learn, no intervals': seconds(bare, targets, probabilities),
            'measure, all intervals': seconds(measure, targets, probabilities),
            'measure, groups of five': seconds(measure, targets, probabilities, groups),
            'per_class, all intervals': seconds(per_class, targets, probabilities, names)}
    print(f'{args.images:,} images, {args.classes} classes')
    for name, value in rows.items(): print(f'{name:30} {value:8.2f} s')
    print(f'ratio of measure to scikit-learn: {rows["measure, all intervals"] / rows["scikit-learn, no intervals"]:.1f}')


if __name__ == '__main__': main()
