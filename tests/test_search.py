"The search space, the study that goes on after a kill, and what a search says about bad input."
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch

from conftest import assert_sentence, imgcls
from imgcls_nb.data import digits
from imgcls_nb.models import create_model
from imgcls_nb.run import ImgclsError, InputError
from imgcls_nb.search import (Genotype, ProxyImages, SearchedCNN, SearchSpace, _open_study, _pick, _sampler, _take_up, genotype_latency, hypervolume,
                              is_beaten, need_optuna, proxy_training, register_genotype, search_architecture, search_settings, search_space)

from imgcls_nb.supernet import Supernet, extract, gradient_norm, naswot, rank_agreement, shared_weights, synflow, zero_cost_scores

try: import ray
except ImportError: ray = None
needs_ray = pytest.mark.skipif(ray is None, reason='Ray is not installed: pip install "imgcls_nb[ray]"')
TINY = SearchSpace(resolutions=(8,), widths=(4, 8), depths=(1,), kernels=(3, 5), expansions=(1, 2))


@pytest.fixture(scope='module')
def images(): return digits().split()


@pytest.fixture(scope='module')
def latencies(tmp_path_factory): return tmp_path_factory.mktemp('latencies')


def pick_from(seed):
    rng = np.random.default_rng(seed)
    return lambda name, values: int(rng.choice(values))


@pytest.mark.parametrize('seed', range(20))
def test_every_sample_is_a_network_and_its_name_says_all(seed):
    genotype = SearchSpace().choose(pick_from(seed))
    assert Genotype.from_name(genotype.name) == genotype == Genotype(**json.loads(json.dumps(genotype.as_dict())))
    model = create_model(register_genotype(genotype.name), 7, 3, (genotype.resolution, genotype.resolution + 4))
    assert model.genotype == genotype and model(torch.zeros(2, 3, 9, 15)).shape == (2, 7)


@pytest.mark.parametrize('name', ['search:', 'search:r8-w8', 'search:r8-w8-1.3', 'search:r8-w8-1.2.1', 'search:r0-w8-1.3.1', 'resnet18'])
def test_names_that_are_no_network(name):
    with pytest.raises(InputError): Genotype.from_name(name)


def test_the_space_follows_the_images(images):
    assert search_space(images.scan()).resolutions == (8, 12, 16)
    assert len(TINY) == 2 * 4**3


def test_the_test_images_are_never_opened(images, monkeypatch):
    opened, original = set(), type(images).pixels
    monkeypatch.setattr(type(images), 'pixels', lambda self, rows, *rest: opened.update(map(int, rows)) or original(self, rows, *rest))
    proxy = ProxyImages(images)
    proxy.at(8), proxy.at(12)
    assert opened and not opened & set(map(int, images.where('test')))


def test_large_sets_are_cut(images):
    proxy = ProxyImages(images, most=100)
    assert [len(proxy.at(8)[split][1]) for split in ('train', 'valid')] == [100, 50]


def test_same_seed_same_training(images):
    proxy = ProxyImages(images, most=400)
    def run(seed):
        torch.manual_seed(seed)
        model = create_model(register_genotype(Genotype(8, 4)), 10, 1, (8, 8))
        return [list(right) for right in proxy_training(model, proxy.at(8), 2, seed)]
    assert run(0) == run(0) != run(1)


def test_latency_is_measured_once(tmp_path):
    first = genotype_latency(Genotype(8, 4), 10, cache=tmp_path, rounds=1)
    [file] = tmp_path.iterdir()
    assert json.loads(file.read_text()) == dict(latency_ms=first)
    file.write_text('{"latency_ms": 7}')
    assert genotype_latency(Genotype(8, 4), 10, cache=tmp_path) == 7


def test_hypervolume_is_optunas():
    from optuna._hypervolume import compute_hypervolume
    for seed in range(5):
        rng = np.random.default_rng(seed)
        table = pd.DataFrame(dict(accuracy=rng.uniform(0.6, 1, 12), latency_ms=rng.uniform(0.005, 0.08, 12)))
        losses = np.stack([-100 * table.accuracy, np.log2(table.latency_ms)], 1)
        inside = losses[(losses < [-80, np.log2(0.05)]).all(1)]
        assert np.isclose(hypervolume(table), compute_hypervolume(inside, np.array([-80, np.log2(0.05)])))


def test_beaten_needs_a_faster_one_clearly_ahead():
    other = [(1.0, [0.1, 0.9])]
    assert is_beaten([0.9, 0.8], 1.0, other) and not is_beaten([0.0], 2.0, other)
    assert not is_beaten([0.9, 0.8], 0.9, other) and not is_beaten([0.9, 0.8, 0.8], 2.0, other)


def test_proposals_depend_on_the_trial_alone(tmp_path):
    "Each trial has a seed of its own, and two workers do not propose the same."
    study = _open_study(tmp_path/'study')
    found = []
    for count, worker in [(0, 0), (0, 1), (1, 0), (0, 0)]:
        study.sampler = _sampler('random', 0, count, worker)
        found.append(TINY.choose(_pick(study.ask())))
    assert found[0] == found[3] and len({g.name for g in found}) == 3


KILLED = """
import sys
from imgcls_nb.data import digits
from imgcls_nb.search import SearchSpace, search_architecture
space = SearchSpace(resolutions=(8,), widths=(4, 8), depths=(1,), kernels=(3, 5), expansions=(1, 2))
search_architecture(digits().split(), sys.argv[1], 8, epochs=3, space=space, latencies=sys.argv[2],
                    progress=lambda done, total: print(done, flush=True))
"""


def test_a_killed_search_goes_on_without_losing_a_trial(images, latencies, tmp_path):
    whole = search_architecture(images, tmp_path/'whole', 8, epochs=3, space=TINY, latencies=latencies)
    process = subprocess.Popen([sys.executable, '-c', KILLED, tmp_path/'killed', latencies], stdout=subprocess.PIPE, text=True)
    while process.stdout.readline().strip() != '2': assert process.poll() is None
    while 'RUNNING' not in (states := [t.state.name for t in _open_study(tmp_path/'killed').trials]): pass
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()
    left = [t.state.name for t in _open_study(tmp_path/'killed').trials]
    assert left.count('COMPLETE') + left.count('RUNNING') == len(left) >= len(states) >= 3
    found = search_architecture(images, tmp_path/'killed', 8, epochs=3, space=TINY, latencies=latencies)
    assert list(found.table['genotype']) == list(whole.table['genotype'])
    assert list(found.table['curve']) == list(whole.table['curve'])
    again = search_architecture(images, tmp_path/'killed', 8, epochs=3, space=TINY, latencies=latencies)
    assert len(again.table) == 8  # nothing left to do


def test_the_trial_that_was_cut_off_comes_again(tmp_path):
    study = _open_study(tmp_path)
    lost = TINY.choose(_pick(study.ask()))
    study = _open_study(tmp_path)
    _take_up(study)
    assert TINY.choose(_pick(study.ask())) == lost
    assert [t.state.name for t in study.trials] == ['FAIL', 'RUNNING']


def test_limits(images, latencies, tmp_path):
    found = search_architecture(images, tmp_path/'epochs', None, all_epochs=7, epochs=2, space=TINY, latencies=latencies, stop_beaten=False)
    assert 7 <= found.table['epochs'].sum() <= 8 and found.best in map(Genotype.from_name, found.front['genotype'])
    assert found.build(3)(torch.zeros(2, 1, 8, 8)).shape == (2, 3)
    found = search_architecture(images, tmp_path/'seconds', None, seconds=0.1, epochs=1, space=TINY, latencies=latencies)
    assert len(found.table) == 1
    assert '<table' in found._repr_html_() and found.best.name in found._repr_html_()
    with pytest.raises(ImgclsError, match='allow more trials'):
        search_architecture(images, tmp_path/'fast', 2, latency_ms=1e-6, space=TINY, latencies=latencies)


@pytest.mark.parametrize('options, words', [
    (dict(sampler='grid'), 'no sampler'), (dict(trials=None), 'an end'), (dict(trials=0), 'an end'), (dict(workers=0), 'an end')])
def test_bad_searches_are_one_sentence(images, tmp_path, options, words):
    with pytest.raises(InputError, match=words): search_architecture(images, tmp_path, **options)
    assert not list(tmp_path.iterdir())


def test_a_folder_belongs_to_one_search(images, latencies, tmp_path):
    search_architecture(images, tmp_path, 1, epochs=1, space=TINY, latencies=latencies)
    with pytest.raises(InputError, match='another seed'): search_architecture(images, tmp_path, 1, seed=1, epochs=1, space=TINY)
    with pytest.raises(InputError, match='another data'): search_architecture(digits().split(seed=1), tmp_path, 1, epochs=1, space=TINY)


def test_without_optuna_it_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, 'optuna', None)
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    with pytest.raises(ImgclsError, match=r'pip install "imgcls_nb\[search\]"'): need_optuna()


def test_importing_needs_no_optuna():
    code = 'import sys; import imgcls_nb.search; assert "optuna" not in sys.modules and "ray" not in sys.modules'
    assert subprocess.run([sys.executable, '-c', code]).returncode == 0


def test_the_found_network_learns_in_the_usual_way(images, latencies, tmp_path):
    found = search_architecture(images, tmp_path, 1, epochs=1, space=TINY, latencies=latencies)
    learn = found.learner(images)
    assert learn.recipe['architecture'] == found.best.name and not learn.recipe['pretrained']
    assert learn.dls.train.dataset.preprocessing.height == 8 and learn.model.genotype == found.best


@pytest.mark.parametrize('pruner', ['median', 'halving'])
def test_settings(images, tmp_path, pruner):
    options = dict(architecture=register_genotype(Genotype(8, 4)), size=8, batch_size=64)
    table = search_settings(images, tmp_path, 2, 2, pruner=pruner, **options)
    assert len(table) == 2 and table['accuracy'].is_monotonic_decreasing
    assert len(search_settings(images, tmp_path, 3, 2, pruner=pruner, **options)) == 3  # it goes on
    with pytest.raises(InputError, match='no pruner'): search_settings(images, tmp_path, pruner='shears')


def test_a_part_of_the_supernet_is_the_network_with_its_weights(images):
    torch.manual_seed(0)
    supernet, x = Supernet(SearchSpace(), 10), torch.randn(8, 1, 16, 16)
    genotype = SearchSpace().choose(pick_from(3))
    part = SearchedCNN(genotype, 10)
    part.load_state_dict({name: value.detach() for name, value in shared_weights(dict(supernet.whole.named_parameters()), part).items()}, strict=False)
    assert torch.allclose(supernet(x, genotype), part.train()(x), atol=1e-5)
    cut = extract(supernet, genotype, ProxyImages(images, most=200), batches=1)
    assert all(torch.equal(a, b) for a, b in zip(cut.parameters(), part.parameters()))
    cut.stem[0].weight.data.zero_()
    assert supernet.whole.stem[0].weight.abs().sum() > 0  # what is cut out is a copy


def test_gradients_of_a_part_reach_the_shared_weights_and_no_others():
    supernet = Supernet(SearchSpace(), 10)
    supernet(torch.randn(8, 1, 16, 16), Genotype(16, 8, kernels=(3, 3, 3))).square().sum().backward()
    gradient = supernet.whole.stages[0][0].body[3].weight.grad[:, 0]
    assert gradient[:16, 1:4, 1:4].any() and not gradient[16:].any() and not gradient[:, 0].any() and not gradient[..., 4].any()
    assert supernet.whole.stages[0][1].body[0].weight.grad is None  # the second block has no part in it


def test_scores(images):
    proxy, genotype = ProxyImages(images, most=200), Genotype(8, 4)
    scores = zero_cost_scores(genotype, proxy)
    assert scores == zero_cost_scores(genotype, proxy) and np.isfinite(list(scores.values())).all()
    assert scores != zero_cost_scores(genotype, proxy, seed=1)
    x, model = torch.randn(6, 1, 8, 8), SearchedCNN(genotype, 10)
    repeated = x[[0, 0, 2, 3, 4, 5]]
    assert naswot(model, repeated) < naswot(model, x)
    flow = synflow(model, (1, 8, 8))
    with torch.no_grad(): model.fc.weight.mul_(-np.e)  # the sign does not count, the size does
    assert flow < synflow(model, (1, 8, 8))
    assert gradient_norm(model, x, torch.zeros(6, dtype=torch.long)) > 0


def test_rank_agreement_knows_order_and_reverse():
    order = np.arange(20.0)
    assert rank_agreement(order, order**3).value == 1 and rank_agreement(-order, order, 'spearman').value == -1
    noise = rank_agreement(np.random.default_rng(0).random(40), np.random.default_rng(1).random(40))
    assert noise.low < 0 < noise.high
    with pytest.raises(InputError, match='too few'): rank_agreement([1, 2, 3], [1, 2, 3])


@pytest.mark.ray
@needs_ray
def test_workers_share_a_study(images, latencies, tmp_path):
    found = search_architecture(images, tmp_path, 6, epochs=1, space=TINY, latencies=latencies, workers=2)
    assert 6 <= len(found.table) <= 7
    assert not [t for t in _open_study(tmp_path).trials if t.state.name == 'RUNNING']


def test_the_command_finds_a_network_and_keeps_it(tmp_path):
    "`imgcls run --arch search`: the found network is the bundle's, and another process can make it again by its name."
    result = imgcls('run', 'digits', '--arch', 'search', '--search-trials', '2', '--epochs', '2', '--json', cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    run = tmp_path/'runs'/'digits'
    record, bundle = json.loads((run/'run.json').read_text()), json.loads((run/'bundle'/'bundle.json').read_text())
    assert record['search'] == dict(best=bundle['architecture'], networks=2) and bundle['architecture'].startswith('search:')
    assert imgcls('export', run, '--to', 'openvino', '--out', tmp_path/'more', cwd=tmp_path).returncode == 0
    assert_sentence(imgcls('run', 'digits', '--arch', 'search:r12', cwd=tmp_path), 'search:r12')
