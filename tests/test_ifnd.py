"The IFND callback among fastai's other callbacks, its recipes, and detectors and strategies of one's own"
import itertools, math
import pytest, torch, torch.nn.functional as F
from fastai.callback.all import CSVLogger, GradientAccumulation, GradientClip, SaveModelCallback, SchedCos, SchedNo
from fastai.callback.core import Callback
from helpers_method import bright_loaders, columns, EVER, fit, groups, learner, same
from ifnd_nb.banks import EmbeddingBank
from ifnd_nb.detect import accept, false_negatives
from ifnd_nb.clustering import cluster, three_levels
from ifnd_nb.pairs import count_pairs
from ifnd_nb.detectors import ClusterDetector, Detector
from ifnd_nb.ifnd import ifnd_learner, IFNDCallback
from ifnd_nb.recipes import recipes
from ifnd_nb.levels import stable_clusters
from ifnd_nb.moco import moco_learner, MocoCallback
from ifnd_nb.removal import both, eliminate
from ifnd_nb.scoring import ScoreCallback

@pytest.fixture(scope='module')
def dls(): return bright_loaders()

@pytest.mark.parametrize('strategy', ['eliminate', 'attract', 'both'])
def test_same_seed_same_numbers(dls, strategy):
    a, b = (fit(learner(dls, strategy=strategy)) for _ in range(2))
    same(a, b)
    assert (a.model.detector.pseudo >= 0).any()
    assert repr([[*v] for v in a.recorder.values]) == repr([[*v] for v in b.recorder.values])

@pytest.mark.parametrize('strategy', ['eliminate', 'attract', 'both'])
def test_an_acceptance_of_zero_is_the_baseline_to_the_bit(dls, strategy):
    a = fit(learner(dls, strategy=strategy, acceptance=SchedNo(0., 0.)))
    b = fit(moco_learner(dls, queue_size=64, seed=3))
    for (n, p), q in zip(b.model.named_parameters(), a.model.parameters()): assert torch.equal(p, q), n

def test_removal_changes_what_is_learned(dls):
    learners = [fit(learner(dls, strategy=s, acceptance=1.)) for s in ('eliminate', 'attract', 'both')]
    weights = [next(l.model.parameters()) for l in (*learners, fit(moco_learner(dls, queue_size=64, seed=3)))]
    assert not any(torch.equal(p, q) for p, q in itertools.combinations(weights, 2))

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
    assert m.bank is None

def test_the_recipe_of_stable_clusters_is_the_default(dls):
    for cb in (IFNDCallback(recipe='stable'), IFNDCallback()):
        assert cb.n_clusters == 'stable' and cb.features == 'bank' and {cb.rate(t) for t in (0, .1, .5, 1)} == {1}
        assert cb.strategy == 'both' and cb.removal is both
    m = ifnd_learner(dls, queue_size=64).model
    assert m.detector.n_clusters == 'stable' and isinstance(m.bank, EmbeddingBank)
    assert m.detector.wants == ('likely', 'sure') and m.detector.pseudo.shape == (96, 6) and m.detector.apart == 0

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

# ---- the votes of stable clusters

def with_wants(*wants):
    "A strategy of one's own that asks for these pairs"
    def mine(logits, masks): return both(logits, masks)
    if wants: mine.wants = wants
    return mine

@pytest.mark.parametrize('strategy,wants', [
    ('eliminate', ('likely',)), ('attract', ('sure',)), ('both', ('likely', 'sure')), (with_wants(), ('likely',)),
    (with_wants('sure', 'likely'), ('sure', 'likely'))],
    ids=['eliminate', 'attract', 'both', 'own', 'own, two'])
def test_a_strategy_gets_the_pairs_that_it_wants(dls, strategy, wants):
    d = ifnd_learner(dls, strategy=strategy, queue_size=64).model.detector
    assert d.wants == wants and d(None, torch.arange(5), torch.arange(9)).shape == (len(wants), 5, 9)

def some_pseudo(n=60):
    "Labels at six levels, of which some are none; the last 20 images have those of the first"
    pseudo = torch.randint(-1, 3, (n, 6), generator=torch.Generator().manual_seed(0)).int()
    pseudo[:5] = pseudo[:5].clamp(min=0)
    pseudo[-20:] = pseudo[:20]
    return pseudo

@pytest.mark.parametrize('wants', [('likely',), ('sure',), ('likely', 'sure'), ('sure', 'likely')], ids=str)
@pytest.mark.parametrize('apart', [.1, .199, .2, .4])
def test_pairs_are_likely_by_half_of_the_votes_and_sure_by_all(wants, apart):
    d, idx, queue_idx = ClusterDetector(60, wants=wants), torch.arange(12), torch.arange(-4, 60)
    d.pseudo, d.apart = some_pseudo(), apart
    counted = torch.tensor([[sum(p == q >= 0 for p, q in zip(d.pseudo[i].tolist(), d.pseudo[j].tolist()))
                             if 0 <= j != i else 0 for j in queue_idx.tolist()] for i in idx.tolist()])
    assert {*counted.flatten().tolist()} == {*range(7)} # all cases
    want = dict(likely=counted >= 3, sure=(counted == 6) & (apart >= .2))
    masks = d(None, idx, queue_idx)
    assert masks.dtype == torch.bool and torch.equal(masks, torch.stack([want[o] for o in wants]))
    d.apart = .0999 # nothing is trusted
    assert not d(None, idx, queue_idx).any()

def test_numbers_of_clusters_give_masks_of_each_level_as_ever():
    x, idx, queue_idx = groups(400, 10), torch.arange(30), torch.arange(-5, 400)
    c = cluster(x, [5, 10], seed=7 + 2)
    pseudo = accept(c.labels, c.confidence, .7)
    for wants in (('likely',), ('sure',), ('likely', 'sure')):
        d = ClusterDetector(400, [5, 10], seed=7, wants=wants)
        assert d.refresh(x, .7, 2) and torch.equal(d.pseudo, pseudo) and d.apart == 0
        masks = d(None, idx, queue_idx)
        assert torch.equal(masks, false_negatives(pseudo, idx, queue_idx)) and masks.flatten(1).any(1).all()

@pytest.mark.parametrize('k', [10, 20, 0])
def test_pseudo_labels_are_those_of_stable_clusters(k):
    d, x = ClusterDetector(400, seed=5), groups(400, k)
    x[3] = 0 # has no embedding
    c, apart = stable_clusters(x, seed=5 + 2)
    assert (apart >= .2) == bool(k) and d.refresh(x, .5, 2) == bool(k) and d.pseudo.shape == (400, 6)
    assert torch.equal(d.pseudo, accept(c.labels, c.confidence, .5)) and d.apart == (apart if k else 0)
    assert (d.pseudo >= 0).sum(0).tolist() == [200 if k else 0] * 6 and (d.pseudo[3] == -1).all()
    assert bool(d(None, torch.arange(400), torch.arange(400)).any()) == bool(k)

def test_clusters_that_stand_apart_less_change_nothing_for_who_wants_sure_ones(monkeypatch):
    x = groups(400, 10)
    apart = stable_clusters(x)[1]
    monkeypatch.setattr(ClusterDetector, 'trust', dict(likely=(.5, apart - .01), sure=(1., apart + .01)))
    for wants, learned in ((('sure',), False), (('likely',), True), (('likely', 'sure'), True)):
        d = ClusterDetector(400, wants=wants)
        assert d.refresh(x, 1., 0) is learned and bool((d.pseudo >= 0).any()) is learned
        masks = d(None, torch.arange(50), torch.arange(400))
        assert [bool(m.any()) for m in masks] == [w == 'likely' for w in wants]

def restored(d):
    "As after a restart"
    again = ClusterDetector(len(d.pseudo), seed=d.seed, wants=d.wants)
    again.load_state_dict(d.state_dict())
    return again

def test_what_stood_apart_once_stays_and_outlives_a_restart():
    d = ClusterDetector(400, seed=0, wants=('likely', 'sure'))
    assert d.refresh(groups(400, 10), 1., 0)
    d.accepted, pseudo, apart = .75, d.pseudo.clone(), d.apart
    of = torch.arange(60), torch.arange(400)
    masks = d(None, *of)
    assert apart >= .2 and masks.flatten(1).any(1).all()
    for o in (d, restored(d)):
        assert not o.refresh(groups(400, 0), 1., 1) # finds nothing
        assert torch.equal(o.pseudo, pseudo) and (o.apart, o.accepted) == (apart, .75)
        assert torch.equal(o(None, *of), masks)
        assert o.refresh(groups(400, 20), 1., 2) # finds others
        assert not torch.equal(o.pseudo, pseudo) and o.apart != apart
    fresh = restored(ClusterDetector(400))
    assert fresh.accepted is None and fresh.apart == 0 and (fresh.pseudo == -1).all()

@pytest.mark.parametrize('apart', [.1, .2 - 1e-9, .2, 1 / 3])
def test_how_far_clusters_stand_apart_is_kept_to_the_bit(apart):
    d = ClusterDetector(30)
    d.apart = apart
    assert restored(d).apart == apart

@pytest.mark.parametrize('strategy', ['eliminate', 'attract', 'both'])
def test_while_clusters_do_not_stand_apart_training_is_the_baselines(dls, strategy, monkeypatch):
    def run(**kw): return fit(learner(dls, n_clusters='stable', acceptance=None, strategy=strategy))
    monkeypatch.setattr(ClusterDetector, 'trust', dict(likely=(.5, 1.1), sure=(1., 1.1)))
    learn, plain = run(), fit(moco_learner(dls, queue_size=64, seed=3))
    assert [columns(learn, e)[c] for e in range(3) for c in ('accepted', 'removed')] == [0] * 6
    for (n, p), q in zip(plain.model.named_parameters(), learn.model.parameters()): assert torch.equal(p, q), n
    d = learn.model.detector
    assert d.accepted is None and (d.pseudo == -1).all() and d.apart == 0 and not learn.ifnd.history
    monkeypatch.setattr(ClusterDetector, 'trust', EVER)
    learn = run()
    assert [columns(learn, e)['accepted'] for e in range(3)] == [0, 1, 1] and columns(learn)['removed'] > 0
    assert {h['level'] for h in learn.ifnd.history} == {*range(6)}
    assert not torch.equal(next(learn.model.parameters()), next(plain.model.parameters()))

def test_noise_is_the_baseline_to_the_bit():
    from ifnd_nb.loaders import two_view_dls
    x = torch.randint(0, 256, (96, 1, 16, 16), generator=torch.Generator().manual_seed(0)).byte()
    dls = two_view_dls(x, labels=torch.arange(96) % 4, bs=16, valid=.2, seed=1)
    learn, plain = fit(ifnd_learner(dls, queue_size=64, seed=3)), fit(moco_learner(dls, queue_size=64, seed=3))
    assert [columns(learn, e)['removed'] for e in range(3)] == [0] * 3
    for (n, p), q in zip(plain.model.named_parameters(), learn.model.parameters()): assert torch.equal(p, q), n

def test_the_default_trains(dls, monkeypatch):
    monkeypatch.setattr(ClusterDetector, 'trust', EVER)
    a, b = (fit(ifnd_learner(dls, queue_size=64, seed=3)) for _ in range(2))
    same(a, b)
    assert (a.model.detector.pseudo >= 0).all() and columns(a)['removed'] > 0

def found_in(epoch, seed=3):
    "`stable_clusters` that stand apart in one epoch alone"
    def f(x, least, seed, **kw):
        c, _ = stable_clusters(x, least=-1., seed=seed, **kw)
        return c, .25 if seed == first else .05
    first = seed + epoch
    return f

class Look(Callback):
    "Keeps the pseudo labels of each epoch"
    order = IFNDCallback.order + 1
    def before_fit(self): self.seen = {}
    def before_batch(self):
        if self.training and self.iter == 0: self.seen[self.epoch] = self.model.detector.pseudo.clone()

def test_training_keeps_what_stood_apart_once_and_a_resume_too(dls, monkeypatch):
    monkeypatch.setattr('ifnd_nb.levels.stable_clusters', found_in(2))
    learn = fit(learner(dls, [Look()], n_clusters='stable', acceptance=1.), 5)
    assert [columns(learn, e)['accepted'] for e in range(5)] == [0, 0, 1, 1, 1]
    assert all((columns(learn, e)['removed'] > 0) == (e >= 2) for e in range(5))
    seen, d = learn.look.seen, learn.model.detector
    assert (seen[1] == -1).all() and (seen[2] >= 0).all() and d.apart == .25
    assert torch.equal(seen[2], seen[3]) and torch.equal(seen[2], seen[4])
    assert {h['epoch'] for h in learn.ifnd.history} == {2}
    rest = learner(dls, [Look()], n_clusters='stable', acceptance=1.)
    rest.model.load_state_dict(learn.model.state_dict())
    fit(rest, 7, start_epoch=5)
    assert torch.equal(rest.look.seen[5], seen[2]) and torch.equal(rest.look.seen[6], seen[2])
    assert columns(rest)['accepted'] == 1 and columns(rest)['removed'] > 0 and rest.model.detector.apart == d.apart

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
    def before_fit(self):
        self.kinds = set()
        hook = lambda head, x, out: self.kinds.add(out.dtype)
        self.hooks = [o.head.register_forward_hook(hook) for o in (self.model.encoder_q, self.model.encoder_k)]
    def after_pred(self): assert {o.dtype for o in self.learn.pred} == {torch.float32}
    def after_fit(self): [o.remove() for o in self.hooks]

@pytest.mark.parametrize('strategy', ['eliminate', 'attract', 'both'])
def test_half_precision_on_a_cpu(dls, strategy):
    learn = fit(learner(dls, [HalfPrecision()], strategy=strategy, precision='fp32'), 2)
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
    plain = fit(learner(dls, acceptance=1., strategy='eliminate'))
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

class Halves(Detector):
    "Marks every other slot of the queue, and of these at a second level every other again"
    def forward(self, logits, idx, queue_idx):
        mask = torch.zeros(2, len(idx), len(queue_idx), dtype=torch.bool)
        mask[0, :, ::2] = mask[1, :, ::4] = True
        return mask

@pytest.mark.parametrize('strategy,removed', [
    ('both', .5), (with_wants('likely', 'sure'), .5), ('eliminate', .375), ('attract', .375), (with_wants(), .375)],
    ids=['both', 'own, two', 'eliminate', 'attract', 'own'])
def test_masks_of_several_wants_are_counted_at_their_first_level(dls, strategy, removed):
    learn = fit(learner(dls, detector=Halves(), strategy=strategy), 2) # with a full queue
    assert columns(learn)['removed'] == removed

def test_both_with_one_level_is_elimination_to_the_bit(dls):
    a, b, c = (fit(learner(dls, detector='oracle', strategy=s)) for s in ('both', 'eliminate', 'attract'))
    same(a, b)
    assert repr([[*v] for v in a.recorder.values]) == repr([[*v] for v in b.recorder.values])
    assert columns(a)['removed'] > 0 and not torch.equal(a.model.queue, c.model.queue)

def test_counts_by_hand(dls):
    learn = learner(dls)
    cb = learn.ifnd
    masks = torch.tensor([[[1, 1, 0, 1, 0], [0, 0, 0, 1, 0]]], dtype=torch.bool)
    cb.counts = count_pairs(masks, torch.tensor([0, 2]), torch.tensor([1, 2, 0, 3, -1]), torch.tensor([0, 0, 1, -1]))
    assert cb.counts.tolist() == [8, 4, 2, 1, 1] # pairs, marked, marked with known labels, of these right, to be marked
    assert cb.column('removed') == .5 and cb.column('fn_precision') == .5 and cb.column('fn_recall') == 1

def test_accepted_is_the_rate_of_the_last_detection(dls):
    learn = fit(learner(dls, acceptance=lambda t: min(1., 2 * t), every=2), 5)
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
