"The exports of label tools: each format as its tool documents it, and every odd case kept, repaired or reported."
import io
import json
import zipfile
from pathlib import Path
from xml.sax.saxutils import escape, quoteattr

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image

import imgcls_nb.check  # noqa: F401, brings `ImageSet.check`
from conftest import assert_no_leftovers, imgcls
from imgcls_nb.data import crop_box
from imgcls_nb.image import Preprocessing
from imgcls_nb.label_tools import (from_cvat, from_doccano, from_label_studio, from_label_tool, from_voc, from_yolo, is_label_export,
                                   label_studio_config, read_annotations, to_label_studio)
from imgcls_nb.run import InputError
from imgcls_nb.sources import from_csv, load_images

WIDTH, HEIGHT = 60, 40


def encoded(seed: int, size=(WIDTH, HEIGHT), format='PNG', **options) -> bytes:
    "A picture of noise in coarse blocks, so that no two are near-duplicates."
    blocks = np.random.default_rng(seed).integers(0, 256, (size[1] // 4, size[0] // 4, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(blocks).resize(size, Image.Resampling.NEAREST).save(buffer, format, **options)
    return buffer.getvalue()


PICTURES = [encoded(seed) for seed in range(40)]


def pictures(folder: Path, *names: str) -> Path:
    "Files with a picture each."
    for seed, name in enumerate(names):
        (folder/name).parent.mkdir(parents=True, exist_ok=True)
        (folder/name).write_bytes(PICTURES[seed])
    return folder


def cvat_image(name, *marks, width=WIDTH, height=HEIGHT, **more) -> str:
    "One `<image>`; a mark is a label, or a label and four edges, or a piece of XML."
    inside = ''
    for mark in marks:
        if isinstance(mark, tuple):
            edges = ' '.join(f'{key}="{edge}"' for key, edge in zip(('xtl', 'ytl', 'xbr', 'ybr'), mark[1:]))
            inside += f'<box label={quoteattr(mark[0])} source="manual" occluded="0" {edges} z_order="0"></box>'
        else: inside += mark if mark.startswith('<') else f'<tag label={quoteattr(mark)} source="manual"></tag>'
    extra = ''.join(f' {key}="{value}"' for key, value in more.items())
    return f'<image id="0" name={quoteattr(name)}{extra} width="{width}" height="{height}">{inside}</image>'


def cvat(*images: str, prolog='<?xml version="1.0" encoding="utf-8"?>\n') -> str:
    meta = '<version>1.1</version><meta><task><labels><label><name>cat</name></label></labels></task></meta>'
    return f'{prolog}<annotations>{meta}' + '\n'.join(images) + '</annotations>\n'


def voc(filename, *objects, path=None, size=(WIDTH, HEIGHT)) -> str:
    "An XML file as LabelImg writes it."
    things = ''.join(f'<object><name>{escape(label)}</name><pose>Unspecified</pose><truncated>0</truncated><difficult>0</difficult>'
                     f'<bndbox><xmin>{a}</xmin><ymin>{b}</ymin><xmax>{c}</xmax><ymax>{d}</ymax></bndbox></object>\n'
                     for label, a, b, c, d in objects)
    place = f'<path>{escape(path)}</path>' if path else ''
    return (f'<annotation>\n\t<folder>images</folder>\n\t<filename>{escape(filename)}</filename>\n\t{place}<source><database>Unknown'
            f'</database></source><size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>'
            f'<segmented>0</segmented>\n{things}</annotation>\n')


def choice(*labels, by=1, **more) -> dict:
    result = [dict(value=dict(choices=list(labels)), id='a1', from_name='choice', to_name='image', type='choices', origin='manual')]
    return dict(id=1, completed_by=by, result=result if labels else [], was_cancelled=False, ground_truth=False) | more


def region(label, x, y, width, height, by=1, rotation=0) -> dict:
    result = dict(original_width=WIDTH, original_height=HEIGHT, image_rotation=0, id='r', from_name='label', to_name='image',
                  type='rectanglelabels', value=dict(x=x, y=y, width=width, height=height, rotation=rotation, rectanglelabels=[label]))
    return dict(id=2, completed_by=by, result=[result], was_cancelled=False)


def task(image, *annotations, **more) -> dict:
    return dict(id=7, data=dict(image=image), annotations=list(annotations), predictions=[], project=1) | more


def write(path: Path, content) -> Path:
    "Text, bytes, or anything that JSON can hold."
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes): path.write_bytes(content)
    else: path.write_text(content if isinstance(content, str) else json.dumps(content), encoding='utf-8')
    return path


def lines(*entries: dict) -> str: return ''.join(json.dumps(entry, ensure_ascii=False) + '\n' for entry in entries)


def kinds(data) -> list[str]: return sorted(finding.kind for finding in data.set_aside)


def rows(data) -> list[tuple[str, str]]: return sorted(zip(data.items['image'], data.items['label']))


# The formats

def test_cvat_images(tmp_path):
    pictures(tmp_path, 'a.png', 'b.png', 'c.png')
    path = write(tmp_path/'annotations.xml', cvat(cvat_image('a.png', 'cat', subset='Train'), cvat_image('b.png', 'dog', subset='Test'),
                                                  cvat_image('c.png', 'dog', subset='Validation')))
    data = from_cvat(path)
    assert rows(data) == [('a.png', 'cat'), ('b.png', 'dog'), ('c.png', 'dog')] and data.classes == ('cat', 'dog')
    assert list(data.items['split']) == ['train', 'test', 'valid'] and 'box' not in data.items and not data.set_aside


def test_cvat_boxes_with_fractions_and_turned(tmp_path):
    pictures(tmp_path, 'a.png', 'b.png')
    turned = '<box label="cat" xtl="20" ytl="10" xbr="30" ybr="30" rotation="90.0" occluded="0"></box>'
    data = from_cvat(write(tmp_path/'x.xml', cvat(cvat_image('a.png', ('dog', 1.2, 2.5, 9.5, 20.01)), cvat_image('b.png', turned))))
    assert list(data.items['box']) == [(1, 2, 10, 20), (15, 15, 35, 25)]
    assert data.open(0).size == (9, 18) and data.open(0).tobytes() == Image.open(tmp_path/'a.png').crop((1, 2, 10, 20)).tobytes()


@pytest.mark.parametrize('packed', [False, True])
def test_cvat_imagenet_with_pictures(tmp_path, packed):
    pictures(tmp_path/'task', 'cat/cat_a.png', 'cat/cat_b.png', 'dog/dog_c.png', 'no_label/d.png', 'e.png')
    path = packed_as(tmp_path/'task.zip', tmp_path/'task') if packed else tmp_path/'task'
    data = from_cvat(path)
    assert rows(data) == [('cat/cat_a.png', 'cat'), ('cat/cat_b.png', 'cat'), ('dog/dog_c.png', 'dog')]
    assert kinds(data) == ['no_class', 'no_label'] and is_label_export(path) == packed
    assert data.scan().items['digest'].nunique() == 3


def packed_as(path: Path, folder: Path) -> Path:
    with zipfile.ZipFile(path, 'w') as archive:
        for file in sorted(folder.rglob('*')):
            if file.is_file(): archive.write(file, file.relative_to(folder).as_posix())
    return path


def test_cvat_imagenet_lists(tmp_path):
    pictures(tmp_path, 'images/a.png', 'images/b 1.png', 'images/c.png')
    write(tmp_path/'synsets.txt', 'cat\ndog\n')
    write(tmp_path/'train.txt', 'a.png 1\n"b 1".png 0\n')
    write(tmp_path/'test.txt', 'c.png 0 1\nd.png 5\n?? "\n')
    data = load_images(tmp_path)
    assert rows(data) == [('images/a.png', 'dog'), ('images/b 1.png', 'cat')] and set(data.items['split']) == {'train'}
    assert kinds(data) == ['bad_line', 'missing', 'missing', 'two_labels', 'unknown_class']


def test_voc(tmp_path):
    pictures(tmp_path, 'images/a.png', 'images/b.png', 'images/c.png')
    write(tmp_path/'annotations/a.xml', voc('a.png', ('cat', 1, 2, 30, 40), ('dog', 31, 2, 60, 40)))
    write(tmp_path/'annotations/b.xml', voc('b.png', ('dog', 0, 0, 10, 10)))
    for path in (tmp_path, tmp_path/'annotations'):  # pictures in it, or beside it
        data = load_images(path)
        assert list(data.items['box']) == [(1, 2, 30, 40), (31, 2, 60, 40), (0, 0, 10, 10)]
        assert [Path(group).name for group in data.items['group']] == ['a.png', 'a.png', 'b.png']
        assert kinds(data) == ['no_label']
    assert rows(from_voc(tmp_path/'annotations/b.xml', boxes='image'))[0][1] == 'dog'


def test_voc_prefers_the_picture_beside_it(tmp_path):
    pictures(tmp_path, 'day 1/1.png', 'day 2/1.png')
    for day, label in [('day 1', 'cat'), ('day 2', 'dog')]: write(tmp_path/day/'1.xml', voc('1.png', (label, 0, 0, 9, 9)))
    assert rows(from_voc(tmp_path, boxes='image')) == [('day 1/1.png', 'cat'), ('day 2/1.png', 'dog')]


def test_yolo(tmp_path):
    pictures(tmp_path, 'images/train/a.png', 'images/val/a.png')
    write(tmp_path/'labels/classes.txt', 'cat\ndog\n')
    write(tmp_path/'labels/train/a.txt', '1 0.500000 0.500000 0.333333 0.500000\n0 0.1 0.1 0.1 0.1\n')
    write(tmp_path/'labels/val/a.txt', '1 0.5 0.5 1 1\n')
    data = load_images(tmp_path)
    assert list(data.items['box']) == [(20, 10, 40, 30), (3, 2, 9, 6), (0, 0, 60, 40)] and list(data.items['label']) == ['dog', 'cat', 'dog']
    assert list(data.items['split']) == ['train', 'train', 'valid'] and not data.set_aside
    assert len(from_yolo(tmp_path/'labels')) == 3  # the pictures are in the folder beside it


def test_yolo_labelimg_beside_the_pictures(tmp_path):
    pictures(tmp_path, 'a.png', 'b.png')
    write(tmp_path/'classes.txt', 'cat\r\ndog\r\n')
    write(tmp_path/'a.txt', '1 0.5 0.5 0.5 0.5\r\n')
    assert rows(load_images(tmp_path/'classes.txt')) == [('a.png#xywh=15,10,30,20', 'dog')] and is_label_export(tmp_path)


def test_an_empty_line_in_classes_txt_counts(tmp_path):
    pictures(tmp_path, 'a.png')
    write(tmp_path/'classes.txt', 'cat\n\ndog\n')
    write(tmp_path/'a.txt', '2 0.5 0.5 1 1\n1 0.5 0.5 0.2 0.2\n')
    data = from_yolo(tmp_path)
    assert list(data.items['label']) == ['dog'] and kinds(data) == ['no_label']


def test_doccano(tmp_path):
    pictures(tmp_path, 'a.png', '砖 1.png', 'c.png')
    path = write(tmp_path/'all.jsonl', lines(dict(id=1, filename='a.png', label=['cat'], Comments=[]), dict(filename='砖 1.png', label=['砖']),
                                             dict(id=3, filename='c.png', bbox=[dict(x=1, y=2, width=3, height=4, label='cat')])))
    data = load_images(path)
    assert rows(data) == [('a.png', 'cat'), ('c.png#xywh=1,2,3,4', 'cat'), ('砖 1.png', '砖')]


def test_doccano_one_file_for_each_annotator(tmp_path):
    pictures(tmp_path, 'a.png', 'b.png')
    with zipfile.ZipFile(tmp_path/'export.zip', 'w') as archive:
        archive.writestr('ada.jsonl', lines(dict(filename='a.png', label=['cat']), dict(filename='b.png', label=['cat'])))
        archive.writestr('ben.jsonl', lines(dict(filename='a.png', label=['cat']), dict(filename='b.png', label=['dog'])))
    data = load_images(tmp_path/'export.zip')
    assert rows(data) == [('a.png', 'cat')] and kinds(data) == ['disagreement']
    assert {said.annotator for said in read_annotations(tmp_path/'export.zip')} == {'ada', 'ben'}


def test_label_studio(tmp_path):
    pictures(tmp_path, 'a.png', 'b 2.png', 'c.png')
    path = write(tmp_path/'project-1.json', [task('/data/upload/1/1f0c9a2b-a.png', choice('cat')),
                                             task('/data/local-files/?d=photos/b%202.png', choice('dog')),
                                             task('https://example.com/x/c.png?size=large', region('cat', 50, 25, 25, 50))])
    data = load_images(path)
    assert rows(data) == [('a.png', 'cat'), ('b 2.png', 'dog'), ('c.png#xywh=30,10,15,20', 'cat')] and not data.set_aside


def test_label_studio_min(tmp_path):
    pictures(tmp_path, 'a.png', 'b.png', 'c.png')
    row = dict(annotator=1, annotation_id=5, created_at='2026-01-01', updated_at='2026-01-01', lead_time=2.5)
    box = dict(x=0, y=0, width=50, height=50, rotation=0, rectanglelabels=['dog'], original_width=WIDTH, original_height=HEIGHT)
    path = write(tmp_path/'min.json', [dict(id=1, image='/data/upload/1/00000000-a.png', choice='cat', **row), dict(id=2, image='b.png', kind=dict(choices=['cat', 'dog']), **row),
                                       dict(id=3, image='c.png', label=[box], **row)])
    data = load_images(path)
    assert rows(data) == [('a.png', 'cat'), ('c.png#xywh=0,0,30,20', 'dog')] and kinds(data) == ['two_labels']
    with pytest.raises(InputError, match='answer to camera or mood'):
        from_label_studio(write(tmp_path/'two.json', [dict(id=1, image='a.png', mood='good', camera='old', **row)]))


def test_label_studio_asks_which_question_is_meant(tmp_path):
    pictures(tmp_path, 'a.png', 'b.png')
    sharp = dict(value=dict(choices=['sharp']), from_name='quality', to_name='image', type='choices')
    tasks = [task('a.png', choice('cat')), task('b.png', choice('dog'))]
    for entry in tasks: entry['annotations'][0]['result'].append(sharp)
    path = write(tmp_path/'x.json', tasks)
    with pytest.raises(InputError, match='answer to choice or quality'): from_label_studio(path)
    assert rows(from_label_studio(path, control='choice')) == [('a.png', 'cat'), ('b.png', 'dog')]
    assert from_label_studio(path, control='quality').classes == ('sharp',)


def test_a_picture_inside_of_the_export_is_reported_briefly(tmp_path):
    pictures(tmp_path, 'a.png')
    data = load_images(write(tmp_path/'x.json', [task('a.png', choice('cat')), task('data:image/png;base64,' + 'A' * 100_000, choice('cat'))]))
    assert len(data) == 1 and len(data.set_aside) == 1 and len(str(data.set_aside[0])) < 1000


def test_pictures_in_the_zip_stay_there(tmp_path):
    pictures(tmp_path/'task', 'images/a.png', 'images/b.png')
    write(tmp_path/'task/annotations.xml', cvat(cvat_image('a.png', ('cat', 0, 0, 20, 20), ('dog', 30, 0, 60, 40)), cvat_image('b.png', 'cat')))
    data = load_images(packed_as(tmp_path/'task.zip', tmp_path/'task'))
    assert len(data) == 3 and data.open(1).size == (30, 40) and data.open(2, 'L').mode == 'L'
    scanned = data.scan()
    assert list(scanned.items['width']) == [20, 30, 60] and len(scanned.check()) >= 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ['task', 'task.zip']


# The odd cases: what is made of one, as the kinds of the findings and the rows that stay (all files hold 'a.png' to 'd.png')

CAT = cvat_image('a.png', 'cat')
ODD = {
    'no label': ('x.xml', cvat(CAT, cvat_image('b.png')), ['no_label'], 1),
    'a label of spaces': ('x.xml', cvat(CAT, cvat_image('b.png', ' ')), ['no_label'], 1),
    'two labels': ('x.xml', cvat(CAT, cvat_image('b.png', 'cat', 'dog')), ['two_labels'], 1),
    'the same label twice': ('x.xml', cvat(CAT, cvat_image('b.png', 'cat', 'cat')), [], 2),
    'twice, and it agrees': ('x.xml', cvat(CAT, CAT), ['duplicate_row'], 1),
    'twice, and it differs': ('x.xml', cvat(CAT, cvat_image('a.png', 'dog'), cvat_image('b.png', 'cat')), ['two_labels'], 1),
    'a deleted picture': ('x.xml', cvat(CAT, cvat_image('gone.png', 'cat')), ['missing'], 1),
    'a picture without a name': ('x.xml', cvat(CAT, cvat_image('', 'cat')), ['no_name'], 1),
    'out of the folder': ('x.xml', cvat(CAT, cvat_image('../../etc/passwd', 'cat'), cvat_image('x/../../a.png', 'cat')), ['outside'] * 2, 1),
    'an absolute path': ('x.xml', cvat(CAT, cvat_image('/etc/passwd', 'cat')), ['missing'], 1),
    'the path of a Windows computer': ('x.xml', cvat(cvat_image('C:\\Users\\Mei\\sub\\d.png', 'cat')), [], 1),
    'another case of letters': ('x.xml', cvat(cvat_image('A.PNG', 'cat')), [], 1),
    'two pictures of one name': ('x.xml', cvat(CAT, cvat_image('same.png', 'cat')), ['ambiguous'], 1),
    'one of two by its folder': ('x.xml', cvat(cvat_image('server/one/same.png', 'cat')), [], 1),
    'one file for two names': ('x.xml', cvat(CAT, cvat_image('day 1/d.png', 'cat'), cvat_image('day 2/d.png', 'dog')), ['ambiguous'] * 2, 1),
    'a neighbour is not the missing one': ('x.xml', cvat(CAT, cvat_image('day 2/a.png', 'dog')), ['missing'], 1),
    'a percent-encoded name': ('x.xml', cvat(cvat_image('caf%C3%A9%20%E7%A0%96.png', 'cat')), [], 1),
    'an accent in another encoding': ('x.xml', cvat(cvat_image('cafe\u0301 砖.png', 'cat')), [], 1),
    'a box partly outside': ('x.xml', cvat(cvat_image('a.png', ('cat', -5, 0, 20, 50))), ['box_clipped'], 1),
    'a box half a pixel outside': ('x.xml', cvat(cvat_image('a.png', ('cat', -0.5, 0, 60.4, 40))), [], 1),
    'a box wholly outside': ('x.xml', cvat(CAT, cvat_image('b.png', ('cat', 100, 100, 120, 120))), ['box_outside'], 1),
    'a box without area': ('x.xml', cvat(CAT, cvat_image('b.png', ('cat', 5, 5, 5, 20))), ['empty_box'], 1),
    'a box without numbers': ('x.xml', cvat(CAT, cvat_image('b.png', ('cat', 'nan', 5, 'inf', 'x'))), ['bad_box'], 1),
    'a box without a label': ('x.xml', cvat(CAT, cvat_image('b.png', ('', 5, 5, 9, 9))), ['no_label'], 1),
    'a box drawn backwards': ('x.xml', cvat(cvat_image('a.png', ('cat', 20, 20, 5, 5))), ['box_reversed'], 1),
    'a box drawn twice': ('x.xml', cvat(cvat_image('a.png', ('cat', 5, 5, 9, 9), ('cat', 5, 5, 9, 9))), ['duplicate_box'], 1),
    'a box that is two things': ('x.xml', cvat(CAT, cvat_image('b.png', ('cat', 5, 5, 9, 9), ('dog', 5, 5, 9, 9))), ['two_labels'] * 2, 1),
    'the picture has another size': ('x.xml', cvat(CAT, cvat_image('b.png', ('cat', 5, 5, 9, 9), width=1200)), ['size_differs'], 1),
    'a tag and a box': ('x.xml', cvat(cvat_image('a.png', 'dog', ('cat', 5, 5, 9, 9))), ['tag_and_boxes'], 1),
    'an outline': ('x.xml', cvat(CAT, cvat_image('b.png', '<polygon label="cat" points="1,2;3,4;5,6"></polygon>')), ['other_shape'], 1),
    'a format that cannot be opened': ('x.xml', cvat(CAT, cvat_image('e.heic', 'cat')), ['unsupported'], 1),
    'a text that calls itself a picture': ('x.xml', cvat(CAT, cvat_image('text.png', ('cat', 0, 0, 5, 5))), ['not_an_image'], 1),
    'byte order mark': ('x.xml', b'\xef\xbb\xbf' + cvat(CAT).encode(), [], 1),
    'UTF-16': ('x.xml', cvat(CAT, prolog='<?xml version="1.0" encoding="utf-16"?>').encode('utf-16'), [], 1),
    'one broken VOC file of two': ('v', dict(a=voc('a.png', ('cat', 1, 1, 9, 9)), b=voc('b.png', ('cat', 1, 1, 9, 9))[:-20]),
                                   ['broken_file'] + ['no_label'] * 7, 1),
    'VOC without objects': ('v', dict(a=voc('a.png', ('cat', 1, 1, 9, 9)), b=voc('b.png')), ['no_label'] * 8, 1),
    'VOC without sizes': ('v', dict(a=voc('a.png', ('cat', 1, 1, 9, 9), size=(0, 0))), ['no_label'] * 8, 1),
    'VOC with a bomb': ('v', dict(a=voc('a.png', ('cat', 1, 1, 9, 9)), b='<!DOCTYPE a [<!ENTITY b "c">]>' + voc('b.png')), ['broken_file'] + ['no_label'] * 7, 1),
    'YOLO class beyond the list': ('y', dict(a='0 .5 .5 .5 .5\n7 .5 .5 .2 .2\n'), ['no_label'] * 8 + ['unknown_class'], 1),
    'YOLO lines that are none': ('y', dict(a='0 .5 .5 .5 .5\n0 .5 .5\n0.5 .5 .5 .5 .5\ncat .1 .1 .1 .1'), ['bad_line'] * 3 + ['no_label'] * 8, 1),
    'YOLO outline': ('y', dict(a='0 .5 .5 .5 .5\n0 .1 .1 .2 .2 .3 .3 .4 .4\n'), ['no_label'] * 8 + ['other_shape'], 1),
    'YOLO in pixels': ('y', dict(a='0 .5 .5 .5 .5\n0 320 240 40 40\n'), ['box_outside'] + ['no_label'] * 8, 1),
    'YOLO empty file': ('y', dict(a='0 .5 .5 .5 .5\n', b=''), ['no_label'] * 8, 1),
    'YOLO UTF-16': ('y', dict(a='0 .5 .5 .5 .5\n'.encode('utf-16')), ['no_label'] * 8, 1),
    'YOLO not text': ('y', dict(a='0 .5 .5 .5 .5\n', b=b'\xff\xd8\xff\xe0\x80'), ['broken_file'] + ['no_label'] * 7, 1),
    'Doccano without a label': ('x.jsonl', lines(dict(filename='a.png', label=['cat']), dict(filename='b.png', label=[])), ['no_label'], 1),
    'Doccano null': ('x.jsonl', lines(dict(filename='a.png', label=['cat']), dict(filename='b.png', label=None)), ['no_label'], 1),
    'Doccano two labels': ('x.jsonl', lines(dict(filename='a.png', label=['cat']), dict(filename='b.png', label=['cat', 'dog'])), ['two_labels'], 1),
    'Doccano a line of another kind': ('x.jsonl', lines(dict(filename='a.png', label=['cat'])) + '[1, 2]\n\n', ['bad_line', 'no_name'], 1),
    'Doccano half a character': ('x.jsonl', lines(dict(filename='a.png', label=['cat'])) + '{"filename": "\\ud800.png", "label": ["cat"]}', ['missing'], 1),
    'Doccano a zero byte': ('x.jsonl', lines(dict(filename='a.png', label=['cat'])) + '{"filename": "\\u0000", "label": ["cat"]}', ['no_name'], 1),
    'Studio skipped': ('x.json', [task('a.png', choice('cat')), task('b.png', choice(was_cancelled=True))], ['skipped'], 1),
    'Studio skipped by one of two': ('x.json', [task('a.png', choice('cat'), choice(by=2, was_cancelled=True))], ['skipped'], 1),
    'Studio nobody came': ('x.json', [task('a.png', choice('cat')), task('b.png')], ['no_label'], 1),
    'Studio only guesses': ('x.json', [task('a.png', choice('cat')), task('b.png', predictions=[choice('dog')])], ['no_label'], 1),
    'Studio two agree': ('x.json', [task('a.png', choice('cat'), choice('cat', by=2))], [], 1),
    'Studio two disagree': ('x.json', [task('a.png', choice('cat'), choice('dog', by=2)), task('b.png', choice('cat'))], ['disagreement'], 1),
    'Studio two draw the same': ('x.json', [task('a.png', region('cat', 0, 0, 50, 50), region('cat', 2, 2, 50, 50, by=2))], ['duplicate_box'], 1),
    'Studio two name it differently': ('x.json', [task('a.png', region('cat', 0, 0, 50, 50), region('dog', 2, 2, 50, 50, by=2)), task('b.png', choice('cat'))],
                                       ['disagreement'] * 2, 1),
    'Studio overlapping things': ('x.json', [task('a.png', dict(region('cat', 0, 0, 50, 50), result=[*region('cat', 0, 0, 50, 50)['result'],
                                                                                                   *region('cat', 2, 2, 50, 50)['result']]))], [], 2),
    'Studio two uploads of one name': ('x.json', [task('/data/upload/1/00000000-d.png', choice('cat')), task('/data/upload/1/11111111-d.png', choice('cat')),
                                                  task('a.png', choice('cat'))], ['ambiguous'] * 2, 1),
    'Studio a brush': ('x.json', [task('a.png', choice('cat')), task('b.png', dict(choice(), result=[dict(type='brushlabels', value=dict(rle=[1]))]))], ['other_shape'], 1),
    'Studio a turned box': ('x.json', [task('a.png', region('cat', 50, 50, 10, 10, rotation=45))], [], 1),
    'Studio an old export': ('x.json', [dict(id=1, data=dict(image='a.png'), completions=[choice('cat')], predictions=[])], [], 1),
    'Studio a link that is none': ('x.json', [task('a.png', choice('cat')), task('http://[', choice('cat'))], ['outside'], 1),
}


def odd_folder(tmp_path: Path, name: str, content) -> Path:
    pictures(tmp_path, 'a.png', 'b.png', 'c.png', 'sub/d.png', 'one/same.png', 'two/same.png', 'café 砖.png')
    write(tmp_path/'text.png', 'no picture')
    write(tmp_path/'e.heic', b'1')
    if isinstance(content, dict):
        ending = '.xml' if name == 'v' else '.txt'
        if name == 'y': write(tmp_path/'classes.txt', 'cat\ndog\n')
        for stem, text in content.items(): write(tmp_path/f'{stem}{ending}', text)
        return tmp_path
    return write(tmp_path/name, content)


@pytest.mark.parametrize('case', ODD)
def test_odd_cases_are_kept_repaired_or_reported(tmp_path, case):
    name, content, expected, kept = ODD[case]
    path = odd_folder(tmp_path, name, content)
    assert is_label_export(path) or case in ('UTF-16 without a mark',)
    data = from_label_tool(path)
    assert kinds(data) == sorted(expected) and len(data) == kept, [finding.as_dict() for finding in data.set_aside]
    for finding in data.set_aside: assert finding.evidence and finding.remedy and finding.image
    for row in range(len(data)): assert min(data.open(row).size) > 0


FATAL = {
    'empty': ('x.xml', '', 'empty'), 'not there': (None, None, 'is not there'),
    'broken XML': ('x.xml', cvat(CAT)[:-30], 'line'), 'no annotations': ('x.xml', cvat(), 'no annotations'),
    'nothing usable': ('x.xml', cvat(cvat_image('gone.png', 'cat')), 'first problem: gone.png'),
    'a billion laughs': ('x.xml', '<!DOCTYPE annotations [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;">]>' + cvat(cvat_image('a.png', '<tag label="&b;"/>'), prolog=''), 'DOCTYPE'),
    'a file of this computer': ('x.xml', '<!DOCTYPE annotations [<!ENTITY a SYSTEM "file:///etc/passwd">]>' + cvat(CAT, prolog=''), 'DOCTYPE'),
    'a video': ('x.xml', '<annotations><track id="0" label="car"><box frame="0" xtl="1" ytl="1" xbr="2" ybr="2"/></track></annotations>', 'video'),
    'too deep': ('x.xml', '<annotations>' + '<image name="a.png">' * 999, 'too deeply'),
    'an encoding of another age': ('x.xml', cvat(CAT, prolog='<?xml version="1.0" encoding="shift-jis-x"?>'), 'encoding'),
    'broken JSON': ('x.json', '[{"data": {"image": "a.png"},\n "annotations": [}]', 'line 2'),
    'broken JSON line': ('x.jsonl', '{"filename": "a.png", "label": ["cat"]}\n{"filename": ', 'line 2'),
    'deep JSON': ('x.json', '[{"data": 1, "annotations": ' + '[' * 100_000, 'JSON'),
    'another XML': ('x.xml', '<html><body/></html>', 'known'), 'another JSON': ('x.json', dict(images=[], annotations=[]), 'known'),
    'a torn zip': ('x.zip', b'PK\x03\x04 torn', 'known'), 'names that differ in case': ('x.xml', cvat(CAT, cvat_image('b.png', 'Cat')), 'differ only'),
    'no classes.txt': ('y.txt', '0 .5 .5 .5 .5', 'known'),
}


@pytest.mark.parametrize('case', FATAL)
def test_what_cannot_be_used_gives_one_sentence(tmp_path, case):
    name, content, words = FATAL[case]
    pictures(tmp_path, 'a.png', 'b.png')
    path = write(tmp_path/name, content) if name else tmp_path/'nothing.xml'
    reader = dict(xml=from_cvat, json=from_label_studio, jsonl=from_doccano).get(path.suffix[1:], from_label_tool)
    if words == 'known': reader = from_label_tool
    with pytest.raises(InputError, match=words) as error: reader(path)
    assert '\n' not in str(error.value) and error.value.__class__ is InputError


def test_wrong_arguments(tmp_path):
    path = write(pictures(tmp_path, 'a.png')/'x.xml', cvat(CAT))
    with pytest.raises(InputError, match="'crop' or 'image'"): from_cvat(path, boxes='both')
    with pytest.raises(InputError, match='is no folder'): from_cvat(path, images=tmp_path/'nowhere')
    with pytest.raises(InputError, match='predictions'): from_label_studio(path, use='guesses')
    with pytest.raises(InputError, match='classes.txt'): from_yolo(tmp_path)


# What is no export

def test_ordinary_folders_and_tables_are_no_exports(tmp_path):
    folder = pictures(tmp_path/'photos', 'cat/1.png', 'dog/1.png', 'labels/1.png')
    write(folder/'cat/notes.txt', '0 0.5 0.5 0.5 0.5')
    write(folder/'cat/1.xml', voc('1.png', ('cat', 1, 1, 5, 5)))
    write(folder/'classes.txt', 'cat\ndog\n')
    write(folder/'meta.json', [dict(filename='x', size=1)])
    table = write(tmp_path/'labels.csv', 'image,label\nphotos/cat/1.png,cat\n')
    assert not any(map(is_label_export, (folder, table, tmp_path, tmp_path/'nothing', folder/'classes.txt', folder/'cat/1.png')))
    assert load_images(folder).classes == ('cat', 'dog', 'labels')


# Boxes as pictures

@pytest.fixture
def shelf(tmp_path) -> Path:
    "Twelve pictures with three boxes each, some overlapping."
    names = [f'{number:02}.png' for number in range(12)]
    pictures(tmp_path, *names)
    boxes = [('cat', 0, 0, 20, 40), ('dog', 20, 0, 40, 40), ('cat', 2, 0, 22, 40)]
    return write(tmp_path/'shelf.xml', cvat(*(cvat_image(name, *boxes) for name in names)))


def test_crops_go_through_scan_split_and_pixels(shelf):
    data = from_cvat(shelf).split()
    assert len(data) == 36 and data.items['digest'].nunique() == 36
    assert (data.items.groupby('group')['split'].nunique() == 1).all() and data.items['image'].is_unique
    assert list(data.items[['width', 'height']].iloc[0]) == [20, 40]
    p = Preprocessing(40, 20, 3)
    expected = [np.asarray(Image.open(shelf.parent/group).crop(box)) for group, box in zip(data.items['group'], data.items['box'])]
    assert (data.pixels(range(36), p) == expected).all()
    assert {kind: 0 for kind in ('duplicate', 'misnamed')}.keys().isdisjoint(finding.kind for finding in data.check())
    images, _ = data.dataloaders(p, batch_size=4).train.one_batch()
    assert images.shape == (4, 3, 40, 20)


def test_a_table_of_crops_survives_its_file(shelf, tmp_path):
    data = from_cvat(shelf).split()
    data.table().to_csv(tmp_path/'items.csv', index=False)
    again = from_csv(tmp_path/'items.csv')
    assert list(again.items['box']) == list(data.items['box']) and rows(again) == rows(data)
    assert again.scan().fingerprint() == data.fingerprint() and (again.items['split'] == data.items['split']).all()
    more = from_cvat(shelf).split(seed=9, previous=data)
    assert (more.items['split'] == data.items['split']).all()


def test_the_name_of_a_crop():
    assert crop_box('a.jpg#xywh=1,2,30,40') == (1, 2, 31, 42) and crop_box('a.jpg') is crop_box('a#xywh=1,2,3') is None


def test_a_picture_that_exif_turns_is_cut_as_it_is_seen(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    write(tmp_path/'a.jpg', encoded(0, (80, 40), 'JPEG', exif=exif))
    data = from_cvat(write(tmp_path/'x.xml', cvat(cvat_image('a.jpg', ('cat', 0, 40, 40, 80), width=40, height=80))))
    assert data.open(0).size == (40, 40) and not data.set_aside
    stored = from_cvat_kinds(tmp_path, cvat(cvat_image('a.jpg', ('cat', 0, 0, 40, 40), width=80, height=40), cvat_image('b.png', 'cat')))
    assert stored == ['size_differs']


def from_cvat_kinds(tmp_path, text) -> list[str]:
    write(tmp_path/'b.png', PICTURES[1])
    return kinds(from_cvat(write(tmp_path/'y.xml', text)))


# Label Studio and back

def test_predictions_go_to_label_studio_and_come_back(tmp_path):
    data = from_doccano(write(pictures(tmp_path, 'a.png', 'b 砖.png')/'x.jsonl', lines(dict(filename='a.png', label=['cat']), dict(filename='b 砖.png', label=['"dog"']))))
    path = to_label_studio(data, np.array([[0.25, 0.75], [0.9, 0.1]]), tmp_path/'tasks.json')
    first, second = json.loads(path.read_text(encoding='utf-8'))
    assert first['data'] == dict(image='/data/local-files/?d=a.png') and '%E7%A0%96' in second['data']['image']
    assert first['predictions'][0]['score'] == 0.75 and first['predictions'][0]['model_version'] == 'imgcls_nb'
    assert first['predictions'][0]['result'][0]['value'] == dict(choices=['cat'])
    assert rows(from_label_studio(path, use='predictions')) == [('a.png', 'cat'), ('b 砖.png', '"dog"')]
    with pytest.raises(InputError, match='predictions only'): from_label_studio(path)
    config = label_studio_config(data)
    result = first['predictions'][0]['result'][0]
    assert f'name="{result["from_name"]}" toName="{result["to_name"]}"' in config and "value='\"dog\"'" in config
    assert_no_leftovers(tmp_path)


def test_crops_go_to_label_studio_and_come_back(shelf, tmp_path):
    data = from_cvat(shelf)
    path = to_label_studio(data, np.eye(2)[data.targets(np.arange(len(data)))], tmp_path/'tasks.json')
    again = from_label_studio(path, use='predictions')
    assert rows(again) == rows(data) and list(again.items['box']) == list(data.items['box'])


def test_what_label_studio_cannot_take(tmp_path):
    data = from_cvat(write(pictures(tmp_path, 'a.png', 'b.png')/'x.xml', cvat(CAT, cvat_image('b.png', 'dog'))))
    for wrong, words in [(np.zeros((3, 2)), r'\[3, 2\]'), (np.full((2, 2), np.nan), 'not numbers')]:
        with pytest.raises(InputError, match=words): to_label_studio(data, wrong, tmp_path/'t.json')
    from imgcls_nb.data import digits
    with pytest.raises(InputError, match='files in a folder'): to_label_studio(digits(), np.zeros((1797, 10)), tmp_path/'t.json')


# Anything at all

GOOD = {
    'x.xml': cvat(cvat_image('a.png', 'cat', ('dog', 1, 2, 30.5, 20)), cvat_image('b.png', 'cat')).encode(),
    'v.xml': voc('a.png', ('cat', 1, 2, 30, 40), path='C:\\photos\\a.png').encode(),
    'x.jsonl': lines(dict(filename='a.png', label=['cat']), dict(filename='b.png', label=['dog'])).encode(),
    'x.json': json.dumps([task('a.png', choice('cat')), task('b.png', region('dog', 1, 2, 30, 40, rotation=5))]).encode(),
    'min.json': json.dumps([dict(id=1, image='a.png', choice='cat', annotator=1, annotation_id=2, lead_time=1.5)]).encode(),
    'a.txt': b'0 0.5 0.5 0.25 0.25\n1 0.2 0.2 0.1 0.1\n',
    'classes.txt': b'cat\ndog\n',
}
TOKENS = [b'', b'"', b'<', b'>', b'/', b'{', b'}', b'[', b']', b'null', b'true', b'-1', b'1e999', b'NaN', b'\x00', b'\xff\xfe', b'../', b'&a;', b'"label"',
          b'<tag/>', b'\\', b'9' * 5000, '砖'.encode(), b'\n', b':', b',']


@st.composite
def mutated(draw):
    "A good export with some of its bytes replaced."
    name = draw(st.sampled_from(list(GOOD)))
    data = GOOD[name]
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        length = draw(st.integers(0, 12))
        data = data[:start] + draw(st.one_of(st.sampled_from(TOKENS), st.binary(max_size=8))) + data[start + length:]
    return name, data


@pytest.fixture(scope='module')
def fuzzed(tmp_path_factory) -> Path: return pictures(tmp_path_factory.mktemp('fuzz'), 'a.png', 'b.png')


def check_any(folder: Path, name: str, data: bytes) -> None:
    path = folder/name
    for old in (*folder.glob('*.txt'), *folder.glob('*.xml'), *folder.glob('*.json*')): old.unlink()
    if name in ('a.txt', 'classes.txt'):
        for other in ('a.txt', 'classes.txt'): (folder/other).write_bytes(GOOD[other])
    path.write_bytes(data)
    readers = dict(xml=(from_cvat, from_voc), json=(from_label_studio, from_doccano), jsonl=(from_doccano,), txt=(from_yolo,))[path.suffix[1:]]
    for reader in (*readers, from_label_tool):
        for boxes in ('crop', 'image'):
            try: made = reader(folder if path.suffix == '.txt' else path, boxes=boxes)
            except InputError as error: assert str(error) and '\n' not in str(error)
            else:
                assert len(made) and made.items['image'].is_unique
                for row in range(len(made)): assert folder in made.source(row).parents


@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(mutated())
def test_a_mutated_export_gives_a_table_or_one_sentence(fuzzed, change): check_any(fuzzed, *change)


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(list(GOOD)), st.binary(max_size=200))
def test_random_bytes_give_one_sentence(fuzzed, name, data): check_any(fuzzed, name, data)


def test_a_large_export_is_read_piece_by_piece(tmp_path):
    import tracemalloc
    pictures(tmp_path, 'a.png')
    path = tmp_path/'x.xml'
    padding = '<polygon label="cat" points="' + '1.25,2.5;' * 2000 + '"></polygon>'
    path.write_text(cvat(*(cvat_image('a.png', 'cat', padding) for _ in range(500))), encoding='utf-8')
    tracemalloc.start()
    try:
        assert len(read_annotations(path)) == 500
        peak = tracemalloc.get_traced_memory()[1]
    finally: tracemalloc.stop()
    assert path.stat().st_size > 8e6 and peak < 2e6


# The command

def test_the_command_reads_an_export(tmp_path):
    names = [f'{number:02}.png' for number in range(8)]
    pictures(tmp_path, *names)
    path = write(tmp_path/'export.xml', cvat(*(cvat_image(name, 'cat' if number % 2 else 'dog') for number, name in enumerate(names)), cvat_image('gone.png', 'cat')))
    result = imgcls('data', path, '--json', cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    said = json.loads(result.stdout)
    assert 'missing' in result.stdout and 'gone.png' in result.stdout and said
    with pytest.raises(InputError, match='broken.xml is broken XML: line'): load_images(write(tmp_path/'broken.xml', cvat(CAT)[:-30]))
