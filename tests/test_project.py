"What is written from something else is up to date."
import shutil
import subprocess
import sys

from conftest import ROOT


def contents(folder, pattern):
    return {path.name: path.read_text(encoding='utf-8') for path in sorted(folder.glob(pattern))}


def test_settings_and_readme_are_in_step():
    result = subprocess.run([sys.executable, ROOT/'tools'/'sync.py', '--check'], capture_output=True, text=True)
    assert result.returncode == 0, f'run `python tools/sync.py`:\n{result.stdout}'


def test_a_changed_setting_is_noticed(project_copy):
    settings = project_copy/'settings.ini'
    settings.write_text(settings.read_text().replace('version = 0.1.0', 'version = 0.1.1').replace('user = imgcls', 'user = other'))
    sync = [sys.executable, project_copy/'tools'/'sync.py']
    assert subprocess.run([*sync, '--check'], capture_output=True).returncode == 1
    subprocess.run(sync, check=True, capture_output=True)
    assert '0.1.1' in (project_copy/'imgcls_nb'/'__init__.py').read_text()
    assert 'github.com/imgcls/' not in (project_copy/'README.md').read_text() + (project_copy/'nbs'/'02_data.ipynb').read_text()
    assert subprocess.run([*sync, '--check'], capture_output=True).returncode == 0


def test_the_library_is_what_the_notebooks_export(project_copy):
    before = contents(project_copy/'imgcls_nb', '*.py')
    subprocess.run([shutil.which('nbdev-export')], cwd=project_copy, check=True, capture_output=True)
    assert contents(project_copy/'imgcls_nb', '*.py') == before, 'run `nbdev-export`'


def test_the_notebooks_are_clean(project_copy):
    before = contents(project_copy/'nbs', '*.ipynb')
    subprocess.run([shutil.which('nbdev-clean')], cwd=project_copy, check=True, capture_output=True)
    assert contents(project_copy/'nbs', '*.ipynb') == before, 'run `nbdev-clean`'


def test_links_between_pages_lead_somewhere():
    import re
    for path in [*(ROOT/'nbs').glob('*.ipynb'), ROOT/'README.md']:
        for link in re.findall(r'\]\(([\w/]+\.(?:ipynb|png|svg))\)', path.read_text(encoding='utf-8')):
            assert (path.parent/link).exists(), f'{path.name} links to {link}'
