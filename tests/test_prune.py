"Pruning: really smaller, the classes untouched, useless channels first, and made again from the weights."
import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from imgcls_nb.bundle import load_bundle
from imgcls_nb.data import digits
from imgcls_nb.evaluate import evaluate, predict_probabilities
from imgcls_nb.export import export, to_onnx
from imgcls_nb.models import SmallCNN, _counted, create_model
from imgcls_nb.prune import fit_to_weights, layer_times, prune_channels, pruned_learner
from imgcls_nb.run import InputError
from imgcls_nb.runtimes import open_session, run_session
from imgcls_nb.train import Checkpoint, image_learner, train

NETWORKS = [('simple_cnn', 1, 16), ('small_cnn', 1, 16), ('resnet18', 1, 32), ('mobilenetv3_small_100', 3, 64),
            ('tf_efficientnet_lite0', 3, 64), ('mobilenet', 3, 64), ('small_resnet', 3, 32)]


def made(name, channels, side):
    torch.manual_seed(0)
    return create_model(name, 7, channels, (side, side)).eval()


def work(model, shape): return _counted(model, torch.zeros(1, *shape))['multiply_adds']
def widths(model): return [layer.out_channels for layer in model.modules() if isinstance(layer, nn.Conv2d)]


@pytest.mark.parametrize('name, channels, side', NETWORKS)
def test_half_the_work_all_of_the_classes_and_made_again_from_the_weights(name, channels, side):
    whole, shape = made(name, channels, side), (channels, side, side)
    before = {key: value.clone() for key, value in whole.state_dict().items()}
    half = prune_channels(whole, shape, 0.5, spread='uniform', round_to=4)
    assert 0.2 * work(whole, shape) < work(half, shape) <= 0.5 * work(whole, shape)
    assert sum(p.numel() for p in half.parameters()) < sum(p.numel() for p in whole.parameters())
    assert not any(width % 4 for width in widths(half)[:-1])
    assert all(torch.equal(value, before[key]) for key, value in whole.state_dict().items())
    x = torch.randn(3, *shape)
    again = fit_to_weights(made(name, channels, side), half.state_dict()).eval()
    with torch.no_grad(): assert half(x).shape == (3, 7) and torch.equal(half(x), again(x))
    assert [str(layer) for layer in again.modules()] == [str(layer) for layer in half.modules()]


@pytest.mark.parametrize('spread', ['uniform', 'global'])
def test_channels_that_do_nothing_go_first(spread):
    torch.manual_seed(0)
    model = SmallCNN(7, 1, width=8).eval()
    layers = [layer for layer in model.modules() if isinstance(layer, (nn.Conv2d, nn.BatchNorm2d))]
    with torch.no_grad():
        for layer in layers:
            dead = torch.arange(len(layer.weight)) % 4 == 1  # a quarter of them
            layer.weight[dead] = 0
            if layer.bias is not None: layer.bias[dead] = 0
    x = torch.randn(8, 1, 16, 16)
    smaller = prune_channels(model, (1, 16, 16), 0.6, spread=spread, round_to=1)
    share = work(smaller, (1, 16, 16)) / work(model, (1, 16, 16))
    drawn = prune_channels(model, (1, 16, 16), 0.6, 'random', spread=spread, round_to=1)
    with torch.no_grad():
        assert 0.5 < share <= 0.6 and torch.allclose(model(x), smaller(x), atol=1e-5)
        assert not torch.allclose(model(x), drawn(x), atol=1e-4)


def test_layers_that_take_long_lose_most():
    model, shape = made('resnet18', 1, 32), (1, 32, 32)
    times = layer_times(model, shape, repeats=1)
    assert set(times.index) == {name for name, layer in model.named_modules() if isinstance(layer, (nn.Conv2d, nn.Linear))}
    assert (times > 0).all()
    slow = pd.Series(1.0, times.index)
    slow[[name for name in slow.index if name.startswith('layer4.1')]] = 200.0
    pruned = prune_channels(model, shape, 0.8, spread='latency', times=slow)
    shares = {name: layer.out_channels / dict(model.named_modules())[name].out_channels
              for name, layer in pruned.named_modules() if isinstance(layer, nn.Conv2d)}
    here = [share for name, share in shares.items() if name.startswith('layer4.1')]
    elsewhere = [share for name, share in shares.items() if not name.startswith('layer4')]
    assert np.mean(here) < 0.75 and np.mean(elsewhere) > 0.9
    assert min(shares.values()) >= 0.2 - 1e-9  # no layer is emptied


def test_random_channels_depend_on_the_seed_alone():
    model = made('small_cnn', 1, 16)
    torch.manual_seed(5)
    first, second, other = [prune_channels(model, (1, 16, 16), importance='random', spread='uniform', round_to=1, seed=s) for s in (3, 3, 4)]
    state = torch.get_rng_state()
    torch.manual_seed(5)
    assert torch.equal(torch.get_rng_state(), state)  # nothing was drawn from the caller's generator
    a, b, c = [m.features[0][0].weight for m in (first, second, other)]
    assert torch.equal(a, b) and not torch.equal(a, c)


@pytest.mark.parametrize('options, words', [(dict(keep=50), 'between 0 and 1'), (dict(importance='luck'), 'Unknown importance'),
                                            (dict(spread='wide'), 'Unknown spread'), (dict(round_to=0), 'multiple of 1 or more'),
                                            (dict(keep=0.01, round_to=16), 'cannot be pruned')])
def test_what_cannot_be_is_said_in_a_sentence(options, words):
    with pytest.raises(InputError, match=words): prune_channels(made('small_cnn', 1, 16), (1, 16, 16), **options)


@pytest.mark.parametrize('name', ['small_vit', 'vit_tiny_patch16_224'])
def test_transformers_are_refused_or_still_give_their_classes(name):
    side = 32 if name == 'small_vit' else 224
    model = made(name, 3, side)
    with pytest.raises(InputError, match='cannot be pruned'): prune_channels(model, (3, side, side), 0.5, spread='uniform')


def test_weights_of_another_network_are_refused():
    with pytest.raises(InputError, match='not the weights'):
        fit_to_weights(made('small_cnn', 1, 16), made('simple_cnn', 1, 16).state_dict())


def test_a_pruned_learner_trains_exports_and_resumes_only_itself(tmp_path):
    learn = image_learner(digits().split(), 'small_cnn', size=8, balance='weights', seed=0)
    with learn.no_bar(), learn.no_logging(): train(learn, 3)
    half = pruned_learner(learn, 0.5, spread='uniform', round_to=1)
    assert half.recipe['architecture'] == 'small_cnn, pruned' and learn.recipe['architecture'] == 'small_cnn'
    assert half.loss_func.func.weight is not None and half.recipe['pruned']['channels'] == widths(half.model)
    with half.no_bar(), half.no_logging(): train(half, 3, 5e-3, resume=tmp_path/'kept')
    found, targets = predict_probabilities(half)
    assert (found.argmax(1) == targets).mean() > 0.85
    p = half.dls.train.dataset.preprocessing
    pixels = half.dls[2].dataset.pixels
    assert np.allclose(run_session(open_session(to_onnx(half.model, p)), pixels), found, atol=1e-4)
    bundle = export(half, evaluate(half), tmp_path/'bundle')
    assert load_bundle(bundle.folder).record.architecture == 'small_cnn, pruned'
    again = fit_to_weights(create_model('small_cnn', 10, 1), load_file(bundle.folder/'model.safetensors'))
    assert widths(again) == bundle.record.recipe['pruned']['channels']
    other = pruned_learner(learn, 0.3, spread='uniform', round_to=1)
    with other.no_bar(), other.no_logging(), pytest.raises(InputError, match='another training'):
        train(other, 3, 5e-3, callbacks=(Checkpoint(tmp_path/'kept', resume=True),))
