"An export is the trained network, or there is none: parity of six networks, refusals, weights, the zoo, the command."
import json
import shutil

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from safetensors.torch import save
from torch import nn

from conftest import assert_no_leftovers, assert_sentence, imgcls
from imgcls_nb.bundle import load_bundle
from imgcls_nb.calibrate import calibrate
from imgcls_nb.cli import main
from imgcls_nb.evaluate import evaluate
from imgcls_nb.export import (ExportError, PixelsToProbabilities, _run_whole, compare_probabilities, export, export_module,
                              first_difference, layer_differences, load_model, load_weights, load_whole, match_classes,
                              photograph_crops, prove_or_say_where, read_weights, to_onnx, zoo_bundle, zoo_classes)
from imgcls_nb.formats import add_format
from imgcls_nb.image import Preprocessing
from imgcls_nb.models import create_model
from imgcls_nb.run import InputError
from imgcls_nb.runtimes import open_session, run_session
from imgcls_nb.sources import load_images
from imgcls_nb.train import image_learner, train

HELD_OUT = 600


def trained(architecture: str, side: int, channels: int, steps: int, rate: float = 2e-3):
    "A network after a short real training on digits, with 600 digits that it has not seen."
    torch.manual_seed(0)
    digits, p = load_images('digits'), Preprocessing(side, side, channels, mean=(0.5,) * channels, std=(0.5,) * channels)
    order = np.random.default_rng(0).permutation(len(digits))
    pixels, targets = digits.pixels(order, p), digits.targets(order)
    model = create_model(architecture, 10, channels, (side, side))
    x = torch.from_numpy(pixels[HELD_OUT:]).permute(0, 3, 1, 2).float() / 127.5 - 1
    y = torch.from_numpy(targets[HELD_OUT:])
    optimiser = torch.optim.AdamW(model.parameters(), rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps)
    for _ in range(steps):
        rows = torch.randint(len(x), (64,))
        loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return model.eval(), p, pixels[:HELD_OUT], targets[:HELD_OUT]


def assert_parity(expected: np.ndarray, found: np.ndarray, tolerance: float) -> None:
    "Probabilities within the tolerance, and the same class wherever the margin exceeds it."
    assert len(expected) >= 500 and len(set(expected.argmax(1))) >= 8
    assert np.abs(expected - found).max() <= tolerance
    best = np.sort(expected, 1)
    clear = best[:, -1] - best[:, -2] > 2 * tolerance
    assert clear.mean() > 0.9 and (expected.argmax(1) == found.argmax(1))[clear].all()


@pytest.mark.parametrize('architecture, side, channels, steps', [
    ('simple_cnn', 28, 1, 60), ('resnet18', 32, 3, 40), ('mobilenetv3_small_100', 32, 3, 90),
    pytest.param('tf_efficientnet_lite0', 32, 3, 120, marks=pytest.mark.slow),
    pytest.param('vit_tiny_patch16_224', 32, 3, 100, marks=pytest.mark.slow),
    pytest.param('convnext_atto', 32, 3, 100, marks=pytest.mark.slow)])
def test_the_export_is_the_trained_network(architecture, side, channels, steps, tmp_path):
    model, p, pixels, targets = trained(architecture, side, channels, steps)
    bundle = export_module(model, [str(k) for k in range(10)], p, pixels, tmp_path/'b', targets, architecture=architecture)
    [expected] = _run_whole(PixelsToProbabilities(model, p).eval(), pixels)
    for batch in (1, 7, 64):
        found = run_session(open_session(bundle.folder/'model.onnx'), pixels[:HELD_OUT if batch > 1 else 40], batch)
        assert np.abs(found - expected[:len(found)]).max() <= 1e-4
    assert_parity(expected, bundle.predictor().probabilities(pixels), 1e-4)
    again = load_whole(load_bundle(tmp_path/'b'))
    assert np.abs(_run_whole(again, pixels)[0] - expected).max() < 1e-6


@pytest.mark.parametrize('architecture, side', [('regnety_002', 32), ('mixer_s32_224', 224), ('fastvit_t8', 64)])
@pytest.mark.slow
def test_other_families_export(architecture, side):
    torch.manual_seed(0)
    model, p = create_model(architecture, 5, 3, (side, side)).eval(), Preprocessing(side, side, 3)
    pixels = np.random.default_rng(0).integers(0, 256, (4, side, side, 3)).astype(np.uint8)
    found = run_session(open_session(to_onnx(model, p)), pixels)
    assert np.abs(found - _run_whole(PixelsToProbabilities(model, p).eval(), pixels)[0]).max() < 1e-5


@pytest.fixture(scope='module')
def small():
    "A trained small network, its preprocessing, held-out digits and their classes."
    return trained('small_cnn', 16, 1, 80)


CLASSES = [str(k) for k in range(10)]


class Wrapped(nn.Module):
    "A network whose output is changed."
    def __init__(self, model, change):
        super().__init__()
        self.model, self.change = model, change

    def forward(self, x): return self.change(self.model(x))


class Sly(nn.Module):
    "ReLU, except in an export."
    def forward(self, x): return x if torch.compiler.is_exporting() else x.relu()


def test_a_layer_that_differs_under_export_is_named(small, tmp_path):
    model, p, pixels, targets = small
    sly = load_weights(create_model('small_cnn', 10, 1, (16, 16)), model.state_dict()).eval()
    sly.features[4][2] = Sly().eval()
    with pytest.raises(ExportError, match=r"diverge at the layer 'features\.4\.2' \(Sly\)"):
        export_module(sly, CLASSES, p, pixels, tmp_path/'b', targets)
    assert not (tmp_path/'b').exists()
    assert_no_leftovers(tmp_path)


@pytest.mark.parametrize('place', [0, 2, 4])
def test_one_changed_weight_is_named(small, place):
    model, p, pixels, _ = small
    proto, whole = onnx.load_from_string(to_onnx(model, p)), PixelsToProbabilities(model, p).eval()
    assert first_difference(layer_differences(whole, proto.SerializeToString(), pixels[:8])) is None
    name = [node.input[1] for node in proto.graph.node if node.op_type == 'Conv'][place]
    [weight] = [tensor for tensor in proto.graph.initializer if tensor.name == name]
    changed = numpy_helper.to_array(weight).copy()
    changed.flat[np.abs(changed).argmax()] += 0.2
    weight.CopyFrom(numpy_helper.from_array(changed, name))
    damaged = proto.SerializeToString()
    parity = compare_probabilities(_run_whole(whole, pixels)[0], run_session(open_session(damaged), pixels))
    with pytest.raises(ExportError) as error: prove_or_say_where(parity, whole, damaged, pixels)
    assert f"layer '{name.removeprefix('model.').removesuffix('.weight')}' (Conv2d)" in str(error.value)


def test_a_difference_outside_of_the_network_is_not_blamed_on_a_layer(small):
    model, p, pixels, _ = small
    whole, data = PixelsToProbabilities(model, p).eval(), to_onnx(model, p)
    shifted = np.roll(_run_whole(whole, pixels)[0], 1, 0)
    with pytest.raises(ExportError, match='outside of it'):
        prove_or_say_where(compare_probabilities(shifted, run_session(open_session(data), pixels)), whole, data, pixels)


@pytest.mark.parametrize('change, words', [
    (lambda y: (y, y), 'gives a tuple'), (lambda y: y * float('nan'), 'NaN'), (lambda y: y[0], r'gives \[10\]'),
    (lambda y: y[:, :9], '9 classes'), (lambda y: y * 0, "answers '0' for each"), (lambda y: y.softmax(1), 'probabilities')])
def test_a_network_that_cannot_be_proven_is_refused(small, tmp_path, change, words):
    model, p, pixels, targets = small
    with pytest.raises(InputError, match=words):
        export_module(Wrapped(model, change).eval(), CLASSES, p, pixels, tmp_path/'b', targets)
    assert not (tmp_path/'b').exists()


def test_training_mode_and_wrong_images_are_refused(small, tmp_path):
    model, p, pixels, targets = small
    for give, words in [((Wrapped(model, nn.Identity()).train(), CLASSES, p, pixels), 'training mode'),
                        ((model, CLASSES[:1], p, pixels), 'class'), ((model, CLASSES, p, pixels[:, :8]), 'uint8'),
                        ((model, CLASSES, p, []), 'no held-out images'),
                        ((create_model('resnet18', 10, 3, (32, 32)).eval(), CLASSES, p, pixels), 'does not take images')]:
        with pytest.raises(InputError, match=words): export_module(*give, tmp_path/'b')
        model.eval()
    with pytest.raises(InputError, match='targets'): export_module(model, CLASSES, p, pixels, tmp_path/'b', targets[:5])


def test_a_network_with_its_own_softmax(small, tmp_path):
    model, p, pixels, targets = small
    ends = Wrapped(model, lambda y: y.softmax(1)).eval()
    bundle = export_module(ends, CLASSES, p, pixels, tmp_path/'b', targets, output='probabilities')
    assert np.abs(bundle.predictor().probabilities(pixels) - _run_whole(PixelsToProbabilities(model, p).eval(), pixels)[0]).max() < 1e-5
    with pytest.raises(InputError, match='no name makes again'): load_model(bundle)


def test_len_of_a_batch_does_not_fix_the_batch(small, tmp_path):
    model, p, pixels, targets = small
    counted = Wrapped(model, lambda y: y + torch.zeros(len(y), 10)).eval()
    bundle = export_module(counted, CLASSES, p, pixels, tmp_path/'b', targets)
    assert len(bundle.predictor().probabilities(pixels[:5])) == 5


def test_a_fixed_batch_is_refused(small, tmp_path):
    model, p, pixels, targets = small
    fixed = Wrapped(model, lambda y: y + (1 if len(y) == 2 else 0)).eval()
    with pytest.raises(ExportError, match='no other number of images'): export_module(fixed, CLASSES, p, pixels, tmp_path/'b', targets)


def test_a_learner_s_bundle_makes_its_network_again(tmp_path):
    "With temperature and familiarity."
    data = load_images('digits').split()
    learn = image_learner(data, 'small_cnn', seed=0)
    with learn.no_bar(), learn.no_logging(): train(learn, epochs=2)
    report = evaluate(learn)
    bundle = export(learn, report, tmp_path/'b', calibration=calibrate(learn))
    assert 'familiarity.safetensors' in bundle.record.checksums
    pixels = data.pixels(report.rows, bundle.preprocessing)
    expected, found = bundle.predictor().outputs(pixels), _run_whole(load_whole(load_bundle(tmp_path/'b')), pixels)
    assert np.abs(expected['probabilities'] - found[0]).max() < 1e-4
    assert np.allclose(expected['familiarity'], found[1], rtol=1e-3, atol=1e-2)
    bundle = add_format(bundle, 'openvino', pixels, report.targets)
    added = bundle.record.runtimes['openvino']
    assert added.decision == bundle.record.runtimes['onnx'].decision and added.parity.max_difference < 1e-4


def test_weights_in_every_usual_wrapping(small, tmp_path):
    model, *_ = small
    state = model.state_dict()
    from safetensors.torch import save_file
    save_file(state, tmp_path/'a.safetensors')
    wrappings = dict(plain=state, fastai=dict(model=state, opt=dict(lr=0.1)), lightning=dict(state_dict=state, epoch=3),
                     parallel={f'module.{name}': tensor for name, tensor in state.items()})
    for name, content in wrappings.items(): torch.save(content, tmp_path/f'{name}.pth')
    for path in sorted(tmp_path.iterdir()):
        found = load_weights(create_model('small_cnn', 10, 1, (16, 16)), read_weights(path)).state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in state.items()), path


def test_fastai_s_own_save_with_its_optimiser(tmp_path):
    learn = image_learner(load_images('digits').split(), 'small_cnn', seed=0)
    learn.path = tmp_path
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert set(read_weights(learn.save('whole'))) == set(learn.model.state_dict())


class Booby:
    "Unpickling this writes a file."
    def __init__(self, path): self.path = path
    def __reduce__(self): return open, (str(self.path), 'w')


def test_nothing_is_unpickled(small, tmp_path):
    model, *_ = small
    torch.save(model, tmp_path/'whole.pth')
    torch.save(dict(model=model.state_dict(), more=Booby(tmp_path/'executed')), tmp_path/'trap.pth')
    for name in ('whole.pth', 'trap.pth'):
        with pytest.raises(InputError, match=r'torch\.save\(model\.state_dict\(\)'): read_weights(tmp_path/name)
    assert not (tmp_path/'executed').exists()
    for name, content in {'junk.pth': b'nonsense', 'empty.pth': b''}.items():
        (tmp_path/name).write_bytes(content)
        with pytest.raises(InputError, match='damaged or holds no weights'): read_weights(tmp_path/name)
    torch.save([1, 2], tmp_path/'list.pth')
    with pytest.raises(InputError, match='no named tensors'): read_weights(tmp_path/'list.pth')
    with pytest.raises(InputError, match='no file'): read_weights(tmp_path/'absent.pth')


@pytest.mark.parametrize('content', ['a pickle', 'other weights', 'a link'])
def test_a_bundle_of_other_weights_is_not_made_again(small, content, tmp_path):
    "What is trained on, quantised or converted later is what was exported, and never a pickle."
    model, p, pixels, targets = small
    bundle = export_module(model, CLASSES, p, pixels, tmp_path/'b', targets, architecture='small_cnn')
    path, state = bundle.folder/'model.safetensors', dict(model.state_dict())
    if content == 'a pickle': torch.save(state, path)
    elif content == 'a link': path.rename(path := tmp_path/'elsewhere'), (bundle.folder/'model.safetensors').symlink_to(path)
    else: path.write_bytes(save({name: tensor + 1 for name, tensor in state.items()}))
    with pytest.raises(InputError, match=r'model\.safetensors is (a link|not the file)'): load_model(bundle)
    with pytest.raises(InputError, match=r'model\.safetensors is (a link|not the file)'): load_whole(bundle)


def test_weights_that_do_not_fit_are_named(small):
    state = dict(small[0].state_dict())
    first = next(iter(state))
    state['strange.weight'] = state.pop(first)
    with pytest.raises(InputError) as error: load_weights(create_model('small_cnn', 10, 1, (16, 16)), state)
    assert first in str(error.value) and 'strange.weight' in str(error.value)
    with pytest.raises(InputError, match='another shape'):
        load_weights(create_model('small_cnn', 7, 1, (16, 16)), small[0].state_dict())


def test_the_zoo_without_training(tmp_path):
    bundle = zoo_bundle('tf_efficientnet_lite0', tmp_path/'z', 128)
    runtime, pixels = bundle.record.runtimes['onnx'], photograph_crops(bundle.preprocessing)
    assert runtime.accuracy is None and runtime.parity.images >= 48 and runtime.parity.max_difference < 1e-4
    assert len(set(bundle.classes)) == 1000 and len(set(bundle.predictor().probabilities(pixels).argmax(1))) >= 10
    assert np.abs(_run_whole(load_whole(load_bundle(tmp_path/'z')), pixels)[0] - bundle.predictor().probabilities(pixels)).max() < 1e-4
    names = ['n01440764', 'n01443537_goldfish', 'Tinca tinca', '0', '0007', 'Great-White_Shark']
    assert list(match_classes(names, bundle).values()) == ['tench', 'goldfish', 'tench', 'tench', 'cock', 'great white shark']
    with pytest.raises(InputError, match='crane, nothing like it'): match_classes(['tench', 'crane', 'nothing like it'], bundle)


def test_class_names_of_the_zoo_are_unique():
    labels, ids, names = zoo_classes('resnet18')
    assert len(set(labels)) == len(set(ids)) == len(names) == 1000 and (labels[0], ids[0]) == ('tench', 'n01440764')


def test_folders_are_matched_as_people_mean_them():
    assert match_classes(['Red_Fox', 'red fox', 'ash-tree', '1'], ['red fox', 'ash tree']) == {
        'Red_Fox': 'red fox', 'red fox': 'red fox', 'ash-tree': 'ash tree', '1': 'ash tree'}
    assert match_classes(['7', '3'], ['3', '7']) == {'7': '7', '3': '3'}
    with pytest.raises(InputError): match_classes(['0'], ['3', '7'])  # a number among numbers is a name, not a place


def test_formats_that_cannot_be_kept_are_refused(small, tmp_path):
    model, p, pixels, targets = small
    bundle = export_module(model, CLASSES, p, pixels, tmp_path/'b', targets, architecture='small_cnn')
    with pytest.raises(InputError, match='unpickle'): add_format(bundle, 'torch', pixels)
    with pytest.raises(InputError, match='coreml'): add_format(bundle, 'coreml', pixels)
    assert set(load_bundle(bundle.folder).record.runtimes) == {'onnx'}


def test_openvino_is_the_same_network(small, tmp_path):
    pytest.importorskip('openvino')
    model, p, pixels, targets = small
    bundle = export_module(model, CLASSES, p, pixels, tmp_path/'b', targets, architecture='small_cnn')
    bundle = add_format(bundle, 'openvino', pixels, targets)
    assert_parity(_run_whole(PixelsToProbabilities(model, p).eval(), pixels)[0], bundle.predictor('openvino').probabilities(pixels), 1e-3)


@pytest.mark.edge
@pytest.mark.parametrize('architecture, side, channels, steps', [('simple_cnn', 28, 1, 60), ('resnet18', 32, 3, 40)])
def test_litert_is_the_same_network(architecture, side, channels, steps, tmp_path):
    model, p, pixels, targets = trained(architecture, side, channels, steps)
    bundle = export_module(model, CLASSES, p, pixels, tmp_path/'b', targets, architecture=architecture)
    bundle = add_format(bundle, 'tflite', pixels, targets)
    expected = _run_whole(PixelsToProbabilities(model, p).eval(), pixels)[0]
    found = bundle.predictor('tflite').probabilities(pixels)
    assert_parity(expected, found, 1e-3)
    assert (expected.argmax(1) == found.argmax(1)).mean() >= 0.995
    if architecture == 'simple_cnn':  # a ResNet after forty steps loses more than 2% of its answers, and is refused
        bundle = add_format(bundle, 'tflite-int8', pixels[:300], targets[:300], calibration=pixels[300:])
        assert bundle.record.runtimes['tflite-int8'].bytes < 0.5 * bundle.record.runtimes['tflite'].bytes
    with pytest.raises(InputError, match='calibration images'):
        add_format(bundle, 'tflite-int8', pixels, targets, calibration=pixels[:10])


@pytest.fixture(scope='module')
def photos(tmp_path_factory, small):
    "Digits in folders with spaces and Chinese characters, a broken JPEG among them, and weights of a network."
    folder, digits = tmp_path_factory.mktemp('export')/'我的 photos', load_images('digits')
    for row in range(0, 1797, 12):
        path = folder/digits.items['label'][row]
        path.mkdir(parents=True, exist_ok=True)
        digits.open(row, 'L').save(path/f'图 {row}.png')
    (folder/'3'/'broken.jpg').write_bytes(b'\xff\xd8\xff\xe0 no picture')
    torch.save(dict(state_dict=small[0].state_dict()), folder.parent/'best_model.pth')
    return folder


OWN = ('--arch', 'small_cnn', '--size', '16', '--mean', '0.5', '--std', '0.5')


def test_export_own_weights_and_add_a_format(photos):
    pytest.importorskip('openvino')
    out = photos.parent/'my bundle'
    result = imgcls('export', '--weights', photos.parent/'best_model.pth', *OWN, '--images', photos, '--out', out,
                    '--to', 'onnx,openvino', '--json')
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert set(found['runtimes']) == {'onnx', 'openvino'} and found['runtimes']['onnx']['accuracy']['value'] > 0.8
    assert load_bundle(out).classes == tuple(CLASSES)
    shutil.rmtree(out)


def test_export_says_what_is_wrong(photos, capsys):
    weights, out = photos.parent/'best_model.pth', photos.parent/'out'
    for arguments, words in [
        ((), ['--zoo NAME']), (('--zoo', 'resnet18', '--out', out), ['resnet18', 'network']),
        (('--zoo', 'tf_efficientnet_lite0'), ['--out']), (('--weights', weights, '--out', out), ['--arch', '--images']),
        (('--weights', weights, '--arch', 'resnet18', '--images', photos, '--out', out), ['missing', 'unexpected']),
        (('--weights', photos.parent/'absent.pth', *OWN, '--images', photos, '--out', out), ['no file of weights']),
        ((photos.parent, '--to', 'openvino'), ['not a bundle'])]:
        assert main(['export', *map(str, arguments)]) == 2
        [complaint] = [line for line in capsys.readouterr().err.splitlines() if line.startswith('imgcls: ')]
        for word in words: assert word in complaint
    assert_sentence(imgcls('export', photos.parent, '--to', 'coreml'), 'coreml')
    assert not out.exists()
    assert_no_leftovers(photos.parent)


def test_export_of_a_run(digits_run, tmp_path):
    pytest.importorskip('openvino')
    result = imgcls('export', digits_run['run'], '--to', 'openvino', '--out', tmp_path/'copy', '--json')
    assert result.returncode == 0, result.stderr
    assert 'openvino' in json.loads(result.stdout)['runtimes'] and 'openvino' not in load_bundle(digits_run['bundle']).record.runtimes
    assert_sentence(imgcls('export', tmp_path/'copy', '--to', 'openvino'), '--images')  # in no run any more
