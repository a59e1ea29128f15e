"Opening images: every mode and format becomes upright 8-bit RGB or grey; everything else is refused with a reason."
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image, ImageCms

from imgcls_nb.image import ImageError, Limits, Preprocessing, image_info, normalize, open_image
from samples import MODES, encoded, in_mode, patch, rotated_exif, truncated_jpeg

FORMATS = {'png': 'PNG', 'gif': 'GIF', 'webp': 'WEBP', 'jpeg': 'JPEG', 'jpg': 'JPEG', 'tiff': 'TIFF', 'bmp': 'BMP'}


@pytest.mark.parametrize('name', MODES)
@pytest.mark.parametrize('target', ['RGB', 'L'])
def test_every_mode_shows_the_same_picture(name, target):
    mode, suffix = MODES[name]
    picture = patch('brick', 0)
    opened = open_image(encoded(in_mode(picture, mode), FORMATS[suffix.lower()]), target)
    assert opened.mode == target and opened.size == picture.size
    grey, expected = [np.asarray(image.convert('L').reduce(8), float) for image in (opened, picture)]  # dither averages out
    assert np.abs(grey - expected).mean() < 8, 'not the same picture'


@pytest.mark.parametrize('orientation', range(1, 9))
def test_exif_rotation_is_applied(orientation):
    picture = Image.new('RGB', (64, 32), 'black')
    picture.paste('white', (0, 0, 16, 16))
    stored = encoded(picture, 'JPEG', exif=rotated_exif(orientation), quality=95)
    corners = {1: (0, 0), 2: (63, 0), 3: (63, 31), 4: (0, 31), 5: (0, 0), 6: (31, 0), 7: (31, 63), 8: (0, 63)}
    opened = open_image(stored, 'L')
    assert opened.size == ((64, 32) if orientation < 5 else (32, 64))
    assert opened.getpixel(corners[orientation]) > 200
    assert image_info(stored).rotated == (orientation > 1)


def test_transparent_parts_are_white():
    picture = Image.new('RGBA', (8, 8), (255, 0, 0, 0))
    picture.paste((0, 0, 255, 255), (4, 0, 8, 8))
    opened = open_image(encoded(picture, 'PNG'))
    assert opened.getpixel((0, 0)) == (255, 255, 255) and opened.getpixel((7, 0)) == (0, 0, 255)
    palette = picture.convert('RGB').quantize(4)
    opened = open_image(encoded(palette, 'PNG', transparency=palette.getpixel((0, 0))))
    assert opened.getpixel((0, 0)) == (255, 255, 255) and opened.getpixel((7, 0)) == (0, 0, 255)


def test_alpha_that_hides_everything_is_no_alpha():
    "Some programs leave the alpha channel at 0 everywhere; a white page would be nothing to classify."
    picture = Image.new('RGBA', (8, 8), (255, 0, 0, 0))
    assert open_image(encoded(picture, 'PNG')).getpixel((0, 0)) == (255, 0, 0)


def test_an_icc_profile_is_honoured():
    picture = Image.new('RGB', (8, 8), (200, 100, 50))
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile('sRGB')).tobytes()
    assert open_image(encoded(picture, 'PNG', icc_profile=lab)).getpixel((0, 0)) == pytest.approx((200, 100, 50), abs=2)
    assert open_image(encoded(picture, 'PNG', icc_profile=b'rubbish')).getpixel((0, 0)) == (200, 100, 50)


def test_the_first_frame_counts():
    frames = [Image.new('RGB', (8, 8), color) for color in ('red', 'blue')]
    data = encoded(frames[0], 'GIF', save_all=True, append_images=frames[1:])
    assert open_image(data).getpixel((0, 0)) == (255, 0, 0)
    assert image_info(data).frames == 2


def png_that_claims(width: int, height: int) -> bytes:
    "A PNG whose header promises a picture that its few bytes do not hold."
    def chunk(kind, data): return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
    header = struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', zlib.compress(b'\0' * 1000)) + chunk(b'IEND', b'')


@pytest.mark.parametrize('data, kind', [
    (b'', 'empty'), (b'this is text', 'not_an_image'), (truncated_jpeg(), 'truncated'),
    (png_that_claims(60_000, 60_000), 'too_many_pixels'), (png_that_claims(12_000, 12_000), 'too_many_pixels'),
    (encoded(Image.new('RGB', (4, 4)), 'PPM'), 'not_an_image'), (b'\xff\xd8\xff' + b'\0' * 100, None), (b'GIF89a', None),
    (b'\x89PNG\r\n\x1a\n' + b'\0' * 50, None), (b'<svg xmlns="http://www.w3.org/2000/svg"/>', 'not_an_image')])
def test_what_is_refused_and_why(data, kind):
    with pytest.raises(ImageError) as caught: open_image(data)
    assert kind is None or caught.value.kind == kind
    assert '\n' not in str(caught.value) and 'Traceback' not in str(caught.value)


def test_a_bomb_is_refused_before_it_is_decoded():
    "A valid 12,000-pixel square of zeros: a few hundred kilobytes that would become 432 megabytes."
    bomb = encoded(Image.new('L', (12_000, 12_000)), 'PNG')
    with pytest.raises(ImageError, match='pixels'): open_image(bomb, limits=Limits(max_pixels=50_000_000))


def test_the_byte_limit():
    data = encoded(patch('brick', 1), 'PNG')
    with pytest.raises(ImageError, match='bytes'): open_image(data, limits=Limits(max_bytes=len(data) - 1))
    assert open_image(data, limits=Limits(max_bytes=len(data)))


def test_a_path_behaves_as_its_bytes(tmp_path):
    (tmp_path/'a.jpg').write_bytes(truncated_jpeg())
    with pytest.raises(ImageError, match='too early'): open_image(tmp_path/'a.jpg')
    with pytest.raises(ImageError, match='No such file'): open_image(tmp_path/'b.jpg')
    with pytest.raises(ImageError): open_image(tmp_path)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_files_never_raise_anything_else(data):
    "Change, remove or repeat bytes of a real file: it opens, or it is refused."
    format = data.draw(st.sampled_from(['JPEG', 'PNG', 'GIF', 'WEBP', 'TIFF', 'BMP']))
    content = bytearray(encoded(patch('grass', 3, side=24), format))
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[:data.draw(st.integers(1, len(content)))]
    try: assert open_image(bytes(content), limits=Limits(max_pixels=1_000_000)).mode == 'RGB'
    except ImageError as error: assert error.kind


@settings(max_examples=60, deadline=None)
@given(width=st.integers(1, 300), height=st.integers(1, 300), side=st.integers(1, 64), channels=st.sampled_from([1, 3]),
       fit=st.sampled_from(['crop', 'squash', 'pad']), fraction=st.floats(0.1, 1))
def test_any_picture_becomes_the_size_asked_for(width, height, side, channels, fit, fraction):
    p = Preprocessing(side, side + 1, channels, fit, fraction)
    pixels = p(Image.new('RGB', (width, height), 'white'))
    assert pixels.shape == (side, side + 1, channels) and pixels.dtype == np.uint8
    assert normalize(pixels, p).shape == (channels, side, side + 1)


def test_preprocessing_survives_json():
    import json
    p = Preprocessing(20, 30, 3, 'pad', 0.9, 'bicubic', (0.1, 0.2, 0.3), (1, 2, 3))
    assert Preprocessing(**json.loads(json.dumps(p.as_dict()))) == p


def test_normalize_is_what_torchvision_does():
    from torchvision.transforms import Compose, Normalize, ToTensor
    picture, p = patch('coffee', 2), Preprocessing(96, 96, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    expected = Compose([ToTensor(), Normalize(p.mean, p.std)])(picture).numpy()
    assert np.abs(normalize(p(picture), p) - expected).max() < 1e-6


def test_a_large_file_is_not_read(tmp_path):
    path = tmp_path/'large.jpg'
    with path.open('wb') as file: file.truncate(10**10)  # sparse: takes no space
    with pytest.raises(ImageError, match='bytes'): open_image(path)


def tiff_with_a_tile(side: int) -> bytes:
    "A TIFF of 16 × 16 grey pixels, stored as one compressed tile of `side` × `side`: small as a file, large in memory."
    squeezer = zlib.compressobj(9)
    body = b''.join(squeezer.compress(bytes(side)) for _ in range(side)) + squeezer.flush()
    tags = [(256, 16), (257, 16), (258, 8), (259, 8), (262, 1), (277, 1), (322, side), (323, side), (324, 0), (325, 0)]
    start = 8 + 2 + 12 * len(tags) + 4
    values = {324: start, 325: len(body)}
    entries = b''.join(struct.pack('<HHII', tag, 4, 1, values.get(tag, value)) for tag, value in tags)
    return b'II*\0' + struct.pack('<IH', 8, len(tags)) + entries + bytes(4) + body


def test_a_tile_counts_as_a_picture():
    "The decoder unpacks whole tiles, so a picture of 16 × 16 pixels could take any amount of memory."
    assert open_image(tiff_with_a_tile(256)).size == (16, 16)
    with pytest.raises(ImageError, match='tiles of 2048 × 2048') as caught:
        open_image(tiff_with_a_tile(2048), limits=Limits(max_pixels=1_000_000))
    assert caught.value.kind == 'too_many_pixels'


def png_chunks(png: bytes) -> list[bytes]:
    "The chunks of a PNG, without its signature."
    chunks, position = [], 8
    while position < len(png):
        length = 12 + int.from_bytes(png[position:position + 4], 'big')
        chunks.append(png[position:position + length])
        position += length
    return chunks


def test_info_of_a_png_decodes_no_pixels(monkeypatch):
    "Pillow's `getexif` loads a whole PNG to look for EXIF behind the pixels; the header is enough where there is none."
    from PIL import PngImagePlugin
    picture = patch('brick', 2)
    plain, turned = encoded(picture, 'PNG'), encoded(picture, 'PNG', exif=rotated_exif(6))
    loads, load = [], PngImagePlugin.PngImageFile.load
    monkeypatch.setattr(PngImagePlugin.PngImageFile, 'load', lambda self: loads.append(self) or load(self))
    assert not image_info(plain).rotated and not loads
    assert image_info(turned).rotated
    exif = [chunk for chunk in png_chunks(turned) if chunk[4:8] == b'eXIf']
    others = [chunk for chunk in png_chunks(turned) if chunk[4:8] != b'eXIf']
    behind = turned[:8] + b''.join([*others[:-1], *exif, others[-1]])
    assert image_info(behind).rotated and open_image(behind).size == open_image(turned).size


def png_chunk(kind: bytes, data: bytes) -> bytes:
    "One chunk with its length and checksum."
    return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))


@pytest.mark.parametrize('extra, opens', [
    (png_chunk(b'prVt', b'') * 20_000, True), (png_chunk(b'tEXt', b'a\0b') * 20_000, True),
    (png_chunk(b'zTXt', b'a\0\0' + zlib.compress(bytes(10**7))), False),
    (png_chunk(b'iCCP', b'a\0\0' + zlib.compress(bytes(10**7))), False)])
@pytest.mark.parametrize('behind', [False, True])
def test_chunks_that_unpack_to_much_are_refused(extra, opens, behind):
    first, *middle, last = png_chunks(encoded(Image.new('L', (8, 8), 7), 'PNG'))
    parts = [first, *middle, extra, last] if behind else [first, extra, *middle, last]
    data = b'\x89PNG\r\n\x1a\n' + b''.join(parts)
    if opens: assert open_image(data, 'L').getpixel((0, 0)) == 7
    else:
        with pytest.raises(ImageError): open_image(data)
