"Images to try things on: real patches of photographs in every mode and format, and files that are broken."
import io
from pathlib import Path

import numpy as np
from PIL import Image
from skimage import data as photographs

MODES = dict(bilevel=('1', 'png'), grey=('L', 'PNG'), grey_alpha=('LA', 'png'), palette=('P', 'gif'), colour=('RGB', 'webp'),
             alpha=('RGBA', 'png'), cmyk=('CMYK', 'JPEG'), sixteen_bit=('I;16', 'png'), floating=('F', 'tiff'),
             ycbcr=('YCbCr', 'jpg'), bitmap=('RGB', 'bmp'), upper=('RGB', 'JPEG'))


def patch(name: str, seed: int, side: int = 96) -> Image.Image:
    "A random square of one of scikit-image's photographs, in colour."
    photograph = getattr(photographs, name)()
    rng = np.random.default_rng(seed)
    top, left = rng.integers(0, photograph.shape[0] - side), rng.integers(0, photograph.shape[1] - side)
    return Image.fromarray(photograph[top:top + side, left:left + side]).convert('RGB')


def in_mode(image: Image.Image, mode: str) -> Image.Image:
    "The same picture in another Pillow mode."
    if mode == 'I;16': return Image.fromarray(np.asarray(image.convert('L')).astype(np.uint16) * 257)
    if mode == 'F': return Image.fromarray(np.asarray(image.convert('L')).astype(np.float32))
    return image.convert('L').convert(mode) if mode == 'LA' else image.convert(mode)


def encoded(image: Image.Image, format: str, **options) -> bytes:
    "A picture as the bytes of a file."
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def truncated_jpeg(seed: int = 900) -> bytes:
    "A JPEG that ends in the middle."
    data = encoded(patch('grass', seed), 'JPEG')
    return data[:len(data) // 2]


def rotated_exif(orientation: int = 6) -> Image.Exif:
    "EXIF that asks for a rotation."
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def make_photo_folder(root: Path, each: int = 24) -> Path:
    "Three classes; the first also holds every mode; broken files lie among them."
    classes = dict(zip(['砖 块', 'Green grass', 'gravel é'], ['brick', 'grass', 'gravel']))
    for label, name in classes.items():
        (root/label).mkdir(parents=True)
        for i in range(each): patch(name, i).save(root/label/f'图 {i}.jpg')
    first = root/'砖 块'
    for i, (name, (mode, suffix)) in enumerate(MODES.items()):
        in_mode(patch('brick', 100 + i), mode).save(first/f'{name}.{suffix}')
    patch('brick', 200).save(first/'really a png.jpg', 'PNG')
    patch('brick', 201).save(first/'no suffix', 'PNG')
    patch('brick', 202).save(first/'turned.jpg', exif=rotated_exif())
    frames = [patch('brick', 203 + i) for i in range(3)]
    frames[0].save(first/'animated.gif', save_all=True, append_images=frames[1:])
    (first/'cut off.jpg').write_bytes(truncated_jpeg())
    (first/'zero.jpg').write_bytes(b'')
    (first/'text.jpg').write_text('this is not a picture')
    (first/'notes.txt').write_text('remember to buy film')
    (root/'.DS_Store').write_bytes(b'\0')
    return root


BROKEN = {'cut off.jpg': 'truncated', 'zero.jpg': 'empty', 'text.jpg': 'not_an_image', 'notes.txt': 'not_an_image'}
