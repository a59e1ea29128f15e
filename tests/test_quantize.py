"INT8 after training: as good as the float model, guarded, and refused where nothing is gained."
from copy import deepcopy

import numpy as np
import onnx
import pytest
import torch
from imgcls_nb.data import digits
from imgcls_nb.export import to_onnx
from imgcls_nb.image import Preprocessing, normalize
from imgcls_nb.models import SmallCNN, create_model
from imgcls_nb.quantize import (QuantizationAware, QuantizeError, calibration_rows, quantize, quantize_within,
                                rank_layers)
from imgcls_nb.run import InputError
from imgcls_nb.runtimes import open_session, run_session
from imgcls_nb.train import image_learner
from onnx import numpy_helper

PREPROCESSING = Preprocessing(16, 16, 1, 'crop', 1.0, 'bilinear', (0.5,), (0.5,))
CONNECTED = [(0, 1), (1, 3), (3, 4), (4, 6), (6, 'classifier')]


def taught(model, data, epochs):
    "A short real training."
    torch.manual_seed(0)
    rows = data.where('train')
    x = torch.from_numpy(normalize(data.pixels(rows, PREPROCESSING), PREPROCESSING))
    y, optimiser = torch.from_numpy(data.targets(rows)), torch.optim.Adam(model.parameters(), 2e-3)
    model.train()
    for _ in range(epochs):
        for part in torch.randperm(len(x)).split(64):
            optimiser.zero_grad()
            torch.nn.functional.cross_entropy(model(x[part]), y[part]).backward()
            optimiser.step()
    return model.eval()


@pytest.fixture(scope='module')
def table(): return digits().split()


@pytest.fixture(scope='module')
def images(table):
    held = table.where('test')
    valid = table.where('valid')
    return dict(calibration=table.pixels(calibration_rows(table, 100), PREPROCESSING),
                valid=table.pixels(valid, PREPROCESSING), valid_targets=table.targets(valid),
                test=table.pixels(held, PREPROCESSING), test_targets=table.targets(held))


@pytest.fixture(scope='module')
def network(table): return taught(SmallCNN(10), table, 6)


def planted(network, pairs, factor=1024.0):
    "Exactly the same answers in float: a quarter of the channels is larger, and the next layer takes it back."
    copy = deepcopy(network)
    with torch.no_grad():
        for first, second in pairs:
            norm = copy.features[first][1]
            count = len(norm.weight) // 4
            norm.weight[:count] *= factor
            norm.bias[:count] *= factor
            layer = copy.classifier[1] if second == 'classifier' else copy.features[second][0]
            layer.weight[:, :count] /= factor
    return copy


def right(model, images): return run_session(open_session(model), images['test']).argmax(1) == images['test_targets']


def spread(model, pixels, expected):
    "Mean Kullback-Leibler divergence from the float answers."
    found = run_session(open_session(model), pixels)
    return float((expected * np.log((expected + 1e-9) / (found + 1e-9))).sum(1).mean())


def test_small_cnn_loses_at_most_half_a_point(network, images):
    source = to_onnx(network, PREPROCESSING)
    before = right(source, images)
    assert before.mean() > 0.9
    assert before.mean() - right(quantize(source, images['calibration']), images).mean() <= 0.005


def test_resnet18_loses_at_most_half_a_point_and_shrinks(table, images):
    network = taught(create_model('resnet18', 10, 1, (16, 16)), table, 4)
    source = to_onnx(network, PREPROCESSING)
    small, before = quantize(source, images['calibration'][::2]), right(source, images)
    assert len(small) < 0.3 * len(source) and before.mean() > 0.9
    assert before.mean() - right(small, images).mean() <= 0.005


def test_weights_rounded_together_are_closer_than_each_to_the_nearest(network, images):
    source = to_onnx(network, PREPROCESSING)
    expected = run_session(open_session(source), images['test'])
    together, nearest = (spread(quantize(source, images['calibration'], fit=fit), images['test'], expected)
                         for fit in (True, False))
    assert together < nearest


@pytest.mark.parametrize('reduce_range, most', [(True, 64), (False, 127)])
def test_weights_stay_where_no_pair_overflows(network, images, reduce_range, most):
    small = onnx.load_from_string(quantize(to_onnx(network, PREPROCESSING), images['calibration'][:10], reduce_range))
    whole = [numpy_helper.to_array(t) for t in small.graph.initializer if t.data_type == onnx.TensorProto.INT8]
    weights = [values for values in whole if values.ndim > 1]
    assert len(weights) == 6 and all(abs(values.astype(int)).max() == most for values in weights)


def test_the_answer_is_not_rounded(network, images):
    small = quantize(to_onnx(network, PREPROCESSING), images['calibration'])
    assert len(np.unique(run_session(open_session(small), images['test']))) > 1000  # 8 bits have 256


@pytest.mark.parametrize('pairs', [[(3, 4)], [(0, 1), (3, 4)]])
def test_the_guard_finds_exactly_the_planted_layers(network, images, pairs):
    source = to_onnx(planted(network, pairs), PREPROCESSING)
    assert right(quantize(source, images['calibration']), images).mean() < 0.6
    found = quantize_within(source, images['calibration'], images['valid'], images['valid_targets'])
    assert found.lost.value <= 0.005 and found.lost.low <= found.lost.value <= found.lost.high
    shapes = {node.name: node.input[1] for node in onnx.load_from_string(source).graph.node if node.op_type == 'Conv'}
    assert {shapes[name].removesuffix('_bn').removesuffix('.weight') for name in found.kept_float} == {
        f'model.features.{second}.0' for _, second in pairs}
    assert right(source, images).mean() - right(found.data, images).mean() <= 0.01
    assert found.attempts[found.chosen].bytes == len(found.data) < 0.8 * len(source)


def test_what_cannot_be_saved_is_refused(network, images):
    source = to_onnx(planted(network, CONNECTED), PREPROCESSING)
    with pytest.raises(QuantizeError, match='No 8-bit version was kept'):
        quantize_within(source, images['calibration'], images['valid'], images['valid_targets'])


def test_a_file_that_hardly_shrinks_is_refused(network, images):
    with pytest.raises(QuantizeError, match='at most 10%'):
        quantize_within(to_onnx(network, PREPROCESSING), images['calibration'], images['valid'], largest=0.1)


def test_without_labels_the_float_answers_decide(network, images):
    found = quantize_within(to_onnx(network, PREPROCESSING), images['calibration'], images['valid'], budget=0.02)
    assert not found.labelled and 0 <= found.lost.value <= 0.02


@pytest.mark.parametrize('method', ['minmax', 'entropy', 'percentile'])
def test_every_method_gives_a_model_that_answers(network, images, method):
    small = quantize(to_onnx(network, PREPROCESSING), images['calibration'][:20], method=method)
    assert right(small, images).mean() > 0.9


def test_a_layer_left_out_keeps_its_weights(network, images):
    source = to_onnx(network, PREPROCESSING)
    first = rank_layers(source, quantize(source, images['calibration']), images['calibration'][:8])['layer'][0]
    stored = onnx.load_from_string(quantize(source, images['calibration'], exclude=[first])).graph.initializer
    assert sum(t.data_type == onnx.TensorProto.INT8 and len(t.dims) > 1 for t in stored) == 5


def test_what_cannot_be_asked_for(network, images):
    source = to_onnx(network, PREPROCESSING)
    with pytest.raises(InputError, match='minmax'): quantize(source, images['calibration'], method='magic')
    with pytest.raises(InputError, match='no node'): quantize(source, images['calibration'], exclude=['nowhere'])
    with pytest.raises(InputError, match='no validation'): quantize_within(source, images['calibration'], images['valid'][:0])
    with pytest.raises(InputError, match='2 to 8'): QuantizationAware(1)


def test_training_for_few_bits_beats_rounding_afterwards(table):
    learn = image_learner(table, 'small_cnn', seed=0)
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(3, 3e-3)
        network, aware = deepcopy(learn.model), QuantizationAware(2)
        learn.fit_one_cycle(3, 1e-3, cbs=[aware])
    levels = [len(torch.unique(channel)) for layer in learn.model.modules() if isinstance(layer, torch.nn.Conv2d)
              for channel in layer.weight]
    assert max(levels) <= 3  # -1, 0 and 1 times the scale of the channel
    from imgcls_nb.quantize import _RoundedWeights
    with torch.no_grad():
        for layer in network.modules():
            if isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear)): layer.weight.copy_(_RoundedWeights(1)(layer.weight))
    def accuracy(model):
        learn.model = model
        with learn.no_bar(), learn.no_logging(): probabilities, targets = learn.get_preds(dl=learn.dls.valid)
        return float((probabilities.argmax(1) == targets).float().mean())
    assert accuracy(learn.model) > accuracy(network) + 0.1
