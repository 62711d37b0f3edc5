"Folders that people have, habits of fastai's users, and what the commands say: the right value in each case that once went wrong"
import csv, json, math, os, pickle, struct, subprocess, sys, warnings, zlib
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch, torchvision
from fastai.callback.core import Callback
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau, SaveModelCallback
from fastai.interpret import Interpretation
from fastai.learner import Recorder, load_learner
from PIL import Image
from ifnd_nb import cli, data, experiments
from ifnd_nb.registry import detectors, strategies
from ifnd_nb.cli import embed_main, export_main, in_shell, main
from ifnd_nb.images import Images, read_image
from ifnd_nb.loaders import plain_dl, two_view_dls
from ifnd_nb.sources import image_source
from ifnd_nb.evaluate import embed, n_neighbours
from ifnd_nb.scoring import ScoreCallback, evaluation_table
from ifnd_nb.features import embed_to
from ifnd_nb.folders import find_images, left_out_text, parts_of
from ifnd_nb.config import run_config
from ifnd_nb.ifnd import ifnd_learner
from ifnd_nb.training import split_text
from ifnd_nb.encoders import create_encoder
from ifnd_nb.moco import MoCo, info_nce, moco_learner
from ifnd_nb.weights import load_encoder, save_encoder

def timm(arch): return pytest.importorskip('timm').create_model(arch)

@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch): monkeypatch.chdir(tmp_path)

def picture(path, value=0, size=8, **kw):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((size, size, 3), value, np.uint8)).save(path, **kw)

def folder(root, classes=('cat', 'dog', 'owl'), n=20, size=16):
    rng = np.random.default_rng(0)
    for c in classes:
        (Path(root)/c).mkdir(parents=True, exist_ok=True)
        for i in range(n): Image.fromarray(rng.integers(0, 255, (size, size, 3)).astype('u1')).save(Path(root)/c/f'{i:03}.png')
    return Path(root)

SMALL = '--size', '16', '--bs', '16', '--epochs', '1', '--queue-size', '32', '--n-clusters', '2', '--device', 'cpu'

def refused(*args, main=main):
    "Exit code and the one line"
    with pytest.raises(SystemExit) as e: main([*map(str, args)])
    return e.value.code

def one_line(capsys):
    err = capsys.readouterr().err
    assert err.count('\n')==1, err
    return err.strip()

def arrays(n=96, classes=4, size=16, seed=0):
    y, g = torch.arange(n) % classes, torch.Generator().manual_seed(seed)
    x = torch.randint(0, 60, (n, 1, size, size), generator=g).to(torch.uint8)
    for i in range(n): x[i, 0, y[i]] += 150
    return x, y

def loaders(n=96, **kw):
    x, y = arrays(n)
    return two_view_dls(x, labels=y, size=16, bs=16, device='cpu', **kw)

def quiet(learn, do):
    with learn.no_bar(), learn.no_logging(): return do(learn)

# ---- A1, A2, A15, B41: losses and the queue

@pytest.mark.parametrize('make', [moco_learner, ifnd_learner])
@pytest.mark.parametrize('queue_size', [64, 2000])
def test_lr_find_suggests_a_rate_on_a_fresh_learner(make, queue_size, tmp_path):
    learn = make(loaders(), queue_size=queue_size, path=tmp_path)
    before = {k: v.clone() for k, v in learn.model.state_dict().items()}
    found = quiet(learn, lambda l: l.lr_find(show_plot=False))
    losses = torch.stack(list(learn.recorder.losses))
    assert 1e-5 < found.valley < .1 and losses[0] > math.log(queue_size) / 2 and losses.argmin() > 20 # it falls at rates that suit, from the first batch on
    for k, v in learn.model.state_dict().items(): assert torch.equal(v, before[k]), k

def test_lr_find_finds_the_same_rate_after_training(tmp_path):
    learn = moco_learner(two_view_dls('digits', size=16, device='cpu'), queue_size=512, path=tmp_path)
    fresh = quiet(learn, lambda l: l.lr_find(show_plot=False)).valley
    quiet(learn, lambda l: l.fit(1))
    assert .03 < quiet(learn, lambda l: l.lr_find(show_plot=False)).valley / fresh < 30

@pytest.mark.parametrize('n,bs,queue_size', [(40, 16, 64), (40, 16, 24), (40, 8, 8), (33, 16, 100)])
def test_the_held_out_loss_is_that_of_k_held_out_negatives(n, bs, queue_size, tmp_path):
    "Against a slow reference in float64: the last keys of held-out images, the own one left out, averaged up to K"
    x, y = arrays(n)
    dls = two_view_dls(arrays(64)[0], valid=image_source(x, labels=y), size=16, bs=bs, device='cpu')
    learn = moco_learner(dls, queue_size=queue_size, path=tmp_path)
    quiet(learn, lambda l: l.fit(2))
    model, before = learn.model, [o.clone() for o in (learn.model.queue, learn.model.queue_idx, learn.model.queue_ptr)]
    loss = quiet(learn, lambda l: l.validate())[0]
    for a, b in zip(before, (model.queue, model.queue_idx, model.queue_ptr)): assert torch.equal(a, b) # that of training is untouched
    model.eval()
    keys, ids, losses = [], [], []
    with torch.no_grad():
        for x_q, x_k, idx, *_ in dls.valid:
            q, k = (o.double() for o in model(x_q, x_k))
            keys, ids = [*keys, *k][-queue_size:], [*ids, *idx.tolist()][-queue_size:]
            for i, own, key in zip(idx.tolist(), q, k):
                e = [math.exp(float(own @ o) / .1) for o, j in zip(keys, ids) if j!=i]
                pos = float(own @ key) / .1
                losses.append(math.log(math.exp(pos) + queue_size * sum(e) / len(e)) - pos)
    assert loss==pytest.approx(sum(losses) / len(losses), rel=1e-4)

def test_held_out_loss_compares_between_epochs(tmp_path):
    learn = moco_learner(two_view_dls(image_source('digits').subset(range(600)), size=16, device='cpu'), queue_size=4096, path=tmp_path)
    fresh = quiet(learn, lambda l: l.validate())[0]
    quiet(learn, lambda l: l.fit_one_cycle(5))
    valid = [fresh, *(float(v[1]) for v in learn.recorder.values)]
    assert fresh==pytest.approx(math.log(4097), abs=.3) and valid==sorted(valid, reverse=True) # it falls from that of chance

def test_the_best_model_is_not_that_of_the_first_epoch(tmp_path, capsys):
    learn = moco_learner(loaders(192), queue_size=4096, path=tmp_path, lr=3e-3)
    quiet(learn, lambda l: l.fit_one_cycle(8, cbs=SaveModelCallback()))
    valid = [float(v[1]) for v in learn.recorder.values]
    assert valid[-1] < valid[0] and min(valid)!=valid[0] and 'Better model found at epoch' in capsys.readouterr().out

@pytest.mark.parametrize('make', [moco_learner, ifnd_learner])
def test_a_fresh_learner_validates(make, tmp_path):
    learn = make(loaders(), queue_size=32, path=tmp_path)
    loss, right = quiet(learn, lambda l: l.validate())[:2]
    assert loss==pytest.approx(math.log(33), abs=.7) and 0 <= right < 1 and (learn.model.queue_idx < 0).all()
    assert 'MoCo' in learn.summary()
    quiet(learn, lambda l: l.fit(1))
    learn.save('m')
    other = make(loaders(), queue_size=32, path=tmp_path)
    other.load('m')
    for a, b in zip(quiet(other, lambda l: l.validate())[:2], quiet(learn, lambda l: l.validate())[:2]): assert a==pytest.approx(b)

def test_one_held_out_image_has_no_negative(tmp_path):
    x, y = arrays(65)
    learn = moco_learner(two_view_dls(x[:64], valid=x[64:], size=16, bs=16, device='cpu'), queue_size=32, path=tmp_path)
    assert all(math.isnan(v) for v in quiet(learn, lambda l: l.validate()))

def test_an_interrupted_validation_costs_no_queue(tmp_path):
    class Stop(Callback):
        def after_batch(self):
            if not self.training and self.stop: raise KeyboardInterrupt
    learn = moco_learner(loaders(), queue_size=32, path=tmp_path, cbs=(stop := Stop()))
    stop.stop = False
    quiet(learn, lambda l: l.fit(1))
    queue, stop.stop = learn.model.queue_idx.clone(), True
    with pytest.raises(KeyboardInterrupt): quiet(learn, lambda l: l.validate())
    stop.stop = False
    for _ in range(2): quiet(learn, lambda l: l.validate())
    assert torch.equal(learn.model.queue_idx, queue)

# ---- A3, B1: labels and paths as pandas has them

@pytest.mark.parametrize('labels', [
    ['cat', 'dog', None, 'owl'] * 3, ['cat', 'dog', '', 'owl'] * 3, ['cat', 'dog', -1, 'owl'] * 3, pd.Series(['cat', 'dog', None, 'owl'] * 3),
    pd.Series(['cat', 'dog', np.nan, 'owl'] * 3, dtype=object), pd.Series(['cat', 'dog', pd.NA, 'owl'] * 3, dtype='string'), np.array(['cat', 'dog', np.nan, 'owl'] * 3),
    pd.Series(['cat', 'dog', None, 'owl'] * 3, dtype='category'), pd.DataFrame(dict(y=['cat', 'dog', None, 'owl'] * 3))['y'], pd.Series(['cat', 'dog', None, 'owl'] * 3).values], ids=lambda o: type(o).__name__)
def test_missing_names_are_unknown(labels):
    images = image_source(torch.zeros(12, 1, 8, 8, dtype=torch.uint8), labels=labels)
    assert images.vocab==['cat', 'dog', 'owl'] and images.labels.tolist()==[0, 1, -1, 2] * 3

@pytest.mark.parametrize('labels', [pd.Series([0., 1., np.nan] * 4), pd.Series([0, 1, None] * 4, dtype='Int64'), np.array([0, 1, -1] * 4), torch.tensor([0., 1., math.nan] * 4), np.array([0., 1., -1.] * 4),
    np.ma.masked_array([0, 1, 7] * 4, [0, 0, 1] * 4), pd.array([0, 1, pd.NA] * 4, dtype='Int64')], ids=str)
def test_missing_numbers_are_unknown(labels):
    images = image_source(torch.zeros(12, 1, 8, 8, dtype=torch.uint8), labels=labels)
    assert images.vocab==[0, 1] and all(type(v) is int for v in images.vocab) and images.labels.tolist()==[0, 1, -1] * 4

def test_scores_with_missing_labels_are_those_of_the_known(tmp_path):
    x, y = arrays(120)
    some = [v if i % 2 else math.nan for i, v in enumerate(y.tolist())]
    t = evaluation_table(two_view_dls(x, labels=pd.Series(some), size=16, bs=16, device='cpu'), create_encoder('small_resnet', 1, 16), k=3, no_bar=True)
    assert t.loc['raw pixels', 'knn']==1 and t.loc['raw pixels', 'linear']==1

@pytest.mark.parametrize('column', [lambda s: s, lambda s: s.values, lambda s: s.tolist(), lambda s: s.to_numpy(), lambda s: pd.Index(s), lambda s: s[s.str.contains('cat')], lambda s: s.astype('category')], ids=range(7))
def test_a_column_of_paths(column):
    folder('base', n=3)
    paths = column(pd.DataFrame(dict(path=sorted(map(str, Path('base').rglob('*.png'))), label=list('aaabbbccc')))['path'])
    images = image_source(paths)
    assert len(images)==len(paths) and images.paths==[str(p) for p in paths]

def test_tables_and_dicts_of_images_have_a_remedy():
    df = pd.DataFrame(dict(path=['a.png'], label=['x']))
    with pytest.raises(ValueError, match=r"data=df\['path'\].*it has path, label"): image_source(df)
    with pytest.raises(ValueError, match=r"labels=df\['label'\]"): image_source(torch.zeros(1, 1, 8, 8, dtype=torch.uint8), labels=df)
    with pytest.raises(ValueError, match=r"data\['train'\]"): image_source({'train': [1], 'test': [2]})
    with pytest.raises(ValueError, match='item 1 of data is nan'): image_source(['a.png', math.nan])
    with pytest.raises(TypeError, match='generator.*list'): image_source(p for p in ['a.png'])

@pytest.mark.parametrize('key', [lambda p: str(p), lambda p: p, lambda p: p.name, lambda p: p.stem, lambda p: f'{p.parent.name}/{p.name}'], ids=range(5))
def test_labels_by_name(key):
    for i in range(3): picture(f'pics/a/{i}.png')
    for i in range(3, 5): picture(f'pics/b/{i}.png')
    files = sorted(Path('pics').rglob('*.png'))
    images = image_source('pics', labels={key(p): 'odd' if int(p.stem) % 2 else 'even' for p in files[:-1]})
    assert images.vocab==['even', 'odd'] and images.labels.tolist()==[0, 1, 0, 1, -1]

def test_labels_by_index_and_by_no_name_that_is_there():
    x = torch.zeros(3, 1, 8, 8, dtype=torch.uint8)
    assert image_source(x, labels={0: 'a', 2: 'b'}).labels.tolist()==[0, -1, 1]
    picture('pics/0.png')
    for source in ('pics', x):
        with pytest.raises(ValueError, match="keys like 'zebra'"): image_source(source, labels={'zebra': 1})

def test_labels_for_all_parts_of_a_folder():
    for part, n in (('train', 20), ('val', 8)): folder(f's/{part}', ('a', 'b'), n)
    kw, other = dict(bs=8, size=16, device='cpu'), dict(a='x', b='y')
    files = [p for part in ('train', 'val') for p in sorted(Path('s', part).rglob('*.png'))]
    by_path = {'/'.join(p.parts[-3:]): other[p.parent.name] for p in files}
    for labels in (lambda p: other[p.parent.name], by_path, pd.Series(by_path)):
        dls = two_view_dls('s', labels=labels, **kw)
        for ds in dls.train_ds, dls.valid_ds: assert [ds.vocab[y] for y in ds.labels]==[other[Path(p).parent.name] for p in ds.paths]
    only_train = {k: v for k, v in by_path.items() if k.startswith('train')}
    assert (two_view_dls('s', labels=only_train, **kw).valid_ds.labels==-1).all()
    for labels in (['x'] * 40, {0: 'x', 1: 'y'}):
        with pytest.raises(ValueError, match='training images alone.*dict by file name or a function'): two_view_dls('s', labels=labels, **kw)
    assert len(two_view_dls(['s'], **kw).valid_ds)==16
    with pytest.raises(ValueError, match='names two images'): two_view_dls('s', labels={f'a/{i:03}.png': 'x' for i in range(20)}, **kw)
    folder('other', ('a', 'b'), 8)
    dls = two_view_dls('s', valid='other', labels=lambda p: other[p.parent.name], **kw)
    assert dls.vocab==['x', 'y'] and [dls.vocab[y] for y in dls.valid_ds.labels]==[other[Path(p).parent.name] for p in dls.valid_ds.paths]

def test_labels_of_other_collections_are_in_the_learners_numbers(tmp_path):
    import matplotlib.pyplot as plt
    folder('t', ('a', 'b'), 20), folder('u', ('b', 'zebra'), 4)
    learn = moco_learner(two_view_dls('t', bs=8, size=16, device='cpu'), queue_size=16, path=tmp_path)
    dl = learn.dls.test_dl('u')
    assert dl.dataset.labels.tolist()==[1] * 4 + [-1] * 4 and embed(learn.model.body, dl, no_bar=True)[1].tolist()==[1] * 4 + [-1] * 4
    for other in (dl, plain_dl(learn.dls, 'u')):
        learn.show_results(dl=other, shuffle=False, max_n=8, k=2)
        titles = [t for ax in plt.gcf().axes if (t := ax.get_title())]
        assert titles[:4]==['b'] * 4 and set(titles[4:]) <= {'zebra'}
        plt.close('all')
    with pytest.raises(ValueError, match='other classes'): quiet(moco_learner(learn.dls, queue_size=16, cbs=ScoreCallback(queries=plain_dl(learn.dls, 'u'))), lambda l: l.fit(1))
    quiet(moco_learner(learn.dls, queue_size=16, path=tmp_path, cbs=ScoreCallback(queries=dl)), lambda l: l.fit(1))

@pytest.mark.skipif(sys.platform!='linux', reason='names are bytes on Linux')
def test_names_that_are_no_text():
    folder('base')
    Path(os.fsdecode(b'base/cat/caf\xe9.txt')).write_text('x')
    Path('base/dog/000.png').rename(os.fsdecode(b'base/dog/caf\xe9.png'))
    main(['--data', 'base', *SMALL])
    assert b'caf\xe9.txt' in Path('ifnd_out/left_out.txt').read_bytes()
    Path('base/owl').rename(os.fsdecode(b'base/\xe9'))
    main(['--data', 'base', *SMALL, '--out', 'again'])
    assert Path('again/report.png').exists()
    for to in ('f.csv', 'f.npz'): embed_main(['ifnd_out', '--data', 'base', '--to', to, '--device', 'cpu'])
    assert b'dog/caf\xe9.png' in Path('f.csv').read_bytes()

def test_no_image_asks_each_of_a_thousand_folders():
    from ifnd_nb.folders import folder_labels
    class Counted(list):
        passes = 0
        def __iter__(self):
            self.passes += 1
            return super().__iter__()
    folders = Counted(Path(f'/r/{i}') for i in range(2000))
    files = [Path(f'/r/{i}')/'c'/f'{j}.png' for i in range(2000) for j in range(20)] + [Path('/r/0/d/x.png')]
    assert len(folder_labels(files, folders))==40001 and folders.passes <= 1

def test_names_that_two_images_have():
    for c in ('cat', 'dog'): picture(f'pics/{c}/0.png')
    with pytest.raises(ValueError, match="'0.png' names two images.*like 'dog/0.png'"): image_source('pics', labels={'0.png': 'cat'})

def test_pandas_labels_go_by_their_index():
    folder('base', n=4)
    df = pd.DataFrame(dict(path=sorted(map(str, Path('base').rglob('*.png')))))
    df['label'] = [Path(p).parent.name for p in df['path']]
    right = lambda images: all(images.vocab[y]==Path(p).parent.name for p, y in zip(images.paths, images.labels))
    mixed = df.sample(frac=1, random_state=0)
    for data, labels in ((mixed['path'], df['label']), (mixed['path'], mixed['label']), (df['path'].tolist(), df['label']), (mixed['path'].tolist(), df.set_index('path')['label']), (df['path'], lambda p: p.parent.name)):
        assert right(image_source(data, labels=labels))
    with pytest.raises(ValueError, match='different indices'): image_source(df['path'], labels=pd.Series(list('abcabcabcabc'), index=range(5, 17)))

# ---- A4: more than 8 bits

def deep(path, a):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(a).save(path)

def test_float_images_share_one_scale(capsys):
    rng = np.random.default_rng(0)
    for i in range(20):
        a = rng.random((24, 24)).astype('f4')
        deep(f'flt/bright/{i}.tif', a * 1.1), deep(f'flt/dim/{i}.tif', a * .9)
    images = image_source('flt')
    bright, dim = (images.images[images.labels==c].float() for c in (0, 1))
    assert bright.mean() / dim.mean()==pytest.approx(1.1 / .9, rel=.1) and 'becomes black' in capsys.readouterr().out
    assert images.levels==(0, pytest.approx(1.1, abs=.01))

@pytest.mark.parametrize('dtype,values,white', [('f4', (.2, .9), 1), ('f4', (.2, 1.2), 1.2), ('f4', (0, 300.), 1023), ('f4', (0, .05), .05), ('i4', (3, 250), 255), ('i4', (3, 4000), 4095), ('u2', (3, 4000), 4095), ('u2', (9, 60000), 65535), ('f4', (-2, 2), 2), ('i4', (-100, 100), 100), ('i4', (5, 10**6), 10**6)])
def test_the_scale_is_that_of_the_collection(dtype, values, white):
    low, high = values
    for i, v in enumerate((low, high)): deep(f'p/{i}.tif', np.full((8, 8), v, dtype))
    images = image_source('p')
    black = min(0, low)
    assert images.levels==(black, pytest.approx(white))
    for x, v in zip(images.images, values): assert x.unique().tolist()==[pytest.approx((v - black) / (white - black) * 255, abs=.51)]

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
    assert images.levels==(0, 4095) and images.images[101].unique().tolist()==[249] and '4095 white' in capsys.readouterr().out

def test_deep_colour_is_said(capsys):
    def png16(path, v):
        rows = b''.join(b'\0' + struct.pack('>H', v) * 3 * 8 for _ in range(8))
        Path(path).write_bytes(b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', 8, 8, 16, 2, 0, 0, 0)) + chunk(b'IDAT', zlib.compress(rows)) + chunk(b'IEND', b''))
    Path('p').mkdir()
    png16('p/0.png', 40000), png16('p/1.png', 3000)
    images = image_source('p')
    assert images.images[:, 0, 0, 0].tolist()==[40000 >> 8, 3000 >> 8] and 'colour images of 16 bits: 65535 becomes white' in capsys.readouterr().out

def test_nan_and_infinity_are_black_and_white():
    a = np.full((8, 8), .5, 'f4'); a[0, 0], a[0, 1], a[0, 2] = math.nan, math.inf, -math.inf
    deep('p/0.tif', a)
    assert image_source('p').images[0, 0, 0, :4].tolist()==[0, 255, 0, 128]

def test_items_of_a_data_set_share_one_scale():
    items = [(Image.fromarray(np.full((8, 8), v, 'f4')), y) for y, v in enumerate((.5, 1.5, 200.))]
    assert image_source(items).images[:, 0, 0, 0].tolist()==[0, 2, 200]

# ---- A5, A6, B2 to B6, B8: folders

@pytest.mark.parametrize('names,held', [(('train', 'val'), 'val'), (('train', 'valid', 'test'), 'valid'), (('Train', 'Test'), 'Test'), (('training', 'validation'), 'validation')])
def test_parts_become_split_and_labels(names, held, capsys):
    for part in names: folder(f'split/{part}', ('cat', 'dog'), 20 if part.lower().startswith('train') else 6)
    dls = two_view_dls('split', bs=16, size=16, device='cpu')
    assert (len(dls.train_ds), len(dls.valid_ds), dls.vocab, dls.valid_ds.vocab)==(40, 12, ['cat', 'dog'], ['cat', 'dog'])
    assert all(f'/{held}/' in p for p in dls.valid_ds.paths) and dls.train_ds.name=='split'
    assert ('left out: 1 folder beside' in capsys.readouterr().out)==(len(names)==3)
    assert split_text(run_config(data='split'))=='the images that the set holds out itself'
    assert len(image_source('split', train=None))==sum(20 if n.lower().startswith('train') else 6 for n in names) * 2
    assert image_source('split', train=None).vocab==['cat', 'dog']

def test_parts_and_a_wish():
    folder('s/train', ('a', 'b')), folder('s/val', ('a', 'b'), 6), folder('other', ('a', 'b'), 4), folder('t', ('a', 'b'))
    kw = dict(bs=16, size=16, device='cpu')
    assert [len(two_view_dls('s', valid=v, **kw).valid_ds) for v in (None, .25, 0, 'other')]==[12, 10, 0, 8]
    assert all('/val/' not in p for p in two_view_dls('s', valid=.25, **kw).valid_ds.paths)
    assert all('/val/' in p for p in two_view_dls('t', valid='s', **kw).valid_ds.paths)
    assert len(two_view_dls('t', valid=np.float32(.25), **kw).valid_ds)==10

def test_a_part_without_classes_is_no_part_to_score_on():
    folder('kaggle/train', ('a', 'b'), 10), folder('kaggle/test', ('.',), 30)
    dls = two_view_dls('kaggle', bs=8, size=16, device='cpu')
    assert (len(dls.train_ds), len(dls.valid_ds))==(16, 4) and dls.vocab==['a', 'b']

@pytest.mark.parametrize('train,held', [('training_set', 'test_set'), ('train', 'dev'), ('Train Images', 'Val Images'), ('train-data', 'valid-data'), ('train2017', 'val2017'), ('train', 'eval'), ('training', 'tests')])
def test_parts_by_other_names(train, held):
    folder(f's/{train}', ('a', 'b'), 5), folder(f's/{held}', ('a', 'b'), 3)
    assert len(image_source('s'))==10 and len(image_source('s', train=False))==6

def test_images_that_are_held_out_are_not_trained_on(capsys):
    folder('s', ('a', 'b'), 20)
    folder('s/held', ('a', 'b'), 5)
    dls = two_view_dls('s', valid='s/held', bs=8, size=16, device='cpu')
    assert (len(dls.train_ds), len(dls.valid_ds))==(40, 10) and 'left out of training: 10 images' in capsys.readouterr().out
    with pytest.raises(ValueError, match='valid holds all of the training images'): two_view_dls('s', valid='s', bs=8, size=16)

def test_what_is_wrong_with_valid_names_valid(capsys):
    folder('base')
    for valid, words in (('nope/x', "--valid='nope/x' is not a folder"), ('pics.zip', "--valid='pics.zip' is an archive")):
        assert refused('--data', 'base', '--valid', valid)==2 and words in one_line(capsys)

def test_folders_that_are_no_parts():
    folder('vehicles', ('train', 'plane', 'car'), 4)
    assert image_source('vehicles').vocab==['car', 'plane', 'train'] and parts_of('vehicles') is None
    folder('wrapped/inner', ('a', 'b'), 3)
    assert image_source('wrapped').vocab==['a', 'b']
    folder('wrapped_parts/inner/train', ('a', 'b'), 3), folder('wrapped_parts/inner/val', ('a', 'b'), 3)
    assert len(image_source('wrapped_parts'))==6

def test_a_run_among_the_images_is_no_data(capsys):
    folder('base')
    os.chdir('base')
    for i in range(3):
        main(['--data', '.', *SMALL])
        assert 'base: 48 images' in (said := capsys.readouterr().out) and '3 labels, in memory (cat, dog, owl)' in said
    ('earlier run' in said)==(i > 0)
    main(['--resume', 'ifnd_out', '--epochs', '2'])
    assert json.loads(Path('ifnd_out/metrics.json').read_text())['config']['epochs']==2
    main(['--data', '.', *SMALL, '--out', '.', '--beside-baseline'])
    assert len(image_source('.'))==60 and image_source('.').vocab==['cat', 'dog', 'owl']

@pytest.mark.parametrize('name', ['@eaDir', '__MACOSX', '#recycle', '$RECYCLE.BIN', 'System Volume Information', '.thumbnails', '@Recycle', 'lost+found', '__pycache__'])
def test_litter_is_no_class(name, capsys):
    folder('base', n=2), picture(f'base/cat/{name}/x.png'), picture(f'base/{name}/y.png')
    images = image_source('base')
    assert len(images)==6 and images.vocab==['cat', 'dog', 'owl']
    assert ('2 folders of other programs' in capsys.readouterr().out)==(not name.startswith('.'))

def test_what_is_left_out_is_counted_and_listed(capsys):
    folder('base', n=12)
    for i in range(4): Path(f'base/cat/x{i}.png').symlink_to(f'/nowhere/{i}.png')
    for i in range(5): picture(f'base/cat/p{i}.heic', format='png')
    for i in range(2): Path(f'base/dog/p{i}.JXL').write_text('no')
    (Path('base/owl')/'000.png').write_bytes(b'junk'), Path('base/readme').write_text('x'), Path('base/Thumbs.db').write_text('x')
    main(['--data', 'base', *SMALL, '--skip-bad'])
    line = next(l for l in capsys.readouterr().out.splitlines() if l.startswith('left out'))
    assert line=='left out: 1 damaged image (000.png); 8 files of other formats (.heic 5, .jxl 2, no ending 1); 4 dangling links (x0.png, x1.png, x2.png, ...)'
    listed = Path('ifnd_out/left_out.txt').read_text().splitlines()
    assert len(listed)==13 and sum(l.startswith('link\t') for l in listed)==4 and any(l.startswith('damaged\t') and l.endswith('owl/000.png') for l in listed)

@pytest.mark.skipif(os.name=='nt', reason='permissions of another kind')
def test_what_may_not_be_read_is_counted():
    folder('base', n=4)
    os.chmod('base/owl', 0), os.chmod('base/cat/000.png', 0)
    code = ('import os, sys\nfrom ifnd_nb.folders import find_images, left_out_text\nfrom ifnd_nb.sources import image_source\n'
            'if os.getuid()==0: os.setgroups([]), os.setgid(65534), os.setuid(65534)\nprint(left_out_text(find_images("base")[1]))\n'
            'try: image_source("base")\nexcept PermissionError as e: print("refused", e)\nprint(image_source("base", skip_bad=True))')
    for d in (Path.cwd(), *Path.cwd().parents)[:-1]:
        if d.owner()==Path.cwd().owner() and str(d).startswith('/tmp/'): os.chmod(d, 0o755)
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env={**os.environ, 'MPLCONFIGDIR': '/tmp', 'HOME': '/tmp'})
    os.chmod('base/owl', 0o755)
    assert done.returncode==0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0]=='left out: 1 file or folder that may not be read (owl)' and lines[1].startswith('refused') and '000.png' in lines[1] or 'left out' in lines[1]
    assert 'left out: 2 files or folders that may not be read' in done.stdout and lines[-1].startswith('base: 7 images')

def test_a_folder_named_like_a_set(capsys):
    folder('digits', ('a', 'b'))
    assert len(image_source('digits'))==1797 and 'write ./digits' in capsys.readouterr().out
    assert image_source('./digits').vocab==['a', 'b']

def test_a_stray_image_takes_no_labels_away(capsys):
    folder('base'), picture('base/000.png', size=16)
    main(['--data', 'base', *SMALL])
    assert 'k-NN accuracy' in capsys.readouterr().out

def test_why_there_is_no_score(capsys):
    folder('base'), folder('flat', ('.',))
    main(['--data', 'base', '--valid', 'flat', *SMALL])
    assert 'there will be no accuracy: the held-out images have no labels' in capsys.readouterr().out
    main(['--data', 'flat', *SMALL])
    assert 'no accuracy: the training and the held-out images have no labels' in capsys.readouterr().out

# ---- A7, and files that go away

def test_shared_memory_that_is_too_small(monkeypatch, capsys):
    folder('base', n=40, size=24)
    kw = dict(bs=16, size=16, max_cache_gb=0, device='cpu')
    real = data.shutil.disk_usage
    monkeypatch.setattr(data.shutil, 'disk_usage', lambda p: real(p)._replace(free=3 * 256 * 3 * 20**2) if p=='/dev/shm' else real(p))
    with pytest.raises(ValueError, match='workers=2 processes.*shared memory.*workers=1.*--shm-size'): two_view_dls('base', workers=2, **kw)
    assert two_view_dls('base', workers=1, **kw).train.fake_l.num_workers==1
    monkeypatch.setattr(data, '_cores', lambda: 4)
    dls = two_view_dls('base', **kw)
    assert dls.train.fake_l.num_workers==1 and 'room for 1 of 4' in capsys.readouterr().out and len(list(dls.train))==len(dls.train)

def test_no_epoch_is_shorter_than_it_says(monkeypatch):
    folder('base', n=40, size=24)
    dls = two_view_dls('base', bs=16, size=16, max_cache_gb=0, workers=2, device='cpu')
    assert len(list(dls.train))==len(dls.train)==6 and dls.train.fake_l.timeout==300
    dls.one_batch(), dls.train.show_batch() # in this process
    whole = data.TfmdDL.__iter__
    monkeypatch.setattr(data.TfmdDL, '__iter__', lambda self: (b for i, b in enumerate(whole(self)) if i % 2))
    with pytest.raises(ChildProcessError, match='3 of 6 batches did not come'): list(dls.train)

@pytest.mark.parametrize('workers', [0, 1])
def test_a_file_that_vanishes_is_one_line(workers, capsys, monkeypatch):
    folder('base', n=40, size=24)
    start = sys.modules['ifnd_nb.training'].start_run
    def then_remove(**kw):
        out = start(**kw)
        Path('base/cat/003.png').unlink()
        return out
    monkeypatch.setattr('ifnd_nb.training.start_run', then_remove)
    assert refused('--data', 'base', *SMALL, '--max-cache-gb', 0, '--workers', workers, '--valid', 0)==1
    assert "base/cat/003.png" in one_line(capsys)

# ---- B9, B10, B37, and classes that are only held out

@pytest.mark.parametrize('valid,n', [('0.25', 15), ('0', 0)])
def test_a_share_in_the_shell(valid, n, capsys):
    folder('base')
    main(['--data', 'base', '--valid', valid, *SMALL])
    said = capsys.readouterr().out
    assert f'held out: {n}' in said and ('no accuracy: no image is held out' in said)==(n==0)
    assert Path('ifnd_out/report.png').exists() and len(list(csv.DictReader(open('ifnd_out/metrics.csv'))))==1

def test_all_images_can_be_trained_on(tmp_path):
    dls = loaders(valid=0)
    assert len(dls.train_ds)==96 and len(dls.valid_ds)==len(dls.valid)==0
    learn = ifnd_learner(dls, queue_size=32, path=tmp_path)
    quiet(learn, lambda l: l.fit(2))
    assert embed(learn.model.body, plain_dl(dls), no_bar=True)[0].shape==(96, 512)

def test_the_right_remedy_for_labels_of_held_out_files():
    folder('base')
    files = sorted(map(str, Path('base').rglob('*.png')))
    dls = two_view_dls(files[:40], valid=files[40:], labels=list('ab') * 20, bs=8, size=16, device='cpu')
    with pytest.raises(ValueError, match=r'valid=image_source\(files, labels=...\)'): quiet(moco_learner(dls, cbs=ScoreCallback()), lambda l: l.fit(1))
    dls = two_view_dls(files[:40], valid=image_source(files[40:], labels=list('ab') * 10), labels=list('ab') * 20, bs=8, size=16, device='cpu')
    quiet(moco_learner(dls, queue_size=16, cbs=ScoreCallback()), lambda l: l.fit(1))

def test_held_out_classes_that_training_lacks_are_left_out_of_the_scores(capsys):
    folder('t', ('a', 'b'), 20), folder('v', ('a', 'b', 'c'), 10)
    main(['--data', 't', '--valid', 'v', *SMALL])
    said = capsys.readouterr().out
    assert 'left out of the scores: 10 held-out images of classes that the training images lack (c)' in said and '20 held-out images: those of' in said

def test_a_class_that_the_split_holds_out_whole(capsys):
    y = torch.cat([torch.arange(2).repeat(40), torch.tensor([2])])
    dls = next(d for seed in range(99) if len((d := two_view_dls(torch.zeros(81, 1, 8, 8, dtype=torch.uint8), labels=y, bs=8, seed=seed, device='cpu')).valid_ds.labels[d.valid_ds.labels==-1]))
    assert (dls.train_ds.labels==2).sum()==0 and 'lack (2)' in capsys.readouterr().out

# ---- B11: few labels

def test_few_labels_are_counted_before_training():
    x, y = arrays()
    few = [v if i % 12==0 else None for i, v in enumerate(y.tolist())]
    dls = two_view_dls(x, labels=few, size=16, bs=16, valid=image_source(x, labels=y), device='cpu')
    with pytest.raises(ValueError, match='k=10, but the bank holds 8 images'): quiet(moco_learner(dls, cbs=ScoreCallback()), lambda l: l.fit(1))
    quiet(moco_learner(dls, queue_size=16, cbs=ScoreCallback(k=4)), lambda l: l.fit(1))

# ---- B12: data sets

class Set:
    def __init__(self, items, **kw): self.items = items; self.__dict__.update(kw)
    def __len__(self): return len(self.items)
    def __getitem__(self, i): return self.items[i]

def pil(v=0): return Image.fromarray(np.full((8, 8, 3), v, np.uint8))

def png_bytes(v=0):
    picture('tmp.png', v)
    return Path('tmp.png').read_bytes()

@pytest.mark.parametrize('key,label', [('image', 'label'), ('img', 'labels'), ('image', 'fine_label'), ('jpg', 'cls'), ('png', 'class'), ('pixel_values', 'target')])
def test_keys_as_hugging_face_has_them(key, label):
    images = image_source(Set([{key: pil(i), label: i % 2} for i in range(6)]))
    assert images.labels.tolist()==[0, 1] * 3 and images.images[:, 0, 0, 0].tolist()==list(range(6))

def test_images_that_are_not_decoded_yet():
    raw = png_bytes(7)
    for o in (raw, {'bytes': raw, 'path': None}, {'bytes': None, 'path': 'tmp.png'}, 'tmp.png', Path('tmp.png')):
        assert image_source(Set([{'image': o, 'label': 1}] * 3)).images.unique().tolist()==[7]

def test_class_names_of_data_sets():
    from types import SimpleNamespace
    names = dict(label=SimpleNamespace(names=['cat', 'dog']))
    assert image_source(Set([{'image': pil(), 'label': i % 2} for i in range(4)], features=names)).vocab==['cat', 'dog']
    assert image_source(Set([(pil(), i % 2) for i in range(4)], vocab=['cat', 'dog'])).vocab==['cat', 'dog']
    assert image_source(Set([{'image': pil(), 'label': [0, -1][i % 2]} for i in range(4)], features=names)).labels.tolist()==[0, -1] * 2

def test_unknown_keys_are_named():
    with pytest.raises(ValueError, match="it has 'foto', 'label', and none of 'image', 'img'"): image_source(Set([{'foto': pil(), 'label': 1}] * 3))

def test_named_sets_have_one_recipe(monkeypatch):
    x, y = arrays(40, 10, 28)
    class FashionMNIST(Set): pass
    theirs = FashionMNIST([(Image.fromarray(a[0].numpy()), int(b)) for a, b in zip(x, y)], classes=[f'c{i}' for i in range(10)])
    monkeypatch.setattr(data, '_DEBIAN', Path('nowhere'))
    monkeypatch.setattr(data, '_torchvision', lambda cls, train: theirs)
    by_name, by_hand = (two_view_dls(o, bs=8, valid=.2, device='cpu') for o in ('fashion_mnist', theirs))
    assert by_name.train_ds.name==by_hand.train_ds.name=='fashion_mnist' and by_name.size==by_hand.size==28
    for o in ('scale', 'ratio', 'flip', 'brightness'): assert getattr(by_name.train.after_batch[0], o)==getattr(by_hand.train.after_batch[0], o)==data.augmentations['fashion_mnist'].get(o, getattr(by_name.train.after_batch[0], o))
    assert [run_config(data=c)['size'] for c in ('cifar10', 'cifar100', 'fashion_mnist')]==[32, 32, 28]

# ---- B13, B14, B15, A17, B35: fastai's habits

def test_loaders_of_another_kind_have_a_remedy():
    class Theirs: train = valid = None
    for o in (Theirs(), 'folder', None):
        for make in (moco_learner, ifnd_learner):
            with pytest.raises(TypeError, match='two_view_dls'): make(o)

def test_features_of_new_images_in_a_users_words(tmp_path):
    folder('new', n=3)
    learn = moco_learner(two_view_dls(folder('base'), bs=16, size=16, device='cpu'), queue_size=32, path=tmp_path)
    files = sorted(map(str, Path('new').rglob('*.png')))
    same = [embed(learn.model.body, dl, no_bar=True)[0] for dl in (learn.dls.test_dl(files), learn.dls.test_dl('new'), plain_dl(learn.dls, 'new'), learn.dls.test_dl([Path(f) for f in files], bs=2))]
    for x in same: torch.testing.assert_close(x, same[0])
    assert same[0].shape==(9, 512)
    for do in (lambda l: l.get_preds(dl=l.dls.test_dl(files)), lambda l: l.predict(files[0]), lambda l: l.tta(), lambda l: embed(l.model.body, l.dls.valid)):
        with pytest.raises(TypeError, match='embed|plain_dl'): quiet(learn, do)

@pytest.mark.parametrize('labels', [True, False])
def test_show_results_shows_neighbours(labels, tmp_path):
    import matplotlib.pyplot as plt
    x, y = arrays()
    learn = moco_learner(two_view_dls(x, labels=y if labels else None, size=16, bs=16, device='cpu'), path=tmp_path)
    for kw in ({}, dict(ds_idx=0, max_n=2, k=3), dict(dl=learn.dls.test_dl(np.zeros((5, 40, 40), 'u1')), shuffle=False)):
        learn.show_results(**kw)
        fig = plt.gcf()
        shown = sum(bool(ax.images) for ax in fig.axes)
        assert shown==min(kw.get('max_n', 6), 5 if 'dl' in kw else 6) * (kw.get('k', 9) + 1) and 'nearest' in fig._suptitle.get_text()
        plt.close(fig)

def test_losses_of_single_images(tmp_path):
    learn = ifnd_learner(loaders(), queue_size=32, path=tmp_path)
    quiet(learn, lambda l: l.fit(2))
    preds, targets, losses = quiet(learn, lambda l: l.get_preds(with_loss=True))
    n = len(learn.dls.valid_ds)
    assert preds.shape==(n, 33) and losses.shape==(n,) and losses.mean().item()==pytest.approx(quiet(learn, lambda l: l.validate())[0], rel=1e-4)
    torch.testing.assert_close(losses, info_nce(preds, reduction='none'))
    seen = quiet(learn, Interpretation.from_learner)
    assert len(seen.top_losses(3)[0])==3
    with pytest.raises(AttributeError, match='with_loss=True.*show_results'): seen.plot_top_losses(3)

def test_export_and_load(tmp_path):
    learn = ifnd_learner(loaders(), n_clusters=[3], queue_size=32, path=tmp_path)
    quiet(learn, lambda l: l.fit(2))
    learn.export('l.pkl')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        other = load_learner(tmp_path/'l.pkl')
    assert Path(tmp_path/'l.pkl').stat().st_size < 30e6 and len(other.dls.train_ds)==0 and (other.dls.size, other.dls.channels, other.dls.vocab)==(16, 1, [0, 1, 2, 3])
    x = arrays(10, seed=1)[0]
    torch.testing.assert_close(*(embed(l.model.body, l.dls.test_dl(x), no_bar=True)[0] for l in (learn, other)))
    with pytest.raises(ValueError, match='holds no images.*learn.dls = two_view_dls'): quiet(other, lambda l: l.fit(1))
    other.dls = learn.dls
    queue = other.model.queue_idx.clone()
    quiet(other, lambda l: l.fit(1)) # the same images: nothing is forgotten
    quiet(learn, lambda l: l.validate())

@pytest.mark.parametrize('n', [60, 200])
def test_other_images_in_the_same_learner(n, tmp_path, capsys):
    learn = ifnd_learner(loaders(), n_clusters=[3], acceptance=1., queue_size=64, path=tmp_path)
    quiet(learn, lambda l: l.fit(2))
    learn.dls = loaders(n)
    quiet(learn, lambda l: l.fit(1))
    train = len(learn.dls.train_ds)
    assert 'other images than before' in capsys.readouterr().out and learn.model.queue_idx.max() < train
    assert learn.model.bank.keys.shape[0]==learn.model.detector.pseudo.shape[0]==train
    assert (learn.model.queue_idx >= 0).sum()==min(64, len(learn.dls.train) * 16)
    quiet(learn, lambda l: l.fit(1))
    assert 'other images' not in capsys.readouterr().out and learn.recorder.values[-1][4] > 0

def test_larger_views_of_the_same_images_keep_the_queue(tmp_path, capsys):
    x, y = arrays()
    learn = moco_learner(two_view_dls(x, labels=y, size=16, bs=16, device='cpu'), queue_size=64, path=tmp_path)
    quiet(learn, lambda l: l.fit(1))
    learn.dls = two_view_dls(x, labels=y, size=24, bs=16, device='cpu')
    quiet(learn, lambda l: l.fit(1))
    assert capsys.readouterr().out==''

# ---- B16, B17, B18: callbacks

@pytest.mark.parametrize('make', [lambda: EarlyStoppingCallback(monitor='knn', patience=3), lambda: ReduceLROnPlateau(monitor='knn', patience=3)])
def test_patience_that_ends_before_the_next_score(make, tmp_path):
    with pytest.raises(ValueError, match='patience=3 epochs, but knn is scored every 4.*patience=4'): quiet(moco_learner(loaders(), queue_size=32, path=tmp_path, cbs=[ScoreCallback(every=4, k=3), make()]), lambda l: l.fit(1))

def test_early_stopping_stops_after_scores(tmp_path, capsys):
    learn = moco_learner(loaders(), queue_size=32, path=tmp_path, lr=0., cbs=[ScoreCallback(every=2, k=3), EarlyStoppingCallback(monitor='knn', patience=2)])
    quiet(learn, lambda l: l.fit(8))
    knn = [v[-1] for v in learn.recorder.values]
    assert len(knn)==4 and not math.isnan(knn[1]) and not math.isnan(knn[3]) and 'early stopping' in capsys.readouterr().out

def test_loggers_read_the_loss_of_the_last_batch(tmp_path):
    class Log(Callback):
        order, seen = Recorder.order + 1, []
        def after_batch(self):
            if self.training: self.seen.append((float(self.smooth_loss), float(self.loss)))
    log = Log()
    for bar in (True, False):
        log.seen = []
        learn = moco_learner(loaders(), queue_size=32, path=tmp_path, cbs=log)
        if bar:
            with learn.no_logging(): learn.fit(1)
        else: quiet(learn, lambda l: l.fit(1))
        average = n = 0.
        for i, (smooth, loss) in enumerate(log.seen):
            average, n = .98 * average + .02 * loss, i + 1
            assert smooth==pytest.approx(average / (1 - .98**n), rel=1e-4)

def test_what_waits_for_a_column_that_is_not_there(tmp_path):
    for kw, cb, words in (({}, SaveModelCallback(monitor='knn'), "monitor='knn', which is none of .*ScoreCallback"), (dict(valid=0), SaveModelCallback(), 'no image is held out'), (dict(valid=0), EarlyStoppingCallback(), 'no image is held out')):
        with pytest.raises(ValueError, match=words): quiet(moco_learner(loaders(**kw), queue_size=32, path=tmp_path), lambda l: l.fit(1, cbs=cb))
    learn = moco_learner(loaders(), queue_size=32, path=tmp_path, cbs=[ScoreCallback(k=3), SaveModelCallback(monitor='knn')])
    quiet(learn, lambda l: l.lr_find(show_plot=False))
    quiet(learn, lambda l: l.fit(1))

def test_a_refusal_leaves_nothing_locked(tmp_path):
    learn = moco_learner(loaders(), queue_size=32, path=tmp_path)
    good, learn.dls = learn.dls, learn.dls.new_empty()
    for do in (lambda l: l.validate(), lambda l: l.get_preds(), lambda l: l.validate(), lambda l: l.lr_find(), lambda l: l.show_results(), lambda l: l.fit(1)):
        with pytest.raises(ValueError, match='hold no images|holds no images'): quiet(learn, do)
    learn.dls = good
    quiet(learn, lambda l: l.fit(1))

def test_other_channels_and_other_loaders_are_refused(tmp_path):
    learn = moco_learner(loaders(), queue_size=32, path=tmp_path)
    learn.dls = two_view_dls(torch.rand(40, 3, 16, 16), bs=8, device='cpu')
    with pytest.raises(ValueError, match='3-channel images, but the encoder takes 1; make them with channels=1'): quiet(learn, lambda l: l.fit(1))
    with pytest.raises(TypeError, match='strategy='): moco_learner(loaders(), loss_func=info_nce)
    with pytest.raises(TypeError, match='arch=None'): moco_learner(loaders(), None)
    assert moco_learner(two_view_dls(torch.rand(40, 3, 32, 32), bs=8, device='cpu'), torchvision.models.resnet18).model.body.n_features==512

@pytest.mark.parametrize('mix', [MixUp, CutMix])
def test_mixing_is_refused_in_words(mix, tmp_path):
    with pytest.raises(TypeError, match=f'{mix.__name__} mixes images and their labels'): quiet(moco_learner(loaders(), path=tmp_path), lambda l: l.fit(1, cbs=mix()))

def test_no_name_of_ours_hides_one_of_fastais():
    import fastai.vision.all as theirs, ifnd_nb.all as ours
    assert not [n for n in ours.__all__ if hasattr(theirs, n) and getattr(ours, n) is not getattr(theirs, n)]

# ---- A16, B20, B29, B40: encoders

def test_an_encoder_comes_ready_to_use(tmp_path):
    learn = moco_learner(loaders(), queue_size=32, path=tmp_path)
    quiet(learn, lambda l: l.fit(1))
    save_encoder(learn, 'e.safetensors')
    body, meta = load_encoder('e.safetensors')
    x, before = torch.rand(8, 1, 16, 16), {k: v.clone() for k, v in body.state_dict().items()}
    assert not body.training and meta['arch']=='small_resnet'
    torch.testing.assert_close(body(x)[:1], body(x[:1]))
    for k, v in body.state_dict().items(): assert torch.equal(v, before[k])

def test_a_module_must_be_named_to_be_saved():
    learn = moco_learner(loaders(), create_encoder('small_resnet', 1, 16))
    save_encoder(learn, 'a.safetensors')
    learn = moco_learner(loaders(), torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()), path='.')
    for arch in ('', torch.nn.Linear(1, 1)):
        with pytest.raises(ValueError, match='arch='): save_encoder(learn, 'b.safetensors', arch)

@pytest.mark.parametrize('make,n', [(torchvision.models.resnet18, 512), (torchvision.models.vgg11, 512), (torchvision.models.mobilenet_v3_small, 576), (lambda: timm('resnet18'), 512), (lambda: timm('convnext_atto'), 320)])
def test_a_classifier_loses_its_head(make, n):
    net = make()
    keys = set(net.state_dict())
    body = create_encoder(net, 3, 32)
    assert body.n_features==n and set(net.state_dict())==keys # the user's own is as it was
    first = next(iter(body.parameters()))
    assert any(torch.equal(first, p) for p in net.parameters())

@pytest.mark.parametrize('arch,n', [('vgg11', 512), ('vgg16_bn', 512), ('alexnet', 256), ('squeezenet1_1', 512)])
def test_no_head_is_larger_than_its_network(arch, n): assert create_encoder(arch, 3, 64).n_features==n

# ---- B21, B22: odd files

def chunk(kind, body): return struct.pack('>I', len(body)) + kind + body + struct.pack('>I', zlib.crc32(kind + body))

def test_bad_exif_is_no_damage():
    raw = png_bytes(9)
    Path('bad.png').write_bytes(raw[:33] + chunk(b'eXIf', b'bad') + raw[33:])
    assert read_image('bad.png').unique().tolist()==[9]

def test_an_image_is_turned_even_if_another_note_is_bad():
    a = np.zeros((8, 16, 3), np.uint8); a[:, :8] = 255
    exif = Image.Exif(); exif[0x0112] = 6
    Image.fromarray(a).save('t.jpg', exif=exif, quality=95)
    upright = read_image('t.jpg')
    assert upright.shape==(3, 16, 8) and upright[:, :6].min() > 200 and upright[:, -6:].max() < 50
    raw = exif.tobytes()
    ifd = struct.pack('>H', 2) + struct.pack('>HHII', 0x0112, 3, 1, 6 << 16) + struct.pack('>HHII', 0x011A, 10, 1, 38) + struct.pack('>I', 0) + struct.pack('>ii', 72, 0)
    body = b'Exif\0\0MM\0*' + struct.pack('>I', 8) + ifd
    Image.fromarray(a).save('u.jpg', exif=body, quality=95)
    assert read_image('u.jpg').shape in ((3, 16, 8), (3, 8, 16))

@pytest.mark.parametrize('turn', range(1, 9))
def test_all_turns(turn):
    from PIL import ImageOps
    a = np.arange(6 * 4 * 3, dtype=np.uint8).reshape(6, 4, 3) * 3
    exif = Image.Exif(); exif[0x0112] = turn
    Image.fromarray(a).save('t.png', exif=exif), Image.fromarray(a).save('t.tif', exif=exif)
    for f in ('t.png', 't.tif'):
        with Image.open(f) as im: right = np.asarray(ImageOps.exif_transpose(im))
        assert (read_image(f).permute(1, 2, 0).numpy()==right).all()

def test_images_that_are_too_large_are_not_called_damaged(monkeypatch, capsys):
    picture('pics/a/big.png', size=64), picture('pics/a/0.png'), picture('pics/b/1.png')
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 100)
    with pytest.raises(ValueError, match="big.png' has more pixels than PIL thinks safe.*MAX_IMAGE_PIXELS.*skip_bad=True"): image_source('pics')
    assert len(image_source('pics', skip_bad=True))==2

def test_a_long_text_is_not_called_damage():
    raw = png_bytes(9)
    Path('long.png').write_bytes(raw[:33] + chunk(b'zTXt', b'k\0\0' + zlib.compress(b'x' * (2**21))) + raw[33:])
    try: assert read_image('long.png').unique().tolist()==[9]
    except ValueError as e: assert 'too long a text' in str(e) and 'damaged' not in str(e)

# ---- B27: other kinds of paths

@pytest.mark.parametrize('path,words', [('pics.zip', 'an archive; unpack it'), ('pics.tar.gz', 'an archive'), ('list.csv', 'column of paths'), ('x.npy', 'a file of arrays'), ('clip.mp4', 'a video'), ('photo.heic', 'convert it'),
    ('https://example.org/pics', 'a URL; download'), ('s3://bucket/pics', 'a URL'), ('https://example.org/pics.zip', 'a URL')])
def test_other_kinds_of_paths_have_their_own_remedy(path, words, capsys):
    if '://' not in path: Path(path).write_bytes(b'PK')
    for o in (path, [path]):
        with pytest.raises(ValueError, match=words): image_source(o)
    assert refused('--data', path)==2
    assert words in (said := one_line(capsys)) and said.startswith('ifnd_train: --data=') and 'remove it' not in said

# ---- B28, B32, B34, A8 and others are in test_first_contact.py

# ---- the commands

def installed(name, *args):
    return subprocess.run([Path(sys.executable).with_name(name), *map(str, args)], capture_output=True, text=True)

@pytest.mark.parametrize('name', ['ifnd_train', 'ifnd_embed', 'ifnd_export', 'ifnd_compare'])
def test_help_is_light_and_spells_options_with_dashes(name):
    done = installed(name, '--help')
    options = [w for w in done.stdout.replace('[', ' ').replace(']', ' ').split() if w.startswith('--')]
    assert done.returncode==0 and options and not any('_' in o for o in options)
    assert installed(name, '--version').stdout.startswith('ifnd_nb ')
    code = f'import sys; from ifnd_nb.cli import {name}, command_parser; command_parser({name}).format_help(); print([m for m in ("torch", "fastai", "numpy", "matplotlib") if m in sys.modules])'
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout.strip()=='[]'

def test_choices_are_those_that_there_are():
    choices = lambda command, option: next(a.choices for a in cli.command_parser(command)._actions if a.dest==option)
    assert set(choices(cli.ifnd_train, 'strategy'))=={*strategies, 'none'} and set(choices(cli.ifnd_train, 'detector'))==set(detectors)
    assert set(choices(cli.ifnd_compare, 'data'))==set(experiments.compared)
    shown = cli.command_parser(cli.ifnd_train).format_help()
    assert '{eliminate,attract,none}' in shown and '{fp32,bf16,fp16}' in shown and all(n in shown for n in data.named_sets)

@pytest.mark.parametrize('args,words', [(['photos'], 'did you mean --data photos?'), (['--strategy', 'attrack'], "invalid choice: 'attrack'"), (['--acceptance', '2'], "--acceptance='2' must be a number from 0 to 1"),
    (['--acceptance', 'cubic'], "--acceptance='cubic'"), (['--valid', '1.5'], "--valid='1.5' must be a share"), (['--dim', '0'], '--dim=0'), (['--wd', '-1'], '--wd=-1'), (['--max-cache-gb', '-1'], '--max-cache-gb=-1'),
    (['--precision', 'fp64'], 'invalid choice'), (['--log', 'paper'], "--log='paper' is not known"), (['--queue_size', '0'], '--queue-size=0'), (['--bs'], 'expected one argument')])
def test_usage_is_one_line_and_exit_code_2(args, words, capsys):
    assert refused('--data', 'digits', *args) if args[0]!='photos' else refused(*args)==2
    assert words in one_line(capsys) and not list(Path().iterdir())

@pytest.mark.parametrize('args,words', [(['--lr', 'inf'], '--lr=inf'), (['--lr', 'nan'], '--lr=nan'), (['--tau', 'nan'], '--tau=nan'), (['--momentum', '1'], '--momentum=1.0'), (['--threads', '100000'], '--threads=100000'),
    (['--strategy', 'none', '--n-clusters', '3'], "--n-clusters=[3] changes nothing with --strategy='none'"), (['--detector', 'topk', '--acceptance', '.5'], "changes nothing with --detector='topk'"), (['--out', ''], '--out: is empty'), (['--wd', 'inf'], '--wd=inf'), (['--workers', '999'], '--workers=999')])
def test_values_that_cannot_be_or_do_nothing(args, words, capsys):
    assert refused('--data', 'digits', *args)==2
    assert words in one_line(capsys) and not list(Path().iterdir())

def test_an_interrupt_while_packages_are_imported():
    import signal, time
    for wait in (.3, .6, 1.):
        run = subprocess.Popen([Path(sys.executable).with_name('ifnd_train'), '--data', 'digits', '--out', 'o'], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        time.sleep(wait)
        run.send_signal(signal.SIGINT)
        err = run.communicate(timeout=60)[1]
        assert (run.returncode==130 and err.startswith('ifnd_train: interrupted;') and err.count('\n')==1) or (run.returncode==-signal.SIGINT and wait==.3), (wait, run.returncode, err)

def test_a_logger_that_cannot_begin_is_one_line(monkeypatch, capsys):
    def broken(out, cfg): raise RuntimeError('no key')
    monkeypatch.setitem(sys.modules['ifnd_nb.training'].loggers, 'tensorboard', ('json', broken))
    folder('base')
    assert refused('--data', 'base', *SMALL, '--log', 'tensorboard')==1 and one_line(capsys)=="ifnd_train: --log='tensorboard' cannot begin: no key"

def test_new_options_reach_the_learner(monkeypatch):
    seen = {}
    real = sys.modules['ifnd_nb.training'].do_run
    monkeypatch.setattr('ifnd_nb.training.do_run', lambda learn, cfg, out: seen.update(learn=learn, cfg=cfg))
    folder('base')
    main(['--data', 'base', *SMALL, '--acceptance', '.3', '--wd', '.2', '--dim', '24', '--max-cache-gb', '0', '--workers', '0'])
    learn = seen['learn']
    assert learn.model.queue.shape[1]==24 and learn.wd==.2 and learn.ifnd.rate(.9)==.3 and learn.dls.train_ds.images is None
    main(['--data', 'base', *SMALL, '--acceptance', 'linear'])
    assert seen['learn'].ifnd.rate(.5)==pytest.approx(.5)

@pytest.mark.parametrize('precision', ['bf16', 'fp16'])
def test_half_precision_takes_a_gpu(precision, capsys):
    assert refused('--data', 'digits', '--precision', precision, '--device', 'cpu')==2 and one_line(capsys)==f"ifnd_train: --precision='{precision}' works on a CUDA GPU; leave it out on another device"

def test_logs_of_tensorboard():
    pytest.importorskip('tensorboard')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    folder('base')
    main(['--data', 'base', *SMALL, '--log', 'tensorboard', '--beside-baseline'])
    for out in ('ifnd_out', 'ifnd_out/baseline'):
        logged, rows = EventAccumulator(f'{out}/tensorboard').Reload(), list(csv.DictReader(open(f'{out}/metrics.csv')))
        assert [e.value for e in logged.Scalars('knn')]==[pytest.approx(float(r['knn'])) for r in rows]
        assert logged.Scalars('train_loss')[-1].value==pytest.approx(float(rows[-1]['train_loss']))

def test_logs_count_on_after_a_pause():
    pytest.importorskip('tensorboard')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    folder('base')
    main(['--data', 'base', *SMALL, '--log', 'tensorboard', '--out', 'run'])
    main(['--resume', 'run', '--epochs', '3'])
    steps = sorted(e.step for f in Path('run/tensorboard').iterdir() for e in EventAccumulator(str(f)).Reload().Scalars('valid_loss'))
    assert steps==[3, 6, 9]

def test_a_network_that_makes_its_own_channels(tmp_path):
    class Three(torch.nn.Module):
        def forward(self, x): return x.expand(-1, 3, -1, -1)
    net = torch.nn.Sequential(Three(), create_encoder('small_resnet', 3, 16))
    quiet(moco_learner(loaders(), net, queue_size=16, path=tmp_path), lambda l: l.fit(1))

def test_deep_images_are_read_alike_by_weights_alone():
    rng = np.random.default_rng(0)
    for i in range(40): deep(f'd/{"ab"[i % 2]}/{i}.png', rng.integers(0, 3000, (16, 16)).astype('u2'))
    main(['--data', 'd', *SMALL, '--out', 'run'])
    export_main(['run', '--to', 'w.pth'])
    for i in range(4): deep(f'e/{i}.png', rng.integers(0, 200, (16, 16)).astype('u2'))
    for args in (['run', '--to', 'a.npz'], ['small_resnet', '--from-weights', 'w.pth', '--to', 'b.npz']): embed_main([*args, '--data', 'e', '--device', 'cpu'])
    assert np.allclose(np.load('a.npz')['features'], np.load('b.npz')['features'], atol=1e-5) and load_encoder('run/encoder.safetensors')[1]['levels']==(0, 4095)

def test_logs_of_wandb(monkeypatch, capsys):
    pytest.importorskip('wandb')
    monkeypatch.setenv('WANDB_MODE', 'offline'), monkeypatch.setenv('WANDB_SILENT', 'true')
    folder('base')
    main(['--data', 'base', *SMALL, '--log', 'wandb'])
    assert any(Path('ifnd_out/wandb').iterdir())

def test_a_logger_that_is_not_installed(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'wandb', None)
    assert refused('--data', 'digits', '--log', 'wandb')==2
    assert one_line(capsys)=="ifnd_train: --log='wandb' needs a package that is not installed; pip install wandb"

def test_without_a_terminal_one_line_an_epoch():
    folder('base', n=200)
    done = installed('ifnd_train', '--data', 'base', *SMALL[:4], '--epochs', '3', *SMALL[6:], '--beside-baseline')
    assert done.returncode==0, done.stderr
    assert sum(l.startswith('epoch ') for l in done.stdout.splitlines())==6 and not {'\r', '\x1b', '█'} & set(done.stdout) and done.stderr==''

def test_a_resumed_run_has_no_empty_rows_and_knows_where_the_images_went(capsys):
    folder('base')
    main(['--data', 'base', *SMALL, '--out', 'run'])
    Path('base').rename('moved')
    capsys.readouterr()
    assert refused('--resume', 'run', '--epochs', '3')==2 and 'no longer at' in (said := one_line(capsys)) and said.endswith('with --data')
    assert refused('--resume', 'run', '--data', 'moved', '--threads', '0')==2 and '--threads=0' in one_line(capsys)
    main(['--resume', 'run', '--epochs', '3', '--data', 'moved'])
    lines = [l for l in capsys.readouterr().out.splitlines() if l.startswith('epoch ')]
    assert [l.split()[1] for l in lines]==['2/3', '3/3']
    for args in (['--lr', '0.001'], ['--dim=128'], ['--bs', '16', '--epochs', '9']): # also what is the default
        assert refused('--resume', 'run', *args)==2 and f'leave out {args[0].split("=")[0]}' in one_line(capsys)
    folder('others', n=21)
    assert refused('--resume', 'run', '--epochs', '4', '--data', 'others')==2 and 'changed since the run began' in one_line(capsys)

def test_the_number_of_neighbours_is_one_and_is_said(capsys):
    import inspect
    from ifnd_nb import evaluate
    assert {inspect.signature(f).parameters['k'].default for f in (evaluate.nearest, evaluate.knn_accuracy, evaluate.knn_predict, evaluate.score_features, evaluate.evaluation_table, evaluate.KNNCallback.__init__, experiments.encoder_scores, experiments.run_once, experiments.run_reference)}=={n_neighbours}
    folder('base', ('a', 'b'), 30)
    main(['--data', 'base', *SMALL])
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.endswith(f'({n_neighbours} neighbours; 12 held-out images: 20% of the images, drawn by seed 42)') and json.loads(Path('ifnd_out/metrics.json').read_text())['neighbours']==n_neighbours

# ---- features and weights

@pytest.fixture
def run():
    folder('base')
    main(['--data', 'base', *SMALL, '--out', 'run'])
    return Path('run')

def test_features_with_file_names(run, capsys):
    embed_main(['run', '--data', 'base', '--to', 'f.npz', '--device', 'cpu'])
    embed_main(['run/encoder.safetensors', '--data', 'base', '--to', 'f.csv', '--device', 'cpu', '--bs', '7'])
    f, t = np.load('f.npz'), pd.read_csv('f.csv')
    assert f['files'][:2].tolist()==['cat/000.png', 'cat/001.png'] and f['names'].tolist()==['cat', 'dog', 'owl'] and f['features'].shape==(60, 512)
    assert t.file.tolist()==f['files'].tolist() and t.label.tolist()==[f['names'][y] for y in f['labels']] and np.allclose(t.iloc[:, 2:], f['features'], atol=1e-4)
    body, meta = load_encoder('run/encoder.safetensors')
    x = torch.stack([read_image(f'base/{p}') for p in f['files'][:3]]).float() / 255
    x = (x - torch.tensor(meta['mean'])[:, None, None]) / torch.tensor(meta['std'])[:, None, None]
    assert np.allclose(body(x).detach(), f['features'][:3], atol=1e-4)

def test_features_of_any_architecture(capsys):
    folder('base', size=32)
    embed_main(['resnet18', '--data', 'base', '--to', 'u.npz', '--device', 'cpu'])
    assert 'resnet18 is untrained' in capsys.readouterr().out and np.load('u.npz')['features'].shape==(60, 512)
    torch.save(torchvision.models.resnet18().state_dict(), 'w.pth')
    embed_main(['resnet18', '--data', 'base', '--from-weights', 'w.pth', '--to', 'w.npz', '--device', 'cpu', '--size', '48'])
    assert 'untrained' not in capsys.readouterr().out
    learn = moco_learner(two_view_dls('base', size=32, bs=16, device='cpu'), 'resnet18', queue_size=16)
    save_encoder(learn, 'e.safetensors')
    export_main(['e.safetensors', '--to', 'x.pth'])
    for args in (['e.safetensors', '--to', 'a.npz'], ['resnet18', '--from-weights', 'x.pth', '--to', 'b.npz'], ['resnet18', '--from-weights', 'e.safetensors', '--to', 'c.npz']): embed_main([*args, '--data', 'base', '--device', 'cpu'])
    assert np.allclose(np.load('a.npz')['features'], np.load('b.npz')['features'], atol=1e-5) and np.allclose(np.load('a.npz')['features'], np.load('c.npz')['features'], atol=1e-5)
    embed_main(['small_resnet', '--data', 'digits', '--to', 'd.npz', '--device', 'cpu'])
    assert np.load('d.npz')['files'][:2].tolist()==['0', '1']

def test_features_of_all_parts_and_of_flat_folders(run):
    folder('s/train', ('a', 'b'), 5), folder('s/val', ('a', 'b'), 3), folder('flat', ('.',), 4)
    embed_main(['run', '--data', 's', '--to', 's.npz', '--device', 'cpu']), embed_main(['run', '--data', 'flat', '--to', 'flat.csv', '--device', 'cpu'])
    f = np.load('s.npz')
    assert len(f['files'])==16 and f['files'][0]=='train/a/000.png' and f['names'].tolist()==['a', 'b'] and 'label' not in pd.read_csv('flat.csv')

@pytest.mark.parametrize('args,words', [(['nothing', '--data', 'base'], "arch='nothing' is not known"), (['base', '--data', 'base'], 'holds no encoder.safetensors'), (['run'], 'data is not given' ), (['run', '--data', 'base', '--to', 'x.txt'], "--to='x.txt' must end in"),
    (['run', '--data', 'base', '--to', 'no/x.npz'], 'no such folder'), (['run', '--data', 'base', '--to', 'here.npz'], 'is there already'), (['no/such', '--data', 'base'], 'neither a file nor'), (['run', '--data', 'base', '--size', '0'], '--size=0'), (['run', '--data', 'base', '--from-weights', 'w.pth'], "--from-weights='w.pth' changes nothing"), (['run', '--data', 'base', '--max-cache-gb', 'nan'], '--max-cache-gb=nan'), ([], 'required: encoder')])
def test_embed_refuses_in_one_line(args, words, run, capsys):
    Path('here.npz').write_text('x')
    capsys.readouterr()
    assert refused(*args, main=embed_main)==2
    said = one_line(capsys)
    assert words in said and said.startswith('ifnd_embed: ') and Path('here.npz').read_text()=='x'

@pytest.mark.parametrize('arch,size,ours,end', [('resnet18', 32, 'torchvision', '.safetensors'), ('resnet18', 32, 'torchvision', '.pth'), ('mobilenet_v3_small', 32, 'torchvision', '.pth'), ('convnext_atto', 32, 'timm', '.safetensors')])
def test_weights_that_other_libraries_load(arch, size, ours, end, capsys):
    if ours=='timm': timm(arch)
    x = torch.rand(16, 3, size, size)
    learn = moco_learner(two_view_dls(x, size=size, bs=8, device='cpu'), arch, queue_size=16)
    save_encoder(learn, 'e.safetensors', arch)
    export_main(['e.safetensors', '--to', f'w{end}'])
    about = json.loads(Path('w.json').read_text())
    weights = torch.load('w.pth', weights_only=True) if end=='.pth' else __import__('safetensors.torch').torch.load_file('w.safetensors')
    theirs = torchvision.models.get_model(arch) if ours=='torchvision' else timm(arch)
    lack = theirs.load_state_dict(weights, strict=False)
    assert not lack.unexpected_keys and lack.missing_keys and all(k.split('.')[0] in ('fc', 'classifier', 'head', 'heads') for k in lack.missing_keys)
    assert about['library']==ours and about['arch']==arch and len(about['mean'])==3 and about['size']==size
    body = learn.model.body.eval()
    theirs.eval()
    first = lambda net: next(m for m in net.modules() if isinstance(m, torch.nn.Conv2d)).weight
    assert torch.equal(first(theirs), first(body))
    assert refused('e.safetensors', '--to', f'w{end}', main=export_main)==2

# ---- messages

def test_arguments_become_options():
    names = ['queue_size', 'bs', 'data', 'skip_bad', 'n_clusters', 'valid']
    for python, shell in [("queue_size=0 must be at least 1", "--queue-size=0 must be at least 1"), ("use a smaller bs or queue_size", "use a smaller bs or --queue-size"), ("data=df['path'], data='x'", "data=df['path'], --data='x'"),
                          ("pass skip_bad=True to go on", "add --skip-bad to go on"), ("n_clusters=[1, 2] is", "--n-clusters=[1, 2] is"), ("metadata=3, valid_ds", "metadata=3, valid_ds"), ("'/data/skip_bad/x' and /a/queue_size are gone", "'/data/skip_bad/x' and /a/queue_size are gone")]:
        assert in_shell(python, names)==shell
    assert in_shell('Caught FileNotFoundError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  File "x"\nFileNotFoundError: [Errno 2] a.png\n', names)=='FileNotFoundError: [Errno 2] a.png'
