"What keeps fastai's loop from waiting for the device, and what users of fastai are used to"
import math, warnings
from pathlib import Path
import numpy as np, pytest, torch, matplotlib.pyplot as plt
from fastai.callback.core import Callback
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback
from fastai.interpret import Interpretation
from fastai.learner import load_learner, Recorder
from helpers import arrays, folder, loaders, quiet
from ifnd_nb.embedding import embed
from ifnd_nb.ifnd import ifnd_learner
from ifnd_nb.loaders import plain_dl, two_view_dls
from ifnd_nb.contrast import info_nce
from ifnd_nb.moco import moco_learner
from ifnd_nb.scoring import ScoreCallback

pytestmark = pytest.mark.usefixtures('in_a_folder')

@pytest.mark.parametrize('kw', [
    dict(strategy='eliminate'), dict(n_clusters='stable'), dict(n_clusters='stable', strategy='attract'), dict(),
    dict(strategy='attract', features='pass'), dict(detector='topk'), dict(detector='quantile'),
    dict(detector='oracle')], ids=str)
def test_no_training_step_asks_the_device_for_a_number(kw, monkeypatch):
    "On a GPU each of these calls makes the host wait; here they are counted"
    from fastai.callback.core import Callback
    from torch.utils._python_dispatch import TorchDispatchMode
    from helpers_method import EVER
    from ifnd_nb.detectors import ClusterDetector
    from ifnd_nb.ifnd import ifnd_learner
    asked, steps = [], []
    class Ops(TorchDispatchMode):
        "Operations whose result, or whose size, the host has to know"
        single = '_local_scalar_dense', 'nonzero', 'masked_select', 'equal', 'unique', '_unique2'
        def __torch_dispatch__(self, f, types, args=(), kwargs=None):
            name = f.overloadpacket.__name__
            by_mask = name in ('index', 'index_put_') and any(i is not None and i.dtype==torch.bool for i in args[1])
            if name in self.single or by_mask: asked.append(name)
            return f(*args, **(kwargs or {}))
    ops, real = Ops(), torch.Tensor.cpu
    def cpu(self, *args):
        if steps and steps[-1] is not None: asked.append('cpu')
        return real(self, *args)
    monkeypatch.setattr(torch.Tensor, 'cpu', cpu)
    monkeypatch.setattr(ClusterDetector, 'trust', EVER)
    monkeypatch.setattr('ifnd_nb.habits.monotonic', lambda: 0.) # half a second never passes
    class Begin(Callback):
        order = -100
        def before_batch(self):
            if self.training and self.epoch: steps.append(self.iter); ops.__enter__()
    class End(Callback):
        order = 100
        def after_batch(self):
            if self.training and self.epoch: ops.__exit__(None, None, None); steps.append(None)
    dls = two_view_dls(torch.rand(84, 1, 16, 16), labels=torch.arange(84) % 4, size=16, bs=8, device='cpu')
    learn = ifnd_learner(dls, **{'n_clusters': [3, 6], **kw}, acceptance=.8, queue_size=32, cbs=[Begin(), End()])
    with learn.no_bar(), learn.no_logging(): learn.fit(3)
    n = len(dls.train)
    assert len(steps)==2 * 2 * n and asked==[]
    assert len(learn.recorder.losses)==3 * n and all(isinstance(float(l), float) for l in learn.recorder.losses)

def test_each_loss_is_fetched_once(monkeypatch):
    "Those of earlier epochs are on the host already, and would not go together with those on a GPU"
    dls = two_view_dls(torch.rand(60, 1, 16, 16), size=16, bs=8, device='cpu')
    learn, fetched, real = moco_learner(dls, queue_size=16), [], torch.stack
    def stack(x, *args, **kw):
        if isinstance(x, list) and all(o.dim()==0 for o in x): fetched.append(len(x))
        return real(x, *args, **kw)
    monkeypatch.setattr(torch, 'stack', stack)
    for epochs in (3, 1):
        fetched.clear()
        with learn.no_bar(), learn.no_logging(): learn.fit(epochs)
        assert fetched==[len(dls.train)] * epochs and len(learn.recorder.losses)==epochs * len(dls.train)

# ---- ordinary use

@pytest.mark.parametrize('make', [moco_learner, ifnd_learner])
@pytest.mark.parametrize('queue_size', [64, 2000])
def test_lr_find_suggests_a_rate_on_a_fresh_learner(make, queue_size, tmp_path):
    learn = make(loaders(), queue_size=queue_size, path=tmp_path)
    before = {k: v.clone() for k, v in learn.model.state_dict().items()}
    found = quiet(learn, lambda l: l.lr_find(show_plot=False))
    losses = torch.stack(list(learn.recorder.losses))
    # it falls at rates that suit, from the first batch on
    assert 1e-5 < found.valley < .1 and losses[0] > math.log(queue_size) / 2 and losses.argmin() > 20
    for k, v in learn.model.state_dict().items(): assert torch.equal(v, before[k]), k

def test_lr_find_finds_the_same_rate_after_training(tmp_path):
    learn = moco_learner(two_view_dls('digits', size=16, device='cpu'), queue_size=512, path=tmp_path)
    fresh = quiet(learn, lambda l: l.lr_find(show_plot=False)).valley
    quiet(learn, lambda l: l.fit(1))
    assert .03 < quiet(learn, lambda l: l.lr_find(show_plot=False)).valley / fresh < 30

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
    for a, b in zip(quiet(other, lambda l: l.validate())[:2], quiet(learn, lambda l: l.validate())[:2]):
        assert a==pytest.approx(b)

def test_loaders_of_another_kind_have_a_remedy():
    class Theirs: train = valid = None
    for o in (Theirs(), 'folder', None):
        for make in (moco_learner, ifnd_learner):
            with pytest.raises(TypeError, match='two_view_dls'): make(o)

def test_features_of_new_images_in_a_users_words(tmp_path):
    folder('new', n=3)
    learn = moco_learner(two_view_dls(folder('base'), bs=16, size=16, device='cpu'), queue_size=32, path=tmp_path)
    files = sorted(map(str, Path('new').rglob('*.png')))
    same = [embed(learn.model.body, dl, no_bar=True)[0]
            for dl in (learn.dls.test_dl(files), learn.dls.test_dl('new'), plain_dl(learn.dls, 'new'),
                       learn.dls.test_dl([Path(f) for f in files], bs=2))]
    for x in same: torch.testing.assert_close(x, same[0])
    assert same[0].shape==(9, 512)
    for do in (lambda l: l.get_preds(dl=l.dls.test_dl(files)), lambda l: l.predict(files[0]), lambda l: l.tta(),
               lambda l: embed(l.model.body, l.dls.valid)):
        with pytest.raises(TypeError, match='embed|plain_dl'): quiet(learn, do)

@pytest.mark.parametrize('labels', [True, False])
def test_show_results_shows_neighbours(labels, tmp_path):
    x, y = arrays()
    learn = moco_learner(two_view_dls(x, labels=y if labels else None, size=16, bs=16, device='cpu'), path=tmp_path)
    for kw in ({}, dict(ds_idx=0, max_n=2, k=3),
               dict(dl=learn.dls.test_dl(np.zeros((5, 40, 40), 'u1')), shuffle=False)):
        learn.show_results(**kw)
        fig = plt.gcf()
        shown = sum(bool(ax.images) for ax in fig.axes)
        assert shown==min(kw.get('max_n', 6), 5 if 'dl' in kw else 6) * (kw.get('k', 9) + 1)
        assert 'nearest' in fig._suptitle.get_text()
        plt.close(fig)

def test_losses_of_single_images(tmp_path):
    learn = ifnd_learner(loaders(), queue_size=32, path=tmp_path)
    quiet(learn, lambda l: l.fit(2))
    preds, targets, losses = quiet(learn, lambda l: l.get_preds(with_loss=True))
    n = len(learn.dls.valid_ds)
    assert preds.shape==(n, 33) and losses.shape==(n,)
    assert losses.mean().item()==pytest.approx(quiet(learn, lambda l: l.validate())[0], rel=1e-4)
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
    assert Path(tmp_path/'l.pkl').stat().st_size < 30e6 and len(other.dls.train_ds)==0
    assert (other.dls.size, other.dls.channels, other.dls.vocab)==(16, 1, [0, 1, 2, 3])
    x = arrays(10, seed=1)[0]
    torch.testing.assert_close(*(embed(l.model.body, l.dls.test_dl(x), no_bar=True)[0] for l in (learn, other)))
    with pytest.raises(ValueError, match='holds no images.*learn.dls = two_view_dls'): quiet(other, lambda l: l.fit(1))
    other.dls = learn.dls
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
    assert learn.model.bank.mean.shape[0]==learn.model.detector.pseudo.shape[0]==train
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
    for kw, cb, words in (({}, SaveModelCallback(monitor='knn'), "monitor='knn', which is none of .*ScoreCallback"),
                          (dict(valid=0), SaveModelCallback(), 'no image is held out'),
                          (dict(valid=0), EarlyStoppingCallback(), 'no image is held out')):
        with pytest.raises(ValueError, match=words):
            quiet(moco_learner(loaders(**kw), queue_size=32, path=tmp_path), lambda l: l.fit(1, cbs=cb))
    learn = moco_learner(loaders(), queue_size=32, path=tmp_path,
                         cbs=[ScoreCallback(), SaveModelCallback(monitor='knn')])
    quiet(learn, lambda l: l.lr_find(show_plot=False))
    quiet(learn, lambda l: l.fit(1))

def test_a_refusal_leaves_nothing_locked(tmp_path):
    learn = moco_learner(loaders(), queue_size=32, path=tmp_path)
    good, learn.dls = learn.dls, learn.dls.new_empty()
    for do in (lambda l: l.validate(), lambda l: l.get_preds(), lambda l: l.validate(), lambda l: l.lr_find(),
               lambda l: l.show_results(), lambda l: l.fit(1)):
        with pytest.raises(ValueError, match='hold no images|holds no images'): quiet(learn, do)
    learn.dls = good
    quiet(learn, lambda l: l.fit(1))

@pytest.mark.parametrize('mix', [MixUp, CutMix])
def test_mixing_is_refused_in_words(mix, tmp_path):
    with pytest.raises(TypeError, match=f'{mix.__name__} mixes images and their labels'):
        quiet(moco_learner(loaders(), path=tmp_path), lambda l: l.fit(1, cbs=mix()))

def test_no_name_of_ours_hides_one_of_fastais():
    import fastai.vision.all as theirs, ifnd_nb.all as ours
    assert not [n for n in ours.__all__ if hasattr(theirs, n) and getattr(ours, n) is not getattr(theirs, n)]

@pytest.mark.parametrize('n', [128, 32])
def test_loaders_may_be_replaced_before_the_first_fit(n):
    "More images or fewer: detector and bank are made for those that are trained on"
    from ifnd_nb.ifnd import ifnd_learner
    from ifnd_nb.loaders import two_view_dls
    first, other = (two_view_dls(torch.rand(k, 1, 16, 16), valid=0, bs=16) for k in (64, n))
    learn = ifnd_learner(first, n_clusters=4, acceptance=1., queue_size=32)
    learn.dls = other
    with learn.no_bar(), learn.no_logging(): learn.fit(2)
    assert len(learn.model.detector.pseudo) == len(learn.model.bank.mean) == n
