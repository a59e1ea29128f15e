"""Write what follows from settings.ini and nbs/index.ipynb: pyproject.toml, the version, README.md, badges and links,
and in each chapter the line that leads to its neighbours, in the order of _quarto.yml.

    python tools/sync.py           # after editing settings.ini or nbs/index.ipynb
    python tools/sync.py --check   # exit 1 and name the files that are out of date
"""
import argparse
import configparser
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HEADER = '# Written from settings.ini by `python tools/sync.py`. Edit settings.ini instead.\n'
STATUS = {'3': '3 - Alpha', '4': '4 - Beta', '5': '5 - Production/Stable'}
LICENSES = {'apache2': 'Apache-2.0'}
NBDEV_KEYS = ('nbs_path', 'doc_path', 'lib_path', 'branch', 'title', 'tst_flags')
NBDEV_FLAGS = ('custom_sidebar', 'jupyter_hooks')
NBDEV_LISTS = ('allowed_cell_metadata_keys',)


def settings() -> dict[str, str]:
    "The `[DEFAULT]` section of settings.ini."
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(ROOT/'settings.ini', encoding='utf-8')
    return dict(parser['DEFAULT'])


def toml_list(values: list[str]) -> str:
    "A TOML list, one value a line."
    return '[\n' + ''.join(f'    {json.dumps(value)},\n' for value in values) + ']'


def lines(value: str) -> list[str]:
    "One requirement a line; it may have spaces in it."
    return [line.strip() for line in value.splitlines() if line.strip()]


def extras(s: dict[str, str]) -> dict[str, list[str]]:
    "`dev_requirements` is the extra `dev`, `edge_requirements` the extra `edge`, and so on."
    return {key.removesuffix('_requirements'): lines(value) for key, value in s.items() if key.endswith('_requirements')}


def pyproject(s: dict[str, str]) -> str:
    "pyproject.toml: what pip and nbdev read."
    quote = json.dumps
    site, code = f'https://{s["user"]}.github.io/{s["repo"]}/', f'https://github.com/{s["user"]}/{s["repo"]}'
    classifiers = [f'Development Status :: {STATUS[s["status"]]}', f'Intended Audience :: {s["audience"]}',
                   f'Natural Language :: {s["language"]}', 'Programming Language :: Python :: 3 :: Only',
                   'Topic :: Scientific/Engineering :: Image Recognition']
    author = {'name': s['author'], **({'email': s['author_email']} if s['author_email'] else {})}
    scripts = [line.split('=') for line in s['console_scripts'].split()]
    nbdev = ([f'{key} = {quote(s[key])}' for key in NBDEV_KEYS]
             + [f'{key} = {s[key].lower()}' for key in NBDEV_FLAGS]
             + [f'{key} = {quote(s[key].split())}' for key in NBDEV_LISTS])
    return '\n'.join([
        HEADER, '[build-system]', 'requires = ["setuptools>=77"]', 'build-backend = "setuptools.build_meta"', '',
        '[project]', f'name = {quote(s["lib_name"])}', 'dynamic = ["version"]', f'description = {quote(s["description"])}',
        'readme = "README.md"', f'requires-python = ">={s["min_python"]}"', f'license = {quote(LICENSES[s["license"]])}',
        'license-files = ["LICENSE"]',
        'authors = [{' + ', '.join(f'{key} = {quote(value)}' for key, value in author.items()) + '}]',
        f'keywords = {toml_list(s["keywords"].split())}', f'classifiers = {toml_list(classifiers)}',
        f'dependencies = {toml_list(lines(s["requirements"]))}', '',
        '[project.optional-dependencies]', *(f'{name} = {toml_list(needs)}' for name, needs in extras(s).items()), '',
        '[project.urls]', f'Repository = {quote(code)}', f'Documentation = {quote(site)}', '',
        '[project.scripts]', *(f'{name} = {quote(target)}' for name, target in scripts), '',
        '[project.entry-points.nbdev]', f'{s["lib_path"]} = "{s["lib_path"]}._modidx:d"', '',
        '[tool.setuptools.dynamic]', f'version = {{attr = "{s["lib_path"]}.__version__"}}', '',
        '[tool.setuptools.packages.find]', f'include = ["{s["lib_path"]}"]', '',
        '[tool.nbdev]', *nbdev, '',
        '[tool.pytest.ini_options]', 'testpaths = ["tests"]',
        'addopts = "-m \'not slow and not edge and not frameworks and not network and not ray\' --strict-markers -n auto --dist worksteal"',
        'markers = [', '    "slow: takes minutes; run with `pytest -m slow`",',
        '    "edge: needs the extra `edge`",', '    "frameworks: needs the extra `frameworks`",',
        '    "network: downloads; run with `pytest -m network`",',
        '    "ray: needs the extra `ray`",', ']', '',
        '[tool.ruff]', 'line-length = 110', 'target-version = "py310"', '',
        '[tool.ruff.lint]', 'select = ["E", "F", "I", "B", "UP"]',
        '# Notebook style: one-line bodies; cells import where they need to; fastai names are re-exported by star.',
        'ignore = ["E701", "E702", "F403", "F405", "E402", "I001", "B008", "B905"]', '',
        '# nbdev writes long `__all__` lines; a test holds the cells themselves to 110.',
        '[tool.ruff.lint.pycodestyle]', 'max-line-length = 130', '',
        '[tool.ruff.lint.per-file-ignores]', '"imgcls_nb/_modidx.py" = ["E501"]', '"imgcls_nb/all.py" = ["F401"]', '"tests/*" = ["E501"]', '"tools/*" = ["E501"]', ''])


def versioned(s: dict[str, str]) -> str:
    "The package's `__init__.py`."
    return f'__version__ = "{s["version"]}"\n'


def linked(text: str, s: dict[str, str]) -> str:
    "A notebook's or a page's text with the owner's name in every badge and link as settings.ini has it."
    owner, name = s['user'], s['repo']
    for pattern, link in [(r'github\.com/[\w.-]+/' + name, f'github.com/{owner}/{name}'),
                          (r'colab\.research\.google\.com/github/[\w.-]+/' + name, f'colab.research.google.com/github/{owner}/{name}'),
                          (r'(?<![\w-])[\w-]{1,40}\.github\.io/' + name, f'{owner}.github.io/{name}')]:
        text = re.sub(pattern, link, text)
    return text


def chapters() -> list[str]:
    "The notebooks in the order of the site's sidebar; the home page is the first."
    return re.findall(r'- (\w+\.ipynb)$', (ROOT/'_quarto.yml').read_text(encoding='utf-8'), re.M)


def neighbours(name: str) -> str:
    "The last line of a chapter: where it comes from and where it goes on."
    order = chapters()
    place = order.index(name)
    def link(word: str, other: str) -> str:
        first = json.loads((ROOT/'nbs'/other).read_text(encoding='utf-8'))['cells'][0]['source'][0]
        return f'[Home]({other})' if other == order[0] else f'[{word}: {first.strip().removeprefix("# ")}]({other})'

    return f'{link("Previous", order[place - 1])} · {link("Next", (order + order[:1])[place + 1])}'


def in_order(path: Path, text: str) -> str:
    "A notebook's text with that line at its end."
    if path.name not in chapters()[1:]: return text
    *_, last = re.finditer(r'^ +"(\[(Home|Previous|Next).*\.ipynb\)[^"\n]*)"$', text, re.M)
    return text[:last.start(1)] + json.dumps(neighbours(path.name), ensure_ascii=False)[1:-1] + text[last.end(1):]


def readme(s: dict[str, str]) -> str:
    "README.md: the home page's text and outputs as Markdown, without Quarto. Pictures are files in nbs/images."
    nb = json.loads((ROOT/'nbs'/'index.ipynb').read_text(encoding='utf-8'))
    parts = ['<!-- Written from nbs/index.ipynb by `python tools/sync.py`. Edit the notebook instead. -->']
    for cell in nb['cells']:
        source = ''.join(cell['source'])
        if cell['cell_type'] == 'markdown': parts.append(source)
        elif cell['cell_type'] == 'code' and not re.search(r'^#\|\s*hide', source, re.M): parts += code_cell(cell, source)
    text = linked('\n\n'.join(parts) + '\n', s)
    text = re.sub(r'\]\(images/', '](nbs/images/', text)
    return re.sub(r'\]\((\w+\.ipynb)\)', r'](nbs/\1)', text)


def code_cell(cell: dict, source: str) -> list[str]:
    "A code cell and its text outputs as Markdown."
    code = '\n'.join(line for line in source.splitlines() if not line.startswith('#|'))
    parts = [f'```python\n{code}\n```']
    for output in cell.get('outputs', []):
        data = output.get('data', {})
        text = data.get('text/markdown') or data.get('text/plain') or output.get('text')
        if text and not ''.join(text).startswith('<'): parts.append(''.join(text) if 'text/markdown' in data else f'```text\n{"".join(text).rstrip()}\n```')
    return parts


def targets(s: dict[str, str]) -> dict[Path, str]:
    "Every file that this command writes, with its content."
    notebooks = {path: in_order(path, linked(path.read_text(encoding='utf-8'), s)) for path in sorted((ROOT/'nbs').glob('*.ipynb'))}
    return {ROOT/'pyproject.toml': pyproject(s), ROOT/s['lib_path']/'__init__.py': versioned(s), **notebooks,
            ROOT/'README.md': readme(s), ROOT/'_quarto.yml': linked((ROOT/'_quarto.yml').read_text(encoding='utf-8'), s)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--check', action='store_true', help='change nothing; exit 1 if a file is out of date')
    check = parser.parse_args().check
    stale = {path: text for path, text in targets(settings()).items()
             if not path.exists() or path.read_text(encoding='utf-8') != text}
    for path, text in stale.items():
        print(f'{"out of date" if check else "wrote"}: {path.relative_to(ROOT)}')
        if not check: path.write_text(text, encoding='utf-8')
    return 1 if check and stale else 0


if __name__ == '__main__': sys.exit(main())
