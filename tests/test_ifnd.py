"The IFND callback among fastai's other callbacks, its recipes, and detectors and strategies of one's own"
import math
import pytest, torch, torch.nn.functional as F
from fastai.callback.all import CSVLogger, GradientAccumulation, GradientClip, SaveModelCallback, SchedCos, SchedNo
from fastai.callback.core import Callback
from helpers_method import bright_loaders, columns, fit, groups, learner, same
from ifnd_nb.banks import EmbeddingBank, ViewBank
from ifnd_nb.detect import by_half, count_pairs, three_levels
from ifnd_nb.ifnd import ClusterDetector, Detector, ifnd_learner, IFNDCallback, recipes
from ifnd_nb.levels import octaves, some_of
from ifnd_nb.moco import moco_learner, MocoCallback
from ifnd_nb.removal import attract, eliminate
from ifnd_nb.rivals import TopKDetector
from ifnd_nb.scoring import ScoreCallback

@pytest.fixture(scope='module')
def dls(): return bright_loaders()

@pytest.mark.parametrize('strategy', ['eliminate', 'attract'])
def test_same_seed_same_numbers(dls, strategy):
    a, b = (fit(learner(dls, strategy=strategy)) for _ in range(2))
    same(a, b)
    assert (a.model.detector.pseudo >= 0).any()
    assert repr([[*v] for v in a.recorder.values]) == repr([[*v] for v in b.recorder.values])

@pytest.mark.parametrize('strategy', ['eliminate', 'attract'])
def test_an_acceptance_of_zero_is_the_baseline_to_the_bit(dls, strategy):
    a = fit(learner(dls, strategy=strategy, acceptance=SchedNo(0., 0.)))
    b = fit(moco_learner(dls, queue_size=64, seed=3))
    for (n, p), q in zip(b.model.named_parameters(), a.model.parameters()): assert torch.equal(p, q), n

def test_removal_changes_what_is_learned(dls):
    a, b = (fit(learner(dls, strategy=s, acceptance=1.)) for s in ('eliminate', 'attract'))
    c = fit(moco_learner(dls, queue_size=64, seed=3))
    p, q, r = (next(l.model.parameters()) for l in (a, b, c))
    assert not torch.equal(p, q) and not torch.equal(p, r) and not torch.equal(q, r)

def test_the_table_says_what_was_removed(dls):
    learn = fit(learner(dls, acceptance=SchedCos(0., 1.)), 4)
    accepted = [columns(learn, e)['accepted'] for e in range(4)]
    assert accepted == sorted(accepted) and accepted[0] == 0 < accepted[-1] < 1
    assert columns(learn, 0)['removed'] == 0 < columns(learn)['removed'] < 1
    assert 0 < columns(learn)['fn_precision'] <= 1 and 0 < columns(learn)['fn_recall'] <= 1
    assert {h['level'] for h in learn.ifnd.history} == {0, 1}

# ---- recipes

def test_the_recipe_of_the_paper(dls):
    cb = IFNDCallback(recipe='paper')
    assert cb.n_clusters is three_levels and cb.features == 'pass'
    assert [cb.rate(t) for t in (0, .1, .25, .5, .75, 1)] == pytest.approx([0, .1, .25, .5, .75, 1])
    m = ifnd_learner(dls, recipe='paper', queue_size=64).model
    assert m.detector.n_clusters == three_levels(96) == [5, 10, 20] and m.detector.pseudo.shape == (96, 3)
    assert m.bank is None and m.detector.view_bank is None

def test_the_recipe_of_stable_clusters_is_the_default(dls):
    for cb in (IFNDCallback(recipe='stable'), IFNDCallback()):
        assert cb.n_clusters == 'stable' and cb.acceptance is by_half and cb.features == 'bank'
        assert [cb.rate(t) for t in (0, .1, .25, .5, .75, 1)] == pytest.approx([0, .2, .5, 1, 1, 1])
    m = ifnd_learner(dls, queue_size=64).model
    assert m.detector.n_clusters == 'stable' and isinstance(m.bank, EmbeddingBank)
    assert isinstance(m.detector.view_bank, ViewBank)

@pytest.mark.parametrize('recipe', recipes)
def test_what_is_given_wins_over_the_recipe(recipe):
    given = dict(n_clusters=[3, 7], acceptance=.25, features='bank' if recipe=='paper' else 'pass')
    for name, value in given.items():
        cb = IFNDCallback(recipe=recipe, **{name: value})
        assert getattr(cb, name) == value
        for other in given.keys() - {name}: assert getattr(cb, other) is recipes[recipe][other]
    assert IFNDCallback(recipe=recipe, acceptance=0.).rate(1.) == 0 # given, though it is none

def test_an_unknown_recipe_is_refused(dls):
    for make in (IFNDCallback, lambda **kw: ifnd_learner(dls, **kw)):
        with pytest.raises(ValueError, match="recipe='soup' is not known; use one of: paper, stable"):
            make(recipe='soup')

def test_both_recipes_train(dls):
    for recipe in recipes:
        learn = fit(ifnd_learner(dls, recipe=recipe, queue_size=64, seed=3), 4)
        assert all(p.isfinite().all() for p in learn.model.parameters()) and columns(learn, 0)['accepted'] == 0
        if recipe == 'paper':
            assert [columns(learn, e)['accepted'] for e in range(4)] == pytest.approx([0, .25, .5, .75])

def test_a_function_of_the_number_of_images_gives_numbers_of_clusters(dls):
    assert learner(dls, n_clusters=lambda n: [n // 48, n // 8]).model.detector.n_clusters == [2, 12]

def test_a_strategy_of_finer_clusters_gets_them(dls):
    def mine(logits, masks): return attract(logits, masks)
    finers = []
    for finer in (None, 0, 1):
        if finer is not None: mine.finer = finer
        finers.append(ifnd_learner(dls, strategy=mine, dim=32, queue_size=64).model.detector.finer)
    assert finers == [0, 0, 1]
    named = [ifnd_learner(dls, strategy=s, queue_size=64).model.detector.finer for s in ('eliminate', 'attract')]
    assert named == [0, 1]
    x = groups(400, 10)
    for finer in finers[1:]:
        d = ClusterDetector(400, seed=0, dim=32, finer=finer)
        d.view_bank.update(torch.arange(400), x, F.normalize(x + .1 * groups(400, 0), dim=1))
        d.refresh(x, 1., 0)
        assert [len(c) for c in d.clusters.centroids] == [10 * 2**finer] and (d.pseudo >= 0).all()

# ---- as many clusters as stand apart

@pytest.mark.parametrize('k', [10, 20, 0])
def test_as_many_clusters_as_stand_apart(k):
    d, x = ClusterDetector(400, seed=0, dim=32), groups(400, k)
    d.view_bank.update(torch.arange(400), x, F.normalize(x + .1 * groups(400, 0), dim=1))
    x[3] = 0 # has no embedding
    assert d.refresh(x, .5, 0) == bool(k) and d.pseudo.shape == (400, 1) and d.pseudo[3] == -1
    assert (d.pseudo >= 0).sum() == (200 if k else 0)
    if not k: return # nothing stands apart, nothing is trusted
    assert [len(c) for c in d.clusters.centroids] == [k]
    blind = ClusterDetector(400, seed=0, dim=32) # has seen no views
    assert not blind.refresh(x, .5, 0) and (blind.pseudo == -1).all()
    of = ClusterDetector(400, k, seed=0, dim=32) # the same as that number alone
    of.refresh(x, .5, 0)
    assert torch.equal(d.pseudo, of.pseudo)
    again = ClusterDetector(400, seed=0, dim=32) # as after a restart
    again.load_state_dict(d.state_dict())
    for o in (d, again): assert o.refresh(x, 1., 1)
    assert (again.pseudo >= 0).any() and torch.equal(again.pseudo, d.pseudo)
    kept = d.pseudo.clone()
    assert not d.refresh(groups(400, 0), 1., 2) and torch.equal(d.pseudo, kept) # where none are stable, all stays

def test_a_view_bank_fits_the_model_and_is_filled_for_any_detector(dls):
    with pytest.raises(ValueError, match='dim=128, the model has 32; make it with dim=32'):
        learner(dls, detector=ClusterDetector(96), dim=32)
    d = TopKDetector(.1)
    d.view_bank = ViewBank(96, 128)
    fit(learner(dls, detector=d), 1)
    assert (d.view_bank.views.norm(dim=2) > 0).sum() == 2 * (96 // dls.bs * dls.bs)

def test_the_default_trains(dls):
    a, b = (fit(learner(dls, n_clusters='stable', strategy='attract')) for _ in range(2))
    same(a, b)
    assert a.model.detector.pseudo.shape == (96, 1)

def test_where_nothing_stands_apart_nothing_is_removed(dls, monkeypatch):
    monkeypatch.setattr('ifnd_nb.levels.best_level', lambda *a: None)
    learn, plain = fit(learner(dls, n_clusters='stable', acceptance=1.)), fit(moco_learner(dls, queue_size=64, seed=3))
    assert [columns(learn, e)[c] for e in range(3) for c in ('accepted', 'removed')] == [0] * 6
    for (n, p), q in zip(plain.model.named_parameters(), learn.model.parameters()): assert torch.equal(p, q), n
    monkeypatch.setattr('ifnd_nb.levels.best_level', lambda *a: 1)
    learn = fit(learner(dls, n_clusters='stable', acceptance=1.))
    assert [columns(learn, e)['accepted'] for e in range(3)] == [0, 1, 1] and columns(learn)['removed'] > 0

def test_what_stood_apart_once_is_kept(dls, monkeypatch):
    levels, seen = [], []
    def once(*a): levels.append(1 if len(levels) == 1 else None); return levels[-1]
    monkeypatch.setattr('ifnd_nb.levels.best_level', once)
    class Look(Callback):
        order = IFNDCallback.order + 1
        def before_batch(self):
            if self.training and self.iter == 0: seen.append(self.model.detector.pseudo.clone())
    learn = fit(learner(dls, [Look()], n_clusters='stable', acceptance=1.), 5)
    assert levels == [None, 1, None, None] and [columns(learn, e)['accepted'] for e in range(5)] == [0, 0, 1, 1, 1]
    assert all(columns(learn, e)['removed'] > 0 for e in (2, 3, 4))
    assert (seen[1] == -1).all() and (seen[2] >= 0).all() and torch.equal(seen[2], seen[3])
    assert torch.equal(seen[2], seen[4])
    d = learn.model.detector
    assert len(d.clusters.centroids[0]) == octaves(96)[1] and {h['epoch'] for h in learn.ifnd.history} == {2}
    again = ClusterDetector(96, tau=d.tau, seed=d.seed) # as after a restart
    again.load_state_dict(d.state_dict())
    assert not again.refresh(learn.model.bank.mean, 1., 9) and torch.equal(again.pseudo, seen[4])

@pytest.mark.parametrize('features', ['bank', 'pass'])
def test_the_default_sees_both_views_of_each_batch(dls, features):
    learn = fit(learner(dls, n_clusters='stable', features=features), 1)
    views = learn.model.detector.view_bank.views
    seen = views[0].norm(dim=1) > 0
    assert views.shape[:2] == (2, 96) and seen.sum() == 96 // dls.bs * dls.bs
    torch.testing.assert_close(views[:, seen].norm(dim=2), torch.ones(2, int(seen.sum())))
    assert not torch.allclose(views[0, seen], views[1, seen])
    if features == 'bank': # what is clustered is their mean
        torch.testing.assert_close(learn.model.bank.mean[some_of(96)[seen]], F.normalize(views[:, seen].sum(0), dim=1))

# ---- the callback

def test_the_oracle_is_right(dls):
    c = columns(fit(learner(dls, detector='oracle'), 2))
    assert c['fn_precision'] == c['fn_recall'] == 1

@pytest.mark.parametrize('features', ['bank', 'pass'])
def test_both_sources_of_embeddings(dls, features):
    learn = fit(learner(dls, features=features), 2)
    assert (learn.model.bank is None) == (features == 'pass')
    assert (learn.model.detector.pseudo >= 0).any()

def test_start_and_every(dls):
    learn = fit(learner(dls, acceptance=lambda t: float(t >= .5), every=2), 4)
    assert [columns(learn, e)['accepted'] for e in range(4)] == [0, 0, 1, 1]
    assert {h['epoch'] for h in learn.ifnd.history} == {2}

@pytest.mark.parametrize('method,cbs', [
    ('fit_one_cycle', [GradientClip()]), ('fit_flat_cos', []), ('fit', [GradientAccumulation(48)]),
    ('fit_one_cycle', [ScoreCallback()])],
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
    assert all(p.isfinite().all() and p.dtype == torch.float32 for p in learn.model.parameters())
    assert columns(learn)['removed'] > 0

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
    (dict(strategy='erase'), "strategy='erase'"), (dict(detector='guess'), "detector='guess'"),
    (dict(features='none'), "features='none'"),
    (dict(features='keys'), "features='keys'.*bank, pass"), (dict(recipe='soup'), "recipe='soup'.*paper, stable"),
    (dict(every=0), 'every=0'), (dict(acceptance=-1.), 'acceptance is -1.0'), (dict(n_clusters=500), 'n_clusters=500'),
    (dict(n_clusters=[0]), r'n_clusters=\[0\]'), (dict(n_clusters='many'), "n_clusters='many'")], ids=str)
def test_mistakes_are_named_when_the_learner_is_made(dls, kw, words):
    with pytest.raises(ValueError, match=words): learner(dls, **kw)

def test_another_model_is_refused(dls):
    from fastai.learner import Learner
    with pytest.raises(TypeError, match='needs a MoCo model'):
        Learner(dls, torch.nn.Linear(2, 2), loss_func=F.mse_loss, cbs=IFNDCallback())

# ---- detectors and strategies of one's own

def test_a_strategy_may_be_any_function(dls):
    plain = fit(learner(dls, acceptance=1.))
    mine = fit(learner(dls, acceptance=1., strategy=lambda logits, masks: eliminate(logits, masks)))
    same(plain, mine)

class Every(Detector):
    "Marks every other slot of the queue from the second epoch on"
    def refresh(self, x, rate, epoch): self.epoch = epoch; return x is None
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
    masks = torch.tensor([[[1, 1, 0, 1, 0], [0, 0, 0, 1, 0]]], dtype=torch.bool)
    cb.counts = count_pairs(masks, torch.tensor([0, 2]), torch.tensor([1, 2, 0, 3, -1]), torch.tensor([0, 0, 1, -1]))
    assert cb.counts.tolist() == [8, 4, 2, 1, 1] # pairs, marked, marked with known labels, of these right, to be marked
    assert cb.column('removed') == .5 and cb.column('fn_precision') == .5 and cb.column('fn_recall') == 1

def test_accepted_is_the_rate_of_the_last_detection(dls):
    learn = fit(learner(dls, every=2), 5)
    assert [columns(learn, e)['accepted'] for e in range(5)] == [0, 0, .8, .8, 1]

def test_another_callback_brings_its_own_detector(dls):
    learn = fit(learner(dls, features='pass'), 1)
    learn.remove_cb(learn.ifnd)
    learn.add_cb(IFNDCallback([4], features='bank', acceptance=1.))
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

def test_the_share_accepted_is_known_after_a_resume(dls):
    "In an epoch without a detection of its own, too"
    first = fit(learner(dls, acceptance=1., every=2))
    rest = learner(dls, acceptance=1., every=2)
    rest.model.load_state_dict(first.model.state_dict())
    fit(rest, 4, start_epoch=3)
    assert columns(rest)['accepted'] == 1 and columns(rest)['removed'] > 0
