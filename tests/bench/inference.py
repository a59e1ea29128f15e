"""How long one image takes: the bundle's predictor, a bare call of ONNX Runtime, OpenVINO, PyTorch and torch.compile, in one run.

    python tests/bench/inference.py BUNDLE [IMAGE.jpg]     # a bundle of a timm model or of small_cnn; one thread each
"""
import argparse
import io
import json
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torchvision.transforms import v2

from imgcls_nb.bundle import load_bundle
from imgcls_nb.runtimes import ENGINES, open_engine, open_session


def pytorch_model(bundle):
    "The trained network, from the bundle's own weights, as PyTorch would have it."
    record = bundle.record
    if record.architecture == 'small_cnn':
        from imgcls_nb.models import SmallCNN
        model = SmallCNN(len(bundle.classes), record.preprocessing.channels)
    else:
        import timm
        model = timm.create_model(record.architecture, num_classes=len(bundle.classes), in_chans=record.preprocessing.channels)
    model.load_state_dict(load_file(bundle.folder/'model.safetensors'))
    return model.eval()


def interleaved(ways: dict, rounds: int, calls: int) -> dict[str, float]:
    "Median milliseconds of one call, in turns, so that whatever else the machine does meets all alike."
    times = {name: [] for name in ways}
    for way in ways.values(): way()  # compiles, allocates
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            for _ in range(calls): way()
            times[name].append((time.perf_counter() - start) / calls * 1000)
    return {name: float(np.median(each)) for name, each in times.items()}


def from_pixels(bundle, pixels: np.ndarray, compiled: bool) -> dict:
    "One prepared image to probabilities."
    path, p, model = bundle.folder/'model.onnx', bundle.record.preprocessing, pytorch_model(bundle)
    session, predictor = open_session(path, 1), bundle.predictor(threads=1)
    mean, std = (torch.tensor(each).view(1, -1, 1, 1) for each in (p.mean, p.std))
    def whole(images): return model((images.permute(0, 3, 1, 2).float() / 255 - mean) / std).softmax(1)
    def eager(run=whole):
        with torch.inference_mode(): return run(torch.from_numpy(pixels))
    names = [port.name for port in session.get_outputs()]
    ways = {'ONNX Runtime, bare': lambda: session.run(names, {'pixels': pixels}), 'predictor': lambda: predictor.outputs(pixels)}
    if ENGINES['openvino'].problem() is None:
        openvino = open_engine('openvino', path, 1)
        ways['OpenVINO'] = lambda: openvino.outputs(pixels)
    ways['PyTorch'] = eager
    if compiled:
        faster = torch.compile(whole)
        ways['torch.compile'] = lambda: eager(faster)
    return ways


def from_bytes(bundle, data: bytes) -> dict:
    "A file's bytes to the label; both ways give it."
    p, model, predictor = bundle.record.preprocessing, pytorch_model(bundle), bundle.predictor(threads=1)
    transform = v2.Compose([v2.Resize(round(p.height / p.crop_fraction)), v2.CenterCrop(p.height), v2.ToImage(),
                            v2.ToDtype(torch.float32, scale=True), v2.Normalize(p.mean, p.std)])
    def usual():
        x = transform(Image.open(io.BytesIO(data)).convert('L' if p.channels == 1 else 'RGB'))[None]
        with torch.inference_mode(): return bundle.classes[int(model(x).argmax())]
    return {'predictor, from bytes': lambda: predictor(data).label, 'Pillow, torchvision, PyTorch': usual}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('bundle', type=Path)
    parser.add_argument('image', type=Path, nargs='?', help="a JPEG; scikit-image's cat by default")
    parser.add_argument('--rounds', type=int, default=40)
    parser.add_argument('--calls', type=int, default=5, help='in one round')
    parser.add_argument('--no-compile', action='store_true', help='leave torch.compile out: it needs a C++ compiler')
    args = parser.parse_args()
    torch.set_num_threads(1)
    bundle = load_bundle(args.bundle)
    if args.image: data = args.image.read_bytes()
    else:
        from skimage import data as photographs
        buffer = io.BytesIO()
        Image.fromarray(photographs.chelsea()).save(buffer, 'JPEG', quality=90)
        data = buffer.getvalue()
    pixels = bundle.predictor(threads=1).read(data)[None]
    found = interleaved(from_pixels(bundle, pixels, not args.no_compile), args.rounds, args.calls)
    ways = from_bytes(bundle, data)
    same = len({way() for way in ways.values()}) == 1
    found |= interleaved(ways, args.rounds, args.calls)
    for name, milliseconds in found.items(): print(f'{name:32} {milliseconds:9.3f} ms')
    overhead = found['predictor'] / found['ONNX Runtime, bare'] - 1
    times = found['Pillow, torchvision, PyTorch'] / found['predictor, from bytes']
    print(json.dumps(dict(overhead=round(overhead, 4), times_faster_from_bytes=round(times, 2), same_label=same)))


if __name__ == '__main__': main()
