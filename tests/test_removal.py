"The two removal strategies against their equations, and the IFND callback among fastai's other callbacks"
import math
import pytest, torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.callback.all import CSVLogger, GradientAccumulation, GradientClip, SaveModelCallback, SchedCos, SchedNo
from hypothesis import given, settings, strategies as st

from ifnd_nb.removal import attract
from ifnd_nb.ifnd import ClusterDetector, IFNDCallback
from ifnd_nb.rivals import DebiasedCallback, QuantileDetector, TopKDetector, debiased
from ifnd_nb.loaders import two_view_dls
from ifnd_nb.banks import ViewBank
from ifnd_nb.levels import octaves, some_of
from ifnd_nb.removal import eliminate
from ifnd_nb.scoring import ScoreCallback
from ifnd_nb.ifnd import ifnd_learner
from ifnd_nb.moco import MocoCallback, info_nce, moco_learner, moco_logits, not_negatives

fast = settings(deadline=None, max_examples=80)

def problem(seed, bs, K, H, share, tau=.2, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    q, k, queue = (F.normalize(torch.randn(n, 4, generator=g, dtype=dtype), dim=1) for n in (bs, bs, K))
    invalid = not_negatives(torch.randint(0, 6, (bs,), generator=g), torch.randint(-1, 6, (K,), generator=g))
    masks = (torch.rand(H, bs, K, generator=g) < share) & ~invalid
    return moco_logits(q, k, queue, tau, invalid), masks

def literal(logits, masks, how):
    "The equations, entry by entry, in Python floats"
    total = 0.
    for level in masks:
        for row, marked in zip(logits.tolist(), level.tolist()):
            e = [math.exp(v) for v in row]
            positives = [0] + [j + 1 for j, m in enumerate(marked) if m and how=='attract']
            denom = e[0] + sum(v for v, m in zip(e[1:], marked) if not (m and how=='eliminate'))
            total -= sum(math.log(e[p] / denom) for p in positives) / len(positives)
    return total / (len(masks) * len(logits))

sizes = dict(seed=st.integers(0, 10**6), bs=st.integers(1, 6), K=st.integers(1, 9), H=st.integers(1, 7), share=st.sampled_from([0., .2, .7, 1.]))

@fast
@given(**sizes)
def test_both_equal_their_equations(seed, bs, K, H, share):
    logits, masks = problem(seed, bs, K, H, share)
    assert eliminate(logits, masks).item() == pytest.approx(literal(logits, masks, 'eliminate'), rel=1e-9, abs=1e-12)
    assert attract(logits, masks).item() == pytest.approx(literal(logits, masks, 'attract'), rel=1e-9, abs=1e-12)

@fast
@given(**{**sizes, 'share': st.just(0.)}, dtype=st.sampled_from([torch.float32, torch.float64]))
def test_nothing_marked_is_info_nce_to_the_bit(seed, bs, K, H, share, dtype):
    logits, masks = problem(seed, bs, K, H, share, dtype=dtype)
    assert torch.equal(eliminate(logits, masks), info_nce(logits)) and torch.equal(attract(logits, masks), info_nce(logits))

@pytest.mark.parametrize('loss', [eliminate, attract])
def test_gradients_in_float64(loss):
    for seed in range(5):
        logits, masks = problem(seed, 3, 7, 3, .4)
        keep = logits.isfinite()
        fill = lambda v: torch.full_like(logits, -torch.inf).masked_scatter(keep, v)
        assert torch.autograd.gradcheck(lambda v: loss(fill(v), masks), logits[keep].requires_grad_())

@pytest.mark.parametrize('loss', [eliminate, attract])
def test_rows_in_blocks_equal_rows_together(loss, monkeypatch):
    logits, masks = problem(0, 9, 40, 3, .3)
    def both():
        x = logits.clone().requires_grad_(); y = loss(x, masks); y.backward()
        return y.detach(), x.grad
    whole = both()
    for module in ('eliminate', 'attract'): monkeypatch.setattr(f'ifnd_nb.{module}.row_blocks', lambda x: [slice(i, i+2) for i in range(0, len(x), 2)])
    for a, b in zip(whole, both()): torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)

def test_a_row_without_any_negative_left_is_finite_even_when_all_it_lost_was_near():
    logits = torch.tensor([[-10., *[100.] * 5], [3., *[-torch.inf] * 5]], requires_grad=True) # tau of about .03
    masks = torch.ones(3, 2, 5, dtype=torch.bool); masks[:, 1] = False
    loss = eliminate(logits, masks); loss.backward()
    assert loss.item() == 0 and logits.grad.abs().max() < 1e-6

@fast
@given(**{**sizes, 'share': st.sampled_from([.2, .7])})
def test_eliminated_keys_get_no_gradient_and_attracted_ones_their_share(seed, bs, K, H, share):
    logits, masks = problem(seed, bs, K, H, share)
    x = logits.clone().requires_grad_(); eliminate(x, masks).backward()
    assert (x.grad[:, 1:][masks.all(0)] == 0).all()
    x = logits.clone().requires_grad_(); attract(x, masks).backward()
    want = (logits.softmax(1)[:, 1:] - (masks.double() / (1 + masks.sum(2, keepdim=True))).mean(0)) / bs
    torch.testing.assert_close(x.grad[:, 1:], want, rtol=1e-9, atol=1e-12)

@fast
@given(seed=st.integers(0, 10**6), bs=st.integers(1, 5), K=st.integers(1, 8), prior=st.floats(0., .5))
def test_debiased_equals_its_equation(seed, bs, K, prior):
    logits, _ = problem(seed, bs, K, 1, 0.)
    total = 0.
    for row in logits.tolist():
        e = [math.exp(v) for v in row[1:] if v > -math.inf]
        negative = max(((sum(e) / len(e) if e else 0.) - prior * math.exp(row[0])) / (1 - prior), math.exp(-1/.2))
        total -= math.log(math.exp(row[0]) / (math.exp(row[0]) + len(e) * negative))
    assert debiased(logits, prior, .2).item() == pytest.approx(total / bs, rel=1e-9, abs=1e-12)

def test_top_k_and_quantile_mark_the_nearest():
    logits, tau = torch.tensor([[9., 8., 2., 7.5, -torch.inf], [9., -9., -8., 1., 0.]]), .1
    assert TopKDetector(tau, k=2, threshold=.7)(logits, None, torch.arange(4)).tolist() == [[[True, False, True, False], [False] * 4]]
    d = QuantileDetector(5, tau, share=.5, lr=1.)
    idx = torch.tensor([3, 1])
    d(logits, idx, torch.arange(4)) # the first look sets the threshold
    torch.testing.assert_close(d.threshold, torch.tensor([2., 0. + .25 - .5, 2., .75 + .25 - .5, 2.]))
    assert (d(logits, idx, torch.arange(4))[0].sum(1) == torch.tensor([2, 2])).all()

# the callback

@pytest.fixture(scope='module')
def dls():
    g = torch.Generator().manual_seed(0)
    y = torch.arange(120) % 4
    x = (torch.rand(120, 1, 16, 16, generator=g) * 80 + 40 * y[:, None, None, None]).byte()
    return two_view_dls(x, labels=y, bs=16, valid=.2, seed=1)

def learner(dls, cbs=(), **kw):
    return ifnd_learner(dls, cbs=list(cbs), **{**dict(n_clusters=[4, 8], queue_size=64, seed=3), **kw})

def fit(learn, n=3, method='fit_one_cycle', **kw):
    torch.manual_seed(0); learn.dls.set_epoch(0)
    with learn.no_bar(), learn.no_logging(): getattr(learn, method)(n, **kw)
    return learn

def same(a, b):
    for (n, p), q in zip(a.model.state_dict().items(), b.model.state_dict().values()): assert torch.equal(p, q), n

@pytest.mark.parametrize('strategy', ['eliminate', 'attract'])
def test_same_seed_same_numbers(dls, strategy):
    a, b = (fit(learner(dls, strategy=strategy)) for _ in range(2))
    same(a, b)
    assert (a.model.detector.pseudo >= 0).any() and repr([[*v] for v in a.recorder.values]) == repr([[*v] for v in b.recorder.values])

@pytest.mark.parametrize('strategy', ['eliminate', 'attract'])
def test_an_acceptance_of_zero_is_the_baseline_to_the_bit(dls, strategy):
    a, b = fit(learner(dls, strategy=strategy, acceptance=SchedNo(0., 0.))), fit(moco_learner(dls, queue_size=64, seed=3))
    for (n, p), q in zip(b.model.named_parameters(), a.model.parameters()): assert torch.equal(p, q), n

def test_removal_changes_what_is_learned(dls):
    a, b, c = (fit(learner(dls, strategy=s, acceptance=1.)) if s else fit(moco_learner(dls, queue_size=64, seed=3)) for s in ('eliminate', 'attract', None))
    p, q, r = (next(l.model.parameters()) for l in (a, b, c))
    assert not torch.equal(p, q) and not torch.equal(p, r) and not torch.equal(q, r)

def columns(learn, epoch=-1): return dict(zip(learn.recorder.metric_names[1:-1], learn.recorder.values[epoch]))

def test_the_table_says_what_was_removed(dls):
    learn = fit(learner(dls, acceptance=SchedCos(0., 1.)), 4)
    accepted = [columns(learn, e)['accepted'] for e in range(4)]
    assert accepted == sorted(accepted) and accepted[0] == 0 < accepted[-1] < 1
    assert columns(learn, 0)['removed'] == 0 < columns(learn)['removed'] < 1
    assert 0 < columns(learn)['fn_precision'] <= 1 and 0 < columns(learn)['fn_recall'] <= 1
    assert {h['level'] for h in learn.ifnd.history} == {0, 1}

def groups(n, k, dim=32, spread=.1):
    "n unit-norm rows around k random directions; k=0: no groups"
    g = torch.Generator().manual_seed(0)
    x = spread * torch.randn(n, dim, generator=g)
    return F.normalize(x + F.normalize(torch.randn(k, dim, generator=g), dim=1)[torch.arange(n) % k] if k else x, dim=1)

@pytest.mark.parametrize('k', [10, 20, 0])
def test_as_many_clusters_as_stand_apart(k):
    d, x = ClusterDetector(400, seed=0, dim=32), groups(400, k)
    d.view_bank.update(torch.arange(400), x, F.normalize(x + .1 * groups(400, 0), dim=1))
    x[3] = 0 # has no embedding
    d.refresh(x, .5, 0)
    assert [len(c) for c in d.clusters.centroids] == [k] and d.pseudo.shape == (400, 1) and d.pseudo[3] == -1 and (d.pseudo >= 0).sum() == (200 if k else 0)
    if not k: return # nothing stands apart, nothing is trusted
    blind = ClusterDetector(400, seed=0, dim=32) # has seen no views
    blind.refresh(x, .5, 0)
    assert (blind.pseudo == -1).all()
    of = ClusterDetector(400, k, seed=0) # the same as that number alone
    of.refresh(x, .5, 0)
    assert torch.equal(d.pseudo, of.pseudo)
    again = ClusterDetector(400, seed=0, dim=32) # as after a restart
    again.load_state_dict(d.state_dict())
    for o in (d, again): o.refresh(x, 1., 1)
    assert (again.pseudo >= 0).any() and torch.equal(again.pseudo, d.pseudo)

def test_a_view_bank_fits_the_model_and_is_filled_for_any_detector(dls):
    with pytest.raises(ValueError, match='dim=128, the model has 32; make it with dim=32'): learner(dls, detector=ClusterDetector(96), dim=32)
    d = TopKDetector(.1)
    d.view_bank = ViewBank(96, 128)
    fit(learner(dls, detector=d), 1)
    assert (d.view_bank.views.norm(dim=2) > 0).sum() == 2 * (96 // dls.bs * dls.bs)

def test_the_default_trains(dls):
    a, b = (fit(learner(dls, n_clusters=None, strategy='attract')) for _ in range(2))
    same(a, b)
    assert a.model.detector.pseudo.shape == (96, 1)

def test_where_nothing_stands_apart_nothing_is_removed(dls, monkeypatch):
    monkeypatch.setattr('ifnd_nb.detect.best_level', lambda *a: None)
    learn, plain = fit(learner(dls, n_clusters=None, acceptance=1.)), fit(moco_learner(dls, queue_size=64, seed=3))
    assert [columns(learn, e)[c] for e in range(3) for c in ('accepted', 'removed')] == [0] * 6
    for (n, p), q in zip(plain.model.named_parameters(), learn.model.parameters()): assert torch.equal(p, q), n
    monkeypatch.setattr('ifnd_nb.detect.best_level', lambda *a: 1)
    learn = fit(learner(dls, n_clusters=None, acceptance=1.))
    assert [columns(learn, e)['accepted'] for e in range(3)] == [0, 1, 1] and columns(learn)['removed'] > 0

def test_what_stood_apart_once_is_kept(dls, monkeypatch):
    levels = []
    def once(*a): levels.append(1 if len(levels) in (1, 2) else None); return levels[-1] # level 1 of three is asked for twice, without and with the finest
    monkeypatch.setattr('ifnd_nb.detect.best_level', once)
    learn = fit(learner(dls, n_clusters=None, acceptance=1.), 5)
    assert levels == [None, 1, 1, None, None] and [columns(learn, e)['accepted'] for e in range(5)] == [0, 0, 1, 1, 1]
    d = learn.model.detector
    assert int(d.last) == octaves(96)[1] == len(d.clusters.centroids[0])
    again = ClusterDetector(96, tau=d.tau, seed=d.seed) # as after a restart
    again.load_state_dict(d.state_dict())
    x = learn.model.bank.keys
    for o in (d, again): o.refresh(x, 1., 9)
    assert (again.pseudo >= 0).any() and torch.equal(again.pseudo, d.pseudo)

def test_the_oracle_is_right(dls):
    c = columns(fit(learner(dls, detector='oracle'), 2))
    assert c['fn_precision'] == c['fn_recall'] == 1

@pytest.mark.parametrize('features', ['keys', 'pass'])
def test_both_sources_of_embeddings(dls, features):
    learn = fit(learner(dls, features=features), 2)
    assert (learn.model.bank is None) == (features == 'pass')
    assert (learn.model.detector.pseudo >= 0).any()

@pytest.mark.parametrize('features', ['keys', 'pass'])
def test_the_default_sees_both_views_of_each_batch(dls, features):
    learn = fit(learner(dls, n_clusters=None, features=features), 1)
    views = learn.model.detector.view_bank.views
    seen = views[0].norm(dim=1) > 0
    assert views.shape[:2] == (2, 96) and seen.sum() == 96 // dls.bs * dls.bs
    torch.testing.assert_close(views[:, seen].norm(dim=2), torch.ones(2, int(seen.sum())))
    assert not torch.allclose(views[0, seen], views[1, seen])
    if features == 'keys': torch.testing.assert_close(learn.model.bank.keys[some_of(96)[seen]], F.normalize(views[:, seen].sum(0), dim=1)) # what is clustered is their mean

def test_start_and_every(dls):
    learn = fit(learner(dls, acceptance=1., start=.5, every=2), 4)
    assert [columns(learn, e)['accepted'] for e in range(4)] == [0, 0, 1, 1]
    assert {h['epoch'] for h in learn.ifnd.history} == {2}

@pytest.mark.parametrize('method,cbs', [
    ('fit_one_cycle', [GradientClip()]), ('fit_flat_cos', []), ('fit', [GradientAccumulation(48)]), ('fit_one_cycle', [ScoreCallback(k=5)])],
    ids=['clip', 'flat_cos', 'accumulate', 'knn'])
def test_with_other_callbacks_and_schedules(dls, method, cbs):
    learn = fit(learner(dls, cbs), 2, method)
    assert all(p.isfinite().all() for p in learn.model.parameters()) and columns(learn)['removed'] > 0

class HalfPrecision(Callback):
    "What fastai's MixedPrecision does on a GPU, on a CPU"
    order = MocoCallback.order - 1
    def before_batch(self): self.cast = torch.autocast('cpu', torch.bfloat16); self.cast.__enter__()
    def after_loss(self): self.cast.__exit__(None, None, None)
    def after_pred(self): self.kinds = {o.dtype for o in self.learn.pred}

@pytest.mark.parametrize('strategy', ['eliminate', 'attract'])
def test_half_precision_on_a_cpu(dls, strategy):
    learn = fit(learner(dls, [HalfPrecision()], strategy=strategy), 2)
    assert learn.half_precision.kinds == {torch.bfloat16}
    assert all(p.isfinite().all() and p.dtype == torch.float32 for p in learn.model.parameters()) and columns(learn)['removed'] > 0

def test_a_fresh_learner_can_be_looked_at(dls):
    learn = learner(dls)
    with learn.no_bar(): assert math.isfinite(learn.validate()[0])
    learn.summary()
    assert columns(fit(learn))['removed'] > 0

def test_lr_find_and_summary_leave_model_and_detector_as_they_were(dls):
    learn = learner(dls)
    before = {k: v.clone() for k, v in learn.model.state_dict().items()}
    with learn.no_bar(), learn.no_logging(): learn.lr_find(num_it=20, show_plot=False, suggest_funcs=())
    learn.summary()
    for k, v in learn.model.state_dict().items(): assert torch.equal(v, before[k]), k

def test_save_load_save_model_and_csv(dls, tmp_path):
    learn = learner(dls, [SaveModelCallback(monitor='valid_loss', fname='best'), CSVLogger()], path=tmp_path)
    fit(learn, 2)
    assert 'fn_precision' in (tmp_path/'history.csv').read_text()
    learn.save('last')
    again = learner(dls, path=tmp_path)
    again.load('last')
    same(learn, again)

def test_a_second_fit_starts_from_the_keys_of_the_first(dls):
    learn = fit(learner(dls, acceptance=1.), 2)
    fit(learn, 1)
    assert len(learn.recorder.values) == 1 and columns(learn)['removed'] > 0
    assert learn.recorder.metric_names.count('removed') == 1

def test_validation_is_plain_info_nce(dls):
    learn = fit(learner(dls, acceptance=1.), 2)
    loss = learn.validate()[0]
    learn.remove_cb(learn.ifnd)
    learn.metrics = []
    assert learn.validate()[0] == loss

@pytest.mark.parametrize('kw,words', [
    (dict(strategy='erase'), "strategy='erase'"), (dict(detector='guess'), "detector='guess'"), (dict(features='none'), "features='none'"), (dict(every=0), 'every=0'),
    (dict(start=2.), 'start=2.0'), (dict(acceptance=-1.), 'acceptance is -1.0'), (dict(n_clusters=500), 'n_clusters=500'), (dict(n_clusters=[0]), r'n_clusters=\[0\]'), (dict(n_clusters='many'), "n_clusters='many'")], ids=str)
def test_mistakes_are_named_when_the_learner_is_made(dls, kw, words):
    with pytest.raises(ValueError, match=words): learner(dls, **kw)

def test_another_model_is_refused(dls):
    from fastai.learner import Learner
    with pytest.raises(TypeError, match='needs a MoCo model'): Learner(dls, torch.nn.Linear(2, 2), loss_func=F.mse_loss, cbs=IFNDCallback())

# detectors and strategies of one's own

def test_a_strategy_may_be_any_function(dls):
    plain = fit(learner(dls, acceptance=1.))
    mine = fit(learner(dls, acceptance=1., strategy=lambda logits, masks: eliminate(logits, masks)))
    same(plain, mine)

class Every(torch.nn.Module):
    "Marks every other slot of the queue from the second epoch on"
    needs_embedding = False
    def refresh(self, x, rate, epoch): self.epoch = epoch
    def forward(self, logits, idx, queue_idx):
        if self.epoch < 1: return None
        mask = torch.zeros(1, len(idx), len(queue_idx), dtype=torch.bool)
        mask[..., ::2] = True
        return mask

def test_a_detector_may_be_any_module_and_mark_nothing(dls):
    learn = fit(learner(dls, detector=Every()))
    assert [columns(learn, e)['removed'] for e in range(3)] == [0, .5, .5]
    assert math.isnan(columns(learn)['accepted'])

def test_counts_by_hand(dls):
    learn = learner(dls)
    cb = learn.ifnd
    cb.labels, cb.counts = torch.tensor([0, 0, 1, -1]), torch.zeros(5)
    masks = torch.tensor([[[1, 1, 0, 1, 0], [0, 0, 0, 1, 0]]], dtype=torch.bool)
    cb.count(masks, torch.tensor([0, 2]), torch.tensor([1, 2, 0, 3, -1]))
    assert cb.counts.tolist() == [8, 4, 2, 1, 1] # pairs, marked, marked with known labels, of these right, to be marked
    assert cb.column('removed') == .5 and cb.column('fn_precision') == .5 and cb.column('fn_recall') == 1

def test_accepted_is_the_rate_of_the_last_detection(dls):
    learn = fit(learner(dls, every=2), 5)
    assert [columns(learn, e)['accepted'] for e in range(5)] == [0, 0, .8, .8, 1]

def test_another_callback_brings_its_own_detector(dls):
    learn = fit(learner(dls, features='pass'), 1)
    learn.remove_cb(learn.ifnd)
    learn.add_cb(IFNDCallback([4], features='keys', acceptance=1.))
    fit(learn, 2)
    assert learn.model.detector.n_clusters == [4] and columns(learn)['removed'] > 0
    learn.remove_cb(learn.ifnd)
    learn.add_cb(IFNDCallback(detector='oracle'))
    assert columns(fit(learn, 1))['fn_precision'] == 1 and learn.model.bank is None

def test_history_is_of_the_last_fit_and_not_of_lr_find(dls):
    learn = fit(learner(dls, acceptance=1.), 2)
    n = len(learn.ifnd.history)
    with learn.no_bar(), learn.no_logging(): learn.lr_find(num_it=20, show_plot=False, suggest_funcs=())
    assert len(learn.ifnd.history) == n == 2
    assert len(fit(learn, 2).ifnd.history) == 4

def test_debiased_trains_and_validates_by_info_nce(dls):
    learn = fit(moco_learner(dls, queue_size=64, seed=3, cbs=DebiasedCallback()))
    plain = fit(moco_learner(dls, queue_size=64, seed=3))
    assert all(p.isfinite().all() for p in learn.model.parameters())
    assert not torch.equal(next(learn.model.parameters()), next(plain.model.parameters()))
    loss = learn.validate()[0]
    learn.remove_cb(learn.debiased)
    assert learn.validate()[0] == loss
    with pytest.raises(ValueError, match='prior=1.0'): DebiasedCallback(1.)

def test_galleries_say_what_is_missing(dls):
    learn = fit(learner(dls, [], n_clusters=[96], acceptance=1.), 2)
    learn.model.detector.pseudo[:, 0] = torch.arange(96)
    with pytest.raises(ValueError, match='no two images share a pseudo label'): learn.ifnd.show_false_negatives()
    learn.model.detector.pseudo[2:] = -1
    learn.ifnd.show_clusters()
    with pytest.raises(ValueError, match='no pseudo labels to show'): fit(learner(dls, detector='topk'), 1).ifnd.show_clusters()
