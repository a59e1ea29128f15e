"Strangers who mean harm: files and requests that no honest program sends. Each gets an answer, and the next guest too."
import gzip
import io
import json
import random
import re
import socket
import struct
import sys
import time
import zipfile
import zlib

import numpy as np
import psutil
import pytest
from PIL import Image

from conftest import free_port, serving, started
from samples import encoded, in_mode, patch, rotated_exif
from test_images import png_that_claims

HOST = b'Host: localhost\r\n'
BOUNDARY = b'Content-Type: multipart/form-data; boundary=x\r\n'
LEAKS = re.compile(r'Traceback|\.py\b|site-packages|/(home|usr|tmp|work|root|var|etc)\b|0x[0-9a-f]{6}|object at')


# ---- files ----

def chunk(kind: bytes, data: bytes) -> bytes:
    "A piece of a PNG."
    return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))


def png_with(*chunks: bytes) -> bytes:
    "A good small PNG with more chunks behind its header."
    good = encoded(patch('brick', 1, 16), 'PNG')
    return good[:33] + b''.join(chunks) + good[33:]


def bmp(width: int, height: int, bits: int = 24, colours: int = 0) -> bytes:
    "A BMP whose header claims a size; 30 bytes follow."
    return b'BM' + struct.pack('<IHHIIiiHHIIiiII', 84, 0, 0, 54, 40, width, height, 1, bits, 0, 0, 0, 0, colours, 0) + b'\0' * 30


def tiff(*tags: tuple[int, int, int, int]) -> bytes:
    "A TIFF of nothing but a list of tags: number, kind, count, value."
    body = b''.join(struct.pack('<HHII', *tag) for tag in tags)
    return b'II*\0' + struct.pack('<IH', 8, len(tags)) + body + b'\0' * 4 + b'\0' * 64


def webp_that_claims(width: int, height: int) -> bytes:
    "A WebP of the extended kind that promises a canvas and has no picture."
    canvas = (width - 1).to_bytes(3, 'little') + (height - 1).to_bytes(3, 'little')
    return b'RIFF' + struct.pack('<I', 22) + b'WEBPVP8X' + struct.pack('<I', 10) + b'\x02\0\0\0' + canvas


def gif_of_many_frames(frames: int) -> bytes:
    "One frame, again and again."
    data = encoded(Image.new('P', (4, 4)), 'GIF')
    start = data.index(b',', 13 + 3 * 2)
    return data[:start] + data[start:-1] * frames + b';'


def many_scans(count: int) -> bytes:
    "A progressive JPEG whose last scan is repeated."
    data = encoded(patch('gravel', 3, 64), 'JPEG', progressive=True)
    last = data.rindex(b'\xff\xda')
    return data[:last] + data[last:-2] * count + data[-2:]


def zip_of(name: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, 'w') as archive: archive.writestr(name, 'echo hello')
    return buffer.getvalue()


def files() -> dict[str, tuple[bytes, set[int]]]:
    "Name, content, and the answers that are right for it."
    rng, picture = np.random.default_rng(1), patch('grass', 5, 64)
    def noise(n): return rng.integers(0, 256, n, np.uint8).tobytes()
    good, refused, broken, large = {200}, {415}, {415, 422}, {413}
    found = {'nothing': (b'', {422}), 'one byte': (b'\xff', refused), 'noise': (noise(5000), refused), 'zeros': (bytes(5000), refused)}
    for format in ('JPEG', 'PNG', 'WEBP', 'GIF', 'BMP', 'TIFF'):
        data = encoded(picture, format)
        for part in (4, 20, len(data) // 2, len(data) - 40): found[f'{format} cut after {part}'] = data[:part], broken
        found[f'{format} with another magic'] = b'XXXX' + data[4:], broken
        for seed in range(3):  # a few bytes changed
            damaged = np.frombuffer(data, np.uint8).copy()
            damaged[rng.integers(8, len(data), 25)] = rng.integers(0, 256, 25)
            found[f'{format} damaged {seed}'] = damaged.tobytes(), {200, 413, 415, 422}
    jpeg, png = encoded(picture, 'JPEG'), encoded(picture, 'PNG')
    found |= {
        'GIF and JavaScript': (b'GIF89a/*' + noise(20) + b'*/=1;alert(1)', {413, 415, 422}), 'PNG and ZIP': (png + zip_of('a.sh'), good),
        'JPEG and HTML': (jpeg + b'<html><script>alert(1)</script></html>', good), 'PDF': (b'%PDF-1.7\n' + jpeg, refused),
        'HTML': (b'<!doctype html><img src=x onerror=alert(1)>', refused), 'ZIP': (zip_of('photo.jpg'), refused),
        'SVG': (b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>', refused),
        'SVG of entities': (b'<!DOCTYPE x [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;&a;">]><svg>&b;</svg>', refused),
        'HEIC': (b'\0\0\0\x18ftypheic\0\0\0\0mif1heic' + noise(50), refused), 'AVIF': (b'\0\0\0\x1cftypavif' + noise(50), refused),
        'ICO': (encoded(Image.new('RGB', (16, 16)), 'ICO'), refused), 'PSD': (b'8BPS\0\1' + bytes(6) + noise(60), refused),
        'EPS': (b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) (r) file', refused), 'TGA': (encoded(picture, 'TGA'), refused),
        'PPM': (encoded(picture, 'PPM'), refused), 'ELF': (b'\x7fELF' + noise(60), refused), 'pickle': (b'\x80\x04cos\nsystem\n(S"ls"\ntR.', refused),
        'text with a path': (b'../../../../etc/passwd', refused), 'an address': (b'http://169.254.169.254/latest/meta-data', refused),
        'PNG of 3.6 gigapixels': (png_that_claims(60_000, 60_000), large), 'PNG of 2**31 a side': (png_that_claims(2**31 - 1, 2**31 - 1), {413, 422}),
        'PNG of zeros': (encoded(Image.new('L', (12_000, 12_000)), 'PNG'), large), 'PNG without a side': (png_that_claims(0, 10), {413, 415, 422}),
        'PNG that ends early': (png_that_claims(3000, 3000), {422}), 'WebP claims 16,384 a side': (webp_that_claims(16_384, 16_384), {413, 415, 422}),
        'GIF claims 65,535 a side': (b'GIF89a' + struct.pack('<HH', 65535, 65535) + bytes(3) + b',' + bytes(20) + b';', {413, 422}),
        'GIF of 5,000 frames': (gif_of_many_frames(5000), good), 'BMP of negative height': (bmp(4, -2), {200, 422}),
        'BMP of negative width': (bmp(-4, 2), {413, 415, 422}), 'BMP of 2**31': (bmp(2**31 - 1, 2**31 - 1), {413, 422}),
        'BMP of -2**31': (bmp(4, -2**31), {413, 422}), 'BMP of 2**32 colours': (bmp(4, 2, 8, 2**32 - 1), {413, 415, 422}), 'BMP of 77 bits': (bmp(4, 2, 77), broken),
        'TIFF with huge strips': (tiff((256, 4, 1, 8), (257, 4, 1, 8), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, 2**31),
                                       (277, 3, 1, 1), (278, 4, 1, 2**31), (279, 4, 1, 2**32 - 1)), {200, 413, 415, 422}),
        'TIFF with huge tiles': (tiff((256, 4, 1, 8), (257, 4, 1, 8), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (277, 3, 1, 1),
                                      (322, 4, 1, 2**20), (323, 4, 1, 2**20), (324, 4, 1, 8), (325, 4, 1, 64)), {413, 415, 422}),
        'TIFF of 2**32 values': (tiff((256, 4, 2**32 - 1, 8), (257, 4, 1, 8)), {413, 415, 422}),
        'TIFF whose list is its own next': (b'II*\0' + struct.pack('<IH', 8, 0) + struct.pack('<I', 8), broken),
        'TIFF beyond its end': (b'II*\0' + struct.pack('<I', 2**32 - 1), broken),
        'EXIF rubbish': (encoded(picture, 'JPEG', exif=b'Exif\0\0' + noise(500)), good), 'EXIF turn 6': (encoded(picture, 'JPEG', exif=rotated_exif()), good),
        'EXIF turn 99': (encoded(picture, 'JPEG', exif=rotated_exif(99)), good), 'EXIF turn 65,535': (encoded(picture, 'JPEG', exif=rotated_exif(65_535)), good),
        'EXIF in a loop': (encoded(picture, 'JPEG', exif=b'Exif\0\0II*\0\x08\0\0\0\0\0\x08\0\0\0'), good),
        'ICC rubbish': (encoded(picture, 'JPEG', icc_profile=noise(3000)), good), 'ICC that claims 4 GB': (encoded(picture, 'PNG', icc_profile=b'\xff' * 200), good),
        'animated WebP': (encoded(picture, 'WEBP', save_all=True, append_images=[patch('brick', i, 64) for i in range(4)]), good),
        'animated PNG': (encoded(picture, 'PNG', save_all=True, append_images=[patch('brick', i, 64) for i in range(4)]), good),
        '16 bits': (encoded(in_mode(picture, 'I;16'), 'PNG'), good), 'CMYK': (encoded(picture.convert('CMYK'), 'JPEG'), good),
        'floats': (encoded(Image.fromarray(np.full((8, 8), np.nan, np.float32)), 'TIFF'), good),
        'a transparent palette': (encoded(picture.convert('P'), 'PNG', transparency=bytes(range(256))), good),
        '1 x 65,500': (encoded(Image.new('L', (1, 65_500)), 'PNG'), good), '65,500 x 1': (encoded(Image.new('RGB', (65_500, 1)), 'PNG'), good),
        'one pixel': (encoded(Image.new('RGB', (1, 1)), 'GIF'), good), '65,500 x 300 JPEG': (encoded(Image.new('L', (65_500, 300)), 'JPEG'), good),
        'JPEG of 2,000 scans': (many_scans(2000), {422}), 'JPEG of markers': (b'\xff\xd8' + b'\xff\xe0\0\x02' * 200_000, broken),
        'JPEG of 0xff': (b'\xff\xd8' + b'\xff' * 3_000_000, broken), 'PNG of 20,000 chunks': (png_with(*[chunk(b'tEXt', b'a\0b')] * 20_000), {200, 422}),
        'zTXt bomb': (png_with(chunk(b'zTXt', b'a\0\0' + zlib.compress(bytes(200_000_000), 9))), {200, 422}),
        'iTXt bombs': (png_with(*[chunk(b'iTXt', b'a\0\1\0\0\0' + zlib.compress(bytes(900_000), 9))] * 300), {200, 422}),
        'iCCP bomb': (png_with(chunk(b'iCCP', b'a\0\0' + zlib.compress(bytes(200_000_000), 9))), {200, 422}),
        'IDAT bomb': (b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', 9, 9, 8, 2, 0, 0, 0))
                      + chunk(b'IDAT', zlib.compress(bytes(100_000_000), 9)) + chunk(b'IEND', b''), {200, 422}),
        'a chunk of 2**31 bytes': (b'\x89PNG\r\n\x1a\n' + struct.pack('>I', 2**31 - 1) + b'IHDR' + bytes(30), broken),
        'too many bytes': (bytes(10_000_001), large)}
    return found


# ---- requests ----

def post(data: bytes, headers: bytes = b'', target: bytes = b'/predict') -> bytes:
    return b'POST ' + target + b' HTTP/1.1\r\n' + HOST + headers + b'Content-Length: %d\r\n\r\n' % len(data) + data


def part(data: bytes, disposition: bytes = b'name="file"; filename="a.png"', more: bytes = b'') -> bytes:
    return b'--x\r\nContent-Disposition: form-data; ' + disposition + b'\r\n' + more + b'\r\n' + data + b'\r\n'


def form(*parts: bytes, headers: bytes = BOUNDARY) -> bytes: return post(b''.join(parts) + b'--x--\r\n', headers)


def get(target: bytes = b'/health', headers: bytes = b'', method: bytes = b'GET') -> bytes:
    return method + b' ' + target + b' HTTP/1.1\r\n' + HOST + headers + b'\r\n'


def chunked(*pieces: bytes) -> bytes:
    return b'POST /predict HTTP/1.1\r\n' + HOST + b'Transfer-Encoding: chunked\r\n\r\n' + b''.join(pieces)


def requests() -> dict[str, tuple[bytes, set[int]]]:
    "Name, bytes on the wire, and the right answers; 0 stands for a closed connection without one."
    good = encoded(patch('brick', 9, 32), 'PNG')
    def ask(headers, data=good): return b'POST /predict HTTP/1.1\r\n' + HOST + headers + b'\r\n' + data
    bad, closed, fine = {400}, {0, 400}, {200}
    found = {
        'no file': (form(part(b'x', b'name="other"')), bad), '17 files': (form(*[part(good)] * 17), bad), '10,000 parts': (form(*[part(b'')] * 10_000), bad),
        '10,000 fields': (form(*[part(b'', b'name="a"')] * 10_000), bad), 'a field of 2 MB': (form(part(bytes(2_000_000), b'name="a"'), part(good)), bad),
        'a huge field name': (form(part(good, b'name="' + b'a' * 200_000 + b'"; filename=b')), bad),
        'a huge file name': (form(part(good, b'name="file"; filename="' + b'b' * 3000 + b'"')), {200, 400}),
        '20,000 headers in a part': (form(part(good, more=b'A: b\r\n' * 20_000)), bad), 'no boundary': (form(part(good), headers=b'Content-Type: multipart/form-data\r\n'), bad),
        'an empty boundary': (form(part(good), headers=b'Content-Type: multipart/form-data; boundary=\r\n'), bad),
        'another boundary': (form(part(good), headers=b'Content-Type: multipart/form-data; boundary=y\r\n'), bad),
        'a huge boundary': (form(part(good), headers=b'Content-Type: multipart/form-data; boundary=' + b'b' * 5000 + b'\r\n'), bad),
        'a boundary of rubbish': (form(part(good), headers=b'Content-Type: multipart/form-data; boundary="\xe4\xb8\xad;\xff\r\n'), bad),
        'an unknown charset': (form(part(good), headers=BOUNDARY[:-2] + b'; charset=klingon\r\n'), fine),
        'a charset that takes minutes': (form(part(b'a' * 900_000 + b'-' + b'b9' * 60_000, b'name="a"'), part(good), headers=BOUNDARY[:-2] + b'; charset=punycode\r\n'), {200, 400}),
        'a form in a form': (form(part(form(part(good)), more=b'Content-Type: multipart/mixed; boundary=z\r\n')), {200, 415, 422}),
        'a form without an end': (post(part(good)[:-20], BOUNDARY), bad), 'a form of line ends': (post(b'\r\n' * 500_000, BOUNDARY), bad),
        'much after the end': (post(part(good) + b'--x--\r\n' + b'\r\n' * 500_000, BOUNDARY), {200, 400}),
        'a path as file name': (form(part(good, b'name="file"; filename="../../../etc/passwd"')), fine), 'NUL in the name': (form(part(good, b'name="file"; filename="a\0b.png"')), {200, 400}),
        'rubbish as disposition': (form(part(good, b'name=;;;"\\"; filename')), bad), 'no disposition': (form(b'--x\r\n\r\n' + good + b'\r\n'), bad),
        'base64 in a form': (form(part(b'iVBORw0KGgo=', more=b'Content-Transfer-Encoding: base64\r\n')), refused := {415, 422}),
        'a form that is gzip': (post(gzip.compress(part(good)), BOUNDARY + b'Content-Encoding: gzip\r\n'), bad), 'gzip': (post(gzip.compress(good), b'Content-Encoding: gzip\r\n'), refused),
        'a gzip bomb': (post(gzip.compress(bytes(100_000_000)), b'Content-Encoding: gzip\r\n'), refused),
        'negative length': (ask(b'Content-Length: -5\r\n'), closed), 'length of words': (ask(b'Content-Length: many\r\n'), closed), 'length 1e3': (ask(b'Content-Length: 1e3\r\n'), closed),
        'length of 400 digits': (ask(b'Content-Length: ' + b'9' * 400 + b'\r\n'), closed), 'two lengths': (ask(b'Content-Length: 5\r\nContent-Length: %d\r\n' % len(good)), closed),
        'too short a length': (ask(b'Content-Length: 50\r\n', good), {415, 422}), 'a length of 1 TB': (ask(b'Content-Length: 1000000000000\r\n'), {413}),
        'length and chunks': (ask(b'Content-Length: 5\r\nTransfer-Encoding: chunked\r\n', b'0\r\n\r\n'), closed), 'chunks of rubbish': (chunked(b'zz\r\nhello\r\n0\r\n\r\n'), closed),
        'a chunk of 2**64': (chunked(b'FFFFFFFFFFFFFFFFF\r\nhello'), closed), 'a negative chunk': (chunked(b'-1\r\nhello\r\n0\r\n\r\n'), closed),
        'chunks of one byte': (chunked(*[b'1\r\n' + good[i:i + 1] + b'\r\n' for i in range(len(good))], b'0\r\n\r\n'), fine),
        'an endless trailer': (chunked(b'1\r\na\r\n0\r\nA: ', b'a' * 3_000_000), {0, 400, 431}), 'endless trailers': (chunked(b'1\r\na\r\n0\r\n', b'A: b\r\n' * 500_000), {0, 400, 431}),
        'an unknown encoding': (b'POST /predict HTTP/1.1\r\n' + HOST + b'Transfer-Encoding: rot13\r\n\r\nabc', closed),
        'HTTP/1.0': (b'POST /predict HTTP/1.0\r\nContent-Length: %d\r\n\r\n' % len(good) + good, fine), 'HTTP/0.9': (b'GET /health\r\n\r\n', {0, 200, 400}), 'HTTP/2': (b'PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n', closed),
        'HTTP/9.9': (b'GET /health HTTP/9.9\r\n' + HOST + b'\r\n', closed), 'garbage': (random.Random(3).randbytes(4000) + b'\r\n\r\n', closed), 'NULs': (bytes(4000), closed),
        'TLS': (b'\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03' + random.Random(4).randbytes(507), closed), 'SSH': (b'SSH-2.0-OpenSSH_9.6\r\n', closed),
        'endless headers': (b'GET /health HTTP/1.1\r\n' + b'A: b\r\n' * 200_000, {0, 431}), 'an endless header': (b'GET /health HTTP/1.1\r\nA: ' + b'a' * 2_000_000, {0, 431}),
        'a huge address': (get(b'/' + b'a' * 60_000), {404, 431}), 'a huger address': (b'GET /' + b'a' * 2_000_000, {0, 400, 431}), 'a header without name': (get(headers=b': b\r\n'), closed),
        'a folded header': (get(headers=b'A: b\r\n c\r\n'), {0, 200, 400}), 'a NUL in a header': (get(headers=b'A: b\0c\r\n'), closed), 'no host': (b'GET /health HTTP/1.1\r\n\r\n', {200, 400}),
        'a path up': (get(b'/../../etc/passwd'), {404}), 'a hidden path up': (get(b'/%2e%2e/%2e%2e/etc/passwd'), {404}), 'NUL in the address': (get(b'/%00'), {404}),
        'bytes in the address': (get(b'/\xff\xfe'), {0, 400, 404}), 'another host': (get(b'http://elsewhere.example/health'), fine), 'two slashes': (get(b'//health'), {400, 404}),
        'a script in the address': (get(b'/<script>alert(1)</script>'), {0, 400, 404}), 'expect': (post(good, b'Expect: 100-continue\r\n'), fine),
        'expect the moon': (post(good, b'Expect: the-moon\r\n'), {200, 417}), 'h2c': (get(headers=b'Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AA\r\n'), fine),
        'websocket': (get(b'/predict', b'Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AA==\r\n'), {405}),
        'an id with a line end': (get(headers=b'X-Request-ID: a%0d%0aSet-Cookie: b\r\n'), fine), 'an id of 5,000': (get(headers=b'X-Request-ID: ' + b'a' * 5000 + b'\r\n'), fine),
        'an id of bytes': (get(headers=b'X-Request-ID: \xff\xfe\r\n'), fine), 'a key of bytes': (get(headers=b'Authorization: Bearer \xff\xe4\r\n'), fine),
        'rubbish types': (post(good, b'Content-Type: \xff/;;;=\r\n'), fine), 'a type of 50,000': (post(good, b'Content-Type: multipart/form-data' + b';a=b' * 12_000 + b'\r\n'), {400, 431}),
        'a body with GET': (get(headers=b'Content-Length: 5\r\n') + b'hello', fine)}
    for method in (b'PUT', b'DELETE', b'TRACE', b'PATCH', b'OPTIONS', b'PROPFIND'): found[method.decode()] = get(b'/predict', method=method), {0, 400, 405}
    found['CONNECT'], found['BREW'] = (get(b'a:80', method=b'CONNECT'), closed), (get(method=b'BREW'), closed)
    for top in (b'0', b'-1', b'1001', b'x', b'1.5', b'', b'9' * 400, b'%00', b'1&top=x', b'%F0%9F%98%80', b'nan'): found[f'top={top[:9].decode()}'] = post(good, target=b'/predict?top=' + top), {422}
    return found


# ---- the visit ----

def visit(port: int, data: bytes, seconds: float = 12) -> tuple[int, bytes, bytes]:
    "Send bytes, and read one answer: status (0 for none), headers, body. An answer that never ends is a failure."
    with socket.create_connection(('127.0.0.1', port), seconds) as s:
        received, deadline = b'', time.monotonic() + seconds
        try: s.sendall(data)
        except OSError: pass  # it has hung up already; perhaps with an answer
        try:
            while time.monotonic() < deadline:
                while received.startswith(b'HTTP/1.1 100'): received = received.partition(b'\r\n\r\n')[2]
                head, end, body = received.partition(b'\r\n\r\n')
                length = re.search(rb'content-length: (\d+)', head)
                if end and length and len(body) >= int(length[1]): break
                piece = s.recv(65536)
                if not piece: break
                received += piece
            else: raise AssertionError(f'no end after {seconds} s: {received[:200]}')
        except ConnectionError: pass
    if not received: return 0, b'', b''
    head, _, body = received.partition(b'\r\n\r\n')
    return int(head.split(b' ', 2)[1]), head, body


def is_clean(head: bytes, status: int, body: bytes) -> None:
    "A refusal is JSON with one sentence, and tells nothing about the machine."
    text = body.decode()
    assert not LEAKS.search(text), text
    if status >= 400 and body: assert set(json.loads(text)) == {'error'} and json.loads(text)['error'].endswith('.'), text
    assert b'set-cookie' not in head.lower() and b'server:' not in head.lower()


def processes(pid: int) -> list[psutil.Process]:
    service = psutil.Process(pid)
    return [service, *service.children(recursive=True)]


def megabytes(pid: int) -> float: return sum(each.memory_info().rss for each in processes(pid)) / 1e6


@pytest.fixture(scope='module')
def victim(digits_run, tmp_path_factory):
    "A service with two workers: its port and its number."
    port = free_port()
    with serving(digits_run['bundle'], port, tmp_path_factory.mktemp('victim')/'stderr', '--workers', 2) as process: yield port, process.pid


@pytest.fixture(autouse=True)
def _afterwards(request):
    "Whatever happened: nobody has died, memory is bounded, and the next guest is served."
    if 'victim' not in request.fixturenames: yield; return
    port, pid = request.getfixturevalue('victim')
    before = {each.pid for each in processes(pid)}
    yield
    assert {each.pid for each in processes(pid)} == before
    assert megabytes(pid) < 1500, megabytes(pid)
    assert visit(port, post(encoded(patch('brick', 2, 16), 'PNG')))[0] == 200


FILES, REQUESTS = files(), requests()


def test_there_are_enough_attacks(): assert len(FILES) + len(REQUESTS) >= 150


@pytest.mark.parametrize('name', FILES)
def test_hostile_files(victim, name):
    data, allowed = FILES[name]
    status, head, body = visit(victim[0], post(data))
    assert status in allowed, (status, body)
    is_clean(head, status, body)


def test_all_files_in_forms(victim):
    "Each file is answered as it would be alone, in the order sent."
    names = [name for name in FILES if len(FILES[name][0]) < 1_000_000]
    for group in (names[i:i + 16] for i in range(0, len(names), 16)):
        status, _, body = visit(victim[0], form(*[part(FILES[name][0], b'name="file"; filename="a"') for name in group]), 30)
        assert status == 200, body
        for name, answer in zip(group, json.loads(body)['answers'], strict=True): assert answer.get('status', 200) in FILES[name][1], (name, answer)


@pytest.mark.parametrize('name', REQUESTS)
def test_hostile_requests(victim, name):
    data, allowed = REQUESTS[name]
    status, head, body = visit(victim[0], data)
    assert status in allowed, (status, head, body)
    is_clean(head, status, body)


# ---- those who take their time ----

def answers_of(s: socket.socket, count: int, seconds: float = 20) -> list[bytes]:
    "Status lines of the answers on a connection: `count`, or fewer if it is closed."
    received, deadline = b'', time.monotonic() + seconds
    s.settimeout(seconds)
    while len(found := re.findall(rb'HTTP/1\.1 \d+', received)) < count:
        assert time.monotonic() < deadline, received
        try: piece = s.recv(65536)
        except ConnectionError: break
        if not piece: break
        received += piece
    return found


def is_closed_within(s: socket.socket, seconds: float) -> bool:
    "Whether the other side hangs up in time."
    s.settimeout(seconds)
    try:
        while s.recv(65536): pass
    except TimeoutError: return False
    except ConnectionError: pass
    return True


def test_pipelined_requests_are_answered_in_order(victim):
    good = encoded(patch('brick', 9, 32), 'PNG')
    with socket.create_connection(('127.0.0.1', victim[0])) as s:
        s.sendall(get() + post(good) + post(b'no image') + get(b'/nothing') + get())
        assert [line[-3:] for line in answers_of(s, 5)] == [b'200', b'200', b'415', b'404', b'200']


def test_a_request_is_answered_although_rubbish_follows(victim):
    with socket.create_connection(('127.0.0.1', victim[0])) as s:
        s.sendall(post(encoded(patch('brick', 9, 32), 'PNG')) + b'\0rubbish\r\n\r\n')
        assert answers_of(s, 1) == [b'HTTP/1.1 200'] and is_closed_within(s, 5)


def test_a_flood_of_pipelined_requests_ends(victim):
    "Whoever does not wait for answers is not allowed to fill the memory with questions."
    before = megabytes(victim[1])
    with socket.create_connection(('127.0.0.1', victim[0])) as s:
        s.settimeout(10)
        try:
            for _ in range(200): s.sendall(get() * 3000)
        except OSError: pass
        assert is_closed_within(s, 10)
    assert megabytes(victim[1]) < before + 100


def test_those_who_hang_up_after_many_questions(victim):
    "The answers have nowhere to go; the log, which is looked at in the end, holds no traceback for that."
    for i in range(30):
        s = socket.create_connection(('127.0.0.1', victim[0]))
        s.sendall(get(b'/info') * 20)
        s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
        time.sleep(i / 2000)
        s.close()


def test_a_refused_form_does_not_hold_up_the_connection(victim):
    "The answer to the next request on the same connection comes at once, not when a wait for more of the form is over."
    with socket.create_connection(('127.0.0.1', victim[0])) as s:
        start = time.monotonic()
        for _ in range(3):
            s.sendall(form(part(b'x', b'name="other"')))
            s.sendall(form(*[part(b'')] * 17))
            assert answers_of(s, 2) == [b'HTTP/1.1 400'] * 2
        assert time.monotonic() - start < 4.5


def test_after_a_wish_for_another_protocol_the_connection_ends(victim):
    "Nothing that follows is read as HTTP, so nobody may be left waiting for an answer."
    with socket.create_connection(('127.0.0.1', victim[0])) as s:
        s.sendall(get(headers=b'Connection: Upgrade\r\nUpgrade: h2c\r\n'))
        assert answers_of(s, 1) == [b'HTTP/1.1 200'] and is_closed_within(s, 5)


def test_slow_senders_are_sent_away(victim):
    "One byte now and then: headers that never end, a body after its refusal, and a connection that says nothing."
    port, _ = victim
    drips = {'headers': b'GET /health HTTP/1.1\r\nA: ', 'refused body': get(b'/nothing', b'Content-Length: 90000000\r\n'),
             'too large': b'POST /predict HTTP/1.1\r\n' + HOST + b'Content-Length: 90000000\r\n\r\n', 'nothing': b''}
    open_ones = {name: socket.create_connection(('127.0.0.1', port)) for name in drips}
    for name, s in open_ones.items(): s.sendall(drips[name])
    deadline, alive = time.monotonic() + 25, dict(open_ones)
    while alive and time.monotonic() < deadline:
        time.sleep(0.5)
        for name, s in list(alive.items()):
            s.settimeout(0.01)
            try:
                if name != 'nothing': s.sendall(b'a')
                while s.recv(65536): pass
                del alive[name]
            except TimeoutError: pass
            except OSError: del alive[name]
    for s in open_ones.values(): s.close()
    assert not alive


def test_those_who_hang_up_half_way(victim):
    "A hundred connections that end inside the headers, inside the body, and before the answer."
    data = post(encoded(patch('gravel', 4, 64), 'JPEG'))
    for i in range(100):
        s = socket.create_connection(('127.0.0.1', victim[0]))
        s.sendall(data[:(20, len(data) // 2, len(data))[i % 3]])
        if i % 2: s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))  # a reset instead of a farewell
        s.close()


def test_an_id_is_the_senders_own_only_if_it_is_sane(victim):
    for sent, kept in [(b'order-17.a_B', True), (b'a' * 65, False), (b'a b', False), (b'\xff', False), (b'<b>', False)]:
        head = visit(victim[0], get(headers=b'X-Request-ID: ' + sent + b'\r\n'))[1]
        assert (b'x-request-id: ' + sent in head.lower().replace(sent.lower(), sent)) == kept and head.lower().count(b'x-request-id') == 1


def test_a_slow_body_gets_408(digits_run):
    "The app itself, with a limit of a fifth of a second."
    import asyncio
    from imgcls_nb.serve import ServiceOptions, create_app
    app, sent = create_app(digits_run['bundle'], ServiceOptions(seconds=0.2, workers=1)), []
    async def receive():
        await asyncio.sleep(0.05)
        return dict(type='http.request', body=b'x', more_body=True)
    async def send(message): sent.append(message)

    async def ask():
        scope = dict(type='http', method='POST', path='/predict', raw_path=b'/predict', query_string=b'', headers=[], root_path='',
                     http_version='1.1', scheme='http', server=('localhost', 1), client=('localhost', 2), state={}, asgi=dict(version='3.0'))
        await app(scope, receive, send)
        await app.state.service.pool.stop()
    asyncio.run(ask())
    assert sent[0]['status'] == 408 and (b'connection', b'close') in sent[0]['headers'] and b'0.2 seconds' in sent[1]['body']


def test_one_slow_image_does_not_lock_everybody_out(digits_run):
    "Work that took far longer than anybody may wait: whoever comes to a worker with nothing to do is answered all the same."
    import asyncio
    from imgcls_nb.workers import WorkerPool
    async def ask():
        pool = WorkerPool(digits_run['bundle'], workers=1, latency=0.5)
        await pool.start()
        try:
            pool.seconds_per_image = 60.0  # as if the last images had taken a minute each
            for _ in range(60): assert (await pool.submit(encoded(patch('brick', 2, 16), 'PNG'))).status == 200
            return pool.seconds_per_image
        finally: await pool.stop()
    assert asyncio.run(ask()) < 0.5  # it has learnt that they are fast again


def test_who_never_reads_the_answers_is_sent_away(digits_run, tmp_path):
    "Answers that nobody takes fill the socket; after a while the connection is cut, and it is no longer counted."
    port = free_port()
    program = ('import sys, imgcls_nb.server as server; server.STALLED_SECONDS = 1; from imgcls_nb.serve import ServiceOptions; '
               'server.serve(sys.argv[1], port=int(sys.argv[2]), options=ServiceOptions(workers=1), quiet=True)')
    with started([sys.executable, '-c', program, digits_run['bundle'], port], port, tmp_path/'stderr') as process:
        with socket.socket() as s:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            s.connect(('127.0.0.1', port))
            s.settimeout(0.2)
            deadline, cut = time.monotonic() + 40, False
            while not cut and time.monotonic() < deadline:
                time.sleep(0.002)  # fewer at a time than may wait behind one another: this is about answers, not about requests
                try: s.send(get(b'/info'))
                except TimeoutError: pass
                except ConnectionError: cut = True
            assert cut and megabytes(process.pid) < 1000
        assert visit(port, get())[0] == 200
