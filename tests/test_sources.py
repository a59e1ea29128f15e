"Every source gives the same table; downloads are whole and checked; nothing hostile gets through."
import gzip
import io
import os
import tarfile
import threading
import zipfile
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import assert_no_leftovers
from imgcls_nb import sources
from imgcls_nb.data import Findings, digits
from imgcls_nb.run import InputError
from imgcls_nb.sources import (DATASETS, PublicDataset, RemoteFile, UnpackLimits, cache_folder, checksum, download, from_csv,
                               from_hub_rows, from_npy, from_npz, from_pattern, idx_bytes, load_images, public_datasets, read_idx,
                               register, unpack)

MIRROR = os.environ.get('IMGCLS_MIRROR')


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    "A cache of its own and no mirror, so that no test sees another's files."
    monkeypatch.setenv('IMGCLS_CACHE', str(tmp_path/'the cache'))
    monkeypatch.delenv('IMGCLS_MIRROR', raising=False)
    monkeypatch.setattr(sources, 'DATASETS', dict(DATASETS))
    monkeypatch.setitem(register.__globals__, 'DATASETS', sources.DATASETS)


class Handler(BaseHTTPRequestHandler):
    "Serves `server.data`, whole or from the middle; `server.cuts` says after how many bytes each answer ends."
    protocol_version = 'HTTP/1.1'

    def do_GET(self):
        server, start = self.server, 0
        asked = self.headers.get('Range')
        server.asked.append(asked)
        if self.path == '/missing': return self.send_error(404)
        if asked and server.ranges: start = int(asked.split('=')[1].rstrip('-'))
        if start and start >= len(server.data): return self.send_error(416)
        data = server.data[start:]
        self.send_response(206 if start else 200)
        if start: self.send_header('Content-Range', f'bytes {start}-{len(server.data) - 1}/{len(server.data)}')
        self.send_header('Content-Length', str(len(data)))
        self.send_header('Connection', 'close')
        self.end_headers()
        cut = server.cuts.pop(0) if server.cuts else None
        self.wfile.write(data[:cut])
        self.close_connection = True

    def log_message(self, *arguments): pass


@pytest.fixture
def server():
    "A real web server on this machine."
    server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    server.data, server.cuts, server.asked, server.ranges = np.random.default_rng(0).bytes(400_000), [], [], True
    server.url = f'http://127.0.0.1:{server.server_port}'
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def offered(server, tmp_path, *paths) -> RemoteFile:
    "What the server offers, with its true checksum."
    (tmp_path/'truth').write_bytes(server.data)
    return RemoteFile(tuple(server.url + path for path in paths or ('/a.bin',)), checksum(tmp_path/'truth'), len(server.data))


def test_download(server, tmp_path):
    seen = []
    path = download(offered(server, tmp_path), tmp_path/'new'/'a.bin', lambda done, total: seen.append((done, total)))
    assert path.read_bytes() == server.data and seen[-1] == (400_000, 400_000)
    assert_no_leftovers(tmp_path)


def test_a_broken_transfer_is_resumed(server, tmp_path):
    server.cuts = [100_000, 50_000]
    assert download(offered(server, tmp_path), tmp_path/'a.bin').read_bytes() == server.data
    assert server.asked == [None, 'bytes=100000-', 'bytes=150000-']


def test_a_server_that_cannot_resume_starts_again(server, tmp_path):
    server.cuts, server.ranges = [100_000], False
    assert download(offered(server, tmp_path), tmp_path/'a.bin').read_bytes() == server.data


def test_an_interrupted_download_leaves_no_file_and_goes_on_later(server, tmp_path):
    def interrupt(done, total):
        if done > 50_000: raise KeyboardInterrupt
    server.cuts = [300_000]
    with pytest.raises(KeyboardInterrupt): download(offered(server, tmp_path), tmp_path/'a.bin', interrupt)
    assert not (tmp_path/'a.bin').exists()
    server.asked.clear()
    server.cuts.clear()
    assert download(offered(server, tmp_path), tmp_path/'a.bin').read_bytes() == server.data
    assert server.asked[0].startswith('bytes=')
    assert_no_leftovers(tmp_path)


def test_a_transfer_that_never_gets_further(server, tmp_path):
    server.cuts = [1000] + [0] * 20
    with pytest.raises(InputError, match='IMGCLS_MIRROR'): download(offered(server, tmp_path), tmp_path/'a.bin')
    assert not (tmp_path/'a.bin').exists() and len(server.asked) < 6


def test_a_wrong_checksum_is_refused(server, tmp_path):
    wrong = replace(offered(server, tmp_path), checksum='md5:' + 32 * '0')
    with pytest.raises(InputError, match='another checksum'): download(wrong, tmp_path/'a.bin')
    assert not (tmp_path/'a.bin').exists()
    assert_no_leftovers(tmp_path)


def test_a_wrong_beginning_is_thrown_away(server, tmp_path):
    (tmp_path/'.a.bin.partial-stopped').write_bytes(b'x' * 1000)
    assert download(offered(server, tmp_path), tmp_path/'a.bin').read_bytes() == server.data
    (tmp_path/'.b.bin.partial-stopped').write_bytes(b'x' * 500_000)  # longer than the file
    assert download(offered(server, tmp_path), tmp_path/'b.bin').read_bytes() == server.data


def test_what_another_process_is_writing_is_left_alone(server, tmp_path):
    other = tmp_path/'.a.bin.partial-999999999'
    other.write_bytes(b'not yet whole')
    download(offered(server, tmp_path), tmp_path/'a.bin')
    assert other.read_bytes() == b'not yet whole'


def test_not_found_and_the_second_address(server, tmp_path):
    with pytest.raises(InputError, match='404'): download(offered(server, tmp_path, '/missing'), tmp_path/'missing')
    both = offered(server, tmp_path, '/missing', '/a.bin')
    assert download(both, tmp_path/'a.bin').read_bytes() == server.data


def test_no_network(tmp_path):
    nowhere = RemoteFile(('http://127.0.0.1:9/set.npz',), 'md5:' + 32 * '0', 5_000_000)
    with pytest.raises(InputError) as caught: download(nowhere, tmp_path/'set.npz')
    for word in ('set.npz', '5.0 MB', 'cannot be reached', 'IMGCLS_MIRROR', str(tmp_path)): assert word in str(caught.value)


def test_the_cache_follows_the_environment(monkeypatch, tmp_path):
    assert cache_folder() == tmp_path/'the cache'
    monkeypatch.delenv('IMGCLS_CACHE')
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'xdg'))
    monkeypatch.setattr(sources.sys, 'platform', 'linux')
    assert cache_folder() == tmp_path/'xdg'/'imgcls_nb'


def test_checksums_are_the_ones_torchvision_states():
    from torchvision.datasets import MNIST, FashionMNIST, Imagenette, OxfordIIITPet
    for name, theirs in dict(mnist=MNIST.resources, fashion_mnist=FashionMNIST.resources).items():
        assert {(file.name, file.checksum) for file in DATASETS[name].files} == {(file, f'md5:{md5}') for file, md5 in theirs}
    pets = {(url, f'md5:{md5}') for url, md5 in OxfordIIITPet._RESOURCES}
    assert {(file.urls[0], file.checksum) for file in DATASETS['oxford_pets'].files} == pets
    for size in ('160', '320'):
        file, = DATASETS[f'imagenette_{size}'].files
        assert (file.urls[0], file.checksum.removeprefix('md5:')) == Imagenette._ARCHIVES[f'{size}px']


def test_every_two_dimensional_medmnist_set_has_a_name():
    from medmnist import INFO
    flat = {name for name, facts in INFO.items() if '3D' not in facts['python_class']}
    assert flat <= set(public_datasets()) and len(flat) == 12
    assert sources._public_dataset('pathmnist_224').files[0].name == 'pathmnist_224.npz'
    assert sources._public_dataset('pathmnist_99') is None and sources._public_dataset('adrenalmnist3d') is None


def archive(path: Path, members: dict[str, bytes], **links) -> Path:
    "A tar archive with files, and symbolic links by keyword."
    with tarfile.open(path, 'w:gz') as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for name, target in links.items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            tar.addfile(info)
    return path


@pytest.mark.parametrize('name', ['../out.txt', 'cat/../../out.txt', '/tmp/../../out.txt'])
def test_members_that_climb_out(tmp_path, name):
    path = archive(tmp_path/'a.tgz', {'ok.txt': b'x', name: b'x'})
    with pytest.raises(InputError, match='outside of its folder'): unpack(path, tmp_path/'deep'/'a')
    assert not list(tmp_path.rglob('out.txt')) and not (tmp_path/'deep'/'a').exists()
    assert_no_leftovers(tmp_path)


def test_a_folder_may_be_named_in_a_roundabout_way(tmp_path):
    (tmp_path/'deep').mkdir()
    assert (unpack(archive(tmp_path/'a.tgz', {'ok.txt': b'x'}), tmp_path/'deep'/'..'/'a')/'ok.txt').read_bytes() == b'x'


def test_links_are_refused(tmp_path):
    path = archive(tmp_path/'a.tgz', {'ok.txt': b'x'}, link='/etc')
    with pytest.raises(InputError, match='neither a file nor a folder'): unpack(path, tmp_path/'a')
    assert not (tmp_path/'a').exists()


@pytest.mark.parametrize('limits', [UnpackLimits(max_bytes=1_000_000), UnpackLimits(max_files=2)])
def test_bombs_are_refused(tmp_path, limits):
    path = archive(tmp_path/'a.tgz', {f'{i}.bin': bytes(400_000) for i in range(3)})
    with pytest.raises(InputError, match='unpacks to more than'): unpack(path, tmp_path/'a', limits)
    assert not (tmp_path/'a').exists()


def test_a_cut_off_archive(tmp_path):
    path = archive(tmp_path/'a.tgz', {'a.bin': np.random.default_rng(0).bytes(50_000)})
    path.write_bytes(path.read_bytes()[:20_000])
    with pytest.raises(InputError, match='a.tgz'): unpack(path, tmp_path/'a')
    (tmp_path/'b.tgz').write_bytes(b'<html>Please log in</html>')
    with pytest.raises(InputError, match='b.tgz'): unpack(tmp_path/'b.tgz', tmp_path/'b')
    assert not (tmp_path/'a').exists() and not (tmp_path/'b').exists()


@pytest.mark.parametrize('shape', [(5,), (3, 4), (2, 3, 4), (2, 2, 2, 2)])
def test_idx_there_and_back(tmp_path, shape):
    array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    (tmp_path/'a').write_bytes(idx_bytes(array))
    (tmp_path/'b').write_bytes(gzip.decompress(idx_bytes(array)))
    assert (read_idx(tmp_path/'a') == array).all() and (read_idx(tmp_path/'b') == array).all()


@pytest.mark.parametrize('data, reason', [
    (b'', 'header'), (b'\0\0\x08', 'header'), (b'<html>', 'header'), (b'\0\0\x0d\1\0\0\0\1aaaa', 'header'), (b'\0\0\x08\3\0\0', 'inside its header'),
    (b'\0\0\x08\1\0\0\0\5abc', '3 of the 5'), (b'\0\0\x08\1\0\0\0\2abc', 'behind its end'), (b'\0\0\x08\2' + b'\xff' * 8, 'more than'),
    (gzip.compress(b'\0\0\x08\1\0\0\0\5abcde', mtime=0)[:-6], 'cut off')])
def test_files_that_are_not_idx(tmp_path, data, reason):
    (tmp_path/'t10k.gz').write_bytes(data)
    with pytest.raises(InputError) as caught: read_idx(tmp_path/'t10k.gz')
    assert reason in str(caught.value) and 't10k.gz' in str(caught.value) and 'again' in str(caught.value)


def write_mnist(folder: Path, entry: PublicDataset, invert: bool = False) -> None:
    "A tiny set in MNIST's format: 100 training and 40 test images."
    pixels, labels = digits().arrays, digits().items['label'].astype(np.uint8).to_numpy()
    pixels = 255 - pixels if invert else pixels
    folder.mkdir(parents=True)
    for file, array in zip(entry.files, (pixels[:100], labels[:100], pixels[100:140], labels[100:140])):
        (folder/file.name).write_bytes(idx_bytes(array))


def test_a_mirror_is_used_and_a_differing_checksum_is_said(tmp_path, monkeypatch):
    write_mnist(tmp_path/'mirror'/'MNIST', DATASETS['mnist'])
    monkeypatch.setenv('IMGCLS_MIRROR', str(tmp_path/'mirror'))
    data = load_images('mnist')
    assert dict(data.items['split'].value_counts()) == dict(train=100, test=40) and data.kind == 'digits'
    assert data.facts['licence'] == 'CC BY-SA 3.0' and 'LeCun' in data.facts['citation']
    assert 'differs from the published one' in data.facts['checksum']
    assert Findings(data.set_aside).kinds() == dict(checksum=4)


def test_files_of_one_set_are_never_taken_for_another(tmp_path, monkeypatch):
    write_mnist(tmp_path/'mirror'/'mnist', DATASETS['mnist'])
    monkeypatch.setenv('IMGCLS_MIRROR', str(tmp_path/'mirror'))
    monkeypatch.setattr(sources, 'download', refuse)
    with pytest.raises(InputError, match='no download in tests'): load_images('fashion_mnist')
    write_mnist(tmp_path/'mirror'/'fashion-mnist', DATASETS['fashion_mnist'], invert=True)
    data = load_images('fashion_mnist')
    assert 'Ankle boot' in data.classes and (data.arrays[:100] == 255 - digits().arrays[:100]).all()


def refuse(file, path, progress=None): raise InputError('no download in tests')


def test_verified_files_come_first_and_the_cache_is_checked(tmp_path, monkeypatch, server):
    data = idx_bytes(digits().arrays)
    server.data = data
    file = offered(server, tmp_path, '/images.gz')
    entry = PublicDataset('mine', (file,), None, 1, 1, '', '', '')
    (tmp_path/'mirror'/'a').mkdir(parents=True)
    (tmp_path/'mirror'/'images.gz').write_bytes(b'other')
    (tmp_path/'mirror'/'a'/'images.gz').write_bytes(data)
    monkeypatch.setenv('IMGCLS_MIRROR', str(tmp_path/'mirror'))
    assert sources.find_file(entry, file).path == tmp_path/'mirror'/'a'/'images.gz'
    monkeypatch.delenv('IMGCLS_MIRROR')
    path = sources.find_file(entry, file).path
    path.write_bytes(b'damaged')
    assert sources.find_file(entry, file).verified and path.read_bytes() == data and len(server.asked) == 2
    sources.find_file(entry, file)
    assert len(server.asked) == 2


def test_a_mirror_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv('IMGCLS_MIRROR', str(tmp_path/'nowhere'))
    with pytest.raises(InputError, match='nowhere'): load_images('mnist')


def png(seed: int = 0) -> bytes:
    "A small picture."
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8), dtype=np.uint8)).save(buffer, 'PNG')
    return buffer.getvalue()


def test_archives_of_folders_keep_their_splits(tmp_path, monkeypatch):
    members = {f'imagenette2-160/{split}/{label}/{i}.JPEG': png(i) for split in ('train', 'val')
               for label in ('n01440764', 'n03888257') for i in range(3)}
    (tmp_path/'mirror').mkdir()
    archive(tmp_path/'mirror'/'imagenette2-160.tgz', members | {'imagenette2-160/noisy_imagenette.csv': b'a,b'})
    monkeypatch.setenv('IMGCLS_MIRROR', str(tmp_path/'mirror'))
    data = load_images('imagenette_160')
    assert data.classes == ('parachute', 'tench') and dict(data.items['split'].value_counts()) == dict(train=6, valid=6)
    assert Findings(data.set_aside).kinds() == dict(checksum=1) and data.open(0).size == (8, 8)


def test_pets_take_breed_and_split_from_their_lists(tmp_path, monkeypatch):
    names = ['great_pyrenees_1', 'great_pyrenees_2', 'Abyssinian_1', 'Abyssinian_9']
    (tmp_path/'mirror').mkdir()
    archive(tmp_path/'mirror'/'images.tar.gz', {f'images/{name}.jpg': png() for name in names} | {'images/odd.mat': b'x'})
    archive(tmp_path/'mirror'/'annotations.tar.gz', {'annotations/trainval.txt': b'great_pyrenees_1 1 2 3\nAbyssinian_1 2 1 1\n',
                                                     'annotations/test.txt': b'great_pyrenees_2 1 2 3\nAbyssinian_2 2 1 1\n'})
    monkeypatch.setenv('IMGCLS_MIRROR', str(tmp_path/'mirror'))
    data = load_images('oxford_pets')
    assert data.classes == ('Abyssinian', 'great pyrenees') and sorted(data.items['split']) == ['test', 'train', 'train']
    assert Findings(data.set_aside).kinds() == dict(no_split=1, missing=1, checksum=2)


def medmnist_arrays(labels) -> dict[str, np.ndarray]:
    "Six arrays as MedMNIST stores them."
    images = np.random.default_rng(0).integers(0, 256, (12, 5, 5), dtype=np.uint8)
    parts = dict(train=slice(0, 6), val=slice(6, 9), test=slice(9, 12))
    return {f'{split}_{kind}': array[part] for split, part in parts.items() for kind, array in (('images', images), ('labels', labels))}


def test_medmnist_has_names_for_its_numbers(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path/'pneumoniamnist.npz', **medmnist_arrays(np.tile([[0], [1]], (6, 1)).astype(np.uint8)))
    monkeypatch.setenv('IMGCLS_MIRROR', str(tmp_path))
    data = load_images('pneumoniamnist')
    assert data.classes == ('normal', 'pneumonia') and dict(data.items['split'].value_counts()) == dict(train=6, valid=3, test=3)
    assert data.facts['licence'] == 'CC BY 4.0'


def test_chest_pictures_with_several_findings_are_counted(tmp_path, monkeypatch):
    labels = np.zeros((12, 14), np.uint8)
    labels[0, 6], labels[1, [2, 3]] = 1, 1
    np.savez_compressed(tmp_path/'chestmnist.npz', **medmnist_arrays(labels))
    monkeypatch.setenv('IMGCLS_MIRROR', str(tmp_path))
    data = load_images('chestmnist')
    assert len(data) == 11 and data.classes == ('no finding', 'pneumonia')
    assert '1 pictures' in Findings(data.set_aside).of_kind('several_labels')[0].evidence


def test_npz_layouts_and_groups(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (6, 5, 5, 1), dtype=np.uint8)
    np.savez(tmp_path/'a.npz', images=images, labels=np.array(['猫', 'dog'] * 3), splits=['train', 'train', 'val', 'val', 'test', 'test'],
             groups=np.arange(6) // 2)
    data = load_images(tmp_path/'a.npz')
    assert data.classes == ('dog', '猫') and list(data.items['group']) == list('001122') and data.arrays.shape == (6, 5, 5)
    assert list(data.items['split'][::2]) == ['train', 'valid', 'test']
    np.savez(tmp_path/'b.npz', x_train=images[:4], y_train=[1, 2, 1, 2], x_test=images[4:], y_test=[1, 2])
    assert dict(from_npz(tmp_path/'b.npz').items['split'].value_counts()) == dict(train=4, test=2)


def test_large_npz_files_are_mapped(tmp_path):
    np.savez_compressed(tmp_path/'a.npz', **medmnist_arrays(np.arange(12) % 2))
    held, mapped = from_npz(tmp_path/'a.npz'), from_npz(tmp_path/'a.npz', in_memory=0)
    assert (held.arrays == mapped.arrays).all() and isinstance(mapped.arrays.base, np.memmap) and mapped.open(3).size == (5, 5)
    assert len(list((cache_folder()/'arrays').iterdir())) == 1
    from_npz(tmp_path/'a.npz', in_memory=0)
    assert len(list((cache_folder()/'arrays').iterdir())) == 1


class Trap:
    "A pickle that writes a file when it is read."
    def __init__(self, path): self.path = path
    def __reduce__(self): return (open, (str(self.path), 'w'))


def test_pickles_are_never_read(tmp_path):
    trap = np.empty(2, object)
    trap[:] = [Trap(tmp_path/'ran')] * 2
    np.savez(tmp_path/'a.npz', images=np.zeros((2, 4, 4), np.uint8), labels=trap)
    (tmp_path/'ran').unlink(missing_ok=True)
    with pytest.raises(InputError, match='never read'): from_npz(tmp_path/'a.npz')
    np.save(tmp_path/'b.npy', np.zeros((2, 4, 4), np.uint8))
    np.save(tmp_path/'b_labels.npy', trap)
    with pytest.raises(InputError, match='b_labels.npy'): from_npy(tmp_path/'b.npy')
    assert not (tmp_path/'ran').exists()


def test_npz_files_that_cannot_be_used(tmp_path):
    good = dict(images=np.zeros((2, 4, 4), np.uint8), labels=[0, 1])
    wrong = dict(names=dict(pictures=good['images']), floats=good | dict(images=np.zeros((2, 4, 4))), one=good | dict(labels=[0]),
                 split=good | dict(splits=['train', 'dev']), many=good | dict(labels=np.zeros((2, 3))), group=good | dict(groups=[1]),
                 order=good | dict(images=np.asfortranarray(np.zeros((2, 4, 4), np.uint8))))
    for name, arrays in wrong.items():
        np.savez(tmp_path/f'{name}.npz', **arrays)
        with pytest.raises(InputError): from_npz(tmp_path/f'{name}.npz')
    np.savez_compressed(tmp_path/'whole.npz', images=np.random.default_rng(0).integers(0, 256, (99, 9, 9), np.uint8), labels=np.zeros(99))
    for cut in (10, 500, 4000):
        (tmp_path/'cut.npz').write_bytes((tmp_path/'whole.npz').read_bytes()[:cut])
        with pytest.raises(InputError, match='cut.npz'): from_npz(tmp_path/'cut.npz')


def test_a_header_that_claims_too_much(tmp_path):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, dict(descr='|u1', fortran_order=False, shape=(10**12, 28, 28)))
    with zipfile.ZipFile(tmp_path/'a.npz', 'w') as target:
        target.writestr('images.npy', header.getvalue() + b'\0' * 100)
        target.writestr('labels.npy', header.getvalue())
    with pytest.raises(InputError, match='claims the shape'): from_npz(tmp_path/'a.npz')


@pytest.fixture
def pictures(tmp_path):
    "Six pictures in one folder."
    folder = tmp_path/'图 photos'
    folder.mkdir()
    for i in range(6): (folder/f'{i}.png').write_bytes(png(i))
    return folder


@pytest.mark.parametrize('text, encoding', [
    ('image,label\n0.png,a\n1.png,b\n', 'utf-8'), ('image;label\n0.png;a\n1.png;b\n', 'utf-8-sig'), ('path\tclass\n0.png\ta\n1.png\tb\n', 'utf-16'),
    ('\ufeffsep=;\nFile;Category\n"0.png";a\n".\\1.png";b\n', 'utf-8'), ('id,FileName , Class\r\n7, 0.png,a\r\n8,1.png ,b\r\n\r\n', 'utf-8'),
    ('label,image\na,C:\\Users\\me\\0.png\nb,/home/me/x/1.png\n', 'utf-8')])
def test_csv_dialects(pictures, text, encoding):
    (pictures/'labels.csv').write_bytes(text.replace('\ufeff', '' if encoding != 'utf-8' else '\ufeff').encode(encoding))
    data = from_csv(pictures/'labels.csv')
    assert list(data.items['label']) == ['a', 'b'] and not data.set_aside
    assert [data.open(row).size for row in range(2)] == [(8, 8)] * 2


def test_csv_with_every_column_and_another_folder(pictures, tmp_path):
    (tmp_path/'table.csv').write_text('image,label,split,group,weight\n0.png,"a, b",train,p1,2\n1.png,c,VAL,p1,\n2.png,c,test,p2,0.5\n')
    data = load_images(tmp_path/'table.csv', images=pictures)
    assert list(data.items['split']) == ['train', 'valid', 'test'] and list(data.items['weight']) == [2, 1, 0.5]
    assert list(data.items['group']) == ['p1', 'p1', 'p2'] and data.classes == ('a, b', 'c')


def test_every_line_of_a_csv_is_kept_or_reported(pictures):
    lines = ['image,label,split,weight', '0.png,a,train,1', '0.png,a,train,1', '1.png,a,train,1', '1.png,b,train,1', '2.png,,train,1',
             '99.png,a,train,1', '3.png,a,train,heavy', '4.png,a,dev,1', '5.png,a', ',a,train,1', 'x.heic,a,train,1', '4.png,a,,1']
    (pictures/'x.heic').write_bytes(b'x')
    (pictures/'labels.csv').write_text('\n'.join(lines))
    data = from_csv(pictures/'labels.csv')
    assert list(data.items['image']) == ['0.png']
    assert Findings(data.set_aside).kinds() == dict(no_label=1, missing=2, bad_weight=1, no_split=2, bad_row=1, unsupported=1,
                                                    duplicate_row=1, two_labels=2)
    assert len(data) + len(data.set_aside) == len(lines) - 1


@pytest.mark.parametrize('data, reason', [(b'', 'columns'), (b'a,b\n1,2', 'columns'), (b'image,label\nno.png,a', 'there'), (b'image,label\n', 'no image'),
                                          (b'image,label\n\xff\xfa.png,a', 'UTF-8'), (b'image,label\n"0.png,a\n1.png,b', 'no image')])
def test_tables_that_cannot_be_used(pictures, data, reason):
    (pictures/'labels.csv').write_bytes(data)
    with pytest.raises(InputError) as caught: from_csv(pictures/'labels.csv')
    assert reason in str(caught.value) and 'labels.csv' in str(caught.value)


def test_a_folder_with_a_table(pictures):
    (pictures/'labels.csv').write_text('image,label\n0.png,a\n1.png,b\n')
    assert len(load_images(pictures)) == 2
    (pictures/'labels.csv').write_text('width,height\n1,2\n')
    with pytest.raises(InputError, match='no images in class folders'): load_images(pictures)


def test_patterns(tmp_path):
    for i, name in enumerate(['train/cat_1.png', 'train/dog_2.png', 'test/cat_3.png', 'dev/dog_4.png', 'readme.md', 'test/untitled.png']):
        (tmp_path/name).parent.mkdir(exist_ok=True)
        (tmp_path/name).write_bytes(png(i) if name.endswith('png') else b'text')
    data = from_pattern(tmp_path, r'(?P<split>\w+)/(?P<label>.+)_(?P<group>\d)\.png$')
    assert sorted(data.items['label']) == ['cat', 'cat', 'dog'] and set(data.items['split']) == {'train', 'test'} and 'group' in data.items
    assert Findings(data.set_aside).kinds() == dict(no_split=1, not_an_image=1, no_match=1)
    for pattern, reason in ((r'(', 'regular expression'), (r'.+', 'label'), (r'(?P<label>x+)_', 'matches')):
        with pytest.raises(InputError, match=reason): load_images(tmp_path, pattern=pattern)


def hub_rows(count: int = 6, **columns):
    import datasets
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=['cat', 'dog']),
                                 **{name: datasets.Value('string') for name in columns})
    rows = dict(image=[dict(bytes=png(i), path=None) for i in range(count)], label=[-1 if i == 5 else i % 2 for i in range(count)], **columns)
    return datasets.Dataset.from_dict(rows, features=features)


def test_hub_sets_are_opened_row_by_row():
    data = from_hub_rows(dict(train=hub_rows(), validation=hub_rows(4), extra=hub_rows(2)), 'pets', licence='mine')
    assert len(data) == 9 and dict(data.items['split'].value_counts()) == dict(train=5, valid=4) and data.facts['licence'] == 'mine'
    assert Findings(data.set_aside).kinds() == dict(no_split=1, no_label=1)
    assert data.open(6, 'L').tobytes() == Image.open(io.BytesIO(png(1))).tobytes()
    assert data.scan().split().counts().to_numpy().sum() == 9


def test_a_broken_picture_of_a_hub_set_is_a_finding():
    import datasets
    rows = datasets.Dataset.from_dict(dict(image=[dict(bytes=b'text', path=None), dict(bytes=png(), path=None), None], label=['a', 'b', 'b']),
                                      features=datasets.Features(image=datasets.Image(), label=datasets.Value('string')))
    scanned = from_hub_rows(dict(train=rows), 'odd').scan()
    assert len(scanned) == 1 and sorted(finding.kind for finding in scanned.set_aside) == ['missing', 'not_an_image']


def test_a_local_folder_through_the_same_door(tmp_path):
    hub_rows().to_parquet(tmp_path/'set'/'train.parquet')
    assert len(load_images(f'hf:{tmp_path}/set')) == 5


def test_hub_sets_that_are_no_classification_sets():
    import datasets
    texts = datasets.Dataset.from_dict(dict(text=['a'], label=['b']))
    with pytest.raises(InputError, match='text'): from_hub_rows(dict(train=texts), 'texts')
    with pytest.raises(InputError, match='no split'): from_hub_rows(dict(unlabelled=hub_rows()), 'odd')
    with pytest.raises(InputError, match='nobody/nothing'): load_images('hf:nobody/nothing')
    with pytest.raises(InputError, match='owner/name'): load_images('hf:')


@pytest.mark.parametrize('source, words', [('', 'empty'), ('digit', 'Did you mean digits?'), ('fashion-mnist', 'Did you mean fashion_mnist?'),
                                           ('a\0b', 'Unknown source'), ('nowhere/at/all', 'Unknown source')])
def test_sources_that_are_none(source, words):
    with pytest.raises(InputError) as caught: load_images(source)
    assert words in str(caught.value)


def test_a_name_wins_over_a_folder_of_that_name(tmp_path, monkeypatch):
    for label in 'ab':
        (tmp_path/'digits'/label).mkdir(parents=True)
        (tmp_path/'digits'/label/'1.png').write_bytes(png())
    monkeypatch.chdir(tmp_path)
    assert len(load_images('digits')) == 1797 and len(load_images('./digits')) == 2 and len(load_images(Path('digits'))) == 2


def test_a_quote_that_is_never_closed(pictures):
    (pictures/'labels.csv').write_text('label,image\na,0.png\nb,"1.png\n' + 'b,2.png\n' * 9000)
    data = from_csv(pictures/'labels.csv')
    assert list(data.items['image']) == ['0.png'] and [finding.kind for finding in data.set_aside] == ['missing']


@pytest.mark.skipif(not MIRROR, reason='IMGCLS_MIRROR names no folder with the real files')
@pytest.mark.parametrize('name, counts', [('mnist', dict(train=60_000, test=10_000)), ('cifar10', dict(train=50_000, test=10_000)),
                                          ('pneumoniamnist', None)])
def test_real_files(name, counts, monkeypatch):
    monkeypatch.setenv('IMGCLS_MIRROR', MIRROR)
    data = load_images(name)
    if counts: assert dict(data.items['split'].value_counts()) == counts and len(data.classes) == 10
    assert data.open(0).size in ((28, 28), (32, 32)) and data.facts['licence'] and data.facts['citation']
