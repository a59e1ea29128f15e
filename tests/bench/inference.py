"""What an answer costs: the bundle's predictor beside a bare ONNX Runtime call, PyTorch and OpenVINO, in one run.

    python tests/bench/inference.py                      # tf_efficientnet_lite0 with its ImageNet weights, and a small network
    python tests/bench/inference.py --turns 40 --threads 2

All sides run the same weights on the same pictures with the same number of threads, and take turns, so that a machine that slows down
slows all. First from decoded pixels, then from the bytes of a JPEG, where the usual way is Pillow, torchvision's transform and PyTorch.
Each ratio is between neighbours in one turn; the median and the range are printed, and how far the answers are apart.
"""
import argparse
import io
import statistics
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from imgcls_nb.export import PixelsToProbabilities, export, load_model, zoo_bundle
from imgcls_nb.runtimes import open_session
from imgcls_nb.variants import time_in_turns

warnings.filterwarnings('ignore')
PHOTOS = 'astronaut', 'chelsea', 'coffee', 'rocket', 'retina', 'hubble_deep_field'


def photos(width: int = 640, height: int = 512) -> list[bytes]:
    "JPEG files of the photographs that scikit-image ships; of a size at which resizing first or cropping first is the same."
    from skimage import data
    files = []
    for name in PHOTOS:
        image = ImageOps.fit(Image.fromarray(getattr(data, name)()).convert('RGB'), (width, height), Image.Resampling.LANCZOS)
        file = io.BytesIO()
        image.save(file, 'JPEG', quality=90)
        files.append(file.getvalue())
    return files


def small_bundle(folder: Path):
    "A small network, trained on digits for a moment."
    from imgcls_nb.evaluate import evaluate
    from imgcls_nb.sources import load_images
    from imgcls_nb.train import image_learner, train
    learn = image_learner(load_images('digits').split(), 'small_cnn', seed=0)
    with learn.no_bar(), learn.no_logging(): train(learn, epochs=2)
    return export(learn, evaluate(learn), folder)


def openvino_call(path: Path, threads: int):
    "OpenVINO on the same ONNX file, tuned for single images; None where it is not installed."
    try: import openvino
    except ImportError: return None
    compiled = openvino.Core().compile_model(str(path), 'CPU', {'PERFORMANCE_HINT': 'LATENCY', 'INFERENCE_NUM_THREADS': threads,
                                                                  'INFERENCE_PRECISION_HINT': 'f32'})
    request = compiled.create_infer_request()
    return lambda pixels: request.infer({0: pixels})[compiled.output('probabilities')]


def show(title: str, milliseconds: dict, base: str, answers: dict) -> None:
    "A line a side: the median time, the ratio to the base within each turn, the answers' distance from the base's."
    print(f'\n{title}\n{"":42}{"ms, median":>11}{"times " + base:>30}{"largest difference":>20}')
    fastest = {name: np.median(values, axis=1) for name, values in milliseconds.items()}
    for name, values in fastest.items():
        ratios = values / fastest[base]
        spread = f'{statistics.median(ratios):.3f} ({ratios.min():.3f} to {ratios.max():.3f})'
        print(f'{name:42}{np.median(values):11.3f}{spread:>30}{np.abs(answers[name] - answers[base]).max():20.1e}')


def from_pixels(bundle, files: list[np.ndarray], threads: int, turns: int, compiled: bool) -> None:
    "Decoded pixels in, probabilities out, one image at a time."
    file = bundle.folder/bundle.record.runtimes['onnx'].file
    session, predictor = open_session(file, threads), bundle.predictor(threads=threads)
    network = PixelsToProbabilities(load_model(bundle), bundle.preprocessing, bundle.record.calibration.temperature
                                    if bundle.record.calibration else 1.0).eval()
    sides = {'ONNX Runtime, bare': lambda x: session.run(['probabilities'], {'pixels': x})[0],
             'Predictor.probabilities': predictor.probabilities,
             'PyTorch, eager': lambda x: network(torch.from_numpy(x)).numpy()}
    if compiled:
        fused = torch.compile(network)
        sides['PyTorch, torch.compile'] = lambda x: fused(torch.from_numpy(x)).numpy()
    if vino := openvino_call(file, threads): sides['OpenVINO'] = vino
    with torch.inference_mode():
        answers = {name: np.concatenate([side(x[None]) for x in files]) for name, side in sides.items()}
        calls = {name: (lambda side=side: side(files[0][None])) for name, side in sides.items()}
        found = time_in_turns(calls, turns)
    show(f'{bundle.record.architecture}, from decoded pixels', found, 'ONNX Runtime, bare', answers)


def usual_way(bundle):
    "Pillow, torchvision's transform, PyTorch: what a first script does."
    from torchvision.transforms import v2
    p, network = bundle.preprocessing, load_model(bundle).eval()
    transform = v2.Compose([
        v2.Resize(round(p.height / p.crop_fraction), interpolation=getattr(v2.InterpolationMode, p.interpolation.upper())),
        v2.CenterCrop((p.height, p.width)), v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(p.mean, p.std)])
    def answer(data: bytes) -> np.ndarray:
        image = Image.open(io.BytesIO(data)).convert('RGB')
        return network(transform(image)[None]).softmax(1).numpy()
    return answer


def from_jpegs(bundle, files: list[bytes], threads: int, turns: int) -> None:
    "The bytes of a JPEG in, probabilities out."
    predictor = bundle.predictor(threads=threads)
    sides = {'imgcls_nb': lambda data: predictor.probabilities(predictor.read(data)[None]),
             'Pillow, torchvision, PyTorch eager': usual_way(bundle)}
    with torch.inference_mode():
        answers = {name: np.concatenate([side(data) for data in files]) for name, side in sides.items()}
        calls = {name: (lambda side=side: [side(data) for data in files]) for name, side in sides.items()}
        found = {name: values / len(files) for name, values in time_in_turns(calls, turns, each=2).items()}
    show(f'{bundle.record.architecture}, from JPEG bytes', found, 'imgcls_nb', answers)
    same = (answers['imgcls_nb'].argmax(1) == answers['Pillow, torchvision, PyTorch eager'].argmax(1)).sum()
    print(f'the same class for {same} of {len(files)} photographs')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--turns', type=int, default=20)
    parser.add_argument('--threads', type=int, default=torch.get_num_threads())
    parser.add_argument('--no-compile', action='store_true', help='leave torch.compile out (it needs a C++ compiler)')
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f'{args.threads} threads, {args.turns} turns')
    with tempfile.TemporaryDirectory() as folder:
        large, small = zoo_bundle('tf_efficientnet_lite0', Path(folder)/'lite0'), small_bundle(Path(folder)/'digits')
        read = large.predictor().read
        from_pixels(large, [read(data) for data in photos()], args.threads, args.turns, not args.no_compile)
        from_pixels(small, [np.full((small.preprocessing.height, small.preprocessing.width, 1), v, np.uint8) for v in (0, 99, 255)],
                    args.threads, args.turns, not args.no_compile)
        from_jpegs(large, photos(), args.threads, args.turns)


if __name__ == '__main__': main()
