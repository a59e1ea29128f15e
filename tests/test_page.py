"The page for people, in a real browser, in front of a real service."
import csv
import io
import os
import shutil
import socket
import subprocess
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
import uvicorn
from PIL import Image
from skimage import data as photographs
from sklearn.datasets import load_digits

from conftest import IMGCLS, OFFLINE, ROOT
from imgcls_nb.bundle import load_bundle, model_card
from imgcls_nb.image import Limits
from imgcls_nb.page import page_html, page_policy
from imgcls_nb.run import InputError
from samples import encoded, truncated_jpeg

BROWSER = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome', 'chrome'))), None)
AXE = Path(os.environ.get('AXE') or ROOT/'node_modules'/'axe-core'/'axe.min.js')  # from npm: axe-core
BUNCH = load_digits()
PHONE = dict(viewport=dict(width=360, height=740), has_touch=True, is_mobile=True)


def digit(i: int, format: str = 'PNG') -> bytes:
    "A real scanned digit as a file."
    return encoded(Image.fromarray((BUNCH.images[i] / 16 * 255).round().astype(np.uint8)), format)


def file(name: str, content: bytes, kind: str = 'image/png') -> dict:
    "A file as Playwright hands it over."
    return dict(name=name, mimeType=kind, buffer=content)


def digit_files(*which: int) -> list[dict]:
    return [file(f'digit {i}.png', digit(i)) for i in which]


def astronaut() -> dict:
    return file('astronaut.jpg', encoded(Image.fromarray(photographs.astronaut()).resize((200, 200)), 'JPEG'), 'image/jpeg')


class Front:
    "Stands before the service as a proxy does, passes everything on, and can be busy, slow, or ask for a key."
    def __init__(self, address: str, card: str):
        self.address, self.card, self.client = address, card, None
        self.reset()

    def reset(self):
        self.busy, self.retry_after, self.key, self.delay, self.asked = 0, '1', None, 0.0, []
        self.refusal_delays = []  # seconds until the first, second, … is told that it needs a key
        self.under_way = [0, 0]  # requests to predict: now, and at most

    async def __call__(self, scope, receive, send):
        if scope['type'] == 'lifespan': return await self.lifespan(receive, send)
        body, more = b'', True
        while more:
            message = await receive()
            body, more = body + message.get('body', b''), message.get('more_body', False)
        status, headers, content = await self.answer(scope, body)
        await send(dict(type='http.response.start', status=status,
                        headers=[(name.encode(), value.encode()) for name, value in headers.items()]))
        await send(dict(type='http.response.body', body=content))

    async def lifespan(self, receive, send):
        await receive()
        self.client = httpx.AsyncClient(base_url=self.address, trust_env=False, timeout=30)
        await send(dict(type='lifespan.startup.complete'))
        await receive()
        await self.client.aclose()
        await send(dict(type='lifespan.shutdown.complete'))

    async def answer(self, scope, body):
        import anyio
        path, headers = scope['path'], dict(scope['headers'])
        asks = path in ('/predict', '/info')
        if path == '/predict': self.asked.append(time.monotonic())
        if asks and self.key and headers.get(b'authorization') != f'Bearer {self.key}'.encode():
            await anyio.sleep(self.refusal_delays.pop(0) if self.refusal_delays else 0)
            return self.refusal(401, 'A key is needed.')
        if path == '/predict' and self.busy:
            self.busy -= 1
            return self.refusal(503, 'The service is busy.', **{'retry-after': self.retry_after})
        under_way = self.under_way  # a later test has another
        under_way[0] += path == '/predict'
        under_way[1] = max(under_way)
        await anyio.sleep(self.delay if path == '/predict' else 0)
        reply = await self.client.request(scope['method'], path, params=scope['query_string'].decode(), content=body)
        under_way[0] -= path == '/predict'
        return self.improved(path, reply)

    def refusal(self, status: int, sentence: str, **headers):
        reply = httpx.Response(status, json=dict(error=sentence))
        return status, {'content-type': 'application/json', **headers}, reply.content

    def improved(self, path: str, reply: httpx.Response):
        "What an older service does not have: the card, and the policy with fingerprints."
        headers = {name: reply.headers[name] for name in ('content-type', 'content-security-policy', 'retry-after') if name in reply.headers}
        if path == '/info' and reply.status_code == 404:
            return 200, {'content-type': 'application/json'}, httpx.Response(200, json=dict(card=self.card)).content
        if 'unsafe' in headers.get('content-security-policy', ''): headers['content-security-policy'] = page_policy(reply.text)
        return reply.status_code, headers, reply.content


def listening() -> socket.socket:
    sock = socket.socket()
    sock.bind(('127.0.0.1', 0))
    return sock


@pytest.fixture(scope='module')
def fronted(digits_run):
    "`imgcls serve` as a process, and the proxy before it in a thread: its address is `.url`."
    with listening() as probe: port = probe.getsockname()[1]
    process = subprocess.Popen([IMGCLS, 'serve', digits_run['bundle'], '--port', str(port)],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, **OFFLINE})
    address, deadline = f'http://127.0.0.1:{port}', time.monotonic() + 30
    while True:
        try: httpx.get(f'{address}/health', trust_env=False); break
        except httpx.TransportError:
            assert process.poll() is None and time.monotonic() < deadline, 'the service did not start'
            time.sleep(0.05)
    front, sock = Front(address, model_card(load_bundle(digits_run['bundle']).record)), listening()
    server = uvicorn.Server(uvicorn.Config(front, log_level='critical', lifespan='on'))
    thread = threading.Thread(target=server.run, kwargs=dict(sockets=[sock]), daemon=True)
    thread.start()
    while not server.started: time.sleep(0.01)
    front.url = f'http://127.0.0.1:{sock.getsockname()[1]}/'
    yield front
    server.should_exit = True
    thread.join(20)
    process.terminate()
    process.wait(20)


@pytest.fixture
def front(fronted):
    fronted.reset()
    return fronted


@pytest.fixture(scope='module')
def browser():
    sync_api = pytest.importorskip('playwright.sync_api')
    if BROWSER is None: pytest.skip('no Chromium or Chrome is installed')
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=BROWSER, args=['--no-sandbox'])
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser, front):
    "Opens the page as somebody with this screen and these settings; nothing may break or be loaded from elsewhere."
    contexts, troubles = [], []

    def is_trouble(message):  # a refusal is logged by the browser itself
        return message.type in ('error', 'warning') and 'the server responded with a status of' not in message.text \
            and 'net::ERR_FAILED' not in message.text

    def open_page(**options):
        context = browser.new_context(accept_downloads=True, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(15_000)
        page.on('console', lambda message: troubles.append(message.text) if is_trouble(message) else None)
        page.on('pageerror', lambda error: troubles.append(str(error)))
        page.on('request', lambda request: None if request.url.startswith((front.url, 'blob:', 'data:')) else troubles.append(request.url))
        page.goto(front.url)
        page.evaluate('''() => { window.said = [];
            new MutationObserver(() => said.push(document.getElementById('spoken').textContent))
                .observe(document.getElementById('spoken'), { childList: true, subtree: true }); }''')
        return page
    yield open_page
    for context in contexts: context.close()
    assert troubles == []


def settled(page, count: int) -> list[dict]:
    "The cards in order, once none is waiting."
    page.locator('.card').nth(count - 1).wait_for()
    page.wait_for_selector('.card.waiting', state='detached')
    page.wait_for_timeout(500)  # what is read out comes a moment later
    return page.evaluate('''() => [...document.querySelectorAll('.card')].map(card => ({
        state: card.className.replace('card ', ''), name: card.querySelector('h3').textContent,
        verdict: card.querySelector('.verdict')?.textContent, error: card.querySelector('.error')?.textContent,
        bars: [...card.querySelectorAll('.bars li')].map(bar => bar.innerText.split('\\n')),
        text: card.innerText, alt: card.querySelector('img')?.alt }))''')


def picture(page, name: str) -> None:
    "Keep a picture of the page, where somebody wants to look."
    if folder := os.environ.get('IMGCLS_SCREENSHOTS'): page.screenshot(path=f'{folder}/{name}.png', full_page=True)


def transfer(page, files: list[dict]):
    "What a mouse or a clipboard carries."
    described = [dict(name=each['name'], kind=each['mimeType'], content=list(each['buffer'])) for each in files]
    return page.evaluate_handle('''files => { const carried = new DataTransfer();
        for (const { name, kind, content } of files) carried.items.add(new File([new Uint8Array(content)], name, { type: kind }));
        return carried; }''', described)


def test_one_image_is_answered_beside_its_picture(visit):
    page = visit()
    picture(page, 'empty')
    page.set_input_files('#file', digit_files(3))
    [card] = settled(page, 1)
    assert (card['state'], card['name'], card['verdict'], card['alt']) == ('sure', 'digit 3.png', '3', 'Preview of digit 3.png')
    assert card['bars'][0][0] == '3' and len(card['bars']) >= 3 and all(bar[1].endswith('%') for bar in card['bars'])
    assert 'ms in all, service ' in card['text'] and 'ms (onnx)' in card['text']
    assert page.inner_text('#summary') == '1 image · 1 sure'
    assert page.evaluate('said') == [f'digit 3.png: 3, {card["bars"][0][1]}.']
    assert page.evaluate('document.querySelector(".card img").naturalWidth') == 8
    picture(page, 'one')


def test_several_keep_their_order_and_a_bad_one_keeps_its_reason(visit, front):
    front.delay = 0.1
    files = [*digit_files(0, 1), file('letter.png', b'Dear service'), astronaut(), *digit_files(4),
             file('half.jpg', truncated_jpeg(), 'image/jpeg'), file('nothing.png', b''), file('eight.tiff', digit(8, 'TIFF'), 'image/tiff'),
             *digit_files(*range(10, 20))]
    page = visit()
    page.set_input_files('#file', files)
    cards = settled(page, len(files))
    assert [card['name'] for card in cards] == [each['name'] for each in files]
    assert [card['state'] for card in cards[:8]] == ['sure', 'sure', 'refused', 'unsure', 'sure', 'refused', 'refused', 'sure']
    assert [card['verdict'] for card in cards[:8]] == ['0', '1', None, 'Not sure', '4', None, None, '8']
    assert 'not an image' in cards[2]['error'] and 'cut off' in cards[5]['error'] and 'empty' in cards[6]['error']
    assert 'unlike those that the classifier was trained on' in cards[3]['text'] and 'no preview' in cards[7]['text']
    assert 1 < front.under_way[1] <= 3
    assert page.inner_text('#summary').startswith('18 images · ') and page.inner_text('#summary').endswith('3 without an answer')
    assert page.evaluate('said') == ['Looking at 18 images.', page.inner_text('#summary').replace(' · ', ', ') + '.']
    picture(page, 'several')


def test_drop(visit):
    page = visit()
    carried = transfer(page, digit_files(5, 6))
    page.dispatch_event('h1', 'dragover', dict(dataTransfer=carried))
    assert page.evaluate('document.body.className') == 'over'
    page.dispatch_event('h1', 'drop', dict(dataTransfer=carried))
    assert [card['verdict'] for card in settled(page, 2)] == ['5', '6'] and page.evaluate('document.body.className') == ''
    page.dispatch_event('h1', 'drop', dict(dataTransfer=transfer(page, [])))
    assert 'not a file' in page.inner_text('#notice') and page.locator('.card').count() == 2


def test_paste(visit):
    page = visit()
    page.evaluate('''carried => document.activeElement.dispatchEvent(
        new ClipboardEvent('paste', { clipboardData: carried, bubbles: true }))''', transfer(page, digit_files(7)))
    assert settled(page, 1)[0]['verdict'] == '7'


def test_a_hundred_at_most(visit):
    page = visit()
    page.dispatch_event('h1', 'drop', dict(dataTransfer=transfer(page, digit_files(*range(103)))))
    assert len(settled(page, 100)) == 100 and '3 were left out' in page.inner_text('#notice')


def test_keyboard_alone(visit):
    page = visit()
    def focus(): return page.evaluate('document.activeElement.id || document.activeElement.textContent.trim()')
    page.keyboard.press('Tab')
    assert focus() == 'file' and page.evaluate('getComputedStyle(document.querySelector(".button")).outlineStyle') == 'solid'
    choosers = []
    page.on('filechooser', lambda chooser: choosers.append(chooser))
    for pressed in ('Enter', 'Space'):
        page.wait_for_timeout(300)  # until the browser asks us instead of opening its own dialogue
        page.keyboard.press(pressed)
        page.wait_for_timeout(300)
    assert len(choosers) == 2 and choosers[0].is_multiple()
    choosers[0].set_files(digit_files(1, 2))
    settled(page, 2)
    order = []
    for _ in range(4): page.keyboard.press('Tab'); order.append(focus())
    assert order == ['download', 'clear', 'About this classifier', 'Ask from a program']
    page.keyboard.press('Shift+Tab')
    page.keyboard.press('Enter')
    page.wait_for_selector('#card table')
    assert page.locator('#card h3').first.inner_text() == 'digits' and page.locator('#card li').count() > 3
    page.keyboard.press('Shift+Tab')
    assert focus() == 'clear'
    page.keyboard.press('Enter')
    assert focus() == 'file' and page.locator('.card').count() == 0 and page.locator('#results').is_hidden()


def test_phone(visit):
    page = visit(**PHONE)
    assert page.locator('text=Take a photo').is_visible() and page.get_attribute('#camera', 'capture') == 'environment'
    page.set_input_files('#camera', digit_files(9))
    page.set_input_files('#file', [astronaut(), file('a very long name without any place to break it' * 3 + '.png', b'Dear service')])
    assert [card['state'] for card in settled(page, 3)] == ['sure', 'unsure', 'refused']
    page.click('#about summary')
    page.wait_for_selector('#card table')
    assert page.evaluate('document.documentElement.scrollWidth') <= 360
    sizes = page.evaluate('''() => [...document.querySelectorAll('button, .button, summary')].map(element =>
        element.getBoundingClientRect()).filter(box => box.width).map(box => Math.min(box.width, box.height))''')
    assert len(sizes) >= 6 and min(sizes) >= 24
    picture(page, 'phone')


def test_no_camera_on_a_desk(visit):
    assert visit().locator('text=Take a photo').is_hidden()


def test_dark(visit):
    page = visit(color_scheme='dark')
    page.set_input_files('#file', [*digit_files(0), astronaut(), file('letter.png', b'Dear service')])
    settled(page, 3)
    back, ink = page.evaluate('[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]')
    assert max(map(int, back[4:-1].split(','))) < 50 < 200 < min(map(int, ink[4:-1].split(',')))
    picture(page, 'dark')


def test_nothing_moves_for_those_who_ask_for_it(visit, front):
    front.delay = 1.5
    still, moving = visit(reduced_motion='reduce'), visit()
    for page in (still, moving): page.set_input_files('#file', digit_files(0))
    moving.wait_for_selector('.looking')
    assert moving.evaluate('document.getAnimations().length') > 0 and still.evaluate('document.getAnimations().length') == 0
    settled(moving, 1)
    settled(still, 1)


def test_forced_colours_keep_the_bars(visit):
    page = visit(forced_colors='active')
    page.set_input_files('#file', digit_files(0))
    settled(page, 1)
    assert page.evaluate('getComputedStyle(document.querySelector(".track")).borderTopStyle') == 'solid'
    fill, back = page.evaluate('[".fill", "body"].map(name => getComputedStyle(document.querySelector(name)).backgroundColor)')
    assert fill != back
    picture(page, 'forced')


def test_a_busy_service_is_asked_again_by_itself(visit, front):
    front.busy = 1
    page = visit()
    page.set_input_files('#file', digit_files(3))
    page.wait_for_selector('text=The service is busy. It is asked again in')
    picture(page, 'busy')
    assert settled(page, 1)[0]['verdict'] == '3'
    first, second = front.asked
    assert 1 <= second - first < 5
    assert page.evaluate('said')[0] == 'The service is busy. It is asked again by itself.'


def test_one_refusal_holds_back_all(visit, front):
    front.busy = 1
    page = visit()
    page.set_input_files('#file', digit_files(*range(8)))
    assert [card['verdict'] for card in settled(page, 8)] == list('01234567')
    assert len(front.asked) == 9 and sum(when - front.asked[0] < 0.9 for when in front.asked) <= 3, 'those under way, then nobody for a second'


def test_three_refusals_are_one_sentence(visit, front):
    front.busy = 3
    page = visit()
    page.set_input_files('#file', digit_files(*range(8)))
    settled(page, 8)
    assert page.evaluate('said').count('The service is busy. It is asked again by itself.') == 1 and page.evaluate('said').pop() == '8 images, 8 sure.'


def test_a_service_that_stays_busy(visit, front):
    front.busy, front.retry_after = 6, '0'
    page = visit()
    page.set_input_files('#file', digit_files(3))
    [card] = settled(page, 1)
    assert card['error'] == 'The service is busy.' and len(front.asked) == 6
    page.click('text=Try again')
    assert settled(page, 1)[0]['verdict'] == '3'


def test_a_key(visit, front):
    front.key = 'sesame'
    page = visit()
    page.set_input_files('#file', digit_files(*range(5)))
    page.wait_for_selector('#ask[open]')
    assert page.evaluate('document.activeElement.id') == 'key' and len(front.asked) <= 3
    picture(page, 'key')
    page.keyboard.type('open')
    page.keyboard.press('Enter')
    page.wait_for_selector('text=This key was not accepted.')
    page.keyboard.type('ключ')
    page.keyboard.press('Enter')
    page.wait_for_selector('text=A key is one word of plain letters')
    page.fill('#key', 'sesame')
    page.click('text=Go on')
    assert [card['verdict'] for card in settled(page, 5)] == list('01234')
    page.click('#about summary')
    page.wait_for_selector('#card table')
    assert page.evaluate('[localStorage.length, sessionStorage.length, document.cookie, location.href]') == [0, 0, '', front.url]
    assert 'sesame' not in page.content() and page.input_value('#key') == ''
    page.reload()
    page.set_input_files('#file', digit_files(0))
    page.wait_for_selector('#ask[open]')


def test_who_hears_late_that_a_key_is_needed_uses_the_one_that_came_meanwhile(visit, front):
    front.key, front.refusal_delays = 'sesame', [0, 3]
    page = visit()
    page.set_input_files('#file', digit_files(0, 1))
    page.fill('#key', 'sesame')
    page.keyboard.press('Enter')
    page.wait_for_selector('.card.sure')
    assert [card['verdict'] for card in settled(page, 2)] == ['0', '1'] and page.locator('#ask').is_hidden()


def test_no_key(visit, front):
    front.key = 'sesame'
    page = visit()
    page.set_input_files('#file', digit_files(*range(5)))
    page.wait_for_selector('#ask[open]')
    page.keyboard.press('Escape')
    assert {card['error'] for card in settled(page, 5)} == {'Without a key the service does not answer.'}
    page.click('.card:nth-child(2) >> text=Try again')
    page.fill('#key', 'sesame')
    page.keyboard.press('Enter')
    assert [card['state'] for card in settled(page, 5)] == ['refused', 'sure', 'refused', 'refused', 'refused']


def test_a_service_that_is_gone(visit):
    page = visit()
    page.route('**/predict*', lambda route: route.abort())
    page.set_input_files('#file', digit_files(3))
    assert settled(page, 1)[0]['error'] == 'The service does not answer. Is it still running?'
    page.unroute('**/predict*')
    page.click('text=Try again')
    assert settled(page, 1)[0]['verdict'] == '3'


def test_an_answer_without_a_reason(visit):
    page = visit()
    page.route('**/predict*', lambda route: route.fulfill(status=502, body='<h1>Bad gateway</h1>'))
    page.set_input_files('#file', digit_files(3))
    assert settled(page, 1)[0]['error'] == 'The service said 502, without a reason.'


def test_a_large_file_is_not_sent(visit, front):
    page = visit()
    page.set_input_files('#file', file('large.png', bytes(10_000_001)))
    assert settled(page, 1)[0]['error'] == 'This file is larger than 10 MB.' and front.asked == []


def test_clear_stops_what_is_on_its_way(visit, front):
    front.delay = 8
    page = visit()
    page.set_input_files('#file', digit_files(*range(9)))
    page.wait_for_selector('.looking')
    start = time.monotonic()
    page.click('#clear')
    front.delay = 0
    page.set_input_files('#file', digit_files(7))
    [card] = settled(page, 1)
    assert time.monotonic() - start < 6, 'nobody waits for pictures that are gone'
    assert card['verdict'] == '7' and page.inner_text('#summary') == '1 image · 1 sure' and len(front.asked) <= 4


def test_csv(visit):
    page = visit()
    page.set_input_files('#file', [file('=1+1 "x", y.png', digit(2)), astronaut(), file('letter.png', b'Dear service')])
    cards = settled(page, 3)
    with page.expect_download() as download: page.click('#download')
    content = Path(download.value.path()).read_bytes()
    rows = list(csv.DictReader(io.StringIO(content.decode('utf-8-sig'), newline='')))
    assert download.value.suggested_filename == 'answers.csv' and content.startswith(b'\xef\xbb\xbf')
    assert [row['file'] for row in rows] == ['\'=1+1 "x", y.png', 'astronaut.jpg', 'letter.png']
    assert [row['sure'] for row in rows] == ['true', 'false', ''] and rows[0]['label'] == '2' and 0 < float(rows[0]['probability']) <= 1
    assert rows[1]['reason'] == 'unlike the training images' and rows[2]['error'] == cards[2]['error']


def test_words_of_strangers_stay_words(visit):
    attack = '<img src=x onerror=alert(1)><script>alert(2)</script>'
    card = f'---\ntags: [x]\n---\n# {attack}\n\n- **bold {attack}** and `code`\n\n| a \\| b | {attack} |\n|---|---|\n| 1 | \\*2\\* |\n\n' \
           f'> {attack}\n\n    {attack}\n\n[link](javascript:alert(3)) ** `'
    reply = dict(label=attack, probability=0.5, sure=False, reason=attack, runtime=attack, milliseconds=1, top=[dict(label=attack, probability=0.5)])
    page = visit()
    page.on('dialog', lambda dialog: pytest.fail('a stranger spoke'))
    page.route('**/predict*', lambda route: route.fulfill(json=reply))
    page.route('**/info', lambda route: route.fulfill(json=dict(card=card)))
    before = page.locator('script').count()
    page.set_input_files('#file', file(f'{attack}.png'.replace('/', ' '), digit(1)))
    [shown] = settled(page, 1)
    assert shown['bars'][0][0] == attack and attack in shown['text']
    page.click('#about summary')
    page.wait_for_selector('#card table')
    assert page.locator('#card h3').inner_text() == attack and page.locator('#card strong').inner_text() == f'bold {attack}'
    assert page.locator('#card th').all_inner_texts() == ['a | b', attack] and page.locator('#card td').all_inner_texts() == ['1', '*2*']
    assert page.locator('#card a').count() == page.locator('#card img').count() == 0 and page.locator('script').count() == before


def test_the_browser_enforces_the_policy(browser, front):
    "Not even whoever gets a script into the page can run it, fill in HTML, or call another server."
    context = browser.new_context()
    page = context.new_page()
    page.goto(front.url)
    ran = page.evaluate('''async () => {
        const found = [], script = document.createElement('script');
        try { script.textContent = 'window.injected = true'; document.body.append(script); } catch { }
        if (window.injected) found.push('script');
        try { document.body.insertAdjacentHTML('beforeend', '<b>x</b>'); found.push('html'); } catch { }
        try { await fetch('http://127.0.0.2:9/'); found.push('fetch'); } catch { }
        const style = document.createElement('style');
        style.textContent = 'h1 { color: rgb(1, 2, 3) !important }';
        document.head.append(style);
        if (getComputedStyle(document.querySelector('h1')).color === 'rgb(1, 2, 3)') found.push('style');
        return found; }''')
    context.close()
    assert ran == []


@pytest.mark.skipif(not AXE.exists(), reason='axe-core is not here: npm install --no-save axe-core, or its axe.min.js in AXE')
@pytest.mark.parametrize('name, options', [('light', {}), ('dark', dict(color_scheme='dark')), ('phone', PHONE),
                                           ('dark phone', dict(PHONE, color_scheme='dark'))])
def test_axe_finds_nothing_serious(visit, front, name, options):
    page = visit(reduced_motion='reduce', **options)
    page.evaluate(AXE.read_text(encoding='utf-8'))
    def violations():
        found = page.evaluate('''async () => (await axe.run()).violations.map(each => ({ id: each.id, impact: each.impact,
            nodes: each.nodes.slice(0, 3).map(node => node.html.slice(0, 200)) }))''')
        return [each for each in found if each['impact'] in ('serious', 'critical')]
    assert violations() == [], 'nothing chosen yet'
    page.set_input_files('#file', [*digit_files(0, 1), astronaut(), file('letter.png', b'Dear service')])
    settled(page, 4)
    assert violations() == [], 'answers'
    for summary in page.locator('summary').all(): summary.click()
    page.wait_for_selector('#card table')
    page.dispatch_event('h1', 'drop', dict(dataTransfer=transfer(page, [])))
    assert violations() == [], 'card and notice'
    page.route('**/predict*', lambda route: route.abort())
    page.set_input_files('#file', digit_files(2))
    settled(page, 5)
    assert violations() == [], 'a button to try again'
    page.unroute('**/predict*')
    front.key = 'sesame'
    page.set_input_files('#file', digit_files(3))
    page.wait_for_selector('#ask[open]')
    page.keyboard.press('Enter')
    assert violations() == [], 'the dialogue, with an error'


@pytest.mark.parametrize('count', [1, 20, 21, 1000])
def test_many_classes_are_cut_short(digits_run, count):
    page = page_html(renamed(digits_run, 'x', [f'class {k}' for k in range(count)]), Limits(max_bytes=2_500_000))
    assert page.count('<li>') == min(count, 21) and ('more</li>' in page) == (count > 20) and '2.5&nbsp;MB' in page


def renamed(run: dict, name: str, classes: list[str]):
    "A bundle under other names."
    import dataclasses
    bundle = load_bundle(run['bundle'])
    task = bundle.record.task.model_copy(update=dict(classes=classes))
    return dataclasses.replace(bundle, record=bundle.record.model_copy(update=dict(name=name, task=task)))


@pytest.mark.parametrize('name', ['</title><script>alert(1)</script>', '<style>*{display:none}</style>', '$script ${style} $', '"><b>', "'"])
def test_names_cannot_change_the_page(digits_run, name):
    plain, page = (page_html(renamed(digits_run, each, [each, 'b']), Limits()) for each in ('plain', name))
    assert page.count('<') == plain.count('<') and page_policy(page) == page_policy(plain)


def test_the_policy_names_one_style_and_one_script(digits_run):
    page = page_html(load_bundle(digits_run['bundle']), Limits())
    policy = page_policy(page)
    assert 'unsafe' not in policy and "default-src 'none'" in policy and policy.count("'sha256-") == 2
    for extra in ('<script>alert(1)</script>', '<SCRIPT src="x"></SCRIPT>', '<style></style>'):
        with pytest.raises(InputError): page_policy(page + extra)
    assert '//' not in page and 'innerHTML' not in page
