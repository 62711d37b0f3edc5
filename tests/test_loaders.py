"Indices, seeds and epochs under workers and other processes, and what loaders refuse"
import pickle
import matplotlib.pyplot as plt, numpy as np, pytest, torch
from fastai.callback.progress import ProgressCallback
from fastai.learner import Learner
from torch.utils.data import Dataset
from ifnd_nb import loaders as loaders_room
from ifnd_nb.embedding import embed
from ifnd_nb.glyphs import glyphs
from ifnd_nb.loaders import plain_dl, two_view_dls
from ifnd_nb.moco import moco_learner
from ifnd_nb.scoring import ScoreCallback
from helpers import folder, quiet, save_many

pytestmark = pytest.mark.usefixtures('in_a_folder')

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
        for _ in range(2):
            seen = []
            for x_q, x_k, idx in dl:
                for v in dl.after_batch[-1].decodes((x_q, x_k)):
                    assert torch.allclose(v.mean((1, 2, 3)) * 255, stored[idx].float(), atol=.01)
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
    assert shuffled.n_inp==1 and sorted(torch.cat([b[1] for b in shuffled]).tolist())==idx.tolist()
    assert next(iter(dl))[1].tolist()==list(range(10))

def test_fits_fastai():
    dls = two_view_dls('digits', bs=64)
    assert dls.train.n_inp==2 and dls.n_inp==2 and dls.channels==1 and dls.size==16 and len(dls.stats)==2
    assert dls.vocab==list(range(10))
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
    for source in ('digits', glyphs(4, 10), glyphs(4, 10).images):
        two_view_dls(source, bs=8).show_batch(max_n=3)
        assert len(plt.gcf().axes)==6
        dls = two_view_dls(source, bs=8)
        plain_dl(dls).show_batch(max_n=3)
        assert len(plt.gcf().axes)==3
        plt.close('all')

@pytest.mark.parametrize('kw,match',
                         [(dict(bs=5000), 'bs=5000 is larger than the 1438'),
                          (dict(preset='loud'), "preset='loud'.*glyphs"), (dict(valid=-.1), 'valid=-0.1'),
                          (dict(valid=1), 'valid=1 must be a share'), (dict(bs=0), 'bs=0'), (dict(bs=-1), 'bs=-1'),
                          (dict(workers=-1), 'workers=-1'), (dict(workers=1.5), 'workers=1.5'),
                          (dict(valid=.0001), 'leaves none'), (dict(labels=[1]), 'labels has 1'),
    (dict(seed=None), 'seed=None'), (dict(preset=dict(foo=1, seed=2)), "preset has 'foo', 'seed'"),
    (dict(preset=dict(flip=.1, size=3)), "preset has 'size'")])
def test_loader_errors(kw, match):
    with pytest.raises(ValueError, match=match): two_view_dls('digits', **kw)

def test_a_file_damaged_later_is_named_by_the_worker(tmp_path):
    folder = save_many(tmp_path/'a', 12)
    dls = two_view_dls(folder, bs=4, max_cache_gb=0, workers=1, valid=.25)
    for f in folder.iterdir(): f.write_bytes(b'')
    with pytest.raises(ValueError, match='png.*damaged'): list(dls.train)

def test_labels_of_other_collections_are_in_the_learners_numbers(tmp_path):
    folder('t', ('a', 'b'), 20), folder('u', ('b', 'zebra'), 4)
    learn = moco_learner(two_view_dls('t', bs=8, size=16, device='cpu'), queue_size=16, path=tmp_path)
    dl = learn.dls.test_dl('u')
    assert dl.dataset.labels.tolist()==[1] * 4 + [-1] * 4
    assert embed(learn.model.body, dl, no_bar=True)[1].tolist()==[1] * 4 + [-1] * 4
    for other in (dl, plain_dl(learn.dls, 'u')):
        learn.show_results(dl=other, shuffle=False, max_n=8, k=2)
        titles = [t for ax in plt.gcf().axes if (t := ax.get_title())]
        assert titles[:4]==['b'] * 4 and set(titles[4:]) <= {'zebra'}
        plt.close('all')
    with pytest.raises(ValueError, match='other classes'):
        quiet(moco_learner(learn.dls, queue_size=16, cbs=ScoreCallback(queries=plain_dl(learn.dls, 'u'))),
              lambda l: l.fit(1))
    quiet(moco_learner(learn.dls, queue_size=16, path=tmp_path, cbs=ScoreCallback(queries=dl)), lambda l: l.fit(1))

def test_shared_memory_that_is_too_small(monkeypatch, capsys):
    folder('base', n=40, size=24)
    kw = dict(bs=16, size=16, max_cache_gb=0, device='cpu')
    real = loaders_room.shutil.disk_usage
    monkeypatch.setattr(loaders_room.shutil, 'disk_usage',
                        lambda p: real(p)._replace(free=3 * 256 * 3 * 20**2) if p=='/dev/shm' else real(p))
    with pytest.raises(ValueError, match='workers=2 processes.*shared memory.*workers=1.*--shm-size'):
        two_view_dls('base', workers=2, **kw)
    assert two_view_dls('base', workers=1, **kw).train.fake_l.num_workers==1
    monkeypatch.setattr(loaders_room, 'n_cores', lambda: 4)
    dls = two_view_dls('base', **kw)
    assert dls.train.fake_l.num_workers==1 and 'room for 1 of 4' in capsys.readouterr().out
    assert len(list(dls.train))==len(dls.train)

def test_no_epoch_is_shorter_than_it_says(monkeypatch):
    folder('base', n=40, size=24)
    dls = two_view_dls('base', bs=16, size=16, max_cache_gb=0, workers=2, device='cpu')
    assert len(list(dls.train))==len(dls.train)==6 and dls.train.fake_l.timeout==300
    dls.one_batch(), dls.train.show_batch() # in this process
    whole = loaders_room._loaders[0]
    monkeypatch.setattr(loaders_room, '_loaders', [lambda fake: (b for i, b in enumerate(whole(fake)) if i % 2)])
    with pytest.raises(ChildProcessError, match='3 of 6 batches did not come'): list(dls.train)
