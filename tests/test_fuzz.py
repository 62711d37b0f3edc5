"Any shape, size, type and option: a right answer, or one line that says what is wrong; never a crash, or no number"
import os, random, re, warnings
from unittest import mock
import numpy as np, pytest, torch, torch.nn.functional as F
from hypothesis import given, HealthCheck, settings, strategies as st
from helpers_method import EVER
from ifnd_nb.config import run_config
from ifnd_nb.detect import accept, false_negatives, pair_quality
from ifnd_nb.clustering import cluster
from ifnd_nb.pairs import drift, near_far_quality
from ifnd_nb.evaluate import few_labels_accuracy, knn_accuracy
from ifnd_nb.probes import linear_probe
from ifnd_nb.glyphs import glyphs
from ifnd_nb.detectors import ClusterDetector
from ifnd_nb.ifnd import ifnd_learner
from ifnd_nb.levels import stable_clusters
from ifnd_nb.loaders import two_view_dls
from ifnd_nb.contrast import enqueue, info_nce, moco_logits, not_negatives
from ifnd_nb.removal import attract, both, eliminate
from ifnd_nb.rivals import debiased
from ifnd_nb.runs import load_checkpoint
from ifnd_nb.sources import image_source
from ifnd_nb.views import augmentations, OneView, TwoViews
from ifnd_nb.matrices import blur_matrix, resample_matrix
from ifnd_nb.draws import hashed_uniforms
from ifnd_nb.weights import load_encoder, save_encoder

more = int(os.environ.get('FUZZ', 1)) # FUZZ=20 tries twenty times as many, and other ones each time
calm = dict(deadline=None, suppress_health_check=list(HealthCheck), derandomize=more==1)
seeds, sizes = st.integers(0, 10**6), st.integers(1, 40)

def rand(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
def unit(*shape, seed=0): return F.normalize(rand(*shape, seed=seed), dim=-1)

def answer_or_line(f, *args, **kw):
    "What f returns; None if it refuses in one line"
    try: return f(*args, **kw)
    except (ValueError, TypeError, FileNotFoundError) as e:
        said = re.sub(r'^Exception occured in `\w+` when calling event `\w+`:\s*', '', str(e)) # fastai's preface
        assert said and '\n' not in said and len(said) < 500, repr(said)
        return None

# ---- data

@settings(max_examples=150*more, **calm)
@given(shape=st.lists(st.integers(0, 12), min_size=0, max_size=5),
       dtype=st.sampled_from(['uint8', 'int64', 'float32', 'float64', 'bool', 'uint16', 'complex64', 'U3']),
       as_tensor=st.booleans(), scale=st.sampled_from([1, 255, -3, float('nan'), 1e30]),
       size=st.sampled_from([None, 1, 5, 16, 0, -2, 2.5, 'x']), channels=st.sampled_from([None, 1, 3, 2]),
       labels=st.sampled_from([None, 'fit', 'short', 'nan']))
def test_arrays_of_any_kind(shape, dtype, as_tensor, scale, size, channels, labels):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        x = (np.random.default_rng(0).random(shape) * scale).astype(dtype)
    if as_tensor:
        try: x = torch.from_numpy(np.asarray(x))
        except TypeError: pass
    n = shape[0] if shape else 0
    y = dict(fit=[i % 3 for i in range(n)], short=[0] * max(0, n - 1), nan=[float('nan')] * n).get(labels)
    images = answer_or_line(image_source, x, y, size=size, channels=channels)
    if images is None: return
    assert len(images)==n and images.channels in (1, 3)
    b = images.batch(range(n))
    assert b[0].dtype==torch.uint8 and b[0].shape==(n, images.channels, images.size, images.size)
    assert b[1].tolist()==list(range(n))

@settings(max_examples=40*more, **calm)
@given(n=st.integers(1, 9), channels=st.sampled_from([1, 3]), side=st.integers(1, 40), size=st.integers(4, 40),
       preset=st.sampled_from([*augmentations]), seed=seeds, epoch=st.integers(0, 10**6))
def test_views_of_any_size(n, channels, side, size, preset, seed, epoch):
    x = torch.randint(0, 256, (n, channels, side, side), dtype=torch.uint8,
                      generator=torch.Generator().manual_seed(seed))
    t = TwoViews(size, **augmentations[preset], seed=seed); t.epoch = epoch
    a, b, idx = t((x, torch.arange(n)))
    for v in (a, b): assert v.shape==(n, channels, size, size) and v.isfinite().all() and v.min() >= 0 and v.max() <= 1
    assert torch.equal(t((x, idx))[0], a)
    assert OneView(size)((x, idx))[0].shape==(n, channels, size, size)

@settings(max_examples=60*more, **calm)
@given(b=st.integers(1, 5), n_in=sizes, n_out=sizes, seed=seeds, sigma=st.floats(0, 50))
def test_matrices_of_views(b, n_in, n_out, seed, sigma):
    u = torch.rand(3, b, generator=torch.Generator().manual_seed(seed))
    m = resample_matrix(u[0] * (1 - u[1]), u[1].clamp(min=.01), u[2] > .5, n_in, n_out)
    g = blur_matrix(torch.full((b,), sigma), n_out)
    for w in (m, g): assert (w >= 0).all(); torch.testing.assert_close(w.sum(-1), torch.ones(w.shape[:2]))
    h = hashed_uniforms(torch.arange(b), n_in, seed)
    assert h.shape==(n_in, b) and (h >= 0).all() and (h < 1).all()

@settings(max_examples=60*more, **calm)
@given(n=st.integers(1, 30), bs=st.sampled_from([1, 2, 7, 40, 0, -1, 2.5]),
       valid=st.sampled_from([None, .2, .9, 0., 1., 2, .01]), size=st.sampled_from([None, 4, 17, 0, 3.5]),
       seed=st.sampled_from([0, -3, 2**40, 'a', 1.5]),
       preset=st.sampled_from([None, 'grey', 'nope', {}, {'flip': .5}, {'flop': 1}]), labelled=st.booleans())
def test_loaders_of_any_options(n, bs, valid, size, seed, preset, labelled):
    x = torch.zeros(n, 1, 9, 9, dtype=torch.uint8)
    dls = answer_or_line(two_view_dls, x, valid, [i % 2 for i in range(n)] if labelled else None, size=size, bs=bs,
                         seed=seed, preset=preset, device='cpu')
    if dls is None: return
    seen = torch.cat([b[2] for b in dls.train])
    assert len(seen)==len(seen.unique())==len(dls.train) * bs and len(dls.train_ds) - len(seen) < bs
    assert sum(len(b[2]) for b in dls.valid)==len(dls.valid_ds)==n - len(dls.train_ds)

@settings(max_examples=30*more, **calm)
@given(concepts=st.sampled_from([1, 3, 11, 0, -1, 10**6, 2.5, 'a']), each=st.sampled_from([1, 2, 0, -4, 'b']),
       seed=st.integers(0, 99))
def test_glyphs_of_any_options(concepts, each, seed):
    g = answer_or_line(glyphs, concepts, each, seed=seed)
    if g is not None: assert len(g)==concepts * each and g.labels.bincount().tolist()==[each] * concepts

# ---- the baseline

@settings(max_examples=60*more, **calm)
@given(bs=st.integers(1, 9), K=sizes, dim=sizes, dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
       tau=st.floats(.02, 5), empty=st.integers(0, 40), seed=seeds)
def test_logits_and_losses_of_any_size_and_type(bs, K, dim, dtype, tau, empty, seed):
    q, k, queue = unit(bs, dim, seed=seed).to(dtype), unit(bs, dim, seed=seed+1).to(dtype), unit(K, dim, seed=seed+2)
    queue_idx = torch.where(torch.arange(K) < empty, -1, torch.arange(K) % 7)
    idx = torch.arange(bs) % 7
    logits = moco_logits(q, k, queue, tau, not_negatives(idx, queue_idx)).requires_grad_()
    assert logits.shape==(bs, 1+K) and logits.dtype==torch.float32 and not logits.isnan().any()
    pseudo = torch.randint(-1, 3, (7, 2), generator=torch.Generator().manual_seed(seed)).int()
    masks = false_negatives(pseudo, idx, queue_idx)
    assert not masks[:, :, queue_idx < 0].any()
    for loss in (info_nce(logits), eliminate(logits, masks), attract(logits, masks), both(logits, masks),
                 debiased(logits)):
        assert loss.isfinite()
        g, = torch.autograd.grad(loss, logits, retain_graph=True)
        assert g.isfinite().all()

@settings(max_examples=40*more, **calm)
@given(n=st.integers(1, 12), K=st.integers(1, 12), steps=st.integers(1, 6), bad=st.integers(0, 12), seed=seeds)
def test_a_queue_never_holds_what_is_no_number(n, K, steps, bad, seed):
    queue, queue_idx, ptr = torch.zeros(K, 3), torch.full((K,), -1), torch.zeros(1, dtype=torch.int64)
    for s in range(steps):
        keys = unit(n, 3, seed=seed+s)
        if bad < n: keys[bad] = float('nan')
        enqueue(queue, queue_idx, ptr, keys, torch.arange(n) + s*n)
    assert queue.isfinite().all() and 0 <= int(ptr) < K and (queue_idx >= 0).sum() <= min(K, n*steps)
    known = queue_idx[queue_idx >= 0]
    assert len(known)==len(known.unique())

# ---- detection

@settings(max_examples=60*more, **calm)
@given(n=st.integers(1, 60), dim=st.integers(1, 12),
       k=st.sampled_from(['stable', 1, 5, 60, 200, 0, -1, [2, 4], [], [3, 'a'], 2.5]),
       zeros=st.integers(0, 60), tau=st.floats(.01, 10), seed=seeds, niter=st.integers(1, 4),
       least=st.sampled_from([-1., .1, 2.]), copies=st.sampled_from([1, 3, 60]))
def test_clusters_of_any_size(n, dim, k, zeros, tau, seed, niter, least, copies):
    x = unit(-(-n // copies), dim, seed=seed).repeat(copies, 1)[:n]; x[:zeros] = 0
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        if k=='stable': c, apart = answer_or_line(stable_clusters, x, least, tau, niter, seed) or (None, None)
        else: c = answer_or_line(cluster, x, k, tau, niter, seed)
    if c is None: assert zeros >= n or k in (0, -1, [], [3, 'a'], 2.5); return
    known = x.norm(dim=1) > 0
    found = int(known.sum()) >= 9 and apart >= least if k=='stable' else True
    assert [len(m) > 0 for m in c.centroids]==[found] * c.labels.shape[1] and (k!='stable' or abs(apart) <= 1)
    assert c.labels.shape==c.confidence.shape and len(c.labels)==n
    assert ((c.labels >= 0) == (known[:, None] & found)).all() # where nothing stands apart, none
    assert c.confidence.isfinite().all() and (c.confidence >= 0).all() and (c.confidence <= 1 + 1e-6).all()
    for h, m in enumerate(c.centroids): assert m.isfinite().all() and c.labels[:, h].max() < max(len(m), 1)
    truth = torch.arange(n) % 3 - (seed % 2)
    for rate in (0., .3, 1.):
        p = accept(c.labels, c.confidence, rate)
        q = pair_quality(p, truth)
        assert len(q)==p.shape[1] and ((q.coverage >= 0) & (q.coverage <= 1)).all() and not (q.precision > 1).any()
        near_far_quality(x, p, truth, anchors=5, seed=seed)
    assert all(-1 <= d <= 2 or d!=d for d in drift(c.labels, c.labels.flip(0)))

@settings(max_examples=60*more, **calm)
@given(options=st.fixed_dictionaries(dict(
    n_clusters=st.sampled_from([None, 'stable', 3, [2, 5], lambda n: n // 4, 0, 'a', [], 999]),
    acceptance=st.sampled_from([None, 0., .5, 1, 1.5, -1, lambda t: 2.]),
    strategy=st.sampled_from(['eliminate', 'attract', 'both', '']),
    detector=st.sampled_from(['ifnd', 'oracle', 'topk', 'quantile', 'nobody']),
    every=st.sampled_from([1, 3, 0, 1.5]), features=st.sampled_from([None, 'bank', 'pass', 'none']),
    recipe=st.sampled_from(['paper', 'stable', 'soup']))), ever=st.booleans())
def test_a_learner_of_any_options(options, ever):
    dls = two_view_dls((torch.arange(24 * 64).view(24, 1, 8, 8) % 251).to(torch.uint8), labels=torch.arange(24) % 3,
                       size=8, bs=4, device='cpu')
    learn = answer_or_line(ifnd_learner, dls, queue_size=8, **options)
    if learn is None: return
    trust = mock.patch.object(ClusterDetector, 'trust', EVER if ever else ClusterDetector.trust)
    with learn.no_bar(), learn.no_logging(), warnings.catch_warnings(), trust:
        warnings.simplefilter('ignore')
        learn.fit(2)
    assert all(p.isfinite().all() for p in learn.model.parameters())

# ---- evaluation

@settings(max_examples=60*more, **calm)
@given(n=st.integers(1, 30), m=st.integers(1, 9), dim=st.integers(1, 9), other=st.integers(0, 1), k=st.integers(-1, 40),
       classes=st.integers(1, 4), bad=st.sampled_from([0., 0., float('nan'), float('inf')]), seed=seeds)
def test_neighbours_and_probes_of_any_size(n, m, dim, other, k, classes, bad, seed):
    x, v = rand(n, dim, seed=seed), rand(m, dim + other, seed=seed+1)
    if bad: x[0, 0] = bad
    y, w = torch.arange(n) % classes, torch.arange(m) % classes
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        tried = ((knn_accuracy, (x, y, v, w, k)), (linear_probe, (x, y, v, w)), (few_labels_accuracy, (x, y, v, w)))
        got = [answer_or_line(f, *a) for f, a in tried]
    assert all(g is None or 0 <= g <= 1 for g in got)
    if other or bad: assert got[0] is None

# ---- files and commands

@settings(max_examples=150*more, **calm)
@given(words=st.dictionaries(st.sampled_from(['strategy', 'detector', 'features', 'n_clusters', 'recipe',
                                              'acceptance']),
                             st.sampled_from(['attract', 'both', 'ifnd', 'bank', 'stable', 'half', '3,4', '3,,4', '',
                                              'x'])),
       numbers=st.dictionaries(st.sampled_from(['size', 'epochs', 'bs', 'queue_size', 'lr', 'tau']),
                               st.one_of(st.integers(), st.floats())))
def test_a_configuration_of_any_values(words, numbers):
    good = dict(data='digits', strategy='eliminate', detector='ifnd', features='bank', bs=64, queue_size=9, lr=.1,
                tau=.1)
    cfg = answer_or_line(run_config, **{**good, **words, **numbers})
    if cfg is not None: assert cfg.epochs >= 1 and cfg.bs >= 2 and cfg.lr > 0 and cfg.tau >= .013

@pytest.mark.parametrize('name, load', [('checkpoint', load_checkpoint), ('encoder.safetensors', load_encoder)])
def test_files_that_were_changed_at_random(name, load, tmp_path):
    learn = ifnd_learner(two_view_dls(torch.zeros(20, 1, 8, 8), size=8, bs=4, device='cpu'), n_clusters=2, queue_size=4)
    learn.create_opt()
    path = tmp_path/name
    if name=='checkpoint':
        torch.save(dict(config={}, rows=[], smooth_loss=(0., 0), model=learn.model.state_dict(), opt={}), path)
    else: save_encoder(learn, path, 'small_resnet')
    good, rng = path.read_bytes(), random.Random(0)
    load(tmp_path if name=='checkpoint' else path)
    for _ in range(150):
        b, i = bytearray(good), rng.randrange(len(good))
        kind = rng.randrange(3)
        if kind==0: b = b[:i]
        elif kind==1: b[i:i+rng.randrange(1, 400)] = b''
        else:
            for _ in range(8):
                b[rng.choice((rng.randrange(len(b)), rng.randrange(2000),
                              len(b) - 1 - rng.randrange(2000)))] ^= 1 << rng.randrange(8)
        path.write_bytes(b)
        answer_or_line(load, tmp_path if name=='checkpoint' else path)
