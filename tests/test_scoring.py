"The table of scores, and the callback in bad weather"
import copy, math, random
from pathlib import Path
import pandas as pd, pytest, torch
from fastai.callback.core import Callback, CancelFitException, CancelValidException
from fastai.callback.progress import CSVLogger
from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau, SaveModelCallback
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from torch import nn
from helpers import arrays, folder, loaders, quiet
from helpers_method import Body, images, loader, modes, states
from ifnd_nb import evaluate as ev
from ifnd_nb.embedding import embed, flat_pixels
from ifnd_nb.encoders import create_encoder
from ifnd_nb.loaders import plain_dl, two_view_dls
from ifnd_nb.moco import moco_learner
from ifnd_nb.probes import kmeans_labels, linear_probe
from ifnd_nb.registry import scores
from ifnd_nb.scoring import evaluation_table, labelled, score_features, ScoreCallback, set_batchnorm, untrained_copy
from ifnd_nb.sources import image_source

pytestmark = pytest.mark.usefixtures('in_a_folder')

# ---- the rows of the table

def test_untrained_copy_is_new_seeded_and_leaves_the_original():
    enc = Body(); old = copy.deepcopy(enc.state_dict()); before = states()
    a, b, c = (untrained_copy(enc, s) for s in (0, 0, 1))
    assert states() == before and all(torch.equal(v, old[k]) for k, v in enc.state_dict().items())
    assert torch.equal(a.conv.weight, b.conv.weight) and not torch.equal(a.conv.weight, c.conv.weight)
    assert not torch.equal(a.conv.weight, enc.conv.weight)
    enc.token = nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match='untrained'): untrained_copy(enc)

def test_set_batchnorm_finds_the_statistics_and_nothing_else():
    enc = Body().eval()
    enc.norm.train()
    old = copy.deepcopy(enc.state_dict())
    before = modes(enc), enc.norm.momentum, states()
    set_batchnorm(enc, loader(28, 7))
    assert (modes(enc), enc.norm.momentum, states()) == before and torch.equal(old['conv.weight'], enc.conv.weight)
    x = enc.conv(images(28)).detach()
    assert torch.allclose(enc.norm.running_mean, x.mean((0, 2, 3)), atol=1e-6)
    assert torch.allclose(enc.norm.running_var, x.var((0, 2, 3)), rtol=.2)

@pytest.fixture(scope='module')
def digits(): return two_view_dls('digits', bs=256)

def digits_body(c):
    return nn.Sequential(nn.Conv2d(c, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())

def test_table(digits):
    enc, before = digits_body(digits.channels), states()
    mode = modes(enc)
    table = evaluation_table(digits, enc, no_bar=True)
    assert table.index.tolist() == ['raw pixels', 'untrained encoder', 'trained encoder']
    assert table.columns.tolist() == ['knn', 'one_label', 'linear', 'nmi']
    assert states() == before and modes(enc) == mode and table.notna().all(axis=None)
    assert table.loc['raw pixels', 'knn'] > .9
    again = evaluation_table(digits, enc, untrained=lambda: digits_body(digits.channels), names=['knn', 'nmi'],
                             no_bar=True)
    assert again.columns.tolist() == ['knn', 'nmi']
    pd.testing.assert_frame_equal(again.loc[['raw pixels', 'trained encoder']],
                                  table.loc[['raw pixels', 'trained encoder'], ['knn', 'nmi']])

def test_table_rows_share_one_protocol(digits):
    "Handed in as encoder, raw pixels score what the row of raw pixels scores"
    class Pixels(nn.Module):
        def forward(self, x): return flat_pixels(x)
    table = evaluation_table(digits, Pixels(), names=['knn', 'one_label', 'nmi'], no_bar=True)
    assert (table.nunique() == 1).all()

def test_unlabelled_rows_are_left_out():
    x, y = labelled(torch.arange(4.)[:, None], torch.tensor([0, -1, 1, -1]))
    assert x.flatten().tolist() == [0, 2] and y.tolist() == [0, 1]
    for none in (None, torch.full((4,), -1)):
        with pytest.raises(ValueError, match='no labels'): labelled(torch.zeros(4, 1), none)

def features(n=60, m=30):
    g = torch.Generator().manual_seed(0)
    y, z = torch.arange(n) % 3, torch.arange(m) % 3
    return tuple(o for c in (y, z) for o in (torch.eye(5)[c] + .3 * torch.randn(len(c), 5, generator=g), c))

def test_scores_by_their_names():
    "Each is what its function of `evaluate` gives"
    data = features()
    found = score_features(*data)
    x, y = data[2:]
    want = dict(knn=ev.knn_accuracy(*data), one_label=ev.few_labels_accuracy(*data), linear=linear_probe(*data),
                nmi=ev.cluster_scores(y, kmeans_labels(x, 3))['nmi'])
    assert found == want and list(found) == list(scores) and all(0 < v <= 1 for v in found.values())
    assert score_features(*data, names=['linear']) == dict(linear=want['linear'])
    with pytest.raises(ValueError, match="score='purity' is not known"): score_features(*data, names=['purity'])

def test_a_bank_smaller_than_the_neighbours_is_no_error():
    data = features(n=6)
    assert score_features(*data, names=['knn'])['knn'] == ev.knn_accuracy(*data, k=6)

def test_a_score_that_fails_costs_itself_and_a_line(digits, monkeypatch):
    def broken(*args, seed=0): raise RuntimeError('no such luck')
    monkeypatch.setitem(scores.things, 'broken', broken)
    lines, names = [], ['knn', 'broken']
    found = score_features(*features(), names=names, failed=lines.append)
    assert found['knn'] > .5 and math.isnan(found['broken']) and lines == ['no broken score: no such luck']
    with pytest.raises(RuntimeError, match='no such luck'): score_features(*features(), names=names)
    lines.clear()
    table = evaluation_table(digits, digits_body(digits.channels), names=names, no_bar=True, failed=lines.append)
    assert table.columns.tolist() == names and table.broken.isna().all() and table.knn.notna().all()
    assert lines == [f'{row}: no broken score: no such luck' for row in table.index]

# ---- ScoreCallback on a tiny learner

class Net(nn.Module):
    def __init__(self): super().__init__(); self.body, self.head = Body(), nn.Linear(4, 3)
    def forward(self, x): return self.head(self.body(x))

def tiny(cbs=None, path='.', labels=True, **kw):
    random.seed(0); torch.manual_seed(0)
    items = list(zip(images(), torch.arange(30) % 3))
    dls = DataLoaders(DataLoader(items, bs=6, shuffle=True), DataLoader(items[:9], bs=6), device='cpu')
    return Learner(dls, Net(), loss_func=nn.CrossEntropyLoss(), cbs=cbs, path=path, **kw)

def knn_cb(**kw): return ScoreCallback(**{**dict(bank=loader(), queries=loader(9, seed=1)), **kw})

def run(learn, f='fit', *args, **kw):
    with learn.no_bar(), learn.no_logging(): return getattr(learn, f)(*args, **kw)

def column(learn): return [v[learn.recorder.metric_names.index('knn') - 1] for v in learn.recorder.values]

def test_callback_scores_due_epochs_of_every_fit(tmp_path):
    learn = tiny(knn_cb(every=3), tmp_path)
    run(learn, 'fit_one_cycle', 5, cbs=CSVLogger())
    assert [math.isnan(o) for o in column(learn)] == [True, True, False, True, False]
    assert column(learn)[-1] == learn.score.now()['knn']
    assert learn.recorder.metric_names == ['epoch', 'train_loss', 'valid_loss', 'knn', 'time'] and not learn.metrics
    csv = pd.read_csv(tmp_path/'history.csv')
    assert csv.columns.tolist() == list(learn.recorder.metric_names)
    assert csv.knn.round(5).tolist()[2::2] == pytest.approx(column(learn)[2::2], abs=1e-4)
    run(learn, 'fit', 1)
    assert learn.recorder.metric_names.count('knn') == 1 and len(column(learn)) == 1
    assert not math.isnan(column(learn)[0])

def test_callback_beside_metrics_and_without_time(tmp_path):
    accuracy = lambda p, y: (p.argmax(1) == y).float().mean()
    learn = tiny(knn_cb(), tmp_path, metrics=accuracy)
    learn.recorder.add_time, learn.recorder.train_metrics = False, True
    run(learn, 'fit', 2)
    assert learn.recorder.metric_names[-1] == 'knn'
    assert {len(v) for v in learn.recorder.values} == {len(learn.recorder.metric_names) - 1}

def test_callback_leaves_training_as_it_is():
    runs = {}
    for name, cb in (('without', None), ('with', knn_cb())):
        learn = tiny(cb); run(learn, 'fit', 3); runs[name] = learn
    assert runs['with'].recorder.losses == runs['without'].recorder.losses
    assert all(torch.equal(a, b) for a, b in zip(*(o.model.state_dict().values() for o in runs.values())))

def test_callback_default_loaders_leave_random_state(digits):
    body = digits_body(digits.channels)
    learn = Learner(digits, nn.ModuleDict(dict(body=body)), loss_func=nn.MSELoss(),
                    cbs=ScoreCallback(encoder=lambda m: m['body']))
    before, mode = states(), modes(body)
    acc = learn.score.now()['knn']
    assert .5 < acc <= 1 and states() == before and modes(body) == mode
    want = ev.knn_accuracy(*embed(body, plain_dl(digits), no_bar=True),
                           *embed(body, plain_dl(digits, digits.valid_ds), no_bar=True))
    assert acc == want

def test_callback_sleeps_in_lr_find_summary_and_predictions(tmp_path, monkeypatch):
    learn = tiny(knn_cb(), tmp_path)
    monkeypatch.setattr(ScoreCallback, 'now', lambda self: pytest.fail('awake'))
    run(learn, 'lr_find', num_it=10, show_plot=False)
    learn.summary()
    with learn.no_bar(): learn.get_preds()
    monkeypatch.undo()
    run(learn, 'fit', 1)
    assert not math.isnan(column(learn)[0])

class Raise(Callback):
    def __init__(self, event, ex): self.ex = ex; setattr(self, event, self.throw)
    def throw(self): raise self.ex

@pytest.mark.parametrize('ex', [CancelFitException, RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize('event', ['after_pred', 'after_validate'])
def test_fit_after_an_interruption_is_like_new(ex, event):
    learn = tiny(knn_cb())
    try: run(learn, 'fit', 2, cbs=Raise(event, ex('stop')))
    except (RuntimeError, KeyboardInterrupt): pass
    assert not learn.metrics
    run(learn, 'fit', 2)
    assert learn.recorder.metric_names == ['epoch', 'train_loss', 'valid_loss', 'knn', 'time']
    assert len(column(learn)) == 2

def test_error_while_scoring_leaves_modes():
    def broken(model):
        class B(Body):
            def forward(self, x): raise RuntimeError('out of memory')
        model.broken = B(); model.broken.norm.eval()
        return model.broken
    learn = tiny(knn_cb(encoder=broken))
    with pytest.raises(RuntimeError, match='out of memory'): run(learn, 'fit', 1)
    assert modes(learn.model.broken) in ([False, False, False, False], [True, True, False, True])
    assert learn.recorder.metric_names.count('knn') == 1

def test_columns_stay_in_place_when_validation_is_cancelled():
    learn = tiny(knn_cb())
    run(learn, 'fit', 1, cbs=Raise('before_validate', CancelValidException))
    assert len(learn.recorder.values[0]) == 3 and math.isnan(learn.recorder.values[0][1]) and 0 <= column(learn)[0] <= 1

def test_start_epoch():
    learn = tiny(knn_cb(every=2))
    run(learn, 'fit', 4, start_epoch=2)
    assert [len(v) for v in learn.recorder.values] == [0, 0, 3, 3] and not math.isnan(learn.recorder.values[-1][-1])

def test_save_best_by_knn(tmp_path, capsys):
    learn = tiny(knn_cb(every=2), tmp_path)
    run(learn, 'fit', 4, cbs=SaveModelCallback(monitor='knn', fname='best'))
    assert (tmp_path/'models/best.pth').exists() and 'with knn value' in capsys.readouterr().out

def test_validate_scores():
    learn = tiny(knn_cb(every=7))
    run(learn, 'fit', 2)
    with learn.no_bar(): record = learn.validate()
    assert len(record) == 2 and record[-1] == learn.score.now()['knn']

def test_callback_errors_come_before_the_first_epoch(digits):
    for every in (0, -1, .5):
        with pytest.raises(ValueError, match='every='): ScoreCallback(every=every)
    for names in ('purity', ['knn', 'purity']):
        with pytest.raises(ValueError, match="score='purity' is not known; use one of: knn, one_label, linear, nmi"):
            ScoreCallback(names)
    learn = tiny(ScoreCallback())
    with pytest.raises(ValueError, match='dls.train_ds has none'): run(learn, 'fit', 1)

def test_several_scores_are_columns_of_their_own():
    learn = tiny(knn_cb(names=('knn', 'one_label')))
    run(learn, 'fit', 2)
    assert learn.recorder.metric_names == ['epoch', 'train_loss', 'valid_loss', 'knn', 'one_label', 'time']
    now = learn.score.now()
    assert list(now) == ['knn', 'one_label'] and learn.recorder.values[-1][2:] == list(now.values())

# ---- ordinary use

def test_scores_with_missing_labels_are_those_of_the_known(tmp_path):
    x, y = arrays(120)
    some = [v if i % 2 else math.nan for i, v in enumerate(y.tolist())]
    t = evaluation_table(two_view_dls(x, labels=pd.Series(some), size=16, bs=16, device='cpu'),
                         create_encoder('small_resnet', 1, 16), no_bar=True)
    assert t.loc['raw pixels', 'knn']==1 and t.loc['raw pixels', 'linear']==1

def test_the_right_remedy_for_labels_of_held_out_files():
    folder('base')
    files = sorted(map(str, Path('base').rglob('*.png')))
    dls = two_view_dls(files[:40], valid=files[40:], labels=list('ab') * 20, bs=8, size=16, device='cpu')
    with pytest.raises(ValueError, match=r'valid=image_source\(files, labels=...\)'):
        quiet(moco_learner(dls, cbs=ScoreCallback()), lambda l: l.fit(1))
    dls = two_view_dls(files[:40], valid=image_source(files[40:], labels=list('ab') * 10), labels=list('ab') * 20, bs=8,
                       size=16, device='cpu')
    quiet(moco_learner(dls, queue_size=16, cbs=ScoreCallback()), lambda l: l.fit(1))

def test_few_labels_are_scored(tmp_path):
    x, y = arrays()
    few = [v if i % 12==0 else None for i, v in enumerate(y.tolist())]
    dls = two_view_dls(x, labels=few, size=16, bs=16, valid=image_source(x, labels=y), device='cpu')
    learn = moco_learner(dls, queue_size=16, path=tmp_path, cbs=ScoreCallback())
    quiet(learn, lambda l: l.fit(1))
    assert 0 <= learn.recorder.values[-1][-1] <= 1

@pytest.mark.parametrize('make',
                         [lambda: EarlyStoppingCallback(monitor='knn', patience=3),
                          lambda: ReduceLROnPlateau(monitor='knn', patience=3)])
def test_patience_that_ends_before_the_next_score(make, tmp_path):
    with pytest.raises(ValueError, match='patience=3 epochs, but knn is scored every 4.*patience=4'):
        quiet(moco_learner(loaders(), queue_size=32, path=tmp_path, cbs=[ScoreCallback(every=4), make()]),
              lambda l: l.fit(1))

def test_early_stopping_stops_after_scores(tmp_path, capsys):
    learn = moco_learner(loaders(), queue_size=32, path=tmp_path, lr=0.,
                         cbs=[ScoreCallback(every=2), EarlyStoppingCallback(monitor='knn', patience=2)])
    quiet(learn, lambda l: l.fit(8))
    knn = [v[-1] for v in learn.recorder.values]
    assert len(knn)==4 and not math.isnan(knn[1]) and not math.isnan(knn[3])
    assert 'early stopping' in capsys.readouterr().out
