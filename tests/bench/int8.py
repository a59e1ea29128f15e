"""INT8 of tf_efficientnet_lite0 with its ImageNet weights: agreement, size and speed beside the float model.

    python tests/bench/int8.py [FOLDER] [--calibrate 100] [--threads 2]

Without a folder: crops of the photographs that scikit-image ships, one set to calibrate and another to test; the float
model's answers stand in for labels. With a folder (one subfolder a class, named by the class number 0 to 999 or sorted in
ImageNet's order when there are 1,000; a name such as 207_golden_retriever is number 207): accuracy as well. Calibration
images are drawn class by class and are never tested.
"""
import argparse
import re
import time
from pathlib import Path

import numpy as np
import skimage
from imgcls_nb.compare import paired_interval
from imgcls_nb.export import to_onnx
from imgcls_nb.image import load_pixels
from imgcls_nb.quantize import quantize, saturation_free
from imgcls_nb.runtimes import open_session, run_session
from imgcls_nb.transfer import pretrained_model, pretrained_preprocessing
from imgcls_nb.variants import time_in_turns
from PIL import Image

NAME = 'tf_efficientnet_lite0'
CALIBRATE = 'astronaut.png', 'coffee.png', 'motorcycle_left.png', 'camera.png', 'ihc.png'
TEST = 'chelsea.png', 'rocket.jpg', 'motorcycle_right.png', 'retina.jpg', 'hubble_deep_field.jpg', 'coins.png', 'grass.png'


def crops(names, count, side, seed):
    "Random squares of photographs, a tenth of the picture or more, as `uint8 [N, side, side, 3]`."
    rng, found = np.random.default_rng(seed), []
    pictures = [Image.open(Path(skimage.__file__).parent/'data'/name).convert('RGB') for name in names]
    for i in range(count):
        picture = pictures[i % len(pictures)]
        edge = max(64, int(min(picture.size) * rng.uniform(0.1, 1)**0.5))
        x, y = (int(rng.integers(0, length - edge + 1)) for length in picture.size)
        found.append(np.asarray(picture.crop((x, y, x + edge, y + edge)).resize((side, side), Image.Resampling.BICUBIC)))
    return np.stack(found)


def from_folder(root, preprocessing, calibrate):
    "Pixels to calibrate, and pixels and targets to test."
    folders = sorted(path for path in Path(root).iterdir() if path.is_dir())
    def number(i, name):
        if len(folders) == 1000: return i
        found = re.match(r'\d+', name)
        if not found: raise SystemExit(f'{name} does not begin with the number of an ImageNet class.')
        return int(found[0])
    groups = [(number(i, folder.name), sorted(path for path in folder.iterdir() if path.is_file()))
              for i, folder in enumerate(folders)]
    turns = [(place, target, path) for target, paths in groups for place, path in enumerate(paths)]
    turns.sort(key=lambda turn: turn[0])  # the first of every class, then the second of every class
    pixels = np.stack([load_pixels(path, preprocessing) for _, _, path in turns])
    return pixels[:calibrate], pixels[calibrate:], np.array([target for _, target, _ in turns[calibrate:]])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', nargs='?')
    parser.add_argument('--calibrate', type=int, default=100)
    parser.add_argument('--threads', type=int, default=2)
    options = parser.parse_args()
    p = pretrained_preprocessing(NAME)
    if options.folder: calibration, pixels, targets = from_folder(options.folder, p, options.calibrate)
    else: calibration, pixels, targets = crops(CALIBRATE, options.calibrate, p.width, 0), crops(TEST, 300, p.width, 1), None
    graphs = {'float32': to_onnx(pretrained_model(NAME, None).eval(), p)}
    start = time.perf_counter()
    graphs['INT8, 8 bits, to the nearest'] = quantize(graphs['float32'], calibration, reduce_range=False, fit=False)
    graphs['INT8, 7 bits, to the nearest'] = quantize(graphs['float32'], calibration, fit=False)
    graphs['INT8, default'] = quantize(graphs['float32'], calibration)
    print(f'three versions in {time.perf_counter() - start:.0f} s; '
          f'free of saturation: {saturation_free()}; {len(calibration)} to calibrate, {len(pixels)} to test')
    sessions = {name: open_session(graph, options.threads) for name, graph in graphs.items()}
    answers = {name: run_session(session, pixels, 16) for name, session in sessions.items()}
    image = pixels[:1]
    calls = {name: lambda session=session: session.run(['probabilities'], {'pixels': image}) for name, session in sessions.items()}
    times = {name: np.median(each) for name, each in time_in_turns(calls).items()}
    reference = answers['float32']
    for name, found in answers.items():
        divergence = float((reference * np.log((reference + 1e-12) / (found + 1e-12))).sum(1).mean())
        line = (f'{name:30} size {len(graphs[name]) / len(graphs["float32"]):6.1%}  '
                f'speed {times["float32"] / times[name]:5.2f}x  same class '
                f'{(found.argmax(1) == reference.argmax(1)).mean():6.1%}  KL {divergence:.4f}')
        if targets is not None:
            right, before = found.argmax(1) == targets, reference.argmax(1) == targets
            change = paired_interval(int((before & ~right).sum()), int((right & ~before).sum()), len(right))
            line += (f'  accuracy {right.mean():.2%} ({100 * change.value:+.2f} points, '
                     f'{100 * change.low:+.2f} to {100 * change.high:+.2f})')
        print(line)


if __name__ == '__main__': main()
