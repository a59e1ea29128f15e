"Heat maps are captum's, have the picture's size and leave the network as it was; the sanity check tells a method that ignores the network."
import captum.attr
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from skimage import data as photographs
from torch import nn
from torch.nn import functional as F

from imgcls_nb.data import digits, textures
from imgcls_nb.evaluate import Report, evaluate, report_html
from imgcls_nb.explain import (METHODS, embed, explanation_sections, heat_maps, heat_share, map_layer, overlay,
                               penultimate_features, plot_embedding, randomization_check, rank_correlation, show_explanations, show_heat)
from imgcls_nb.image import Preprocessing, normalize
from imgcls_nb.models import create_model
from imgcls_nb.run import InputError
from imgcls_nb.train import image_learner, train
from imgcls_nb.transfer import pretrained_model, pretrained_preprocessing


@pytest.fixture(scope='module')
def trained():
    "A small network on digits of 16 pixels, trained for a moment, and its report."
    learn = image_learner(digits().split(), 'small_cnn', size=16, augment='none')
    with learn.no_bar(), learn.no_logging(): train(learn, 1)
    return learn, evaluate(learn)


@pytest.fixture(scope='module')
def lite0(): return pretrained_model('tf_efficientnet_lite0', None), pretrained_preprocessing('tf_efficientnet_lite0', 96)


def photographs_for(p, names=('chelsea', 'coffee')):
    return np.stack([p(Image.fromarray(getattr(photographs, name)())) for name in names])


def state_of(model):
    return [module.training for module in model.modules()], [p.requires_grad for p in model.parameters()], \
        [None if p.grad is None else p.grad.clone() for p in model.parameters()], {k: v.clone() for k, v in model.state_dict().items()}


@pytest.mark.parametrize('name, channels, size, layer', [
    ('lenet', 1, 32, 'conv2'), ('simple_cnn', 3, 32, 'conv2'), ('small_cnn', 1, 8, 'features.6'), ('small_cnn', 3, 64, 'features.6'),
    ('resnet18', 3, 64, 'layer4'), ('tf_efficientnet_lite0', 3, 64, 'bn2'), ('mobilenetv3_small_100', 3, 64, 'blocks'),
    ('convnext_atto', 3, 64, 'stages'), ('densenet121', 3, 64, 'features'), ('regnety_002', 3, 64, 's4')])
def test_the_layer_is_found(name, channels, size, layer):
    model = create_model(name, 5, channels, (size, size)).train()
    found = map_layer(model, (channels, size, size))
    assert found == layer and model.training and not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize('name, size', [('vit_tiny_patch16_224', 224), ('swin_tiny_patch4_window7_224', 224), ('mixer_s32_224', 224)])
def test_networks_without_maps_say_so(name, size):
    model = timm.create_model(name, num_classes=3)
    with pytest.raises(InputError, match="no maps of convolutions.*method='occlusion'"): map_layer(model, (3, size, size))


def test_a_transformer_gets_the_other_methods():
    model, p = timm.create_model('vit_tiny_patch16_224', num_classes=3, img_size=32, patch_size=8, depth=2), Preprocessing(32, 32, 3)
    pixels = photographs_for(p)
    with pytest.raises(InputError, match='VisionTransformer has no maps'): heat_maps(model, pixels, p)
    for method in ('occlusion', 'integrated_gradients'):
        maps = heat_maps(model, pixels, p, method=method)
        assert maps.shape == (2, 32, 32) and np.isfinite(maps).all() and maps.max() > 0


def by_hand(model, layer, x, targets):
    "Grad-CAM in five lines."
    kept = {}
    hook = dict(model.named_modules())[layer].register_forward_hook(lambda module, inputs, output: kept.update(maps=output))
    logits = model.eval()(x.requires_grad_())
    hook.remove()
    gradient = torch.autograd.grad(logits[range(len(x)), targets].sum(), kept['maps'])[0]
    return (gradient.mean((2, 3), keepdim=True) * kept['maps']).sum(1, keepdim=True).relu()


@pytest.mark.parametrize('targets', [None, [3, 700]])
def test_grad_cam_is_captums_and_the_one_by_hand(lite0, targets):
    model, p = lite0
    pixels = photographs_for(p)
    x = torch.from_numpy(normalize(pixels, p))
    with torch.no_grad(): answers = model.eval()(x).argmax(1).tolist()
    chosen = targets or answers
    own = by_hand(model, 'bn2', x.clone(), chosen)
    theirs = captum.attr.LayerGradCam(model, model.bn2).attribute(x.clone().requires_grad_(), torch.tensor(chosen), relu_attributions=True)
    assert torch.allclose(own, theirs, rtol=1e-4, atol=1e-7)
    expected = F.interpolate(theirs.detach(), (96, 96), mode='bilinear')[:, 0].numpy()
    assert np.allclose(heat_maps(model, pixels, p, targets), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('height, width, channels', [(16, 16, 1), (24, 40, 3), (8, 8, 1)])
def test_maps_have_the_pictures_size(method, height, width, channels):
    model, p = create_model('small_cnn', 4, channels, (height, width)), Preprocessing(height, width, channels)
    pixels = np.random.default_rng(0).integers(0, 256, (3, height, width, channels), np.uint8)
    maps = heat_maps(model, pixels, p, method=method)
    assert maps.shape == (3, height, width) and maps.dtype == np.float32 and maps.min() >= 0
    again = heat_maps(model, pixels[1:2], p, method=method)
    assert np.allclose(maps[1], again[0], atol=1e-5)  # a picture's map does not depend on the others


@pytest.mark.parametrize('method', METHODS)
def test_the_network_stays_as_it_was(method):
    model = create_model('small_cnn', 4, 1, (16, 16))
    model.train()
    model.features[1].eval()  # a layer in another mode
    for p in model.features[0].parameters(): p.requires_grad_(False)
    before = state_of(model)
    pixels, p = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 1), np.uint8), Preprocessing(16, 16, 1)
    heat_maps(model, pixels, p, method=method)
    randomization_check(model, pixels, p, method, steps=2)
    penultimate_features(model, pixels, p)
    after = state_of(model)
    assert before[:2] == after[:2] and all(grad is None for grad in after[2])
    assert all(torch.equal(value, after[3][name]) for name, value in before[3].items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_network_that_is_frozen_has_maps():
    model = create_model('small_cnn', 4, 1, (16, 16)).requires_grad_(False)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 1), np.uint8)
    for method in METHODS: assert np.isfinite(heat_maps(model, pixels, Preprocessing(16, 16, 1), method=method)).all()


class Corner(nn.Module):
    "Answers 1 if and only if the upper left corner is bright."
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 1)
        nn.init.ones_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)

    def forward(self, x):
        corner = self.conv(x)[:, :, :4, :4].mean((1, 2, 3))
        return torch.stack([-corner, corner], 1)


def test_maps_show_the_only_place_that_matters():
    pixels = np.random.default_rng(0).integers(130, 256, (5, 16, 16, 1), np.uint8)
    region = np.zeros((16, 16), bool)
    region[:4, :4] = True
    for method, least in (('integrated_gradients', 0.999), ('occlusion', 0.6)):
        share = heat_share(heat_maps(Corner(), pixels, Preprocessing(16, 16, 1), [1] * 5, method), region)
        assert (share > least).all(), method
    assert np.isnan(heat_share(np.zeros((2, 16, 16)), region)).all()
    assert np.allclose(heat_share(np.ones((1, 16, 16)), region), 1 / 16)


def test_the_sanity_check_names_who_fails(trained):
    learn, report = trained
    p = learn.dls[2].dataset.preprocessing
    pixels = report.data.pixels(report.rows[:12], p)
    def ignores_the_network(model, x, targets): return x - x.amin()
    passed, failed = randomization_check(learn.model, pixels, p), randomization_check(learn.model, pixels, p, ignores_the_network)
    assert (failed == 1).all() and passed.iloc[0] == 1 and passed.iloc[-1] < 0.5
    assert passed.index[1] == 'classifier.1' and passed.index[-1] == 'features.0.0'
    assert passed.equals(randomization_check(learn.model, pixels, p))  # the same seed
    state = torch.get_rng_state()
    randomization_check(learn.model, pixels[:2], p, steps=2)
    assert torch.equal(torch.get_rng_state(), state)


def test_rank_correlation():
    a = np.random.default_rng(0).random((3, 5, 6))
    assert np.isclose(rank_correlation(a, np.exp(a)), 1) and np.isclose(rank_correlation(a, -a), -1)
    assert rank_correlation(a, np.zeros_like(a)) == 0


def test_features_are_what_the_head_is_given(trained, lite0):
    learn, report = trained
    p = learn.dls[2].dataset.preprocessing
    pixels = report.data.pixels(report.rows[:70], p)
    features = penultimate_features(learn.model, pixels, p)
    head = learn.model.classifier[1]
    logits = features @ head.weight.detach().cpu().numpy().T + head.bias.detach().cpu().numpy()
    assert np.array_equal(logits.argmax(1), report.answers[:70])
    model, p = lite0
    assert penultimate_features(model, photographs_for(p), p).shape == (2, 1280)


def test_embeddings_keep_classes_together():
    rng = np.random.default_rng(0)
    classes = np.repeat([0, 1, 2], 30)
    features = rng.normal(size=(90, 20)) + 8 * np.eye(3, 20)[classes]
    for method in ('tsne', 'pca'):
        points = embed(features, method)
        assert points.shape == (90, 2) and np.array_equal(points, embed(features, method))
        distance = np.linalg.norm(points[:, None] - points, axis=2) + np.eye(90) * 1e9
        assert (classes[distance.argmin(1)] == classes).mean() > 0.95
    assert embed(features[:4]).shape == (4, 2)
    figure = plot_embedding(points, classes, np.roll(classes, 1), ['a', '中文', '$x$'], rng.integers(0, 256, (90, 8, 8, 3), np.uint8))
    assert '3 wrong answers' in figure._suptitle.get_text()


def test_overlays():
    for channels in (1, 3):
        pixels, heat = np.full((6, 8, channels), 100, np.uint8), np.zeros((6, 8))
        flat = overlay(pixels, heat)
        assert flat.shape == (6, 8, 3) and flat.dtype == np.uint8 and len(np.unique(flat)) == 1
        heat[2, 3] = 5
        hot = overlay(pixels, heat)
        assert (hot[2, 3] != flat[2, 3]).any() and np.array_equal(hot[0, 0], flat[0, 0])
    assert show_heat(np.zeros((9, 6, 8, 1), np.uint8), np.ones((9, 6, 8)), ['x'] * 9).get_axes()


def test_sections_go_into_the_report(trained):
    learn, report = trained
    mistakes = report.confident_mistakes(8)
    assert (report.answers[mistakes] != report.targets[mistakes]).all() and (np.diff(report.probabilities[mistakes].max(1)) <= 0).all()
    sections = explanation_sections(learn, report)
    page = report_html(report, extra=sections)
    assert len(sections) == 2 and all(heading in page and len(html) < 1_000_000 for heading, html in sections)
    true, answer = report.targets[mistakes[0]], report.answers[mistakes[0]]
    assert f'alt="The most confident mistakes: {true} → {answer}' in page
    perfect = Report(report.data, report.rows, report.targets, np.eye(10, dtype=np.float32)[report.targets])
    assert 'the least sure answers' in explanation_sections(learn, perfect)[0][0]
    few = Report(report.data, report.rows[:3], report.targets[:3], report.probabilities[:3])
    assert len(explanation_sections(learn, few)) == 1
    with pytest.raises(InputError, match='every answer is right'): show_explanations(learn, perfect)


def test_sections_of_larger_pictures_stay_small():
    data = textures()
    keep = np.r_[data.where('train')[::12], data.where('valid')[::9], data.where('test')[::3]]
    data.items = data.items.iloc[keep].reset_index(drop=True)
    learn = image_learner(data, 'tf_efficientnet_lite0', pretrained=False, size=64)
    sections = explanation_sections(learn, evaluate(learn))
    assert len(sections) == 2 and all(len(html) < 1_000_000 for _, html in sections)


def test_hostile_inputs():
    model, p = create_model('small_cnn', 4, 1, (16, 16)), Preprocessing(16, 16, 1)
    good = np.zeros((2, 16, 16, 1), np.uint8)
    for pixels, options, words in [(good[:0], {}, 'at least one'), (good.astype(float), {}, 'float64'), (good[:, :9], {}, r'\[2, 9, 16, 1\]'),
                                   (good, dict(method='gradcam'), 'Unknown method'), (good, dict(layer='nowhere'), "no layer 'nowhere'"),
                                   (good, dict(targets=[1]), '2 pictures need as many')]:
        with pytest.raises(InputError, match=words): heat_maps(model, pixels, p, **options)
    with pytest.raises(InputError, match='no linear layer'): penultimate_features(nn.Sequential(nn.Conv2d(1, 4, 16), nn.Flatten()), good, p)
    with pytest.raises(InputError, match='tsne or pca'): embed(np.zeros((9, 3)), 'umap')
    with pytest.raises(InputError, match='3 pictures'): embed(np.zeros((3, 3)))
