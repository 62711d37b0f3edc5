"Arrays, files and data sets become images: in memory or on demand, whatever their depth"
import struct, threading, zlib
from pathlib import Path
import numpy as np, pytest, torch
from PIL import Image
from torch.utils.data import Subset, TensorDataset
from ifnd_nb import reading
from ifnd_nb.loaders import two_view_dls
from ifnd_nb.sources import image_source
from helpers import A, chunk, deep, GREY, ITEMS, Items, picture, png_bytes, save_many, smooth

pytestmark = pytest.mark.usefixtures('in_a_folder')

@pytest.mark.parametrize('max_cache_gb', [2, 0])
def test_truncated_file_among_good_ones(tmp_path, max_cache_gb, capsys):
    folder = save_many(tmp_path/'a', ext='jpg')
    noise = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    big = Image.fromarray(noise); big.save(folder/'big.jpg', quality=95)
    whole = (folder/'big.jpg').read_bytes()
    assert len(whole) > 2**16
    kw = dict(max_cache_gb=max_cache_gb, size=16)
    assert len(image_source(folder, **kw))==9
    (folder/'big.jpg').write_bytes(whole[:-5000])
    with pytest.raises(ValueError, match='big.jpg.*damaged.*skip_bad=True'): image_source(folder, **kw)
    labels = list('abcdefgh') + ['bad']
    images = image_source(folder, labels=labels, skip_bad=True, **kw)
    assert len(images)==8 and images.left_out==[(str(folder/'big.jpg'), 'damaged')]
    assert capsys.readouterr().out=='left out: 1 damaged image (big.jpg)\n'
    assert [images.vocab[y] for y in images.labels]==labels[:8]
    assert images.batch(range(8))[0][:, 0, 0, 0].tolist()==pytest.approx([i*10 for i in range(8)], abs=3)
    for f in folder.iterdir(): f.write_bytes(b'no image')
    with pytest.raises(ValueError, match='all 9 images are damaged'): image_source(folder, skip_bad=True, **kw)

def test_bad_file_stops_long_before_the_end(tmp_path, monkeypatch):
    folder = save_many(tmp_path/'a', 3)
    (folder/'000.png').write_bytes(b'')
    files, read, count = [folder/'000.png'] + [folder/'001.png']*3000, reading.read_image, []
    monkeypatch.setattr(reading, 'read_image', lambda *a: count.append(1) or read(*a))
    with pytest.raises(ValueError, match='000.png'): image_source(files)
    assert len(count) < 3000

def test_channels_and_sizes_of_files(tmp_path):
    for i in range(3): GREY.save(tmp_path/f'{i}.png')
    images = image_source(tmp_path)
    assert (images.channels, images.size, images.view_size)==(1, 30, 30)
    assert image_source(tmp_path, channels=3).channels==3
    smooth(200, 300).save(tmp_path/'z.png')
    images = image_source(tmp_path, size=20)
    assert (images.channels, images.size, images.view_size)==(3, 25, 20)
    for i in range(5): smooth(200, 300).save(tmp_path/f'z{i}.png')
    images = image_source(tmp_path)
    assert (images.size, images.view_size)==(80, 64) and image_source(tmp_path, size=128).size==160

@pytest.mark.parametrize('shape,channels',
                         [((7, 12, 12), 1), ((7, 12, 12, 1), 1), ((7, 1, 12, 12), 1), ((7, 12, 12, 3), 3),
                          ((7, 3, 12, 12), 3), ((7, 12, 16, 3), 3)])
@pytest.mark.parametrize('kind', ['uint8', 'float32', 'float64', 'tensor'])
def test_arrays(shape, channels, kind):
    a = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    given = torch.from_numpy(a) if kind=='tensor' else a if kind=='uint8' else (a / 255).astype(kind)
    images = image_source(given)
    assert images.images.shape==(7, channels, 12, 12) and images.labels is None
    want = a[:, None] if a.ndim==3 else a.transpose(0, 3, 1, 2) if a.shape[-1]==channels else a
    left = (want.shape[3] - 12) // 2
    assert (images.images.numpy()==want[..., left:left+12]).all()
    assert image_source(given, channels=3).channels==3 and image_source(given, channels=1).channels==1

def test_odd_memory_layouts():
    a = np.random.default_rng(0).integers(0, 256, (5, 8, 8), dtype=np.uint8)
    frozen = a.copy(); frozen.flags.writeable = False
    for given, want in ((a[::-1], a[::-1]), (frozen, a), (np.asfortranarray(a), a), (a[:, ::-1], a[:, ::-1])):
        assert (image_source(given).images[:, 0].numpy()==want).all()

def test_large_arrays_are_stored_near_the_size_of_views():
    images = image_source(np.random.rand(3, 200, 300), size=32)
    assert (images.size, images.view_size)==(40, 32)

@pytest.mark.parametrize('bad,match', [
    (np.zeros((5, 8, 8), np.uint16), 'dtype uint16.*uint8'), (np.zeros((5, 8, 8), bool), 'dtype bool'),
    (np.array([['a']]), 'dtype'),
    (np.zeros((5, 8)), r'shape \(5, 8\)'), (np.zeros((5, 8, 8, 2)), r'shape \(5, 8, 8, 2\)'),
    (np.full((5, 8, 8), -1.), r'outside \[0, 1\]'),
    (np.full((5, 8, 8), np.nan), r'outside \[0, 1\]'), (torch.full((5, 8, 8), 7), 'dtype torch.int64'),
    (np.zeros((0, 8, 8)), 'empty'), ([], 'empty'), (np.zeros(()), 'shape')])
def test_arrays_refused(bad, match):
    with pytest.raises(ValueError, match=match): image_source(bad)

@pytest.mark.parametrize('kind', ITEMS)
@pytest.mark.parametrize('max_cache_gb', [2, 0])
def test_map_style_data_sets(kind, max_cache_gb):
    y = [2, 0, 2, 0, 2, 0]
    for items, kw, labelled in ((ITEMS[kind], {}, False), ([(x,) for x in ITEMS[kind]], {}, False),
                                ([(x, i) for x, i in zip(ITEMS[kind], y)], dict(targets=y, classes=list('abc')), True),
                                ([(x, torch.tensor(i)) for x, i in zip(ITEMS[kind], y)],
                                 dict(targets=torch.tensor(y), classes=list('abc')), True)):
        images = image_source(Items(items, **kw), max_cache_gb=max_cache_gb)
        assert (images.images is None)==(max_cache_gb==0)
        assert (images.batch(range(6))[0].permute(0, 2, 3, 1).numpy()==A).all()
        assert (images.labels is not None)==labelled
        if labelled: assert [images.vocab[i] for i in images.labels]==[*'cacaca']

def test_other_items():
    named = image_source([(x, s) for x, s in zip(ITEMS['pil'], 'bababa')])
    assert named.vocab==['a', 'b'] and named.labels.tolist()==[1, 0]*3
    dicts = image_source(Items([dict(image=x, label=i) for i, x in enumerate(ITEMS['pil'])]))
    assert dicts.labels.tolist()==list(range(6))
    boxes = image_source(Items([(x, dict(boxes=[1, 2])) for x in ITEMS['pil']]))
    assert boxes.labels is None
    part = image_source(Subset(TensorDataset(torch.from_numpy(A).permute(0, 3, 1, 2), torch.arange(6)), [4, 2]))
    assert part.vocab==[2, 4] and part.labels.tolist()==[1, 0] and (part.images[0].permute(1, 2, 0).numpy()==A[4]).all()
    given = image_source(Items(ITEMS['pil']), labels=torch.tensor([1, 1, 1, 0, 0, 0]))
    assert given.labels.tolist()==[1, 1, 1, 0, 0, 0]

def test_bad_items():
    items = Items([*ITEMS['pil'], 'no image'])
    with pytest.raises(ValueError, match='item 6 of data cannot be read'): image_source(items)
    for gb in (2, 0): assert len(image_source(items, skip_bad=True, labels=list(range(7)), max_cache_gb=gb))==6
    with pytest.raises(ValueError, match=r'item 0 .*outside \[0, 1\]'): image_source(Items([torch.randn(3, 8, 8)]))

def test_data_sets_are_read_by_one_thread_once():
    class Once(Items):
        reading, most, seen = 0, 0, []
        def __getitem__(self, i):
            Once.reading += 1; Once.most = max(Once.most, Once.reading)
            Once.seen.append((i, threading.get_ident()))
            Once.reading -= 1
            return super().__getitem__(i)
    image_source(Once(ITEMS['pil'] * 20))
    read = [t for _, t in Once.seen][16:]
    assert Once.most==1 and len(Once.seen) <= 120 + 16 and len(set(read[-100:]))==1

def test_float_images_share_one_scale(capsys):
    rng = np.random.default_rng(0)
    for i in range(20):
        a = rng.random((24, 24)).astype('f4')
        deep(f'flt/bright/{i}.tif', a * 1.1), deep(f'flt/dim/{i}.tif', a * .9)
    images = image_source('flt')
    bright, dim = (images.images[images.labels==c].float() for c in (0, 1))
    assert bright.mean() / dim.mean()==pytest.approx(1.1 / .9, rel=.1) and 'becomes black' in capsys.readouterr().out
    assert images.levels==(0, pytest.approx(1.1, abs=.01))

@pytest.mark.parametrize('dtype,values,white',
                         [('f4', (.2, .9), 1), ('f4', (.2, 1.2), 1.2), ('f4', (0, 300.), 1023), ('f4', (0, .05), .05),
                          ('i4', (3, 250), 255), ('i4', (3, 4000), 4095), ('u2', (3, 4000), 4095),
                          ('u2', (9, 60000), 65535), ('f4', (-2, 2), 2), ('i4', (-100, 100), 100),
                          ('i4', (5, 10**6), 10**6)])
def test_the_scale_is_that_of_the_collection(dtype, values, white):
    low, high = values
    for i, v in enumerate((low, high)): deep(f'p/{i}.tif', np.full((8, 8), v, dtype))
    images = image_source('p')
    black = min(0, low)
    assert images.levels==(black, pytest.approx(white))
    for x, v in zip(images.images, values):
        assert x.unique().tolist()==[pytest.approx((v - black) / (white - black) * 255, abs=.51)]

def test_one_bright_pixel_changes_no_other_image_and_held_out_images_have_the_same_scale():
    a = np.full((8, 8), .5, 'f4')
    for i in range(9): deep(f'p/{i}.tif', a)
    a[0, 0] = .99
    deep('p/9.tif', a), deep('q/0.tif', a * 300)
    images = image_source('p')
    assert (images.images[:, 0, 4, 4]==128).all()
    dls = two_view_dls('p', valid='q', bs=4, size=8, device='cpu')
    assert dls.valid_ds.levels==dls.train_ds.levels==dls.levels==(0, 1)

def test_one_deep_image_among_many_is_seen(capsys):
    for i in range(300): picture(f'p/{i:03}.png', 9)
    deep('p/101.png', np.full((8, 8), 4000, 'u2'))
    images = image_source('p', channels=1)
    assert images.levels==(0, 4095) and images.images[101].unique().tolist()==[249]
    assert '4095 white' in capsys.readouterr().out

def test_deep_colour_is_said(capsys):
    def png16(path, v):
        rows = b''.join(b'\0' + struct.pack('>H', v) * 3 * 8 for _ in range(8))
        head = chunk(b'IHDR', struct.pack('>IIBBBBB', 8, 8, 16, 2, 0, 0, 0))
        body = chunk(b'IDAT', zlib.compress(rows)) + chunk(b'IEND', b'')
        Path(path).write_bytes(b'\x89PNG\r\n\x1a\n' + head + body)
    Path('p').mkdir()
    png16('p/0.png', 40000), png16('p/1.png', 3000)
    images = image_source('p')
    assert images.images[:, 0, 0, 0].tolist()==[40000 >> 8, 3000 >> 8]
    assert 'colour images of 16 bits: 65535 becomes white' in capsys.readouterr().out

def test_items_of_a_data_set_share_one_scale():
    items = [(Image.fromarray(np.full((8, 8), v, 'f4')), y) for y, v in enumerate((.5, 1.5, 200.))]
    assert image_source(items).images[:, 0, 0, 0].tolist()==[0, 2, 200]

def pil(v=0): return Image.fromarray(np.full((8, 8, 3), v, np.uint8))

@pytest.mark.parametrize('key,label',
                         [('image', 'label'), ('img', 'labels'), ('image', 'fine_label'), ('jpg', 'cls'),
                          ('png', 'class'), ('pixel_values', 'target')])
def test_keys_as_hugging_face_has_them(key, label):
    images = image_source(Items([{key: pil(i), label: i % 2} for i in range(6)]))
    assert images.labels.tolist()==[0, 1] * 3 and images.images[:, 0, 0, 0].tolist()==list(range(6))

def test_images_that_are_not_decoded_yet():
    raw = png_bytes(7)
    for o in (raw, {'bytes': raw, 'path': None}, {'bytes': None, 'path': 'tmp.png'}, 'tmp.png', Path('tmp.png')):
        assert image_source(Items([{'image': o, 'label': 1}] * 3)).images.unique().tolist()==[7]

def test_class_names_of_data_sets():
    from types import SimpleNamespace
    names = dict(label=SimpleNamespace(names=['cat', 'dog']))
    images = image_source(Items([{'image': pil(), 'label': i % 2} for i in range(4)], features=names))
    assert images.vocab==['cat', 'dog']
    assert image_source(Items([(pil(), i % 2) for i in range(4)], vocab=['cat', 'dog'])).vocab==['cat', 'dog']
    assert image_source(Items([{'image': pil(), 'label': [0, -1][i % 2]} for i in range(4)],
                              features=names)).labels.tolist()==[0, -1] * 2

def test_unknown_keys_are_named():
    with pytest.raises(ValueError, match="it has 'foto', 'label', and none of 'image', 'img'"):
        image_source(Items([{'foto': pil(), 'label': 1}] * 3))
