"The networks written by hand are those of the literature; what they cost is counted right; bad input gets a sentence."
import numpy as np
import pandas as pd
import pytest
import timm
import torch
import torchvision
from torch import nn

from imgcls_nb.models import (BY_HAND, AlexNet, LeNet, ModelLimits, MobileNet, ResNet, SimpleCNN, SmallCNN, VisionTransformer,
                              conv_block, counted_cost, create_model, draw_network, feature_maps, layer_costs, model_cost,
                              own_input_shape, pareto_front, published_accuracy, receptive_field, search_zoo,
                              size_options, weights_status, zoo)
from imgcls_nb.run import InputError

TINY = dict(patch=16, width=192, depth=12, heads=3)
PAIRS = {'AlexNet': (AlexNet, lambda: torchvision.models.alexnet(weights=None)),
         'ResNet-18': (ResNet, lambda: torchvision.models.resnet18(weights=None)),
         'ResNet-34': (lambda: ResNet(blocks=(3, 4, 6, 3)), lambda: torchvision.models.resnet34(weights=None)),
         'MobileNet': (MobileNet, lambda: timm.create_model('mobilenetv1_100')),
         'ViT-Tiny': (lambda: VisionTransformer(1000, **TINY), lambda: timm.create_model('vit_tiny_patch16_224'))}


def count(model: nn.Module) -> int: return sum(p.numel() for p in model.parameters())


def randomised(model: nn.Module) -> nn.Module:
    "Running statistics and scales that are not the ones every network starts with."
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return model


@pytest.mark.parametrize('name', PAIRS)
def test_by_hand_equals_the_library(name):
    torch.manual_seed(0)
    ours, theirs = PAIRS[name][0](), randomised(PAIRS[name][1]())
    own, state = ours.state_dict(), theirs.state_dict()
    assert [t.shape for t in own.values()] == [t.shape for t in state.values()]
    ours.load_state_dict(dict(zip(own, state.values())))
    x = torch.randn(2, 3, 224, 224)
    with torch.no_grad(): mine, other = ours.eval()(x), theirs.eval()(x)
    assert mine.std() > 0
    torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('model, parameters', [
    (LeNet(), 61_706), (SimpleCNN(), 12_851_562), (AlexNet(), 61_100_840), (ResNet(), 11_689_512), (MobileNet(), 4_231_976),
    (ResNet(blocks=(3, 3, 3), width=16, stem=conv_block, classes=10), 272_474), (SmallCNN(channels=3), 35_962)],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else '')
def test_parameter_counts(model, parameters):
    assert count(model) == parameters


def test_the_guides_network_layer_by_layer():
    model = SimpleCNN()
    assert [count(layer) for layer in model.children()] == [448, 4_640, 12_845_184, 0, 1_290]
    with pytest.raises(RuntimeError, match='cannot be multiplied'): model(torch.zeros(1, 3, 112, 112))


@pytest.mark.parametrize('name, multiply_adds', [('resnet18', 1_814_073_344), ('mobilenetv1_100', 568_740_352),
                                                 ('vit_tiny_patch16_224', 1_253_683_200)])
def test_work_is_counted_as_published_attention_too(name, multiply_adds):
    assert counted_cost(name)['multiply_adds'] == multiply_adds
    model = create_model(name, 1000)
    assert model_cost(model, (3, 224, 224), repeats=1).multiply_adds == multiply_adds
    assert layer_costs(model, (3, 224, 224)).multiply_adds.sum() == multiply_adds
    assert model.training


@pytest.mark.parametrize('name', BY_HAND)
def test_every_parameter_is_in_one_row(name):
    shape = own_input_shape(name)
    model = create_model(name, 5, shape[0], shape[1:])
    assert layer_costs(model, shape).parameters.sum() == count(model)
    assert counted_cost(name, shape, 5)['parameters'] == count(model)


@pytest.mark.parametrize('model, layer, shape, pixels', [
    (LeNet(), 'conv1', (1, 32, 32), 5), (LeNet(), 'conv2', (1, 32, 32), 14), (SimpleCNN(), 'conv2', (3, 224, 224), 8),
    (AlexNet(), 'features.10', (3, 64, 288), 163), (ResNet(), 'stages.0', (3, 32, 224), 43),
    (ResNet(), 'stages.3', (3, 32, 512), 435), (MobileNet(), 'blocks', (3, 32, 448), 315),
    (ResNet(), 'stages.3', (3, 32, 96), 96)])  # the last one: no more than there is
def test_receptive_fields(model, layer, shape, pixels):
    assert receptive_field(model, layer, shape) == pixels


def test_feature_maps_leave_the_model_as_it_was():
    model = SmallCNN().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    maps = feature_maps(model, torch.rand(3, 1, 32, 32), ['features.0', 'features.6'])
    assert maps['features.0'].shape == (3, 16, 32, 32) and maps['features.6'].shape == (3, 64, 8, 8)
    assert model.training and not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    with pytest.raises(InputError, match="no layer 'features.99'. Nearest: features"):
        feature_maps(model, torch.rand(1, 1, 32, 32), ['features.99'])
    broken = LeNet()
    with pytest.raises(RuntimeError): feature_maps(broken, torch.rand(1, 1, 8, 8))
    assert not any(module._forward_hooks for module in broken.modules())


@pytest.mark.parametrize('name', BY_HAND)
def test_every_network_can_be_drawn(name):
    shape = own_input_shape(name)
    model = create_model(name, 5, shape[0], shape[1:])
    figure = draw_network(model, shape, title=name)
    assert len(figure.axes[0].patches) == len(list(model.children())) + 1


@pytest.mark.parametrize('name', BY_HAND)
def test_networks_by_hand_take_grey_and_colour_and_learn(name):
    torch.manual_seed(0)
    for channels in (1, 3):
        model = create_model(name, 4, channels, (64, 64))
        x, y = torch.rand(4, channels, 64, 64), torch.arange(4)
        logits = model(x)
        assert logits.shape == (4, 4)
        nn.functional.cross_entropy(logits, y).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize('name', ['resnet10t', 'mobilenetv3_small_050', 'vit_tiny_patch16_224', 'swin_tiny_patch4_window7_224',
                                  'mixer_s32_224', 'convnext_atto', 'efficientvit_b0', 'xcit_nano_12_p16_224', 'levit_128s',
                                  'mobilevit_xxs', 'regnetx_002', 'resmlp_12_224', 'gmlp_ti16_224', 'cait_xxs24_224',
                                  'deit_tiny_distilled_patch16_224', 'pvt_v2_b0', 'edgenext_xx_small', 'poolformer_s12'])
def test_any_timm_name_works_at_its_own_size(name):
    channels, *size = own_input_shape(name)
    model = create_model(name, 6, channels, tuple(size))
    with torch.no_grad(): assert model.eval()(torch.zeros(2, channels, *size)).shape == (2, 6)


@pytest.mark.parametrize('name', ['vit_tiny_patch16_224', 'deit_tiny_patch16_224', 'mixer_s32_224', 'resmlp_12_224'])
def test_networks_of_a_fixed_size_are_made_for_another(name):
    assert create_model(name, 6, 1, (64, 96))(torch.zeros(2, 1, 64, 96)).shape == (2, 6)


def test_only_a_fixed_size_has_to_be_told():
    assert size_options('vit_tiny_patch16_224', (96, 64)) == dict(img_size=(96, 64))
    assert size_options('vit_tiny_patch16_224', (224, 224)) == size_options('resnet18', (96, 64)) == {}


@pytest.mark.parametrize('name, channels, size, smallest', [('lenet', 1, (8, 8), 16), ('alexnet', 3, (32, 32), 64),
                                                            ('small_cnn', 1, (3, 3), 4), ('inception_v3', 3, (32, 32), 96)])
def test_too_small_an_image_names_a_size_that_works(name, channels, size, smallest):
    with pytest.raises(InputError, match=f'cannot take images of {size[1]} × {size[0]} pixels .*it takes {smallest} × {smallest};'):
        create_model(name, 10, channels, size)
    create_model(name, 10, channels, (smallest, smallest))


@pytest.mark.parametrize('call', [lambda name: create_model(name, 2), counted_cost, lambda name: search_zoo([name])])
def test_an_unknown_name_gets_the_nearest(call):
    with pytest.raises(InputError, match="Unknown architecture 'resnet81'. Nearest: resnet18"): call('resnet81')


def test_published_accuracies_are_of_default_weights_at_their_own_size():
    table = published_accuracy()
    assert len(table) > 60 and table.index.is_unique and not table.isna().any().any()
    for name, side in table.side.items():
        cfg = timm.get_pretrained_cfg(name)
        assert cfg.num_classes == 1000 and cfg.input_size == (3, side, side)
    assert table.top1['resnet50'] > table.top1['resnet18'] and table.top1.between(50, 90).all()


def test_search_keeps_to_its_limits():
    table = search_zoo('*mobilenet*', ModelLimits(parameters=6e6, multiply_adds=3e8, top1=65), most=4, repeats=0)
    assert len(table) == 4 and table.attrs['unseen'] > 0 and table.latency_ms.isna().all()
    assert (table.parameters <= 6e6).all() and (table.multiply_adds <= 3e8).all() and (table.top1 >= 65).all()
    assert table.multiply_adds.is_monotonic_increasing
    slow = search_zoo(['lenet', 'resnet18'], ModelLimits(latency_ms=1e-6), repeats=1)
    assert len(slow) == 0 and list(slow.columns) == list(table.columns) and slow.attrs['unseen'] == 0
    assert len(search_zoo('nothing_like_this')) == 0


def test_search_tells_its_progress_and_where_weights_are():
    told = []
    table = search_zoo(['lenet', 'small_cnn'], repeats=2, progress=lambda done, of: told.append((done, of)),
                       installed=lambda name: name == 'lenet')
    assert told == [(1, 2), (2, 2)] and (table.latency_ms > 0).all() and table.latency_ms.is_monotonic_increasing
    assert table.weights.to_dict() == dict(lenet='here', small_cnn='none')


def test_weights_in_the_cache_are_here(tmp_path, monkeypatch):
    import huggingface_hub.file_download as hub
    monkeypatch.setattr(hub.constants, 'HF_HUB_CACHE', str(tmp_path))
    assert weights_status('resnet18') == 'download'
    snapshot = tmp_path/'models--timm--resnet18.a1_in1k'/'snapshots'/'abc'
    snapshot.mkdir(parents=True)
    (snapshot/'model.safetensors').write_bytes(b'x')
    (snapshot.parents[1]/'refs').mkdir()
    (snapshot.parents[1]/'refs'/'main').write_text('abc')
    assert weights_status('resnet18') == 'here' and weights_status('resnet34') == 'download'


def test_networks_too_large_for_memory_are_not_timed(monkeypatch):
    from imgcls_nb import models
    large = models.machine().memory_gb * 1e9
    assert np.isnan(models._measured('lenet', dict(parameters=large), repeats=1))


def test_pareto_front_of_a_table():
    table = pd.DataFrame(dict(latency_ms=[1, 2, 2, 3, 4, 5], top1=[60, 70, 65, 70, np.nan, 80]), index=list('abcdef'))
    assert list(pareto_front(table).index) == ['a', 'b', 'f']
    assert list(pareto_front(table.iloc[:0]).index) == []


def test_names_at_hand():
    assert set(BY_HAND) <= set(zoo()) and len(set(zoo())) == len(zoo()), 'a name by hand hides one of timm'
    assert zoo('small_*')[:3] == ['small_cnn', 'small_resnet', 'small_vit']


def test_the_command_lists_networks_that_keep_to_the_limits():
    import json
    from conftest import assert_sentence, imgcls
    result = imgcls('models', '*mobilenet*', '--parameters', '4', '--top1', '65', '--most', '2', '--json')
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert len(found) == 2 and all(row['parameters'] <= 4e6 and row['top1'] >= 65 and row['latency_ms'] > 0 for row in found.values())
    assert_sentence(imgcls('models', 'no such network'), "'no such network'")
