"What would disturb a lesson in 00_data: file formats, damage, indices under workers, other processes, error messages"
import io, os, pickle, random, subprocess, sys
import numpy as np, pytest, torch
from PIL import Image, ImageDraw, ImageOps
from fastai.callback.progress import ProgressCallback
from fastai.learner import Learner
from torch.utils.data import Dataset, Subset, TensorDataset
from ifnd_nb import data
from ifnd_nb.glyphs import glyph_concepts, glyphs
from ifnd_nb.images import Images, read_image
from ifnd_nb.loaders import ImagesDL, image_stats, plain_dl, two_view_dls
from ifnd_nb.sources import image_source
from ifnd_nb.views import TwoViews, augmentations, hashed_uniforms, resample_matrix

torch.set_num_threads(1)

# ---- files

def picture(w=40, h=30):
    "A smooth picture whose corners differ, so that a wrong turn or crop shows"
    y, x = np.mgrid[:h, :w]
    return Image.fromarray(np.stack([x*255/(w-1), y*255/(h-1), 255 - x*128/(w-1)], -1).astype(np.uint8))

def pixels(im): return np.asarray(im).astype(int)

GREY = picture().convert('L')
ALPHA = Image.fromarray(np.tile(np.linspace(0, 255, 40), (30, 1)).astype(np.uint8))

def over_white(im, alpha):
    a = pixels(alpha)[..., None] / 255
    return Image.fromarray((pixels(im.convert('RGB')) * a + 255 * (1 - a)).round().astype(np.uint8))

def with_alpha(im): im = im.copy(); im.putalpha(ALPHA); return im

def deep(dtype): return Image.fromarray((pixels(GREY) * 257).astype(dtype))

def orientation(n):
    "The picture stored so that EXIF orientation `n` puts it right"
    undo = {1: [], 2: [Image.FLIP_LEFT_RIGHT], 3: [Image.ROTATE_180], 4: [Image.FLIP_TOP_BOTTOM], 5: [Image.TRANSPOSE],
            6: [Image.ROTATE_90], 7: [Image.TRANSVERSE], 8: [Image.ROTATE_270]}[n]
    im, exif = picture(), Image.Exif()
    for t in undo: im = im.transpose(t)
    exif[0x0112] = n
    return im, dict(exif=exif)

FILES = { # name: (image, how to save it, what it must look like, tolerance per value)
    'rgb.png': (picture(), {}, picture(), 0), 'rgb.bmp': (picture(), {}, picture(), 0), 'rgb.tif': (picture(), {}, picture(), 0),
    'rgb.ppm': (picture(), {}, picture(), 0), 'rgb.tga': (picture(), {}, picture(), 0), 'rgb.jpg': (picture(), dict(quality=95), picture(), 12),
    'lossless.webp': (picture(), dict(lossless=True), picture(), 0), 'lossy.webp': (picture(), dict(quality=95), picture(), 16),
    'RGB.JPEG': (picture(), dict(quality=95), picture(), 12), 'progressive.jpg': (picture(), dict(quality=95, progressive=True), picture(), 12),
    'grey.png': (GREY, {}, GREY, 0), 'grey.jpg': (GREY, dict(quality=95), GREY, 6), 'grey.gif': (GREY, {}, GREY, 0), 'grey.tif': (GREY, {}, GREY, 0),
    'palette.png': (picture().quantize(256), {}, picture().quantize(256).convert('RGB'), 0), 'palette.gif': (picture().quantize(64), {}, picture().quantize(64).convert('RGB'), 0),
    'bilevel.png': (GREY.convert('1'), {}, GREY.convert('1').convert('L'), 0), 'bilevel.tif': (GREY.convert('1'), {}, GREY.convert('1').convert('L'), 0),
    'rgba.png': (with_alpha(picture()), {}, over_white(picture(), ALPHA), 2), 'rgba.webp': (with_alpha(picture()), dict(lossless=True), over_white(picture(), ALPHA), 3),
    'rgba.tif': (with_alpha(picture()), {}, over_white(picture(), ALPHA), 2), 'la.png': (with_alpha(GREY), {}, over_white(GREY, ALPHA), 2),
    'deep.png': (deep(np.uint16), {}, GREY, 1), 'deep.tif': (deep(np.uint16), {}, GREY, 1), 'deep32.tif': (deep(np.int32), {}, GREY, 1),
    'float.tif': (Image.fromarray((pixels(GREY) / 255).astype(np.float32)), {}, GREY, 1),
    'cmyk.jpg': (picture().convert('CMYK'), dict(quality=95), picture(), 16), 'cmyk.tif': (picture().convert('CMYK'), {}, picture(), 2),
    **{f'exif{n}.jpg': (orientation(n)[0], dict(quality=95, **orientation(n)[1]), picture(), 16) for n in range(1, 9)},
    **{f'exif{n}.png': (*orientation(n), picture(), 0) for n in (3, 6)}}

@pytest.mark.parametrize('name', FILES)
def test_formats_and_modes_load_alike(tmp_path, name):
    im, kw, want, tolerance = FILES[name]
    im.save(tmp_path/name, **kw)
    got = read_image(tmp_path/name)
    assert got.dtype==torch.uint8 and got.shape==(3, 30, 40)
    assert np.abs(got.permute(1, 2, 0).numpy().astype(int) - pixels(want.convert('RGB'))).max() <= tolerance
    grey = read_image(tmp_path/name, channels=1)
    assert grey.shape==(1, 30, 40)
    assert np.abs(grey[0].numpy().astype(int) - pixels(want.convert('L'))).max() <= tolerance
    assert read_image(tmp_path/name, side=20).shape==(3, 20, 20)

def test_transparent_palette_and_colour_key(tmp_path):
    im = Image.new('P', (8, 8), 0); im.putpalette([255, 0, 0, 0, 0, 255])
    ImageDraw.Draw(im).rectangle((0, 0, 3, 7), 1)
    im.save(tmp_path/'p.png', transparency=0); im.save(tmp_path/'p.gif', transparency=0)
    Image.new('RGB', (8, 8), (255, 0, 0)).save(tmp_path/'rgb.png', transparency=(255, 0, 0))
    Image.new('L', (8, 8), 9).save(tmp_path/'l.png', transparency=9)
    for f in ('p.png', 'p.gif'):
        x = read_image(tmp_path/f)
        assert (x[:, :, 4:] == 255).all() and (x[:2, :, :4] == 0).all() and (x[2, :, :4] == 255).all()
    assert (read_image(tmp_path/'rgb.png') == 255).all() and (read_image(tmp_path/'l.png', 1) == 255).all()

def test_dark_16_bit_stays_dark(tmp_path):
    Image.fromarray(np.full((4, 4), 200, np.uint16)).save(tmp_path/'dark.png')
    assert read_image(tmp_path/'dark.png').max() <= 1

def test_large_jpeg_is_shrunk_like_a_full_decode(tmp_path):
    rng = np.random.default_rng(0)
    im = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((1600, 1200), Image.Resampling.BICUBIC)
    im.save(tmp_path/'big.jpg', quality=95)
    want = ImageOps.fit(im, (64, 64), Image.Resampling.BILINEAR)
    assert np.abs(read_image(tmp_path/'big.jpg', side=64).permute(1, 2, 0).numpy().astype(int) - pixels(want)).mean() < 2

def test_missing_file_is_not_called_damaged(tmp_path):
    with pytest.raises(FileNotFoundError): read_image(tmp_path/'gone.png')
    with pytest.raises(FileNotFoundError, match='gone.png.*does not exist'): image_source([tmp_path/'gone.png'])

def mutate(b, rng):
    "Damage as disks and networks do it: cut, zeroed, flipped bits, a piece lost or doubled"
    b, kind = bytearray(b), rng.randrange(5)
    i, j = sorted(rng.randrange(len(b)) for _ in range(2))
    if kind==0: return bytes(b[:i])
    if kind==1: b[i:j] = bytes(j-i)
    if kind==2:
        for _ in range(rng.choice((1, 4, 32))): b[rng.randrange(len(b))] ^= 1 << rng.randrange(8)
    if kind==3: del b[i:i + rng.randrange(1, 64)]
    if kind==4: b[i:i] = b[j:j+64]
    return bytes(b)

@pytest.mark.parametrize('ext,kw', [('jpg', {}), ('jpg', dict(progressive=True)), ('png', {}), ('gif', {}), ('webp', {}), ('bmp', {}), ('tiff', {})])
def test_damaged_files_are_named_or_read(tmp_path, ext, kw, recwarn):
    buf = io.BytesIO(); picture().save(buf, {'jpg': 'jpeg'}.get(ext, ext), **kw)
    rng, path, refused = random.Random(0), tmp_path/f'damaged.{ext}', 0
    for _ in range(500):
        path.write_bytes(mutate(buf.getvalue(), rng))
        try: x = read_image(path, side=16)
        except ValueError as e:
            refused += 1
            assert 'damaged.' in str(e) and 'skip_bad' in str(e)
        else: assert x.shape==(3, 16, 16) and x.dtype==torch.uint8
    assert refused

def save_many(folder, n=8, side=20, ext='png', **kw):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n): Image.new('RGB', (side, side), (i*10, 5, 7)).save(folder/f'{i:03}.{ext}', **kw)
    return folder

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
    assert len(images)==8 and images.left_out==[(str(folder/'big.jpg'), 'damaged')] and capsys.readouterr().out=='left out: 1 damaged image (big.jpg)\n'
    assert [images.vocab[y] for y in images.labels]==labels[:8]
    assert images.batch(range(8))[0][:, 0, 0, 0].tolist()==pytest.approx([i*10 for i in range(8)], abs=3)
    for f in folder.iterdir(): f.write_bytes(b'no image')
    with pytest.raises(ValueError, match='all 9 images are damaged'): image_source(folder, skip_bad=True, **kw)

def test_bad_file_stops_long_before_the_end(tmp_path, monkeypatch):
    folder = save_many(tmp_path/'a', 3)
    (folder/'000.png').write_bytes(b'')
    files, read, count = [folder/'000.png'] + [folder/'001.png']*3000, data.read_image, []
    monkeypatch.setattr(data, 'read_image', lambda *a: count.append(1) or read(*a))
    with pytest.raises(ValueError, match='000.png'): image_source(files)
    assert len(count) < 3000

# ---- folders

def test_subfolders_are_labels(tmp_path):
    for c in ('cat', 'dog/small', '.hidden'): save_many(tmp_path/'d'/c, 3)
    (tmp_path/'d'/'readme.txt').write_text('no image'); (tmp_path/'d'/'cat'/'data.h5').write_text('no image'); (tmp_path/'d'/'cat'/'._000.png').write_text('no image')
    images = image_source(tmp_path/'d')
    assert images.vocab==['cat', 'dog'] and images.labels.tolist()==[0]*3 + [1]*3 and images.name=='d'
    save_many(tmp_path/'d', 1)
    assert image_source(tmp_path/'d').labels.tolist()==[-1] + [0]*3 + [1]*3
    assert image_source(tmp_path/'d'/'cat').labels is None
    assert len(image_source([tmp_path/'d'/'cat', str(tmp_path/'d'/'dog')]))==6

def test_order_is_sorted_and_links_are_followed(tmp_path):
    save_many(tmp_path/'real', 3)
    (tmp_path/'root').mkdir()
    for c in ('b', 'a'): (tmp_path/'root'/c).symlink_to(tmp_path/'real', target_is_directory=True)
    (tmp_path/'real'/'loop').symlink_to(tmp_path/'root', target_is_directory=True)
    images = image_source(tmp_path/'root')
    assert images.batch(range(len(images)))[0][:3, 0, 0, 0].tolist()==[0, 10, 20]

def test_file_list_keeps_its_order(tmp_path):
    folder = save_many(tmp_path/'a')
    files = [folder/f'{i:03}.png' for i in (5, 1, 3)]
    images = image_source([str(f) for f in files], labels=[7, -1, 9])
    assert images.images[:, 0, 0, 0].tolist()==[50, 10, 30]
    assert images.labels.tolist()==[0, -1, 1] and images.vocab==[7, 9]

def test_paths_in_other_sequences(tmp_path):
    from fastai.data.transforms import get_image_files
    folder = save_many(tmp_path/'a')
    files = get_image_files(folder).sorted()
    for given in (files, np.array([str(f) for f in files]), np.array(list(files), dtype=object), tuple(files)):
        assert image_source(given).images[:, 0, 0, 0].tolist()==[i*10 for i in range(8)]

def test_labels_of_any_kind():
    x = np.zeros((4, 8, 8))
    for labels in ([7, 9, 7, -1], np.array([7, 9, 7, -1]), torch.tensor([7, 9, 7, -1]), [torch.tensor(i) for i in (7, 9, 7, -1)], [7, 9, 7, None]):
        images = image_source(x, labels=labels)
        assert images.labels.tolist()==[0, 1, 0, -1] and images.vocab==[7, 9]
    assert image_source(x, labels=['b', 'a', 'b', None]).labels.tolist()==[1, 0, 1, -1]
    assert image_source(x, labels=np.array(['b', 'a', 'b', 'b'])).vocab==['a', 'b']

def test_a_fault_of_the_system_is_not_called_damage(tmp_path, monkeypatch):
    folder = save_many(tmp_path/'a')
    def no_more(*a): raise OSError(24, 'Too many open files')
    monkeypatch.setattr(data.Image, 'open', no_more)
    with pytest.raises(OSError, match='Too many open files'): read_image(folder/'000.png')
    with pytest.raises(OSError, match='Too many open files'): image_source(folder, skip_bad=True)

def test_channels_and_sizes_of_files(tmp_path):
    for i in range(3): GREY.save(tmp_path/f'{i}.png')
    images = image_source(tmp_path)
    assert (images.channels, images.size, images.view_size)==(1, 30, 30)
    assert image_source(tmp_path, channels=3).channels==3
    picture(200, 300).save(tmp_path/'z.png')
    images = image_source(tmp_path, size=20)
    assert (images.channels, images.size, images.view_size)==(3, 25, 20)
    for i in range(5): picture(200, 300).save(tmp_path/f'z{i}.png')
    images = image_source(tmp_path)
    assert (images.size, images.view_size)==(80, 64) and image_source(tmp_path, size=128).size==160

# ---- arrays and data sets

@pytest.mark.parametrize('shape,channels', [((7, 12, 12), 1), ((7, 12, 12, 1), 1), ((7, 1, 12, 12), 1), ((7, 12, 12, 3), 3), ((7, 3, 12, 12), 3), ((7, 12, 16, 3), 3)])
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
    for given, want in ((a[::-1], a[::-1]), (frozen, a), (np.asfortranarray(a), a), (a[:, ::-1], a[:, ::-1])): assert (image_source(given).images[:, 0].numpy()==want).all()

def test_large_arrays_are_stored_near_the_size_of_views():
    images = image_source(np.random.rand(3, 200, 300), size=32)
    assert (images.size, images.view_size)==(40, 32)

@pytest.mark.parametrize('bad,match', [
    (np.zeros((5, 8, 8), np.uint16), 'dtype uint16.*uint8'), (np.zeros((5, 8, 8), bool), 'dtype bool'), (np.array([['a']]), 'dtype'),
    (np.zeros((5, 8)), r'shape \(5, 8\)'), (np.zeros((5, 8, 8, 2)), r'shape \(5, 8, 8, 2\)'), (np.full((5, 8, 8), -1.), r'outside \[0, 1\]'),
    (np.full((5, 8, 8), np.nan), r'outside \[0, 1\]'), (torch.full((5, 8, 8), 7), 'dtype torch.int64'), (np.zeros((0, 8, 8)), 'empty'), ([], 'empty'), (np.zeros(()), 'shape')])
def test_arrays_refused(bad, match):
    with pytest.raises(ValueError, match=match): image_source(bad)

class Items(Dataset):
    "A map-style data set of given items"
    def __init__(self, items, **kw): self.items = items; self.__dict__.update(kw)
    def __len__(self): return len(self.items)
    def __getitem__(self, i): return self.items[i]

A = np.random.default_rng(1).integers(0, 256, (6, 9, 9, 3), dtype=np.uint8)
ITEMS = {'pil': [Image.fromarray(a) for a in A], 'array': list(A), 'tensor': [torch.from_numpy(a.transpose(2, 0, 1).copy()) for a in A],
         'float': [torch.from_numpy(a.transpose(2, 0, 1) / 255) for a in A]}

@pytest.mark.parametrize('kind', ITEMS)
@pytest.mark.parametrize('max_cache_gb', [2, 0])
def test_map_style_data_sets(kind, max_cache_gb):
    y = [2, 0, 2, 0, 2, 0]
    for items, kw, labelled in ((ITEMS[kind], {}, False), ([(x,) for x in ITEMS[kind]], {}, False), ([(x, i) for x, i in zip(ITEMS[kind], y)], dict(targets=y, classes=list('abc')), True),
                                ([(x, torch.tensor(i)) for x, i in zip(ITEMS[kind], y)], dict(targets=torch.tensor(y), classes=list('abc')), True)):
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
    import threading
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

@pytest.mark.parametrize('name,cls', [('cifar10', 'CIFAR10'), ('mnist', 'MNIST')])
def test_downloads_go_through_torchvision(name, cls, monkeypatch, tmp_path):
    import torchvision
    class Small(Items):
        def __init__(self, root, train=True, download=False):
            assert download
            super().__init__([(x, i % 3) for i, x in enumerate(ITEMS['pil'][:6 if train else 3])], targets=[i % 3 for i in range(6 if train else 3)], classes=['x', 'y', 'z'])
    monkeypatch.setattr(torchvision.datasets, cls, Small)
    monkeypatch.setenv('FASTAI_HOME', str(tmp_path))
    dls = two_view_dls(name, bs=2, size=16)
    assert len(dls.train_ds)==6 and len(dls.valid_ds)==3 and dls.vocab==['x', 'y', 'z']
    def offline(*a, **kw): raise OSError('no network')
    monkeypatch.setattr(torchvision.datasets, 'CIFAR100', offline)
    with pytest.raises(ValueError, match='CIFAR100 could not be downloaded.*folder of images'): image_source('cifar100')

def test_fashion_mnist(monkeypatch):
    if not data._DEBIAN.is_dir(): pytest.skip('needs dataset-fashion-mnist')
    images = image_source('fashion_mnist', train=False)
    assert images.images.shape==(10000, 1, 28, 28) and images.labels.bincount().tolist()==[1000]*10 and images.vocab[9]=='Ankle boot'

@pytest.mark.parametrize('bad,kw,error,match', [
    ('glyph', {}, FileNotFoundError, "did you mean 'glyphs'.*digits.*cifar10"), ('imagenet', {}, FileNotFoundError, 'Known names: digits'), ('./nowhere', {}, FileNotFoundError, 'not a folder'),
    (7, {}, TypeError, 'int'), ('digits', dict(labels=[1, 2]), ValueError, 'labels has 2 entries for 1797'), ('digits', dict(channels=2), ValueError, 'channels=2'),
    ('digits', dict(size=0), ValueError, 'size=0'), ('digits', dict(size='32'), ValueError, "size='32'"), (np.zeros((3, 8, 8)), dict(labels=[[1], [2], [3]]), ValueError, r'labels must hold.*\[1\]'),
    (Items(ITEMS['pil']), dict(labels=[1]), ValueError, 'labels has 1 entries for 6')])
def test_source_errors(bad, kw, error, match):
    with pytest.raises(error, match=match): image_source(bad, **kw)

def test_empty_folder(tmp_path):
    with pytest.raises(ValueError, match='holds no images'): image_source(tmp_path)

def test_images_pass_through_unless_told():
    g = glyphs(3, 4)
    assert image_source(g) is g
    h = image_source(g, labels=list('ab')*6, channels=1)
    assert h.vocab==['a', 'b'] and h.images.shape==(12, 1, 32, 32) and g.channels==3 and len(g.vocab)==3

# ---- glyphs

def test_glyphs_are_the_same_in_another_process():
    code = "import hashlib, warnings; warnings.filterwarnings('ignore'); from ifnd_nb.glyphs import glyphs; print(hashlib.sha1(glyphs(30, 4, seed=3).images.numpy().tobytes()).hexdigest())"
    import hashlib
    here = hashlib.sha1(glyphs(30, 4, seed=3).images.numpy().tobytes()).hexdigest()
    out = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, check=True, env={**os.environ, 'PYTHONHASHSEED': '1'})
    assert out.stdout.split()[-1]==here

def test_glyph_sets_are_prefixes():
    big, small = glyphs(20, 9), glyphs(15, 4)
    assert torch.equal(big.images.view(20, 9, 3, 32, 32)[:15, :4].flatten(0, 1), small.images)
    assert big.vocab[:15]==small.vocab
    assert not torch.equal(glyphs(15, 4, seed=1).images, small.images)

def test_every_concept_renders_within_the_frame_and_in_contrast():
    n = len(glyph_concepts())
    rng = np.random.default_rng(0)
    for char, _ in glyph_concepts():
        assert len(data._faces(char)) >= 4
        for _ in range(2):
            m = data._glyph(char, rng.random(16), 32)
            assert m.shape==(32, 32) and m.max() > 60, char
            ys, xs = np.nonzero(m > 40)
            assert max(np.ptp(ys), np.ptp(xs)) + 1 >= 32*.3, char
    u = rng.random((500, 9))
    fg, bg = data._glyph_colours(u, 16)
    grey = np.array([.299, .587, .114])
    apart = np.abs((bg.clip(0, 255) @ grey) - (fg @ grey)[:, None, None])
    assert apart.min() > 64
    g = glyphs(n, 1)
    assert g.images.shape==(n, 3, 32, 32) and len(g.coarse)==n and len(g.coarse_vocab)==14
    assert set(g.coarse[:50].tolist())==set(range(14))

def test_glyph_arguments():
    with pytest.raises(ValueError, match='n_concepts=1 '): glyphs(1)
    with pytest.raises(ValueError, match='n_concepts=9999'): glyphs(9999)
    with pytest.raises(ValueError, match='per_concept=0'): glyphs(5, 0)

# ---- views

def test_hashed_uniforms():
    u = hashed_uniforms(torch.arange(20000), 28, seed=5, epoch=2)
    assert u.min() >= 0 and u.max() < 1
    assert abs(u.mean() - .5) < .005 and abs(u.var() - 1/12) < .002
    assert np.abs(np.corrcoef(u) - np.eye(28)).max() < .035
    later, other = hashed_uniforms(torch.arange(20000), 28, 5, 3), hashed_uniforms(torch.arange(20000), 28, 6, 2)
    for v in (later, other, u.roll(1, 1)): assert np.abs(np.corrcoef(u.flatten(), v.flatten())[0, 1]) < .01
    for seed in (0, -1, 2**40, 2**62): assert hashed_uniforms(torch.tensor([0]), 2, seed).shape==(2, 1)

def test_resample_matrix_agrees_with_pil():
    x = torch.rand(1, 1, 40, 40)
    one = torch.ones(1)
    m = resample_matrix(0*one, one, torch.tensor([False]), 40, 16)
    want = torch.tensor(np.asarray(Image.fromarray(x[0, 0].numpy()).resize((16, 16), Image.Resampling.BILINEAR)))
    assert (m @ x[0] @ m.mT)[0].sub(want).abs().max() < .02

def test_views_agree_with_float64_by_hand():
    "Crop, resize, mirror and blur of one view, written out pixel by pixel from the same draws"
    tfm, x, idx = TwoViews(16, scale=(.3, .9), flip=1., jitter=0., grey=0., blur=1., sigma=(.5, 1.5)), torch.randint(0, 256, (3, 3, 24, 20), dtype=torch.uint8), torch.tensor([5, 0, 9])
    views = tfm((x, idx))[0]
    u = hashed_uniforms(idx, 28)[:7].double()
    for b in range(3):
        area, ratio = .3 + .6*u[0, b], (3/4) * (16/9)**u[1, b]
        height, width, sigma = min(1, (area/ratio)**.5), min(1, (area*ratio)**.5), .5 + u[6, b]
        def axis(n, start, extent, mirror):
            m = torch.zeros(16, n, dtype=torch.float64)
            for o in range(16):
                at = (15.5 - o if mirror else o + .5) / 16
                centre, wide = (start + extent*at)*n - .5, max(1, extent*n/16)
                for i in range(n): m[o, i] = max(0, 1 - abs(i - centre)/wide)
            g = torch.tensor([[float(np.exp(-.5*((o - i)/float(sigma))**2)) for i in range(16)] for o in range(16)], dtype=torch.float64)
            return (g / g.sum(1, keepdim=True)) @ (m / m.sum(1, keepdim=True))
        want = axis(24, u[2, b]*(1 - height), height, False) @ (x[b].double()/255) @ axis(20, u[3, b]*(1 - width), width, True).T
        assert (views[b] - want).abs().max() < 1e-5

@pytest.mark.parametrize('preset', augmentations)
@pytest.mark.parametrize('channels', [1, 3])
def test_views_differ_per_image_and_per_view(preset, channels):
    torch.manual_seed(0)
    one = torch.randint(0, 256, (1, channels, 40, 40), dtype=torch.uint8).expand(16, -1, -1, -1)
    x_q, x_k, idx, y = TwoViews(32, **augmentations[preset])((one, torch.arange(16), torch.arange(16)))
    for v in (x_q, x_k): assert type(v) is torch.Tensor and v.shape==(16, channels, 32, 32) and v.dtype==torch.float32 and 0 <= v.min() and v.max() <= 1
    assert torch.pdist(torch.cat([x_q, x_k]).flatten(1)).min() > .1

def test_a_view_depends_on_image_and_epoch_alone():
    x = torch.randint(0, 256, (12, 3, 32, 32), dtype=torch.uint8)
    t = TwoViews(24, blur=.5, seed=4)
    whole, order = t((x, torch.arange(12))), torch.randperm(12)
    for part in order.split(5): assert torch.allclose(t((x[part], part))[1], whole[1][part], atol=1e-5)

# ---- loaders

class Numbered(Dataset):
    "Item i is an image of which each pixel is i"
    def __init__(self, n): self.n = n
    def __len__(self): return self.n
    def __getitem__(self, i): return torch.full((1, 16, 16), i, dtype=torch.uint8)

STILL = dict(flip=0., jitter=0., grey=0.)

@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('max_cache_gb', [2, 0])
def test_index_means_the_same_image_everywhere(workers, max_cache_gb):
    dls = two_view_dls(Numbered(150), valid=.3, bs=16, workers=workers, max_cache_gb=max_cache_gb, preset=STILL)
    for ds, dl, dropped in ((dls.train_ds, dls.train, 105 % 16), (dls.valid_ds, dls.valid, 0)):
        stored = ds.batch(range(len(ds)))[0][:, 0, 0, 0]
        for epoch in range(2):
            seen = []
            for x_q, x_k, idx in dl:
                for v in dl.after_batch[-1].decodes((x_q, x_k)): assert torch.allclose(v.mean((1, 2, 3)) * 255, stored[idx].float(), atol=.01)
                seen += idx.tolist()
            assert len(seen)==len(set(seen))==len(ds) - dropped==dl.n - dropped
    both = torch.cat([ds.batch(range(len(ds)))[0][:, 0, 0, 0] for ds in (dls.train_ds, dls.valid_ds)])
    assert sorted(both.tolist())==list(range(150))

def flat(batches): return [t for b in batches for t in b]
def same(a, b): return len(a)==len(b) and all(torch.equal(s, t) for s, t in zip(flat(a), flat(b)))

def test_same_seed_same_batches_for_any_workers():
    make = lambda workers, seed=1: two_view_dls(Numbered(90), bs=16, seed=seed, workers=workers, max_cache_gb=0)
    a, b, other = make(0), make(2), make(0, 2)
    for _ in range(2): assert same(list(a.train), list(b.train))
    assert same(list(a.valid), list(b.valid)) and not same(list(a.train), list(other.train))

def test_epochs_resume_and_looks_do_not_disturb():
    dls = two_view_dls('digits', bs=256)
    epochs = [list(dls.train) for _ in range(3)]
    assert not same(epochs[0], epochs[1])
    again = two_view_dls('digits', bs=256)
    again.set_epoch(2)
    got = []
    for b in again.train:
        got.append(b)
        again.one_batch(); list(again.valid); list(plain_dl(again)); again.train.new(bs=7).one_batch()
    assert same(got, epochs[2])
    again.set_epoch(1)
    assert again.train.epoch==1 and same(list(again.train), epochs[1])
    for _ in zip(range(1), again.train): pass # a pass broken off
    assert again.train.epoch==3

def test_views_of_held_out_images_stay():
    dls = two_view_dls('digits', bs=256)
    first = list(dls.valid)
    list(dls.train); dls.set_epoch(5)
    assert same(list(dls.valid), first)

def test_plain_loader():
    dls = two_view_dls(glyphs(5, 21), bs=16)
    dl = plain_dl(dls, bs=10)
    x, idx, y = map(torch.cat, zip(*dl))
    assert idx.tolist()==list(range(len(dls.train_ds))) and torch.equal(y, dls.train_ds.labels)
    assert dl.n_inp==1 and dl.fake_l.num_workers==0
    assert x.mean((0, 2, 3)).abs().max() < 1e-2 and (x.std((0, 2, 3)) - 1).abs().max() < 1e-2
    assert len(torch.cat([b[1] for b in plain_dl(dls, dls.valid_ds)]))==21
    shuffled = dl.new(shuffle=True)
    assert shuffled.n_inp==1 and sorted(torch.cat([b[1] for b in shuffled]).tolist())==idx.tolist() and next(iter(dl))[1].tolist()==list(range(10))

def test_channels_of_held_out_images_follow():
    x = np.random.default_rng(0).random((40, 16, 16, 3))
    held = image_source(x)
    for valid in (x, held):
        dls = two_view_dls('digits', valid=valid, bs=64)
        assert next(iter(dls.valid))[0].shape==(40, 1, 16, 16)
    assert held.channels==3
    with pytest.raises(ValueError, match='images has 3 channels, but the loaders have 1'): plain_dl(dls, held)
    assert two_view_dls('digits', channels=3, bs=64).one_batch()[0].shape==(64, 3, 16, 16)

def test_a_slice_of_images_is_no_copy(tmp_path):
    images = image_source(torch.randint(0, 256, (9, 1, 8, 8), dtype=torch.uint8), labels=list('abcabcabc'))
    for at in (slice(2, 7), slice(0, 0), slice(None, None, 3)):
        a, b = images.subset(at), images.subset(range(9)[at])
        assert len(a)==len(b)==len(range(9)[at]) and all(torch.equal(x, y) for x, y in zip(a.batch(range(len(a))), b.batch(range(len(b)))))
    assert images.subset(slice(2, 7)).images.data_ptr()==images.images[2].data_ptr()
    read = image_source(save_many(tmp_path/'d'), max_cache_gb=0)
    assert torch.equal(read.subset(slice(3, 6)).batch([0, 2])[0], read.batch([3, 5])[0])

def test_held_out_images_are_left_as_they_were():
    held = image_source(np.zeros((3, 8, 8)), labels=[9, 9, 8])
    dls = two_view_dls('digits', valid=held, bs=64)
    assert dls.valid_ds.labels.tolist()==[9, 9, 8] and held.labels.tolist()==[1, 1, 0] and held.vocab==[8, 9]

def test_coarse_labels_follow_the_split():
    g = glyphs(20, 5)
    dls = two_view_dls(g, bs=16)
    kind = dict(zip(g.labels.tolist(), g.coarse.tolist()))
    assert all(kind[y]==c for ds in (dls.train_ds, dls.valid_ds) for y, c in zip(ds.labels.tolist(), ds.coarse.tolist()) if y >= 0)

def test_fits_fastai():
    dls = two_view_dls('digits', bs=64)
    assert dls.train.n_inp==2 and dls.n_inp==2 and dls.channels==1 and dls.size==16 and len(dls.stats)==2 and dls.vocab==list(range(10))
    class Net(torch.nn.Module):
        def __init__(self): super().__init__(); self.l = torch.nn.Linear(256, 8)
        def forward(self, x_q, x_k): return self.l(x_q.flatten(1)), self.l(x_k.flatten(1))
    learn = Learner(dls, Net(), loss_func=lambda p, *y: (p[0] - p[1]).pow(2).mean())
    learn.remove_cb(ProgressCallback)
    with learn.no_logging(): learn.fit(2)
    assert len(learn.recorder.values)==2 and all(np.isfinite(v).all() for v in learn.recorder.values)
    dls.to('cpu'); dls.cpu()
    assert len(dls.new_empty().train_ds)==0
    restored = pickle.loads(pickle.dumps(dls))
    assert same(list(restored.valid), list(dls.valid))

def test_show_batch():
    import matplotlib; matplotlib.use('agg')
    import matplotlib.pyplot as plt
    for source in ('digits', glyphs(4, 10), glyphs(4, 10).images):
        two_view_dls(source, bs=8).show_batch(max_n=3)
        assert len(plt.gcf().axes)==6
        dls = two_view_dls(source, bs=8)
        plain_dl(dls).show_batch(max_n=3)
        assert len(plt.gcf().axes)==3
        plt.close('all')

def test_labels_without_names_are_their_own_names():
    images = Images(torch.randint(0, 256, (40, 3, 16, 16), dtype=torch.uint8), torch.arange(40) % 3)
    assert images.vocab==[0, 1, 2]
    two_view_dls(images, bs=4).show_batch()

def test_held_out_images_of_their_own(tmp_path, capsys):
    for c in 'ab': save_many(tmp_path/'t'/c, 6)
    for c in 'b': save_many(tmp_path/'v'/c, 3)
    save_many(tmp_path/'v'/'a', 1); save_many(tmp_path/'w'/'c', 3); save_many(tmp_path/'w'/'a', 3)
    dls = two_view_dls(tmp_path/'t', valid=tmp_path/'v', bs=4)
    assert dls.valid_ds.labels.tolist()==[0, 1, 1, 1] and dls.valid_ds.vocab==['a', 'b']
    assert two_view_dls(tmp_path/'t', valid=tmp_path/'w', bs=4).valid_ds.labels.tolist()==[0, 0, 0, -1, -1, -1]
    assert capsys.readouterr().out=='left out of the scores: 3 held-out images of classes that the training images lack (c)\n'

@pytest.mark.parametrize('kw,match', [(dict(bs=5000), 'bs=5000 is larger than the 1438'), (dict(preset='loud'), "preset='loud'.*glyphs"), (dict(valid=-.1), 'valid=-0.1'), (dict(valid=1), 'valid=1 must be a share'), (dict(bs=0), 'bs=0'), (dict(bs=-1), 'bs=-1'), (dict(workers=-1), 'workers=-1'), (dict(workers=1.5), 'workers=1.5'), (dict(valid=.0001), 'leaves none'), (dict(labels=[1]), 'labels has 1'),
    (dict(seed=None), 'seed=None'), (dict(preset=dict(foo=1, seed=2)), "preset has 'foo', 'seed'"), (dict(preset=dict(flip=.1, size=3)), "preset has 'size'")])
def test_loader_errors(kw, match):
    with pytest.raises(ValueError, match=match): two_view_dls('digits', **kw)

def test_a_file_damaged_later_is_named_by_the_worker(tmp_path):
    folder = save_many(tmp_path/'a', 12)
    dls = two_view_dls(folder, bs=4, max_cache_gb=0, workers=1, valid=.25)
    for f in folder.iterdir(): f.write_bytes(b'')
    with pytest.raises(ValueError, match='png.*damaged'): list(dls.train)
