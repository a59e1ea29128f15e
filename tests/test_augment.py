"Augmentation: presets keep what they promise, the seed decides everything, mixing leaves the learner as it was."
import random

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.data.all import Normalize
from fastai.torch_core import set_seed
from fastai.vision.core import TensorImage
from PIL import Image
from torch import nn
from torchvision.transforms import v2

from imgcls_nb.augment import (MIXING, PRESETS, SETTINGS, AugmentationExplorer, EachImage, augmentations, average_over_copies,
                               change_image, mixing, predict_with_tta, preset_views, show_strengths)
from imgcls_nb.data import from_arrays
from imgcls_nb.sources import load_images
from imgcls_nb.evaluate import predict_probabilities
from imgcls_nb.image import Preprocessing
from imgcls_nb.run import InputError
from imgcls_nb.train import image_learner, train

KINDS = ['none', *PRESETS]
SHAPES = [(1, 8, 8), (3, 8, 8), (1, 17, 40), (3, 40, 17), (3, 64, 64), (1, 2, 3)]
P = Preprocessing(16, 16, 1)


def apply(transforms: list, batch: torch.Tensor, seed: int = 0, training: bool = True) -> torch.Tensor:
    "As a loader does."
    set_seed(seed)
    batch = TensorImage(batch)
    for transform in transforms: batch = transform(batch, split_idx=0 if training else 1)
    return batch.as_subclass(torch.Tensor)


def extremes(shape: tuple, count: int = 24) -> torch.Tensor:
    "Pictures of black, white and everything between: what is most easily pushed out of range."
    noise = torch.rand(count, *shape, generator=torch.Generator().manual_seed(0))
    return torch.cat([noise, noise.round(), torch.zeros(2, *shape), torch.ones(2, *shape)])


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('kind', KINDS)
def test_a_preset_keeps_shape_type_and_range(kind, shape):
    batch = extremes(shape)
    before = batch.clone()
    result = apply(augmentations(kind), batch)
    assert result.shape == batch.shape and result.dtype == torch.float32 and torch.isfinite(result).all()
    assert result.min() >= -1e-6 and result.max() <= 1 + 1e-6
    assert torch.equal(batch, before), 'the input was changed in place'


@pytest.mark.parametrize('kind', KINDS)
def test_validation_pictures_stay_as_they_are(kind):
    batch = extremes((3, 24, 24))
    assert torch.allclose(apply(augmentations(kind), batch, training=False), batch, atol=1e-3)


@pytest.mark.parametrize('kind', PRESETS)
def test_the_seed_decides(kind):
    batch = extremes((1, 24, 24))
    assert torch.equal(apply(augmentations(kind), batch, 1), apply(augmentations(kind), batch, 1))
    assert not torch.equal(apply(augmentations(kind), batch, 1), apply(augmentations(kind), batch, 2))


def marked_corner(count: int = 400) -> torch.Tensor:
    "A bright spot in the upper left quarter."
    batch = torch.zeros(count, 1, 32, 32)
    batch[:, :, 7:11, 7:11] = 1
    return batch


def quarters_with_the_spot(result: torch.Tensor) -> set[tuple[bool, bool]]:
    "(lower, right) for where the brightest pixel of each picture is."
    spots = result.flatten(1).argmax(1)
    return {(int(spot) // 32 >= 16, int(spot) % 32 >= 16) for spot in spots}


@pytest.mark.parametrize('kind', ['digits', 'documents', 'medical'])
def test_presets_without_flips_never_flip(kind):
    assert quarters_with_the_spot(apply(augmentations(kind), marked_corner())) == {(False, False)}


def test_photos_flip_sideways_alone_and_the_others_every_way():
    assert quarters_with_the_spot(apply(augmentations('photos'), marked_corner())) == {(False, False), (False, True)}
    for kind in ('textures', 'satellite'):
        assert len(quarters_with_the_spot(apply(augmentations(kind), marked_corner()))) == 4, kind


@pytest.mark.parametrize('kind', KINDS)
def test_labels_stay_with_their_pictures(kind):
    shades = np.arange(120, dtype=np.uint8) * 2
    data = from_arrays(shades[:, None, None] + np.zeros((120, 8, 8), np.uint8), shades // 48,
                       ['train'] * 100 + ['valid'] * 10 + ['test'] * 10)
    spec = Preprocessing(8, 8, 1, mean=(0.0,), std=(1.0,))
    loader = data.dataloaders(spec, augmentations(kind), batch_size=50, device='cpu').train
    for x, y in loader:
        assert x.shape == (50, 1, 8, 8) and y.dtype == torch.int64
        if PRESETS.get(kind, {}).get('max_lighting', 0) == 0:  # the others change the shade itself
            found = (x[:, 0, 4, 4] * 127.5).round().long() // 24
            assert [data.classes[k] for k in y] == [str(int(k)) for k in found]


@pytest.mark.parametrize('kind', PRESETS)
def test_workers_change_nothing(kind):
    def batches(limit):
        set_seed(5)
        loader = load_images('digits').split().dataloaders(P, augmentations(kind), 256, memory_limit=limit, device='cpu').train
        return [batch for _ in range(2) for batch in loader], loader.fake_l.num_workers
    (memory, none), (files, some) = batches(2e9), batches(0)
    assert none == 0 < some and len(memory) == len(files) > 2
    for (x, y), (x2, y2) in zip(memory, files): assert torch.equal(x, x2) and torch.equal(y, y2)


def test_each_image_draws_anew_for_every_picture():
    batch = torch.rand(1, 3, 16, 16).repeat(12, 1, 1, 1)
    for change in (v2.RandAugment(), v2.TrivialAugmentWide(), v2.RandomErasing(1.0)):
        result = apply([EachImage(change)], batch)
        assert result.shape == batch.shape and result.min() >= 0 and result.max() <= 1
        assert len(torch.unique(result, dim=0)) > 3
        assert torch.equal(result, apply([EachImage(change)], batch))
        assert torch.equal(apply([EachImage(change)], batch, training=False), batch)


def test_each_image_stands_before_the_normalisation():
    seen = []
    def look(image):
        seen.append(image)
        return image
    data = load_images('digits').split()
    loader = data.dataloaders(P, [EachImage(look)], batch_size=8, device='cpu').train
    seen.clear()  # fastai tries its transforms once when a loader is made
    loader.one_batch()
    assert len(seen) == 8 and torch.stack(seen).min() >= 0 and torch.stack(seen).max() <= 1


@pytest.mark.parametrize('kind', [kind for kind in PRESETS if PRESETS[kind]['max_lighting']])
def test_light_changes_in_our_own_training_loader_and_only_there(kind):
    data = from_arrays(np.full((120, 8, 8), 128, np.uint8), np.arange(120) % 2, ['train'] * 60 + ['valid', 'test'] * 30)
    dls = data.dataloaders(Preprocessing(8, 8, 1), augmentations(kind), 60, device='cpu')
    shades = [loader.one_batch()[0][:, 0, 4, 4].std() for loader in (dls.train, dls.valid, dls[2])]
    assert shades[0] > 0.02 and shades[1] == shades[2] == 0


# mixing

@pytest.fixture(scope='module')
def few():
    "100 training digits."
    data = load_images('digits')
    return from_arrays(data.arrays[:300], data.items['label'][:300], ['train'] * 100 + ['valid'] * 100 + ['test'] * 100,
                       kind='digits')


def quiet(learn, *args, **options):
    with learn.no_bar(), learn.no_logging(): return train(learn, *args, **options)


class Stop(Callback):
    "Interrupts the training, as a person does."
    order = 90

    def after_batch(self):
        if self.training: raise KeyboardInterrupt


@pytest.mark.parametrize('kind', MIXING)
def test_mixing_trains_and_metrics_are_those_of_whole_pictures(few, kind):
    learn = image_learner(few, 'small_cnn', device='cpu')
    loss = learn.loss_func
    quiet(learn, 3, callbacks=mixing(kind))
    probabilities, targets = predict_probabilities(learn, 1)
    assert learn.loss_func is loss and not any(isinstance(cb, tuple(MIXING.values())) for cb in learn.cbs)
    assert abs(learn.recorder.values[-1][2] - (probabilities.argmax(1) == targets).mean()) < 1e-6


@pytest.mark.parametrize('kind', MIXING)
def test_mixing_is_repeatable(few, kind):
    first, second = [quiet(image_learner(few, 'small_cnn', device='cpu'), 1, callbacks=mixing(kind, 1)) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(first.model.state_dict().values(), second.model.state_dict().values()))


@pytest.mark.parametrize('loss', [nn.CrossEntropyLoss(), nn.CrossEntropyLoss(torch.ones(10)), nn.MultiMarginLoss()])
def test_mixing_takes_any_loss_with_a_reduction(few, loss):
    learn = quiet(image_learner(few, 'small_cnn', loss=loss, device='cpu'), 1, callbacks=mixing('cutmix'))
    assert np.isfinite(learn.recorder.values[-1][0]) and loss.reduction == 'mean'


def test_a_loss_without_a_reduction_is_refused_in_one_sentence(few):
    def my_loss(prediction, target): return nn.functional.cross_entropy(prediction, target)
    learn = image_learner(few, 'small_cnn', loss=my_loss, device='cpu')
    with pytest.raises(InputError, match='needs a loss with a `reduction`'): quiet(learn, 1, callbacks=mixing('mixup'))


def test_after_an_interruption_training_goes_on(few):
    learn = image_learner(few, 'small_cnn', device='cpu')
    loss = learn.loss_func
    with pytest.raises(KeyboardInterrupt): quiet(learn, 1, callbacks=(*mixing('mixup'), Stop()))
    assert learn.loss_func is loss
    quiet(learn, 1, callbacks=mixing('mixup'))
    quiet(learn, 1)
    assert learn.loss_func is loss


def test_the_mixed_loss_is_the_mixture_of_the_losses(few):
    found = []
    class Look(Callback):
        order = 50
        def after_loss(self):
            if not self.training: return
            pred = self.pred.detach()
            own, other = [nn.functional.cross_entropy(pred, y, reduction='none') for y in (self.y, mix.yb1[0])]
            found.append((float(self.loss.detach()), float((mix.lam * own + (1 - mix.lam) * other).mean())))
    for kind in MIXING:
        mix = mixing(kind)[0]
        quiet(image_learner(few, 'small_cnn', device='cpu'), 1, callbacks=(mix, Look()))
    assert found and np.allclose(*np.array(found).T, atol=1e-5)


# test-time augmentation

@pytest.fixture(scope='module')
def trained(few):
    return quiet(image_learner(few, 'small_cnn', device='cpu'), 6)


@pytest.mark.parametrize('options', [dict(kind='none'), dict(kind='none', copies=0), dict(kind='digits', copies=0)])
@pytest.mark.parametrize('split', [0, 1, 2])
def test_without_changes_tta_is_the_plain_prediction(trained, split, options):
    plain, truth = predict_probabilities(trained, split)
    averaged, targets = predict_with_tta(trained, split, **options)
    assert np.array_equal(plain, averaged) and np.array_equal(truth, targets)


def test_tta_is_repeatable_normalised_and_leaves_everything_as_it_was(trained):
    state, own = torch.get_rng_state(), random.getstate()
    first, second = [predict_with_tta(trained, 2, 'digits', 3, seed=1)[0] for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), state) and random.getstate() == own
    assert np.array_equal(first, second) and np.allclose(first.sum(1), 1, atol=1e-5) and first.dtype == np.float32
    assert not np.array_equal(first, predict_with_tta(trained, 2, 'digits', 3, seed=2)[0])
    assert not np.array_equal(first, predict_probabilities(trained, 2)[0])


def test_tta_averages_over_the_pictures_that_the_preset_gives(trained):
    seen = []
    class Spy(nn.Module):
        def forward(self, x):
            seen.append(x)
            return trained.model(x)
    average_over_copies(Spy(), trained.dls.valid.new(bs=100), 'digits', copies=2)
    assert len(seen) == 3 and not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])
    assert seen[1].min() >= -1.001 and seen[1].max() <= 1.001  # mean and deviation are 0.5


# looking at it

def picture(mode: str = 'RGB', size=(40, 30)) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.mark.parametrize('mode', ['L', 'RGB'])
@pytest.mark.parametrize('size', [(40, 30), (8, 8), (1, 1)])
def test_every_setting_over_its_whole_range(mode, size):
    image = picture(mode, size)
    assert change_image(image).tobytes() == image.tobytes()
    for name, setting in SETTINGS.items():
        for value in np.linspace(setting.low, setting.high, 5):
            changed = change_image(image, **{name: float(value)})
            assert changed.size == size and changed.mode == mode


def test_the_grid_and_the_strip_show_what_they_should():
    assert len(show_strengths(picture(), ['zoom', 'blur'], steps=2).axes) == 10
    assert preset_views(picture(), 'satellite', count=5).size == (200, 30)


def test_the_explorer_follows_its_sliders():
    explorer = AugmentationExplorer(picture(size=(500, 300)))
    assert max(explorer.image.size) == 256
    resting, views = explorer.changed.value, explorer.views.value
    for name, slider in explorer.sliders.items():
        slider.value = slider.max
        assert explorer.changed.value != resting and name in explorer.code.value, name
        slider.value = SETTINGS[name].neutral
        assert explorer.changed.value == resting, name
    explorer.mirror.value = True
    assert 'mirror=True' in explorer.code.value
    explorer.draw.value = 7
    assert explorer.views.value != views


# what people get wrong

@pytest.mark.parametrize('call, words', [
    (lambda: augmentations('letters'), 'one of none, digits'),
    (lambda: mixing('blend'), 'one of none, mixup, cutmix'),
    (lambda: mixing('mixup', alpha=0), 'above zero'),
    (lambda: mixing('mixup', alpha=float('nan')), 'above zero'),
    (lambda: change_image(picture(), twist=1), 'one of rotation'),
    (lambda: change_image(picture(), zoom=0), 'outside 0.5 to 2'),
    (lambda: change_image(picture(), zoom=float('nan')), 'outside 0.5 to 2'),
    (lambda: show_strengths(picture(), ['twist']), 'one of rotation'),
    (lambda: preset_views(picture(), 'letters'), 'one of none, digits')])
def test_a_wrong_name_or_value_gives_one_clear_sentence(call, words):
    with pytest.raises(InputError, match=words) as caught: call()
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize('options, words', [(dict(split=3), '2 is test'), (dict(split='test'), '2 is test'),
                                            (dict(kind='letters'), 'one of none'), (dict(copies=-1), '0 or more')])
def test_wrong_arguments_of_tta(trained, options, words):
    with pytest.raises(InputError, match=words): predict_with_tta(trained, **options)


def test_tta_without_a_normalisation_is_refused(trained):
    loader = trained.dls.valid.new()
    loader.after_batch.fs = [t for t in loader.after_batch.fs if not isinstance(t, Normalize)]
    with pytest.raises(InputError, match='does not normalise'): average_over_copies(trained.model, loader, 'digits')
