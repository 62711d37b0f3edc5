"What the lessons of 02_evaluation do not show: parity with slow references, odd shapes, and the callback in bad weather"
import copy, math, random
import numpy as np, pandas as pd, pytest, torch
import torch.nn.functional as F
from fastai.callback.core import Callback, CancelFitException, CancelValidException
from fastai.callback.progress import CSVLogger
from fastai.callback.tracker import SaveModelCallback
import fastai.callback.hook, fastai.callback.schedule
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from hypothesis import assume, given, settings, strategies as st
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from torch import nn
from ifnd_nb import evaluate as ev
from ifnd_nb.loaders import plain_dl, two_view_dls

quick = settings(max_examples=40, deadline=None, derandomize=True)

def problem(seed, n, m, d, c):
    g = torch.Generator().manual_seed(seed)
    r = lambda *s: torch.randn(*s, generator=g)
    return r(n, d), torch.randint(0, c, (n,), generator=g), r(m, d), torch.randint(0, c, (m,), generator=g)

# ---- k-NN

def slow_votes(train_x, train_y, x, k, tau):
    "float64, one query at a time: (votes per class, gap between the k-th and the next similarity) of each query"
    b = train_x.double(); b = b / b.norm(dim=1, keepdim=True)
    for v in x.double():
        sims = [(float(v @ bi / v.norm()), -i) for i, bi in enumerate(b)]
        best = sorted(sims, reverse=True)
        votes = {}
        for s, i in best[:k]:
            c = int(train_y[-i]); votes[c] = votes.get(c, 0.) + math.exp((s - best[0][0]) / tau)
        yield votes, best[k-1][0] - best[k][0] if k < len(best) else 1.

@quick
@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 12), st.integers(1, 9), st.integers(1, 6), st.integers(1, 40), st.sampled_from([.03, .07, 1.]))
def test_knn_equals_float64_loop(seed, n, m, d, c, k, tau):
    k = min(k, n)
    train_x, train_y, x, _ = problem(seed, n, m, d, c)
    for pred, (votes, gap) in zip(ev.knn_predict(train_x, train_y, x, k, tau).tolist(), slow_votes(train_x, train_y, x, k, tau)):
        if gap > 1e-5: assert votes.get(pred, 0.) >= max(votes.values()) - 1e-4

@quick
@given(st.integers(0, 10**6), st.integers(1, 60), st.integers(1, 20), st.integers(1, 5), st.integers(1, 60), st.integers(1, 200))
def test_blocks_change_nothing(seed, n, m, d, k, chunk):
    "On a grid of small integers in one-hot directions all similarities are exact, and most of them tie"
    g, k = torch.Generator().manual_seed(seed), min(k, n)
    train_x, x = (F.one_hot(torch.randint(0, d, (o,), generator=g), d).float() * 3 for o in (n, m))
    y = torch.randint(0, 4, (n,), generator=g)
    whole, blocks = ev.nearest(train_x, x, k), ev.nearest(train_x, x, k, chunk=chunk)
    assert all(torch.equal(a, b) for a, b in zip(whole, blocks))
    slow = [sorted(range(n), key=lambda i: (-float(F.normalize(v, dim=0) @ F.normalize(train_x[i], dim=0)), i))[:k] for v in x]
    assert whole[1].tolist() == slow
    assert torch.equal(ev.knn_predict(train_x, y, x, k), ev.knn_predict(train_x, y, x, k, chunk=chunk))

def test_bank_larger_than_one_block():
    train_x, train_y, x, _ = problem(0, 2**16 + 500, 3, 4, 5)
    sims, idx = ev.nearest(train_x, x, 7)
    ref = (F.normalize(x, dim=1) @ F.normalize(train_x, dim=1).T).topk(7, 1)
    assert torch.allclose(sims, ref[0], atol=1e-6) and torch.equal(idx, ref[1])

def test_memory_of_a_large_bank_is_bounded(monkeypatch):
    seen, real = [], ev._first_topk
    monkeypatch.setattr(ev, '_first_topk', lambda s, k: (seen.append(s.numel()), real(s, k))[1])
    train_x, train_y, x, _ = problem(0, 3000, 200, 4, 5)
    ev.nearest(train_x, x, 5, chunk=1000)
    assert max(seen) <= 1000

def test_votes_tie_to_the_lowest_class():
    assert ev.weighted_vote(torch.tensor([[3, 1], [2, 2]]), torch.tensor([[.5, .5], [.1, .1]])).tolist() == [1, 2]

def test_tiny_temperature_does_not_overflow():
    train_x, train_y, x, _ = problem(1, 50, 9, 6, 3)
    assert torch.equal(ev.knn_predict(train_x, train_y, x, 10, tau=1e-4), ev.knn_predict(train_x, train_y, x, 1))

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(dtype):
    train_x, train_y, x, y = problem(2, 60, 10, 8, 3)
    x, train_x = x.to(dtype), train_x.to(dtype)
    assert torch.equal(ev.knn_predict(train_x, train_y, x, 5), ev.knn_predict(train_x.float(), train_y, x.float(), 5))

def test_zero_rows_are_no_error():
    train_x, train_y, x, _ = problem(3, 20, 4, 5, 3)
    assert ev.nearest(train_x * 0, x, 3)[1].tolist() == [[0, 1, 2]] * 4

@pytest.mark.parametrize('change,match', [
    (dict(k=0), 'k=0.*between 1 and 20'), (dict(k=21), 'k=21.*holds 20'), (dict(train_x=torch.zeros(20, 2, 2)), r'\(N, D\)|\(n, D\)'),
    (dict(x=torch.full((4, 5), math.inf)), 'x.*4 of 4'), (dict(x=torch.zeros(4, 6)), 'different lengths'), (dict(train_y=torch.zeros(19, dtype=torch.long)), '19 labels for 20'),
    (dict(train_y=torch.full((20,), -1)), 'unlabelled'), (dict(train_y=torch.zeros(20)), 'class numbers'), (dict(train_x=torch.zeros(0, 5), train_y=torch.zeros(0, dtype=torch.long)), "shape")])
def test_knn_errors_name_argument_and_value(change, match):
    train_x, train_y, x, _ = problem(4, 20, 4, 5, 3)
    with pytest.raises(ValueError, match=match): ev.knn_predict(**{**dict(train_x=train_x, train_y=train_y, x=x, k=3), **change})

# ---- linear probe and clusters

def test_linear_probe_separates_what_is_separable():
    train_x, train_y, x, y = problem(5, 200, 50, 6, 3)
    shift = 6 * torch.eye(6)[:3]
    assert ev.linear_probe(train_x + shift[train_y], train_y, x + shift[y], y) == 1.
    assert ev.linear_probe(train_x, train_y, x, y) < .6

def test_linear_probe_is_quiet_repeatable_and_clear(recwarn):
    train_x, train_y, x, y = problem(6, 100, 30, 20, 4)
    a = ev.linear_probe(train_x, train_y, x, y, max_iter=1)
    assert a == ev.linear_probe(train_x, train_y, x, y, max_iter=1) and not [w for w in recwarn if 'onverge' in str(w.message)]
    with pytest.raises(ValueError, match='two classes'): ev.linear_probe(train_x, train_y * 0, x, y)

@quick
@given(st.lists(st.tuples(st.integers(-1, 5), st.integers(-1, 7)), min_size=1, max_size=60))
def test_cluster_scores_equal_slow_reference(pairs):
    both = [(y, c) for y, c in pairs if y >= 0 and c >= 0]
    got = ev.cluster_scores(*map(list, zip(*pairs)))
    if not both: assert all(map(math.isnan, got.values())); return
    y, c = zip(*both)
    purity = sum(max(sum(a == k for a, b in both if b == j) for k in set(y)) for j in set(c)) / len(both)
    assert got['purity'] == pytest.approx(purity)
    assert got['nmi'] == pytest.approx(normalized_mutual_info_score(y, c)) and got['ari'] == pytest.approx(adjusted_rand_score(y, c))

def test_kmeans_finds_what_is_there_from_a_seed():
    _, y, x, _ = problem(7, 90, 90, 5, 3)
    x = .1 * x + torch.eye(5)[y]
    assert ev.cluster_scores(y, ev.kmeans_labels(x, 3))['ari'] == 1.
    assert torch.equal(ev.kmeans_labels(x, 7, seed=1), ev.kmeans_labels(x, 7, seed=1))
    with pytest.raises(ValueError, match='n_clusters=91'): ev.kmeans_labels(x, 91)

# ---- embed

class Body(nn.Module):
    def __init__(self): super().__init__(); self.conv, self.norm, self.drop = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(.5)
    def forward(self, x): return self.drop(self.norm(self.conv(x)).relu()).mean((2, 3))

def images(n=30, seed=0): return torch.rand(n, 1, 6, 6, generator=torch.Generator().manual_seed(seed))
def loader(n=30, bs=7, labels=True, seed=0):
    x, y = images(n, seed), torch.arange(n) % 3
    return [(x[i], i, y[i])[:2+labels] for i in torch.arange(n).split(bs)]
def states(): return random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()
def modes(m): return [o.training for o in m.modules()]

@quick
@given(st.permutations(range(12)), st.integers(1, 13))
def test_embed_places_rows_by_index(order, bs):
    x, enc = images(12), Body()
    order = torch.tensor(order)
    v, y = ev.embed(enc, [(x[i], i, i * 2) for i in order.split(bs)], no_bar=True)
    assert torch.allclose(v, enc.eval()(x).detach(), atol=1e-6) and y.tolist() == list(range(0, 24, 2)) and not v.requires_grad

def test_embed_restores_modes_and_random_state_also_after_an_error():
    enc = Body(); enc.norm.eval()
    dl = DataLoader(list(zip(images(), torch.arange(30))), bs=7, shuffle=True)
    before = modes(enc), states()
    ev.embed(enc, dl, no_bar=True)
    assert (modes(enc), states()) == before
    class Broken(Body):
        def forward(self, x): raise RuntimeError('out of memory')
    enc = Broken(); enc.norm.eval()
    before = states()
    with pytest.raises(RuntimeError, match='out of memory'): ev.embed(enc, loader(), no_bar=True)
    assert modes(enc) == [True, True, False, True] and states() == before

def test_embed_takes_any_callable_memory_format_and_no_labels():
    v, y = ev.embed(lambda x: x.half(), loader(labels=False), no_bar=True)
    assert y is None and v.dtype == torch.float32 and v.shape == (30, 36)
    enc = Body().to(memory_format=torch.channels_last)
    last = [(x.to(memory_format=torch.channels_last), i) for x, i, _ in loader()]
    assert torch.allclose(ev.embed(enc, last, no_bar=True)[0], ev.embed(enc, loader(), no_bar=True)[0], atol=1e-6)

@pytest.mark.parametrize('dl,match', [(loader()[:-1] + loader()[-2:-1], '7 repeated'), (loader()[1:], '7 missing'),
    (DataLoader(list(zip(images(), torch.arange(30))), bs=7, drop_last=True), 'of 30 images.*2 missing')])
def test_embed_refuses_lost_or_repeated_rows(dl, match):
    with pytest.raises(ValueError, match=match): ev.embed(Body(), dl, no_bar=True)

# ---- the rows of the table

def test_untrained_copy_is_new_seeded_and_leaves_the_original():
    enc = Body(); old = copy.deepcopy(enc.state_dict()); before = states()
    a, b, c = (ev.untrained_copy(enc, s) for s in (0, 0, 1))
    assert states() == before and all(torch.equal(v, old[k]) for k, v in enc.state_dict().items())
    assert torch.equal(a.conv.weight, b.conv.weight) and not torch.equal(a.conv.weight, c.conv.weight) and not torch.equal(a.conv.weight, enc.conv.weight)
    enc.token = nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match='untrained'): ev.untrained_copy(enc)

def test_set_batchnorm_finds_the_statistics_and_nothing_else():
    enc = Body().eval(); enc.norm.train(); old = copy.deepcopy(enc.state_dict()); before = modes(enc), enc.norm.momentum, states()
    ev.set_batchnorm(enc, loader(28, 7))
    assert (modes(enc), enc.norm.momentum, states()) == before and torch.equal(old['conv.weight'], enc.conv.weight)
    x = enc.conv(images(28)).detach()
    assert torch.allclose(enc.norm.running_mean, x.mean((0, 2, 3)), atol=1e-6)
    assert torch.allclose(enc.norm.running_var, x.var((0, 2, 3)), rtol=.2)

@pytest.fixture(scope='module')
def digits(): return two_view_dls('digits', bs=256)

def digits_body(c): return nn.Sequential(nn.Conv2d(c, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())

def test_table(digits):
    enc, before = digits_body(digits.channels), states()
    mode = modes(enc)
    table = ev.evaluation_table(digits, enc, no_bar=True)
    assert table.index.tolist() == ['raw pixels', 'untrained encoder', 'trained encoder'] and table.columns.tolist() == ['knn', 'one_label', 'linear', 'nmi', 'ari', 'purity']
    assert states() == before and modes(enc) == mode and table.notna().all(axis=None) and table.loc['raw pixels', 'knn'] > .9
    again = ev.evaluation_table(digits, enc, untrained=lambda: digits_body(digits.channels), linear=False, no_bar=True)
    assert again.columns.tolist() == ['knn', 'one_label', 'nmi', 'ari', 'purity']
    pd.testing.assert_frame_equal(again.loc[['raw pixels', 'trained encoder']], table.drop(columns='linear').loc[['raw pixels', 'trained encoder']])

def test_table_rows_share_one_protocol(digits):
    "Handed in as encoder, raw pixels score what the row of raw pixels scores"
    class Pixels(nn.Module):
        def forward(self, x): return ev.flat_pixels(x)
    table = ev.evaluation_table(digits, Pixels(), linear=False, no_bar=True)
    assert (table.nunique() == 1).all()

def test_unlabelled_rows_are_left_out():
    x, y = ev.labelled(torch.arange(4.)[:, None], torch.tensor([0, -1, 1, -1]))
    assert x.flatten().tolist() == [0, 2] and y.tolist() == [0, 1]
    for none in (None, torch.full((4,), -1)):
        with pytest.raises(ValueError, match='no labels'): ev.labelled(torch.zeros(4, 1), none)

# ---- ScoreCallback on a tiny learner

class Net(nn.Module):
    def __init__(self): super().__init__(); self.body, self.head = Body(), nn.Linear(4, 3)
    def forward(self, x): return self.head(self.body(x))

def tiny(cbs=None, path='.', labels=True, **kw):
    random.seed(0); torch.manual_seed(0)
    items = list(zip(images(), torch.arange(30) % 3))
    dls = DataLoaders(DataLoader(items, bs=6, shuffle=True), DataLoader(items[:9], bs=6), device='cpu')
    return Learner(dls, Net(), loss_func=nn.CrossEntropyLoss(), cbs=cbs, path=path, **kw)

def knn_cb(**kw): return ev.KNNCallback(**{**dict(k=3, bank=loader(), queries=loader(9, seed=1)), **kw})
def run(learn, f='fit', *args, **kw):
    with learn.no_bar(), learn.no_logging(): return getattr(learn, f)(*args, **kw)
def column(learn): return [v[learn.recorder.metric_names.index('knn') - 1] for v in learn.recorder.values]

def test_callback_scores_due_epochs_of_every_fit(tmp_path):
    learn = tiny(knn_cb(every=3), tmp_path)
    run(learn, 'fit_one_cycle', 5, cbs=CSVLogger())
    assert [math.isnan(o) for o in column(learn)] == [True, True, False, True, False] and column(learn)[-1] == learn.knn.accuracy()
    assert learn.recorder.metric_names == ['epoch', 'train_loss', 'valid_loss', 'knn', 'time'] and not learn.metrics
    csv = pd.read_csv(tmp_path/'history.csv')
    assert csv.columns.tolist() == list(learn.recorder.metric_names) and csv.knn.round(5).tolist()[2::2] == pytest.approx(column(learn)[2::2], abs=1e-4)
    run(learn, 'fit', 1)
    assert learn.recorder.metric_names.count('knn') == 1 and len(column(learn)) == 1 and not math.isnan(column(learn)[0])

def test_callback_beside_metrics_and_without_time(tmp_path):
    accuracy = lambda p, y: (p.argmax(1) == y).float().mean()
    learn = tiny(knn_cb(), tmp_path, metrics=accuracy)
    learn.recorder.add_time, learn.recorder.train_metrics = False, True
    run(learn, 'fit', 2)
    assert learn.recorder.metric_names[-1] == 'knn' and {len(v) for v in learn.recorder.values} == {len(learn.recorder.metric_names) - 1}

def test_callback_leaves_training_as_it_is():
    runs = {}
    for name, cb in (('without', None), ('with', knn_cb())):
        learn = tiny(cb); run(learn, 'fit', 3); runs[name] = learn
    assert runs['with'].recorder.losses == runs['without'].recorder.losses
    assert all(torch.equal(a, b) for a, b in zip(*(o.model.state_dict().values() for o in runs.values())))

def test_callback_default_loaders_leave_random_state(digits):
    body = digits_body(digits.channels)
    learn = Learner(digits, nn.ModuleDict(dict(body=body)), loss_func=nn.MSELoss(), cbs=ev.KNNCallback(encoder=lambda m: m['body']))
    before, mode = states(), modes(body)
    acc = learn.knn.accuracy()
    assert .5 < acc <= 1 and states() == before and modes(body) == mode
    want = ev.knn_accuracy(*ev.embed(body, plain_dl(digits), no_bar=True), *ev.embed(body, plain_dl(digits, digits.valid_ds), no_bar=True))
    assert acc == want

def test_callback_sleeps_in_lr_find_summary_and_predictions(tmp_path, monkeypatch):
    learn = tiny(knn_cb(), tmp_path)
    monkeypatch.setattr(ev.KNNCallback, 'accuracy', lambda self: pytest.fail('awake'))
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
    assert learn.recorder.metric_names == ['epoch', 'train_loss', 'valid_loss', 'knn', 'time'] and len(column(learn)) == 2

def test_error_while_scoring_leaves_modes():
    def broken(model):
        class B(Body):
            def forward(self, x): raise RuntimeError('out of memory')
        model.broken = B(); model.broken.norm.eval()
        return model.broken
    learn = tiny(knn_cb(encoder=broken))
    with pytest.raises(RuntimeError, match='out of memory'): run(learn, 'fit', 1)
    assert modes(learn.model.broken) == [False, False, False, False] or modes(learn.model.broken) == [True, True, False, True]
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
    assert len(record) == 2 and record[-1] == learn.knn.accuracy()

def test_callback_errors_come_before_the_first_epoch(digits):
    for every in (0, -1, .5):
        with pytest.raises(ValueError, match='every='): ev.KNNCallback(every=every)
    learn = tiny(ev.KNNCallback())
    with pytest.raises(ValueError, match='dls.train_ds has none'): run(learn, 'fit', 1)
    learn = Learner(digits, Net(), loss_func=nn.MSELoss(), cbs=ev.KNNCallback(k=10**6))
    with pytest.raises(ValueError, match='k=1000000'): run(learn, 'fit', 1)

# ---- pictures

def test_plot_embedding_takes_many_points_many_classes_and_no_labels():
    import matplotlib; matplotlib.use('agg')
    import matplotlib.pyplot as plt
    x = torch.randn(3000, 5)
    ax = ev.plot_embedding(x, torch.arange(3000) % 4 - 1, vocab=list('abc'), n_max=1000)
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ['unlabelled', 'a', 'b', 'c'] and sum(len(c.get_offsets()) for c in ax.collections) == 1000
    assert ev.plot_embedding(x, torch.arange(3000) % 50).get_legend() is None
    assert ev.plot_embedding(x).get_legend() is None
    assert len(ev.plot_embedding(x[:20], method='tsne').collections[0].get_offsets()) == 20
    with pytest.raises(ValueError, match="choose 'pca' or 'tsne'"): ev.plot_embedding(x, method='umap')
    plt.close('all')

# ---- few labels

@quick
@given(seed=st.integers(0, 10**6), c=st.integers(2, 4), each=st.integers(1, 5), m=st.integers(1, 9))
def test_with_every_label_known_few_labels_are_the_nearest_neighbour(seed, c, each, m):
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(c).repeat(each)
    train_x, x, truth = torch.randn(len(y), 3, generator=g), torch.randn(m, 3, generator=g), torch.randint(c, (m,), generator=g)
    assert ev.few_labels_accuracy(train_x, y, x, truth, each, draws=3) == pytest.approx(ev.knn_accuracy(train_x, y, x, truth, k=1))

def test_few_labels_draw_as_many_of_each_class():
    y = torch.tensor([0] * 50 + [1] * 3)
    x = F.one_hot(y, 2).float()
    assert ev.few_labels_accuracy(x, y, x, y, per_class=3) == 1
    with pytest.raises(ValueError, match='per_class=4, but the rarest class has 3'): ev.few_labels_accuracy(x, y, x, y, per_class=4)
