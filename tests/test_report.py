"The report as a person gets it: one file, opened from disk in a browser, on a desk, on a phone, on paper."
import os
import shutil

import numpy as np
import pandas as pd
import pytest

from imgcls_nb.data import digits, from_arrays
from imgcls_nb.evaluate import Report, report_html

BROWSER = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome', 'chrome'))), None)
LOG = pd.DataFrame(dict(train_loss=[1.2, 0.6], valid_loss=[0.9, 0.5], accuracy=[0.7, 0.9]))


def answered(data, seed: int = 0) -> Report:
    "A report on made-up answers, most of them right."
    rows = data.where('test')
    targets, rng = data.targets(rows), np.random.default_rng(seed)
    logits = rng.normal(size=(len(rows), len(data.classes)))
    logits[np.arange(len(rows)), targets] += 3
    powers = np.exp(logits)
    return Report(data, rows, targets, (powers / powers.sum(1, keepdims=True)).astype(np.float32))


def many_classes():
    "Forty classes with long names, colour photographs of noise, in groups."
    pixels = np.random.default_rng(0).integers(0, 256, (800, 48, 64, 3), dtype=np.uint8)
    labels = [f'species {k % 40} of a family with a long name 名' for k in range(800)]
    return from_arrays(pixels, labels, groups=[str(k // 2 // 40 * 40 + k % 40) for k in range(800)]).split()


@pytest.fixture(scope='module')
def browser():
    sync_api = pytest.importorskip('playwright.sync_api')
    if BROWSER is None: pytest.skip('no Chromium or Chrome is installed')
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=BROWSER, args=['--no-sandbox'])
        yield chromium
        chromium.close()


@pytest.mark.parametrize('name, make', [('digits', lambda: digits().split()), ('many', many_classes)])
def test_a_report_needs_nothing_but_itself(name, make, browser, tmp_path):
    "No request, no message on the console, no picture without a text, no sideways scrolling on a phone, and it prints."
    file = tmp_path/'report.html'
    file.write_text(report_html(answered(make()), LOG), encoding='utf-8')
    assert file.stat().st_size < 5_000_000
    troubles = []
    def note(request):
        if not request.url.startswith(('file:', 'data:')): troubles.append(request.url)
    for width in (1100, 360):
        page = browser.new_page(viewport=dict(width=width, height=800))
        page.on('console', lambda message: troubles.append(message.text))
        page.on('pageerror', lambda error: troubles.append(str(error)))
        page.on('request', note)
        page.goto(file.as_uri())
        assert page.evaluate('document.documentElement.scrollWidth') <= width
        assert page.evaluate('[...document.images].every(i => i.alt.length > 10 && i.naturalWidth > 0)')
        assert page.evaluate('document.images.length') >= 7 and troubles == []
        if folder := os.environ.get('IMGCLS_SCREENSHOTS'): page.screenshot(path=f'{folder}/report-{name}-{width}.png', full_page=True)
    assert len(page.pdf(format='A4')) > 20_000
    if folder := os.environ.get('IMGCLS_SCREENSHOTS'): page.pdf(path=f'{folder}/report-{name}.pdf', format='A4')


def test_groups_are_named_in_the_report():
    report = answered(many_classes())
    assert f'in {len(set(report.groups))} groups' in report.title and report.title in report_html(report)
