"The built wheel installs and works without the repository."
import configparser
import subprocess
import sys
import zipfile

import pytest

from conftest import ROOT


@pytest.fixture
def wheel(project_copy, tmp_path):
    "The wheel, built without a network."
    command = [sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps', '--no-build-isolation', '-w', tmp_path, project_copy]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return next(tmp_path.glob('*.whl'))


def test_the_wheel_holds_the_library_alone(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split('/')[0].split('-')[0] for name in names} == {'imgcls_nb'}
    assert any(name.endswith('LICENSE') for name in names)


def test_the_installed_wheel_imports_and_runs(wheel, tmp_path):
    subprocess.run([sys.executable, '-m', 'pip', 'install', '-q', '--no-deps', '--target', str(tmp_path/'site'), str(wheel)],
                   check=True, capture_output=True)
    code = ('import sys; sys.path.insert(0, "site"); import imgcls_nb, imgcls_nb.all; from imgcls_nb.cli import main\n'
            'assert "site" in imgcls_nb.__file__\ntry: main(["--version"])\nexcept SystemExit as end: sys.exit(end.code)')
    result = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    settings = configparser.ConfigParser(interpolation=None)
    settings.read(ROOT/'settings.ini', encoding='utf-8')
    assert result.stdout.strip() == f'imgcls_nb {settings["DEFAULT"]["version"]}'


def test_the_command_is_installed(wheel):
    text = zipfile.ZipFile(wheel).read(next(n for n in zipfile.ZipFile(wheel).namelist() if n.endswith('entry_points.txt')))
    assert 'imgcls = imgcls_nb.cli:main' in text.decode()
