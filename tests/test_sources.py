"One function for any collection of images"
import math
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch, torchvision
from PIL import Image
from ifnd_nb import sources
from ifnd_nb.config import run_config
from ifnd_nb.glyphs import glyphs
from ifnd_nb.loaders import two_view_dls
from ifnd_nb.registry import named_sets
from ifnd_nb.sources import image_source
from helpers import arrays, folder, ITEMS, Items, save_many

pytestmark = pytest.mark.usefixtures('in_a_folder')

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

@pytest.mark.parametrize('name,cls', [('cifar10', 'CIFAR10'), ('mnist', 'MNIST')])
def test_downloads_go_through_torchvision(name, cls, monkeypatch, tmp_path):
    class Small(Items):
        def __init__(self, root, train=True, download=False):
            assert download
            super().__init__([(x, i % 3) for i, x in enumerate(ITEMS['pil'][:6 if train else 3])],
                             targets=[i % 3 for i in range(6 if train else 3)], classes=['x', 'y', 'z'])
    monkeypatch.setattr(torchvision.datasets, cls, Small)
    monkeypatch.setenv('FASTAI_HOME', str(tmp_path))
    dls = two_view_dls(name, bs=2, size=16)
    assert len(dls.train_ds)==6 and len(dls.valid_ds)==3 and dls.vocab==['x', 'y', 'z']
    def offline(*a, **kw): raise OSError('no network')
    monkeypatch.setattr(torchvision.datasets, 'CIFAR100', offline)
    with pytest.raises(ValueError, match='CIFAR100 could not be downloaded.*folder of images'): image_source('cifar100')

def test_fashion_mnist(monkeypatch):
    if not sources._DEBIAN.is_dir(): pytest.skip('needs dataset-fashion-mnist')
    images = image_source('fashion_mnist', train=False)
    assert images.images.shape==(10000, 1, 28, 28) and images.labels.bincount().tolist()==[1000]*10
    assert images.vocab[9]=='Ankle boot'

@pytest.mark.parametrize('bad,kw,error,match', [
    ('glyph', {}, FileNotFoundError, "did you mean 'glyphs'.*digits.*cifar10"),
    ('imagenet', {}, FileNotFoundError, 'Known names: digits'), ('./nowhere', {}, FileNotFoundError, 'not a folder'),
    (7, {}, TypeError, 'int'), ('digits', dict(labels=[1, 2]), ValueError, 'labels has 2 entries for 1797'),
    ('digits', dict(channels=2), ValueError, 'channels=2'),
    ('digits', dict(size=0), ValueError, 'size=0'), ('digits', dict(size='32'), ValueError, "size='32'"),
    (np.zeros((3, 8, 8)), dict(labels=[[1], [2], [3]]), ValueError, r'labels must hold.*\[1\]'),
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

def test_a_named_set_is_the_same_wherever_it_comes_from(monkeypatch):
    class FashionMNIST(torch.utils.data.Dataset):
        def __len__(self): return 100
        def __getitem__(self, i): return Image.new('L', (28, 28), i), i % 10
    entry = lambda train: FashionMNIST()
    entry.preset = named_sets['fashion_mnist'].preset
    monkeypatch.setitem(named_sets.things, 'fashion_mnist', entry)
    dls = two_view_dls('fashion_mnist', bs=16)
    assert dls.train_ds.name=='fashion_mnist' and dls.train.after_batch[0].scale==entry.preset['scale']

@pytest.mark.parametrize('column',
                         [lambda s: s, lambda s: s.values, lambda s: s.tolist(), lambda s: s.to_numpy(),
                          lambda s: pd.Index(s), lambda s: s[s.str.contains('cat')], lambda s: s.astype('category')],
                          ids=range(7))
def test_a_column_of_paths(column):
    folder('base', n=3)
    paths = column(pd.DataFrame(dict(path=sorted(map(str, Path('base').rglob('*.png'))),
                                     label=list('aaabbbccc')))['path'])
    images = image_source(paths)
    assert len(images)==len(paths) and images.paths==[str(p) for p in paths]

def test_tables_and_dicts_of_images_have_a_remedy():
    df = pd.DataFrame(dict(path=['a.png'], label=['x']))
    with pytest.raises(ValueError, match=r"data=df\['path'\].*it has path, label"): image_source(df)
    with pytest.raises(ValueError, match=r"labels=df\['label'\]"):
        image_source(torch.zeros(1, 1, 8, 8, dtype=torch.uint8), labels=df)
    with pytest.raises(ValueError, match=r"data\['train'\]"): image_source({'train': [1], 'test': [2]})
    with pytest.raises(ValueError, match='item 1 of data is nan'): image_source(['a.png', math.nan])
    with pytest.raises(TypeError, match='generator.*list'): image_source(p for p in ['a.png'])

def test_a_folder_named_like_a_set(capsys):
    folder('digits', ('a', 'b'))
    assert len(image_source('digits'))==1797 and 'write ./digits' in capsys.readouterr().out
    assert image_source('./digits').vocab==['a', 'b']

def test_named_sets_have_one_recipe(monkeypatch):
    x, y = arrays(40, 10, 28)
    class FashionMNIST(Items): pass
    theirs = FashionMNIST([(Image.fromarray(a[0].numpy()), int(b)) for a, b in zip(x, y)],
                          classes=[f'c{i}' for i in range(10)])
    monkeypatch.setattr(sources, '_DEBIAN', Path('nowhere'))
    monkeypatch.setattr(sources, 'downloaded', lambda cls, train: theirs)
    by_name, by_hand = (two_view_dls(o, bs=8, valid=.2, device='cpu') for o in ('fashion_mnist', theirs))
    assert by_name.train_ds.name==by_hand.train_ds.name=='fashion_mnist' and by_name.size==by_hand.size==28
    own, named, given = named_sets['fashion_mnist'].preset, by_name.train.after_batch[0], by_hand.train.after_batch[0]
    for o in ('scale', 'ratio', 'flip', 'brightness'): assert getattr(named, o)==getattr(given, o)==own[o]
    assert [run_config(data=c).size for c in ('cifar10', 'cifar100', 'fashion_mnist')]==[32, 32, 28]
