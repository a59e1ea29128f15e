"SimCLR: the loss is the formula, only training images are looked at, collapse is named, and a classifier can begin there."
import json
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback

from conftest import imgcls
from imgcls_nb.data import digits, from_arrays, from_folder
from imgcls_nb.evaluate import predict_probabilities
from imgcls_nb.labelling import unlabelled
from imgcls_nb.models import ResNet, conv_block, create_model
from imgcls_nb.run import InputError
from imgcls_nb.self_supervised import (Encoder, TwoViews, VIEWS, encode, feature_spread, headless, linear_probe, load_encoder,
                                       nt_xent, pretrain, pretrain_learner, simclr_learner, start_from, view_transforms)
from imgcls_nb.train import ReportProgress, image_learner, train

DATA = digits().split().scan()
SMALL = replace(DATA, items=DATA.items.groupby(['split', 'label']).head(12).reset_index(drop=True))


def quietly(learn, epochs=1, *callbacks, **options):
    with learn.no_bar(), learn.no_logging(): return train(learn, epochs, callbacks=callbacks, **options)


def same(first, second):
    pairs = list(zip(first.state_dict().values(), second.state_dict().values(), strict=True))
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.fixture(scope='module')
def encoder(): return pretrain(SMALL, 'small_cnn', 2, size=8, batch_size=32)


def colour_images(count=24, side=40, classes=3):
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 200, (classes * count, side // 4, side // 4, 3)).repeat(4, 1).repeat(4, 2)
    labels = np.arange(classes * count) // count
    blocks[np.arange(len(blocks)), :, :, labels] += 55  # one colour more of it
    return blocks.astype(np.uint8), [f'class{k}' for k in labels]


def one_by_one(z, temperature):
    "NT-Xent with a loop over every pair."
    z, losses = z / z.norm(dim=1, keepdim=True), []
    for i in range(len(z)):
        terms = [torch.exp(z[i] @ z[j] / temperature) for j in range(len(z)) if j != i]
        positive = torch.exp(z[i] @ z[(i + len(z) // 2) % len(z)] / temperature)
        losses.append(-torch.log(positive / sum(terms)))
    return sum(losses) / len(losses)


@pytest.mark.parametrize('count,temperature', [(4, 0.5), (10, 0.07), (14, 1.0)])
def test_loss_and_its_gradient_are_the_formula_s(count, temperature):
    torch.manual_seed(count)
    z = torch.randn(count, 6, dtype=torch.float64, requires_grad=True)
    ours, reference = nt_xent(z, temperature), one_by_one(z, temperature)
    assert abs(ours.item() - reference.item()) < 1e-12
    assert torch.allclose(torch.autograd.grad(ours, z)[0], torch.autograd.grad(reference, z)[0], atol=1e-12)
    assert torch.autograd.gradcheck(lambda z: nt_xent(z, temperature), z)


def test_loss_knows_partners_and_keeps_its_precision():
    torch.manual_seed(0)
    z = torch.randn(64, 16)
    paired, crossed = torch.cat([z, z]), torch.cat([z, z.roll(1, 0)])
    assert nt_xent(paired, 0.1) < nt_xent(crossed, 0.1) - 1
    with torch.autocast('cpu', torch.bfloat16): assert torch.isclose(nt_xent(paired, 0.1), nt_xent(paired.double(), 0.1).float(), rtol=1e-5)
    assert torch.isfinite(nt_xent(100 * torch.ones(8, 4), 0.01))
    for rows in (0, 2, 3, 5):
        with pytest.raises(InputError, match='two views of at least two'): nt_xent(torch.zeros(rows, 4))


@pytest.mark.parametrize('kind', ['none', *VIEWS])
@pytest.mark.parametrize('channels', [1, 3])
def test_views_of_every_kind_stay_pictures_of_their_size(kind, channels):
    from fastai.vision.core import TensorImage
    torch.manual_seed(0)
    x = TensorImage(torch.rand(6, channels, 20, 12))
    views = TwoViews(view_transforms(kind, channels))(x, split_idx=0)
    assert views.shape == (12, channels, 20, 12) and 0 <= views.min() and views.max() <= 1
    differ = (views[:6] - views[6:]).abs().flatten(1).amax(1)
    assert (differ == 0).all() if kind == 'none' else (differ > 0.01).sum() >= 5
    assert torch.equal(TwoViews(view_transforms(kind, channels))(x, split_idx=1), x)  # in training alone


def test_neither_other_splits_nor_labels_are_seen(encoder):
    rng, items = np.random.default_rng(1), SMALL.items
    arrays, others = SMALL.arrays.copy(), items['image'][items['split'] != 'train']
    arrays[others] = rng.integers(0, 256, (len(others), 8, 8))
    other = replace(SMALL, arrays=arrays, items=items.assign(label=rng.permutation(items['label'])))
    again = pretrain(other, 'small_cnn', 2, size=8, batch_size=32)
    assert same(again.model, encoder.model) and again.facts == encoder.facts
    assert encoder.facts['images'] == (items['split'] == 'train').sum()
    one = items['image'][items['split'] == 'train'].iloc[0]
    arrays[one] = 255 - arrays[one]  # while one training image makes a difference
    assert not same(pretrain(other, 'small_cnn', 2, size=8, batch_size=32).model, encoder.model)


def test_other_splits_are_not_even_opened(tmp_path):
    from PIL import Image
    pixels, labels = colour_images()
    for i, (image, label) in enumerate(zip(pixels, labels)):
        folder = tmp_path/('test' if i % 4 == 0 else 'train')/label
        folder.mkdir(parents=True, exist_ok=True)
        if folder.parent.name == 'test': (folder/f'{i}.png').write_bytes(b'no image')
        else: Image.fromarray(image).save(folder/f'{i}.png')
    found = pretrain(from_folder(tmp_path), 'small_cnn', 1, size=32, batch_size=16)
    assert found.facts['images'] == 54


def test_a_folder_without_labels_with_a_broken_image(tmp_path):
    from PIL import Image
    pixels, _ = colour_images(8)
    for i, image in enumerate(pixels): Image.fromarray(image).resize((30 + i, 50)).save(tmp_path/f'{i}.png')
    (tmp_path/'broken.png').write_bytes((tmp_path/'3.png').read_bytes()[:200])
    images = unlabelled(tmp_path)
    done = []
    found = pretrain(images, 'resnet10t', 2, size=48, batch_size=8, callbacks=(ReportProgress(lambda *a: done.append(a[:2])),))
    assert found.facts['images'] == 24 and found.preprocessing.channels == 3 and found.preprocessing.height == 48
    assert done[-1] == (6, 6) and encode(found, images.scan()).shape == (24, 512)


@pytest.mark.parametrize('name', ['small_cnn', 'lenet', 'simple_cnn', 'mobilenet', 'small_vit', 'small_resnet', 'resnet18', 'tf_efficientnet_lite0'])
def test_every_architecture_hands_on_all_but_its_head(name):
    grey = name in ('small_cnn', 'lenet')
    learn = image_learner(SMALL if grey else colour(), name, pretrained=False, size=32)
    p = learn.dls.train.dataset.preprocessing
    torch.manual_seed(7)
    body = headless(create_model(name, 2, p.channels, (32, 32)))
    start_from(learn, Encoder(body, name, p, dict(method='simclr')))
    x = torch.rand(3, p.channels, 32, 32)
    with torch.no_grad(): assert torch.allclose(headless(learn.model).cpu().eval()(x), body.eval()(x), atol=1e-6)


def colour(): return from_arrays(*colour_images()).split().scan()


def test_a_classifier_begins_there_and_trains(encoder):
    learn = start_from(image_learner(SMALL, 'small_cnn', size=8, batch_size=16), encoder)
    assert torch.equal(learn.model.features[0][0].weight.cpu(), encoder.model.features[0][0].weight.cpu())
    assert not learn.recipe['pretrained'] and learn.recipe['encoder'] == encoder.digest
    quietly(learn, 10, learning_rate=1e-2)
    probabilities, targets = predict_probabilities(learn)
    assert (probabilities.argmax(1) == targets).mean() > 0.4
    assert not torch.equal(learn.model.features[0][0].weight.cpu(), encoder.model.features[0][0].weight.cpu())


def test_what_the_command_does(tmp_path):
    "As `imgcls train SOURCE --pretrain simclr` will: a learner, a pretraining like it, a training that begins there; twice is once."
    reports = []
    def made():
        return pretrain_learner(image_learner(SMALL, size=8, seed=3), 2, tmp_path/'pretrain',
                                (ReportProgress(lambda *a: reports.append(a)),))
    learn = made()
    before = len(reports)
    quietly(learn, 1, resume=tmp_path/'checkpoint')
    second = made()
    assert before and len(reports) == before  # what is finished is read
    quietly(second, 1, resume=tmp_path/'checkpoint')  # and fits the checkpoint
    assert same(second.model, learn.model)
    third = start_from(image_learner(SMALL, size=8, seed=3), pretrain(SMALL, 'small_cnn', 1, size=8))
    with pytest.raises(InputError, match='another training'): quietly(third, 1, resume=tmp_path/'checkpoint')


class Stop(Callback):
    def before_epoch(self):
        if self.epoch == 1: raise RuntimeError('power cut')


def test_resumed_is_the_same_and_kept_is_read_back(tmp_path, encoder):
    asked = dict(architecture='small_cnn', epochs=2, size=8, batch_size=32, folder=tmp_path)
    with pytest.raises(RuntimeError, match='power cut'): pretrain(SMALL, callbacks=(Stop(),), **asked)
    assert not (tmp_path/'encoder.safetensors').exists()
    resumed = pretrain(SMALL, **asked)
    assert same(resumed.model, encoder.model)
    loaded = load_encoder(tmp_path/'encoder.safetensors')
    assert same(loaded.model, encoder.model) and loaded.facts == resumed.facts and loaded.preprocessing == encoder.preprocessing
    for changed, word in [(dict(epochs=3), 'epochs'), (dict(seed=1), 'seed'), (dict(temperature=0.1), 'temperature')]:
        with pytest.raises(InputError, match=f'another pretraining: its {word}'): pretrain(SMALL, **asked | changed)
    with pytest.raises(InputError, match='fingerprint'): pretrain(DATA, **asked)
    (tmp_path/'encoder.safetensors').write_bytes(b'\0' * 40)
    with pytest.raises(InputError, match='not an encoder that can be read'): load_encoder(tmp_path/'encoder.safetensors')
    with pytest.raises(InputError, match='not an encoder that can be read'): load_encoder(tmp_path/'none.safetensors')


def test_what_cannot_work_is_one_sentence(encoder):
    few = replace(SMALL, items=SMALL.items[SMALL.items['split'] == 'train'].head(15))
    with pytest.raises(InputError, match='15 images.*at least 16'): pretrain(few)
    for wrong in (dict(temperature=0), dict(views='cats'), dict(architecture='resnet81'), dict(architecture='alexnet', size=16),
                  dict(architecture=ResNet(2, 1), pretrained=True), dict(architecture='small_cnn', pretrained=True)):
        with pytest.raises(InputError) as error: simclr_learner(SMALL, **wrong)
        assert '\n' not in str(error.value) and str(error.value).endswith('.')
    with pytest.raises(InputError, match='does not fit'): start_from(image_learner(SMALL, 'small_resnet', size=8), encoder)
    with pytest.raises(InputError, match='channels 1'): start_from(image_learner(colour(), 'small_cnn', size=32), encoder)


def test_collapse_is_named():
    rng = np.random.default_rng(0)
    assert feature_spread(rng.normal(size=(200, 64))).collapse is None
    assert feature_spread(rng.normal(size=(200, 2)) @ rng.normal(size=(2, 64))).collapse == 'dimensional'
    assert feature_spread(np.ones((50, 64))).collapse == feature_spread(np.zeros((50, 64)) + 3).collapse == 'complete'
    with pytest.raises(InputError, match='diverged'): feature_spread(np.full((50, 8), np.nan))
    eye = feature_spread(torch.cat([torch.eye(16), -torch.eye(16)]))
    assert eye.spread == pytest.approx(1) and eye.effective_rank == pytest.approx(16) and eye.collapse is None


class NoNegatives(torch.nn.Module):
    def forward(self, projections, *labels):
        first, second = projections.as_subclass(torch.Tensor).chunk(2)
        return 1 - torch.cosine_similarity(first, second).mean()


def test_a_broken_loss_is_caught_and_a_sound_one_is_not():
    learn = simclr_learner(DATA, 'small_cnn', size=8)
    learn.loss_func = NoNegatives()
    with pytest.warns(UserWarning, match='complete.*point the same way') as heard: quietly(learn, 8)
    assert sum('Collapse' in str(w.message) for w in heard) == 1 and learn.watch_collapse.rows[-1]['spread'] < 0.02
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter('always')
        sound = quietly(simclr_learner(DATA, 'small_cnn', size=8), 2)
    assert not [w for w in heard if 'Collapse' in str(w.message)] and sound.watch_collapse.rows[-1]['spread'] > 0.5


def test_the_road_that_a_gpu_takes(tmp_path):
    "ResNet-18 with a thumbnail's stem, bfloat16, channels-last, large views: on a processor, narrow and for one epoch."
    torch.manual_seed(0)
    network = ResNet(3, 3, stem=conv_block, width=8)
    made = dict(epochs=1, learning_rate=2e-3, batch_size=16, size=32, half=True, folder=tmp_path)
    found = pretrain(colour(), network, **made)
    assert encode(found, colour()).shape[1] == 64 and isinstance(network.fc, torch.nn.Linear)  # the given one stays whole
    assert same(pretrain(colour(), network, **made).model, found.model)
    assert 0 < linear_probe(found, colour()).value <= 1
    learn = image_learner(colour(), 'small_cnn', size=32)
    learn.model = ResNet(3, 3, stem=conv_block, width=8).to(learn.dls.device)
    quietly(start_from(learn, found), 1)


def test_it_learns_without_labels():
    learned = pretrain(DATA, 'small_cnn', 12, size=8)
    untrained = Encoder(simclr_learner(DATA, 'small_cnn', size=8).model.encoder, 'small_cnn', learned.preprocessing)
    rows, test = DATA.where('train'), DATA.where('test')
    def neighbours(model):
        z, of_test = [torch.nn.functional.normalize(torch.from_numpy(encode(model, DATA, part)), dim=1) for part in (rows, test)]
        return (DATA.targets(rows)[(of_test @ z.T).argmax(1).numpy()] == DATA.targets(test)).mean()
    assert neighbours(learned) > max(0.93, neighbours(untrained) + 0.02)


@pytest.mark.slow
def test_the_command_pretrains(tmp_path):
    result = imgcls('run', 'digits', '--pretrain', 'simclr', '--json', cwd=tmp_path)
    assert result.returncode == 0 and json.loads(result.stdout)['accuracy'] > 0.97, result.stderr
    record = json.loads((tmp_path/'runs'/'digits'/'run.json').read_text())
    assert record['recipe']['encoder'] and (tmp_path/'runs'/'digits'/'pretrain').is_dir()
