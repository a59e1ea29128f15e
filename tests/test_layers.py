"The house rules: data flows one way, and what must start fast stays light."
import ast
import subprocess
import sys

import pytest

from conftest import ROOT

ORDER = 'run task image data label_tools sources check labelling balance augment models transfer train averaging distributed evaluate calibrate compare slices explain runtimes bundle hub export formats variants quantize prune distill compress workers page serve server client apps edge scale diagnose self_supervised search supernet multimodal fusion cli'.split()
LIGHT = 'run task image runtimes bundle workers page serve server client edge cli'.split()
HEAVY = 'torch fastai matplotlib timm pandas sklearn'.split()


def imported(module: str) -> set[str]:
    "The modules of the library that a module imports anywhere, inside functions too."
    tree = ast.parse((ROOT/'imgcls_nb'/f'{module}.py').read_text(encoding='utf-8'))
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.level == 1 or (node.module or '').startswith('imgcls_nb')):
            name = (node.module or '').removeprefix('imgcls_nb').lstrip('.')
            found |= {name} if name else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name.removeprefix('imgcls_nb.') for alias in node.names if alias.name.startswith('imgcls_nb.')}
    return found & {path.stem for path in (ROOT/'imgcls_nb').glob('*.py')}


def test_every_module_has_its_place():
    assert {path.stem for path in (ROOT/'imgcls_nb').glob('*.py')} - {'__init__', '_modidx', 'all'} == set(ORDER)


@pytest.mark.parametrize('module', ORDER)
def test_a_module_imports_only_those_before_it(module):
    assert imported(module) <= set(ORDER[:ORDER.index(module)])


@pytest.mark.parametrize('module', LIGHT)
def test_light_modules_load_nothing_heavy(module):
    code = f'import sys, imgcls_nb.{module}; print(" ".join({{m.split(".")[0] for m in sys.modules}} & set({HEAVY})))'
    loaded = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.split()
    assert loaded == []


@pytest.mark.parametrize('module, allowed', [('run', set()), ('image', {'numpy', 'PIL'})])
def test_the_lowest_modules_need_little(module, allowed):
    tree = ast.parse((ROOT/'imgcls_nb'/f'{module}.py').read_text(encoding='utf-8'))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 0}
    outside = {name.split('.')[0] for name in names} - sys.stdlib_module_names - {'imgcls_nb'}
    assert outside <= allowed


def test_all_reexports_every_chapter():
    from imgcls_nb import all as everything
    for name in ('Task', 'open_image', 'load_images', 'augmentations', 'create_model', 'pretrained_model', 'image_learner',
                 'evaluate', 'load_bundle', 'export', 'compress', 'serve'):
        assert hasattr(everything, name), name


def test_no_two_chapters_give_one_name_to_two_things():
    "`from imgcls_nb.all import *` would silently keep the later one."
    import importlib
    owner = {}
    for module in ORDER:
        if module in ('workers', 'page', 'serve', 'server', 'cli'): continue  # all.py takes single names of these, or none
        for name in importlib.import_module(f'imgcls_nb.{module}').__all__:
            assert owner.setdefault(name, module) == module, f'{name} is in {owner[name]} and in {module}'
