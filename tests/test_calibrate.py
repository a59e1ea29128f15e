"Is it as sure as it should be: figures agree with others', promises are kept, and bundle, command and service say when not."
import json
import warnings

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.special import log_softmax, softmax
from torchmetrics.functional.classification import multiclass_calibration_error

from conftest import imgcls
from imgcls_nb import calibrate as ca
from imgcls_nb.bundle import load_bundle
from imgcls_nb.run import InputError
from samples import encoded


def answers(seed, count, classes, concentration=1.0):
    "Random targets and probabilities."
    rng = np.random.default_rng(seed)
    return rng.integers(0, classes, count), rng.dirichlet(np.full(classes, concentration), count).astype(np.float32)


def exact_logits(rng, count, classes=5, spread=3.0, temperature=1.0):
    "Targets drawn from the very probabilities, and logits that claim them at another temperature."
    logits = rng.normal(0, spread, (count, classes))
    chances = softmax(logits, 1).cumsum(1)
    return (rng.random((count, 1)) > chances).sum(1).clip(max=classes - 1), logits * temperature


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 300), st.integers(2, 7), st.integers(1, 20), st.sampled_from([0.01, 0.3, 2.0]))
def test_the_error_equals_torchmetrics(seed, count, classes, bins, concentration):
    targets, probabilities = answers(seed, count, classes, concentration)
    assume(np.allclose(probabilities.sum(1), 1, atol=1e-4))
    expected = multiclass_calibration_error(torch.tensor(probabilities), torch.tensor(targets), classes, bins, 'l1')
    assert ca.calibration_error(targets, probabilities, bins) == pytest.approx(float(expected), abs=1e-5)


def test_a_certain_answer_counts_too():
    targets, probabilities = np.array([0, 1, 1]), np.array([[1, 0], [1, 0], [0.4, 0.6]], np.float32)
    assert ca.calibration_error(targets, probabilities) == pytest.approx((1 + 0.4) / 3, abs=1e-6)


def test_bins_of_equal_mass_hold_as_many_images():
    targets, probabilities = answers(0, 103, 4)
    table = ca.reliability_table(targets, probabilities, 10, 'mass')
    assert len(table) == 10 and table.images.sum() == 103 and table.images.max() - table.images.min() <= 1
    assert ((table.low <= table.accuracy) & (table.accuracy <= table.high)).all()
    assert table.confidence.is_monotonic_increasing
    with pytest.raises(InputError, match='width'): ca.calibration_error(targets, probabilities, equal='height')


def test_luck_alone_looks_like_an_error():
    "A network that is exactly right about itself is inside the range; one that claims more is above it."
    rng, inside, above = np.random.default_rng(0), 0, 0
    for _ in range(60):
        targets, logits = exact_logits(rng, 300)
        exact, bold = softmax(logits, 1), softmax(3 * logits, 1)
        chance = ca.error_by_chance(exact)
        inside += chance.low <= ca.calibration_error(targets, exact) <= chance.high
        above += ca.calibration_error(targets, bold) > ca.error_by_chance(bold).high
    assert inside >= 53 and above == 60


@pytest.mark.parametrize('true', [0.4, 1.0, 2.5])
def test_the_temperature_is_found_again(true):
    targets, logits = exact_logits(np.random.default_rng(1), 5000, temperature=true)
    assert ca.fit_temperature(targets, logits) == pytest.approx(true, rel=0.06)
    assert ca.fit_temperature(targets, log_softmax(logits, 1)) == pytest.approx(true, rel=0.06)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.floats(0.2, 5))
def test_scaling_probabilities_is_dividing_logits(seed, temperature):
    logits = np.random.default_rng(seed).normal(0, 4, (20, 5))
    scaled = ca.scale_probabilities(softmax(logits, 1).astype(np.float32), temperature)
    assert np.abs(scaled - softmax(logits / temperature, 1)).max() < 1e-5
    assert (scaled.argmax(1) == logits.argmax(1)).all()


def test_all_right_does_not_mean_certain():
    "The temperature stays finite where no answer is wrong, and where none is right."
    targets = np.arange(200) % 4
    logits = np.eye(4)[targets] * 3.0
    p = softmax(logits / ca.fit_temperature(targets, logits), 1).max(1)
    assert 0.9 < p.min() and p.max() < 0.9999
    assert ca.fit_temperature((targets + 1) % 4, logits) == pytest.approx(10, rel=0.01)


def over_confident(rng, count):
    "Binary answers whose confidence claims more than is true: what is claimed, and what came true."
    true = rng.beta(6, 0.5, count) * 0.5 + 0.5
    claimed = 0.5 + 0.5 * (2 * true - 1) ** 0.5
    right = rng.random(count) < true
    return np.where(right, 0, 1), np.stack([claimed, 1 - claimed], 1), true


def test_the_promise_is_kept():
    "Of 300 simulated validation splits, at most 5% lead to a threshold below which the true precision lies."
    rng, broken, promised = np.random.default_rng(0), 0, 0
    _, population, true = over_confident(rng, 400_000)
    confidence = population.max(1)
    order = np.argsort(-confidence)
    precision, sorted_confidence = true[order].cumsum() / np.arange(1, len(true) + 1), confidence[order]
    for _ in range(300):
        targets, probabilities, _ = over_confident(rng, 400)
        try: promise = ca.choose_threshold(targets, probabilities, 0.95)
        except InputError: continue
        promised += 1
        assert promise.low >= 0.95 and promise.accepted <= promise.images == 400
        broken += precision[np.searchsorted(-sorted_confidence, -promise.threshold, side='right') - 1] < 0.95
    assert promised >= 150 and broken <= 15


def test_what_cannot_be_promised_is_refused():
    targets, probabilities, _ = over_confident(np.random.default_rng(0), 400)
    with pytest.raises(InputError, match='at least 2,995'): ca.choose_threshold(targets, probabilities, 0.999)
    with pytest.raises(InputError, match='surest'): ca.choose_threshold(1 - targets, probabilities, 0.9)
    for precision in (0, 1, 98, -1, float('nan')):
        with pytest.raises(InputError, match='0.99'): ca.choose_threshold(targets, probabilities, precision)
    assert ca.images_for_promise(0.99) == 299 and 0.99**299 < 0.05 < 0.99**298


def test_a_harder_promise_turns_more_away():
    targets, probabilities, _ = over_confident(np.random.default_rng(1), 5000)
    found = [ca.choose_threshold(targets, probabilities, p) for p in (0.92, 0.94, 0.96)]
    assert [p.accepted for p in found] == sorted((p.accepted for p in found), reverse=True)
    assert all(((probabilities.max(1) >= p.threshold).sum(), p.images) == (p.accepted, 5000) for p in found)


@pytest.mark.parametrize('right', [0.0, 1.0])
@pytest.mark.parametrize('classes', [1, 2, 5])
def test_degenerate_answers(right, classes):
    "One class, all right, all wrong: every figure and picture exists, without a warning."
    targets = np.zeros(70, int) if right or classes == 1 else np.ones(70, int)
    probabilities = np.full((70, classes), 0.1 / max(1, classes - 1))
    probabilities[:, 0] = 0.9 if classes > 1 else 1.0
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        ca.plot_reliability(targets, probabilities)
        ca.plot_risk_coverage(targets, probabilities, 0.5)
        for threshold in (0, 0.9, 1): ca.plot_threshold(targets, probabilities, threshold)
        assert 0.1 <= ca.fit_temperature(targets, np.log(probabilities)) <= 10
    expected = 0.0 if classes == 1 else 0.1 if right else 0.9
    assert ca.calibration_error(targets, probabilities) == pytest.approx(expected, abs=1e-6)
    assert ca.area_under_risk(targets, probabilities) == (0 if right or classes == 1 else 1)


def test_what_is_no_number_is_refused():
    targets, probabilities = answers(0, 30, 3)
    probabilities[4, 1] = np.nan
    def familiarity(targets, features): return ca.fit_familiarity(features, targets)
    for function in (ca.calibration_error, ca.fit_temperature, ca.risk_coverage, familiarity, ca.plot_reliability):
        with pytest.raises(InputError, match='not numbers'): function(targets, probabilities)
        with pytest.raises(InputError, match='no images'): function(targets[:0], probabilities[:0])
        with pytest.raises(InputError, match='targets'): function(targets[:9], probabilities)
    with pytest.raises(InputError, match='not numbers'): ca.separation(np.array([1.0, np.nan]), np.ones(3))
    with pytest.raises(InputError, match='some of each'): ca.separation(np.ones(3), np.ones(0))


def test_the_area_is_the_mean_risk():
    targets, probabilities = answers(3, 200, 4)
    order = np.argsort(-probabilities.max(1))
    wrong = (probabilities.argmax(1) != targets)[order]
    assert ca.area_under_risk(targets, probabilities) == pytest.approx((wrong.cumsum() / np.arange(1, 201)).mean())


def test_familiarity_is_the_mahalanobis_distance():
    "Where all directions are kept, the score equals the textbook formula with the same covariance."
    from scipy.spatial.distance import cdist
    from sklearn.covariance import LedoitWolf
    rng = np.random.default_rng(0)
    features, targets = rng.normal(size=(300, 12)) @ rng.normal(size=(12, 12)), np.repeat([0, 2, 3], 100)
    features += 3 * targets[:, None]
    means = np.stack([features[targets == k].mean(0) for k in (0, 2, 3)])
    covariance = LedoitWolf(assume_centered=True).fit(features - np.repeat(means, 100, 0)).covariance_
    expected = -cdist(features, means, 'mahalanobis', VI=np.linalg.inv(covariance)).min(1)
    assert np.allclose(ca.fit_familiarity(features, targets).score(features), expected, rtol=1e-3, atol=1e-3)


def test_familiarity_of_few_and_of_constant_features():
    rng = np.random.default_rng(0)
    few = ca.fit_familiarity(rng.normal(size=(4, 200)), np.array([0, 0, 1, 1]))
    assert np.isfinite(few.score(rng.normal(size=(5, 200)))).all()
    constant = ca.fit_familiarity(np.ones((10, 3)), np.zeros(10, int))
    assert np.isfinite(constant.score(np.ones((2, 3)))).all()


def test_separation():
    rng = np.random.default_rng(0)
    known, foreign = rng.normal(2, 1, 2000), rng.normal(0, 1, 2000)
    found = ca.separation(known, foreign)
    assert found.auroc == pytest.approx(0.921, abs=0.02) and found.false_positives.value == pytest.approx(0.361, abs=0.05)


@pytest.fixture(scope='module')
def learner():
    "A small network, trained for a moment, on digits."
    from imgcls_nb.data import digits
    from imgcls_nb.train import image_learner, train
    learn = image_learner(digits().split(), 'small_cnn', size=16)
    with learn.no_bar(), learn.no_logging(): train(learn, 4)
    return learn


def test_outputs_are_those_of_the_model(learner):
    from imgcls_nb.evaluate import evaluate
    outputs, report = ca.network_outputs(learner), evaluate(learner)
    assert np.abs(softmax(outputs.logits, 1) - report.probabilities).max() < 1e-5 and (outputs.targets == report.targets).all()
    layer = learner.model.classifier[-1].cpu()
    with torch.inference_mode(): again = layer(torch.tensor(outputs.features))
    assert torch.allclose(again, torch.tensor(outputs.logits), atol=1e-4)
    assert len(ca.network_outputs(learner, 0, most=100).logits) == 100
    assert not any(isinstance(module, ca._Tap) for module in learner.model.modules())


class TwoHeads(torch.nn.Module):
    "Two linear heads whose logits are averaged: the last layer's output is not the network's."
    def __init__(self):
        super().__init__()
        self.body, self.one, self.other = torch.nn.Flatten(), torch.nn.Linear(256, 10), torch.nn.Linear(256, 10)

    def forward(self, x): return (self.one(self.body(x)) + self.other(self.body(x))) / 2


@pytest.mark.parametrize('model', [TwoHeads(), torch.nn.Sequential(torch.nn.Conv2d(1, 10, 16), torch.nn.Flatten())])
def test_a_network_without_a_linear_end(learner, model, tmp_path):
    "It has no features to tell foreign images by; temperature and promise work all the same, and the card says so."
    from fastai.learner import Learner
    from imgcls_nb.evaluate import evaluate
    from imgcls_nb.export import export
    other = Learner(learner.dls, model.to(learner.dls.device), loss_func=learner.loss_func)
    other.recipe = learner.recipe
    assert ca.network_outputs(other).features is None
    calibration = ca.calibrate(other)
    assert calibration.familiarity is None and calibration.thresholds == ca.Thresholds()
    bundle = export(other, evaluate(other), tmp_path/'bundle', None, calibration)
    card = (bundle.folder/'README.md').read_text(encoding='utf-8')
    assert '"unlike the training images": never' in card and bundle.record.runtimes['onnx'].decision.sure.value == 1


@pytest.fixture(scope='module')
def exported(learner, tmp_path_factory):
    "Its calibration, report and bundle."
    from imgcls_nb.evaluate import evaluate
    from imgcls_nb.export import export
    calibration, report = ca.calibrate(learner, 0.95), evaluate(learner)
    return calibration, report, export(learner, report, tmp_path_factory.mktemp('calibrated')/'bundle', None, calibration)


def test_the_record_goes_around(exported):
    calibration, report, bundle = exported
    record = load_bundle(bundle.folder).record
    decision, promise = record.runtimes['onnx'].decision, calibration.promise
    assert record.format_version == 3 and record.calibration.temperature == calibration.temperature
    assert (decision.probability, decision.familiarity) == (promise.threshold, calibration.thresholds.familiarity)
    assert decision.promise.required == 0.95 <= decision.promise.low == promise.low
    assert record.metrics['log_loss'].value == pytest.approx(calibration.report(report).metrics['log_loss'].value)
    card = (bundle.folder/'README.md').read_text(encoding='utf-8')
    assert '## When it says not sure' in card and f'{record.calibration.error_before:.4f} before' in card


def test_the_predictor_gives_calibrated_probabilities_and_obeys(exported, learner):
    calibration, report, bundle = exported
    pixels, outputs = report.data.pixels(report.rows, bundle.preprocessing), ca.network_outputs(learner)
    predictor = bundle.predictor()
    found = predictor.outputs(pixels)
    assert np.abs(found['probabilities'] - calibration.probabilities(outputs.logits)).max() < 1e-5
    assert np.allclose(found['familiarity'], calibration.scores(outputs), rtol=1e-3, atol=1e-2)
    sure = [answer.sure for answer in predictor.answers(pixels)]
    assert (sure == calibration.sure(outputs)).mean() > 0.995 and 0.5 < np.mean(sure) < 1
    assert bundle.record.runtimes['onnx'].decision.sure.value == pytest.approx(np.mean(sure))


def test_reasons(exported):
    from imgcls_nb.data import textures
    calibration, report, bundle = exported
    predictor = bundle.predictor()
    foreign = predictor.answers(textures().pixels(np.arange(0, 1456, 20), bundle.preprocessing))
    assert np.mean([not a.sure for a in foreign]) > 0.8
    reasons = {a.reason for a in foreign if not a.sure}
    assert reasons <= {'low probability', 'unlike the training images'} and 'unlike the training images' in reasons
    doubtful = next(a for a in foreign if not a.sure)
    assert doubtful.text == f'not sure (perhaps {doubtful.label})' and doubtful.as_dict()['sure'] is False


def test_the_smaller_runtime_has_thresholds_of_its_own(exported):
    from imgcls_nb.compress import compress
    calibration, report, bundle = exported
    compression = compress(bundle, report.data, budget=0.05)
    assert compression.kept and compression.runtime.parity.same_class >= 0.97 * len(report.targets)
    decision = compression.runtime.decision
    assert decision.promise.low >= 0.95 and decision.sure.value > 0.5
    outputs = compression.bundle.predictor('onnx-int8').outputs(report.data.pixels(report.data.where('valid'), bundle.preprocessing))
    assert 0.002 <= (outputs['familiarity'] < decision.familiarity).mean() <= 0.01


def test_an_export_that_finds_images_more_familiar_is_refused(learner, exported, tmp_path, monkeypatch):
    import onnx
    from onnx import numpy_helper
    from imgcls_nb import export as ex
    honest = ex.to_onnx

    def damaged(*args):
        model = onnx.load_from_string(honest(*args))
        norms = next(t for t in model.graph.initializer if t.name.endswith('norms'))
        norms.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(norms) * np.float32(1.5), norms.name))
        return model.SerializeToString()
    monkeypatch.setattr(ex, 'to_onnx', damaged)
    with pytest.raises(ex.ExportError, match='familiar'): ex.export(learner, exported[1], tmp_path/'bundle', None, exported[0])
    assert not (tmp_path/'bundle').exists()


def test_a_precision_that_cannot_be_promised_is_said(learner, tmp_path):
    from imgcls_nb.evaluate import evaluate
    from imgcls_nb.export import export
    calibration = ca.calibrate(learner, 0.999)
    assert calibration.promise is None and 'at least 2,995' in calibration.refusal
    bundle = export(learner, evaluate(learner), tmp_path/'bundle', calibration=calibration)
    assert bundle.record.runtimes['onnx'].decision.probability is None
    assert '**not** promised' in (bundle.folder/'README.md').read_text(encoding='utf-8')
    with pytest.raises(InputError, match='0.99'): ca.calibrate(learner, 99)
    with pytest.raises(InputError, match='turned away'): ca.calibrate(learner, turned_away=1.5)


def test_sections_state_their_findings(exported, learner):
    sections = ca.calibration_sections(exported[0], ca.network_outputs(learner))
    assert [heading for heading, _ in sections] == ['As sure as it should be?', 'When it says not sure']
    page = ''.join(content for _, content in sections)
    assert page.count('<img ') == page.count('alt="') == 5 and 'Reliability before' in page
    assert str(exported[0].promise.accepted) in page


def test_a_bundle_without_calibration_is_always_sure(learner, tmp_path):
    from imgcls_nb.evaluate import evaluate
    from imgcls_nb.export import export
    report = evaluate(learner)
    bundle = export(learner, report, tmp_path/'plain')
    predictor = bundle.predictor()
    pixels = report.data.pixels(report.rows, bundle.preprocessing)
    assert set(predictor.outputs(pixels)) == {'probabilities'} and all(a.sure for a in predictor.answers(pixels))
    assert np.abs(predictor.probabilities(pixels) - report.probabilities).max() < 1e-5
    assert_version_1_is_read(bundle, pixels)


def assert_version_1_is_read(bundle, pixels):
    "The same bundle with a record as version 1 wrote it: without the fields that came later."
    record = json.loads((bundle.folder/'bundle.json').read_text(encoding='utf-8'))
    before = [a.as_dict() for a in bundle.predictor().answers(pixels[:5])]
    assert record.pop('calibration') is None and record['runtimes']['onnx'].pop('decision') is None
    (bundle.folder/'bundle.json').write_text(json.dumps(record | dict(format_version=1)), encoding='utf-8')
    old = load_bundle(bundle.folder)
    assert old.record.format_version == 1 and [a.as_dict() for a in old.predictor().answers(pixels[:5])] == before


def test_a_threshold_without_the_output_is_refused(exported, learner, tmp_path):
    "A record that compares a familiarity which the graph does not give is found out when it is opened."
    from imgcls_nb.bundle import write_bundle
    from imgcls_nb.export import to_onnx
    bundle = exported[2]
    other = write_bundle(tmp_path/'other', bundle.record, {'model.onnx': to_onnx(learner.model, bundle.preprocessing), **{
        'model.safetensors': (bundle.folder/'model.safetensors').read_bytes()}} | (
        {'model.int8.onnx': b''} if 'onnx-int8' in bundle.record.runtimes else {}))
    with pytest.raises(InputError, match='does not fit'): other.predictor()


def noise(side=64):
    "A picture that is no digit."
    return encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side), dtype=np.uint8)), 'PNG')


def test_command_and_service_say_it(digits_run, tmp_path):
    from fastapi.testclient import TestClient
    from imgcls_nb.serve import create_app
    (tmp_path/'new').mkdir()
    (tmp_path/'new'/'noise.png').write_bytes(noise())
    result = imgcls('predict', digits_run['bundle'], tmp_path/'new', '--json', '--sort-into', tmp_path/'sorted')
    found = json.loads(result.stdout)
    assert found['sure'] is False and found['reason'] == 'unlike the training images' and found['label'] in '0123456789'
    assert (tmp_path/'sorted'/'not sure'/'noise.png').exists()
    shown = imgcls('predict', digits_run['bundle'], tmp_path/'new')
    assert 'not sure (perhaps' in shown.stdout and 'unlike the training images' in shown.stdout
    with TestClient(create_app(digits_run['bundle'])) as client:
        answer = client.post('/predict', content=noise()).json()
        assert answer['sure'] is False and answer['reason'] == 'unlike the training images'
        page = client.get('/').text
    assert 'Not sure' in page and 'unlike those that the classifier was trained on' in page


def test_a_run_says_what_it_found(digits_run):
    fitted = digits_run['calibration']
    assert fitted['temperature'] > 0 and fitted['precision'] is None
    decision = digits_run['runtimes']['onnx']['decision']
    assert decision['probability'] is None and decision['sure']['value'] > 0.95


def test_a_precision_that_the_split_is_too_small_for_is_refused_before_training(tmp_path):
    from contextlib import redirect_stderr
    from io import StringIO
    from imgcls_nb.cli import main
    said, runs = StringIO(), tmp_path/'runs'
    with redirect_stderr(said):
        assert main(['run', 'digits', '--runs', str(runs), '--precision', '98']) == InputError.exit_code
        assert not runs.exists()
        assert main(['run', 'digits', '--runs', str(runs), '--precision', '0.99']) == InputError.exit_code
    assert 'write 99% as 0.99' in said.getvalue() and 'at least 299 validation images' in said.getvalue()
    assert not (runs/'digits'/'log.csv').exists()
