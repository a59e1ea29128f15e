"Versions side by side, the choice between them, and bundles made smaller from a table or from folders."
import json
from dataclasses import replace

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from imgcls_nb.bundle import Decision, Figure, add_runtime, load_bundle, prefer
from imgcls_nb.cli import main
from imgcls_nb.compress import choose, compress, images_in
from imgcls_nb.evaluate import Estimate, evaluate
from imgcls_nb.export import export, to_onnx
from imgcls_nb.models import create_model, model_cost
from imgcls_nb.image import Preprocessing
from imgcls_nb.run import InputError
from imgcls_nb.runtimes import ENGINES
from imgcls_nb.sources import load_images
from imgcls_nb.train import image_learner, train
from imgcls_nb.variants import Variant, Variants, front, graph_cost, measure_bundle, measure_variants, time_in_turns


@pytest.fixture(scope='module')
def trained():
    learn = image_learner(load_images('digits').split(), 'simple_cnn', seed=0)
    with learn.no_bar(), learn.no_logging(): train(learn, epochs=3)
    return learn, evaluate(learn)


@pytest.fixture
def bundle(trained, tmp_path): return export(*trained, tmp_path/'bundle')


def variant(ms: float, size: int, gain: float | None) -> Variant:
    difference = None if gain is None else Estimate(gain, gain - 0.01, gain + 0.01)
    return Variant(size, 10, 10, ms, ms, 1000 / ms, 1, Estimate(0.9 + (gain or 0), 0.8, 1.0), difference)


def several(**each) -> Variants: return Variants(each, next(iter(each)), 100, True)


@pytest.mark.parametrize('architecture, channels, side', [('simple_cnn', 1, 28), ('resnet18', 3, 32), ('mobilenetv3_small_100', 3, 32)])
def test_the_graph_is_counted_as_pytorch_counts_the_network(architecture, channels, side):
    network = create_model(architecture, 10, channels, (side, side)).eval()
    counted, cost = graph_cost(to_onnx(network, Preprocessing(side, side, channels))), model_cost(network, (channels, side, side), 1)
    assert counted['multiply_adds'] == cost.multiply_adds and 0.97 * cost.parameters < counted['parameters'] <= cost.parameters + 2 * channels  # mean and deviation


def test_a_layer_that_gives_the_answer_itself_is_counted():
    nodes = [helper.make_node('Cast', ['pixels'], ['values'], to=TensorProto.FLOAT), helper.make_node('Flatten', ['values'], ['rows']),
             helper.make_node('MatMul', ['rows', 'weight'], ['probabilities'])]
    graph = helper.make_graph(nodes, 'linear', [helper.make_tensor_value_info('pixels', TensorProto.UINT8, ['batch', 4, 4, 1])],
                              [helper.make_tensor_value_info('probabilities', TensorProto.FLOAT, ['batch', 3])],
                              [numpy_helper.from_array(np.ones((16, 3), np.float32), 'weight')])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', 17)], ir_version=8)
    assert graph_cost(model.SerializeToString()) == dict(parameters=48, multiply_adds=48)


def test_turns_time_every_call_and_skip_the_first():
    seen = []
    found = time_in_turns({'a': lambda: seen.append('a'), 'b': lambda: seen.append('b')}, turns=3, each=4)
    assert {name: values.shape for name, values in found.items()} == dict(a=(3, 4), b=(3, 4))
    assert seen.count('a') == seen.count('b') == 3 * 5


def test_without_labels_the_reference_is_right(trained):
    learn, report = trained
    p = learn.dls[2].dataset.preprocessing
    graph, pixels = to_onnx(learn.model, p), report.data.pixels(report.rows[:50], p)
    measured = measure_variants(dict(first=graph, second=graph), pixels, turns=1, batches=(1,))
    assert not measured.labelled and measured['second'].accuracy.value == 1 and measured['second'].difference.value == 0
    assert 'agrees with first, %' in measured.table()


@pytest.mark.parametrize('limits, name', [(dict(budget=0.05), 'quick'), (dict(budget=0.005), 'middle'), (dict(budget=0), 'whole')])
def test_the_fastest_within_the_budget_is_chosen(limits, name):
    chosen = choose(several(whole=variant(10, 900, None), middle=variant(5, 500, -0.004), quick=variant(1, 200, -0.03)), **limits)
    assert chosen.name == name and chosen.met and set(chosen.rejected) == {'whole', 'middle', 'quick'} - {name}


def test_equally_fast_means_the_smaller_one():
    assert choose(several(whole=variant(10, 900, None), small=variant(10.2, 300, 0.0))).name == 'small'


def test_a_limit_that_nothing_keeps_is_said():
    chosen = choose(several(whole=variant(10, 900, None), small=variant(5, 300, 0.0)), latency_ms=1)
    assert chosen.name == 'small' and not chosen.met and '5 ms' in chosen.reason and '1 ms' in chosen.reason
    assert choose(several(whole=variant(10, 900, None)), budget=-1).name == 'whole'


def test_the_front_holds_what_nothing_beats():
    measured = several(whole=variant(10, 900, None), worse=variant(11, 950, -0.01), small=variant(5, 300, -0.02))
    assert front(measured) == ['small', 'whole'] and front(measured, 'bytes') == ['small', 'whole']


def test_a_bundle_from_its_own_data(trained, bundle):
    done = compress(bundle, trained[1].data, budget=0.02)
    assert done.kept and done.measured.images == len(trained[1].rows) and done.loss <= 0.02
    assert load_bundle(bundle.folder).record == done.bundle.record and done.bundle.predictor().runtime == 'onnx'
    chosen = prefer(prefer(done.bundle, 'onnx', 'to begin with.'), 'onnx-int8', 'because.')
    assert load_bundle(bundle.folder).predictor().runtime == 'onnx-int8'
    assert [note for note in chosen.record.notes if note.startswith('Used')] == ['Used by default: onnx-int8, because.']
    with pytest.raises(InputError, match='no runtime'): prefer(chosen, 'tflite', 'x')


def folders(data, place, broken: bool = True):
    for name, split in (('zum Üben 练习', 'valid'), ('test set', 'test')):
        for row in data.where(split)[:120]:
            folder = place/name/str(data.items['label'].iloc[row])
            folder.mkdir(parents=True, exist_ok=True)
            data.open(row, 'L').save(folder/f'{row} 图.png')
        if broken: (folder/'broken.jpg').write_bytes(b'\xff\xd8\xff\xe0 no picture')
    return place/'zum Üben 练习', place/'test set'


def test_folders_with_odd_names_and_a_broken_file(trained, bundle, tmp_path, capsys):
    calibration, test = folders(trained[1].data, tmp_path)
    command = ['compress', str(bundle.folder), '--calibration', str(calibration), '--test', str(test), '--budget-accuracy', '3', '--json']
    assert main([*command, '--target-latency', '1s']) == 0
    found = json.loads(capsys.readouterr().out)
    assert found['kept'] and found['choice']['met'] and set(found['versions']) == {'onnx', 'onnx-int8'}
    assert load_bundle(bundle.folder).record.preferred == found['choice']['name']
    assert main([*command, '--target-latency', '0.000001ms']) == 1
    assert not json.loads(capsys.readouterr().out)['choice']['met']


def test_bench_with_a_folder_with_odd_names_and_a_broken_file(trained, bundle, tmp_path, capsys):
    _, test = folders(trained[1].data, tmp_path)
    assert main(['bench', str(bundle.folder), '--test', str(test), '--turns', '2', '--threads', '1', '--json']) == 0
    found = json.loads(capsys.readouterr().out)
    files = sorted(test.rglob('*.png'))
    right = [str(answer.label) == path.parent.name for answer, path in zip(bundle.predictor().predict(files), files)]
    assert found['runtimes']['onnx']['accuracy']['value'] == pytest.approx(np.mean(right)) and found['images'] == len(files)
    assert found['runtimes']['onnx']['bytes'] == (bundle.folder/'model.onnx').stat().st_size and not found['absent']


def test_bench_without_images_has_times_and_no_accuracy(bundle, capsys):
    assert main(['bench', str(bundle.folder), '--turns', '1', '--json']) == 0
    found = json.loads(capsys.readouterr().out)
    assert found['runtimes']['onnx']['latency_ms'] > 0 and found['runtimes']['onnx']['accuracy'] is None and found['images'] == 0
    assert main(['bench', str(bundle.folder), '--turns', '1']) == 0
    printed = capsys.readouterr().out
    assert 'accuracy, %' not in printed and 'difference' not in printed and '--test FOLDER' in printed


def test_a_runtime_that_cannot_run_here_is_named_with_its_reason(bundle, capsys):
    runtime = bundle.record.runtimes['onnx'].model_copy(update=dict(engine='tensorrt'))
    both = add_runtime(bundle, 'tensorrt', runtime, (bundle.folder/'model.onnx').read_bytes())
    p = both.preprocessing
    measured = measure_bundle(both, np.zeros((4, p.height, p.width, p.channels), np.uint8), turns=1, batches=(1,))
    assert ('tensorrt' in measured.absent) == (ENGINES['tensorrt'].problem() is not None) and 'onnx' in measured
    assert main(['bench', str(bundle.folder), '--turns', '1']) == 0
    printed = capsys.readouterr().out
    assert all(f'Not here: {name}. {why}' in printed for name, why in measured.absent.items())


def test_a_picture_in_both_folders_is_refused(trained, bundle, tmp_path):
    calibration, test = folders(trained[1].data, tmp_path, broken=False)
    picture = next(calibration.rglob('*.png'))
    (test/picture.parent.name/'copy.png').write_bytes(picture.read_bytes())
    with pytest.raises(InputError, match='must not be calibrated with'): images_in(bundle, calibration, test)


@pytest.mark.parametrize('options, says', [
    ([], 'in no run'), (['--calibration', 'a'], 'belong together'), (['--calibration', 'nowhere', '--test', 'nowhere'], 'nowhere')])
def test_what_is_missing_is_said(bundle, options, says, capsys):
    assert main(['compress', str(bundle.folder), *options]) == 2
    assert says in capsys.readouterr().err


def test_a_bundle_that_is_sometimes_not_sure_stays_so(trained, bundle):
    from imgcls_nb.compress import images_of
    sure = Decision(probability=0.9, familiarity=None, promise=None, sure=Figure(value=0.9, low=0.8, high=1), precision=None)
    runtime = bundle.record.runtimes['onnx'].model_copy(update=dict(decision=sure))
    careful = replace(bundle, record=bundle.record.model_copy(update=dict(runtimes=dict(onnx=runtime))))
    images = replace(images_of(bundle, trained[1].data), valid_targets=None)
    with pytest.raises(InputError, match='whose classes are known'): compress(careful, images)


def test_a_loss_that_the_test_images_prove_is_a_veto(trained, bundle):
    data = trained[1].data
    from imgcls_nb.compress import CompressionImages, images_of
    images, wrong = images_of(bundle, data), np.random.default_rng(0)
    predictor = bundle.predictor()
    noise = wrong.integers(0, 256, (400, *images.test.shape[1:]), np.uint8)  # on which eight bits answer otherwise
    targets = predictor.probabilities(noise).argmax(1)
    done = compress(bundle, CompressionImages(images.calibration, images.valid, images.valid_targets, noise, targets), budget=0.0)
    disagree = 1 - done.measured['onnx-int8'].accuracy.value if done.measured else 0
    assert done.kept == (done.measured is not None and done.measured['onnx-int8'].difference.high >= 0), disagree
    if not done.kept: assert any('INT8 was refused' in note for note in done.bundle.record.notes)
