"What would disturb a lesson in 03_detection: slow references in float64, awkward sizes and values, several processes"
import math, warnings
import numpy as np, pytest, torch
import torch.nn.functional as F
from hypothesis import assume, given, settings, strategies as st
from ifnd_nb.banks import EmbeddingBank, ViewBank
from ifnd_nb.detect import _octave_to_use, accept, assign, cluster, drift, false_negatives, merge_clusters
from ifnd_nb.detect import near_far_quality, neighbours, neighbours_agree, pair_quality, three_levels
from ifnd_nb.kmeans import spherical_kmeans
from ifnd_nb.levels import agreement, best_level, octaves, separation, some_of

from ifnd_nb.loaders import plain_dl, two_view_dls
from ifnd_nb.evaluate import embed
from ifnd_nb.encoders import Encoder, create_encoder

torch.set_num_threads(1)

def points(n, dim, seed): return F.normalize(torch.randn(n, dim, generator=torch.Generator().manual_seed(seed)), dim=1)

sizes = dict(n=st.integers(1, 60), dim=st.integers(1, 9), seed=st.integers(0, 10**6))

@settings(max_examples=60, deadline=None)
@given(**sizes, k=st.integers(1, 20), tau=st.floats(.02, 2.))
def test_assign_agrees_with_float64(n, dim, seed, k, tau):
    x, c = points(n, dim, seed), points(k, dim, seed + 1)
    labels, confidence = assign(x, c, tau)
    for i in range(n):
        sims = [float(x[i].double() @ c[j].double()) for j in range(k)]
        assert sims[labels[i]] >= max(sims) - 1e-5
        want = math.exp(max(sims)/tau) / sum(math.exp(s/tau) for s in sims)
        assert confidence[i] == pytest.approx(want, rel=1e-6 + 3e-6/tau) # float32 cosines over tau
    assert labels.dtype == torch.int32

@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 40), levels=st.integers(1, 3), rate=st.floats(0, 1), seed=st.integers(0, 10**6), ties=st.booleans())
def test_accept_agrees_with_a_sort(n, levels, rate, seed, ties):
    rng = np.random.default_rng(seed)
    labels, conf = torch.tensor(rng.integers(0, 5, (n, levels)), dtype=torch.int32), torch.tensor(rng.integers(1, 4, (n, levels)) / 3 if ties else rng.random((n, levels)))
    got, count = accept(labels, conf, rate), math.floor(rate * n + 1e-7)
    for h in range(levels):
        keep = sorted(range(n), key=lambda i: (-conf[i, h].item(), i))[:count]
        assert got[:, h].tolist() == [labels[i, h].item() if i in keep else -1 for i in range(n)]

@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 30), levels=st.integers(1, 3), bs=st.integers(1, 40), K=st.integers(1, 50), seed=st.integers(0, 10**6))
def test_false_negatives_agree_with_a_loop(n, levels, bs, K, seed):
    rng = np.random.default_rng(seed)
    pseudo = torch.tensor(rng.integers(-1, 4, (n, levels)), dtype=torch.int32)
    idx, queue = torch.tensor(rng.integers(0, n, bs)), torch.tensor(rng.integers(-1, n, K))
    mask = false_negatives(pseudo, idx, queue)
    for h in range(levels):
        for a, i in enumerate(idx.tolist()):
            for b, s in enumerate(queue.tolist()):
                assert mask[h, a, b].item() == (s >= 0 and s != i and pseudo[i, h].item() == pseudo[s, h].item() != -1)

@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 40), levels=st.integers(1, 3), seed=st.integers(0, 10**6))
def test_pair_quality_agrees_with_all_pairs(n, levels, seed):
    rng = np.random.default_rng(seed)
    pseudo, truth = torch.tensor(rng.integers(-1, 4, (n, levels))), torch.tensor(rng.integers(-1, 3, n))
    table = pair_quality(pseudo, truth)
    for h in range(levels):
        counts = dict(marked=0, same=0, both=0, all=0)
        for i in range(n):
            for j in range(i):
                if truth[i] < 0 or truth[j] < 0: continue
                m, s = bool(pseudo[i, h] == pseudo[j, h] != -1), bool(truth[i] == truth[j])
                for name, hit in dict(marked=m, same=s, both=m and s, all=True).items(): counts[name] += hit
        ratio = lambda a, b: a / b if b else math.nan
        assert table.precision[h] == pytest.approx(ratio(counts['both'], counts['marked']), nan_ok=True)
        assert table.recall[h] == pytest.approx(ratio(counts['both'], counts['same']), nan_ok=True)
        assert table.coverage[h] == pytest.approx(counts['marked'] / max(1, counts['all']))

def test_near_and_far_pairs_sum_up_to_all_pairs():
    x, truth = points(80, 6, 0), torch.arange(80) % 4
    pseudo = torch.stack([truth, torch.arange(80) % 3], 1).int()
    table = near_far_quality(x, pseudo, truth, anchors=80)
    assert table.near_recall[0] == table.far_recall[0] == table.near_precision[0] == table.far_precision[0] == 1
    assert (table.near_recall[1] + table.far_recall[1]) / 2 == pytest.approx(pair_quality(pseudo[:, 1], truth).recall[0], abs=.01)

# ---- k-means

def slow_kmeans(x, first, rounds):
    "Centroids in float64, and whether no cluster ever ran empty and no image was ever halfway between two"
    c, clear = x[first].clone(), True
    for _ in range(rounds):
        sims = [[float(v @ o) for o in c] for v in x]
        y = [row.index(max(row)) for row in sims]
        clear &= all(len(c) < 2 or sorted(row)[-1] - sorted(row)[-2] > 1e-5 for row in sims) and len(set(y)) == len(c)
        for j in set(y):
            total = sum(v for v, y_i in zip(x, y) if y_i == j)
            clear &= float(total.norm()) > 1e-3
            c[j] = total / total.norm()
    return c, clear

@settings(max_examples=80, deadline=None)
@given(n=st.integers(2, 40), dim=st.integers(2, 6), k=st.integers(1, 6), spread=st.floats(.05, 1.), rounds=st.integers(1, 6), seed=st.integers(0, 10**6))
def test_kmeans_agrees_with_float64(n, dim, k, spread, rounds, seed):
    means = points(k, dim, seed + 1)
    x, k = F.normalize(means[torch.arange(n) % k] + spread * points(n, dim, seed), dim=1), min(k, n)
    want, clear = slow_kmeans(x.double(), np.random.RandomState(seed).choice(n, size=k, replace=False), rounds)
    assume(clear) # float32 may decide otherwise where float64 hardly decides
    torch.testing.assert_close(spherical_kmeans(x, k, rounds, seed).double(), want, atol=1e-4, rtol=0)

@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 40), dim=st.integers(1, 5), distinct=st.integers(1, 4), k=st.integers(1, 60), seed=st.integers(0, 10**6))
def test_awkward_data_never_stop_a_clustering(n, dim, distinct, k, seed):
    x = points(distinct, dim, seed)[torch.arange(n) % distinct]
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        c = cluster(x, [k, 2*k])
    assert (c.labels >= 0).all() and c.confidence.isfinite().all() and (c.confidence > 0).all() and all(o.isfinite().all() for o in c.centroids)
    assert [len(o) for o in c.centroids] == [min(k, n), min(2*k, n)]

def test_same_seed_same_clusters_and_random_state_is_left_alone():
    x = points(300, 8, 0)
    torch.manual_seed(1); np.random.seed(1)
    a = cluster(x, [5, 20], seed=3)
    after = torch.rand(1), np.random.rand()
    torch.manual_seed(1); np.random.seed(1)
    assert (torch.rand(1), np.random.rand()) == after
    b = cluster(x, [5, 20], seed=3)
    assert torch.equal(a.labels, b.labels) and torch.equal(a.confidence, b.confidence)
    assert not torch.equal(cluster(x, [5, 20], seed=4).labels, a.labels)

def test_clustering_is_quiet(capfd):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        cluster(points(60, 4, 0), [3, 50])
    assert capfd.readouterr() == ('', '')

def test_rows_without_an_embedding():
    x = points(60, 4, 0)
    x[3], x[7] = 0, math.nan
    with pytest.warns(UserWarning, match='1 of 60 embeddings are not finite'): c = cluster(x, 5)
    assert c.labels[[3, 7]].tolist() == [[-1], [-1]] and (c.labels[c.labels[:, 0] >= 0].shape[0]) == 58
    assert (accept(c.labels, c.confidence, 1.)[[3, 7]] == -1).all()
    with pytest.raises(ValueError, match='no finite embedding'), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        cluster(torch.full((5, 3), math.inf), 2)
    for bad in (0, [], [3, 0], 2.5, '9'):
        with pytest.raises(ValueError, match='n_clusters'): cluster(points(9, 3, 0), bad)

@settings(max_examples=50, deadline=None)
@given(n=st.integers(1, 10**8))
def test_three_levels_rise_and_fit(n):
    levels = three_levels(n)
    assert levels == sorted(set(levels)) and 1 <= levels[0] and levels[-1] <= n

@settings(max_examples=50, deadline=None)
@given(n=st.integers(1, 10**8))
def test_octaves_rise_by_doubling_and_fit(n):
    levels = octaves(n)
    assert levels == sorted(set(levels)) and 1 <= levels[0] <= max(6, levels[-1]) and levels[-1] == min(n, round(2 * math.sqrt(n)))
    assert all(abs(b - 2*a) <= 1 for a, b in zip(levels, levels[1:])) and (n < 9 or 3 <= levels[0] <= 6)

def test_separation_is_the_equation():
    x = points(300, 6, 0)
    x[5] = 0
    c, x = cluster(x, [1, 4, 9]), x[x.norm(dim=1) > 0]
    v, want = x.double(), []
    for o in c.centroids:
        sims = [sorted((float(i @ j) for j in o.double()), reverse=True) for i in v]
        want.append(len(o)**.25 * sum(s[0] - s[1] if len(s) > 1 else 0 for s in sims) / len(sims))
    assert separation(x, c.centroids).tolist() == pytest.approx(want, abs=1e-5)
    some = x[some_of(len(x), 150)] # of many rows, some
    assert separation(x, c.centroids, rows=150)[2] == pytest.approx(float(9**.25 * (lambda t: (t[:, 0] - t[:, 1]).mean())((some @ c.centroids[2].T).topk(2, 1).values)), abs=1e-5)

def literal_rand_index(a, b):
    "The adjusted Rand index, pair by pair"
    pairs = [(a[i] == a[j], b[i] == b[j]) for i in range(len(a)) for j in range(i)]
    one, other, both = sum(p for p, _ in pairs), sum(q for _, q in pairs), sum(p and q for p, q in pairs)
    chance = one * other / len(pairs)
    return (both - chance) / ((one + other) / 2 - chance)

def test_agreement_is_the_equation():
    c = cluster(points(90, 5, 0), [2, 6, 20]).centroids
    q = points(90, 5, 1)
    k = F.normalize(q + .6 * points(90, 5, 2), dim=1)
    want = [literal_rand_index(*([max(range(len(o)), key=lambda j: float(i.double() @ o[j].double())) for i in v] for v in (q, k))) for o in c]
    assert agreement(torch.stack([q, k]), c) == pytest.approx(want, abs=1e-9) and all(0 < w < 1 for w in want)
    assert all(abs(o) < .1 for o in agreement(torch.stack([q, k.roll(1, 0)]), c)) # of other images: chance
    holes = torch.stack([q, k])
    holes[0, 3], holes[1, 4], holes[0, 5] = 0, 0, math.nan
    assert agreement(holes, c) == pytest.approx(agreement(torch.stack([q, k])[:, [i for i in range(90) if i not in (3, 4, 5)]], c))
    assert agreement(torch.zeros(2, 9, 5), c) == [0] * 3

def alike(x, noise=0.): return torch.stack([x, F.normalize(x + noise * points(*x.shape, 7), dim=1)])

def test_no_number_of_clusters_is_that_of_the_best_level():
    some = cluster(points(400, 12, 0), views=torch.stack([points(400, 12, 1), points(400, 12, 2)]))
    assert (some.labels == -1).all() and (some.confidence == 0).all() and [len(c) for c in some.centroids] == [0]
    x = F.normalize(points(10, 32, 1).repeat(40, 1) + .3 * points(400, 32, 2), dim=1)
    some, each = cluster(x, views=alike(x, .1)), cluster(x, octaves(400))
    h = best_level([s * a for s, a in zip(separation(x, each.centroids).tolist(), agreement(alike(x, .1), each.centroids))])
    assert h == 1 and torch.equal(some.centroids[0], each.centroids[h]) and torch.equal(some.labels[:, 0], each.labels[:, h]) and torch.equal(some.confidence[:, 0], each.confidence[:, h])
    other = x[torch.randperm(400, generator=torch.Generator().manual_seed(3))]
    assert (cluster(x, views=torch.stack([x, other])).labels == -1).all() # clusters that stand apart, but part the views
    with pytest.raises(ValueError, match='n_clusters=None needs views'): cluster(x)

def test_where_nothing_stands_apart_as_many_clusters_as_last():
    x, each = points(400, 12, 0), cluster(points(400, 12, 0), octaves(400))
    views = torch.zeros(2, 9, 12)
    for last, h in ((20, 2), (22, 2), (1, 0), (400, 3)):
        some = cluster(x, last=last, views=views)
        assert torch.equal(some.labels[:, 0], each.labels[:, h]) and torch.equal(some.confidence[:, 0], each.confidence[:, h])
        assert torch.equal(cluster(x, last=last, finer=1, views=views).labels, some.labels) # no octave finer each time
    apart = F.normalize(points(10, 32, 1).repeat(40, 1) + .3 * points(400, 32, 2), dim=1)
    assert torch.equal(cluster(apart, last=40, views=alike(apart)).labels, cluster(apart, views=alike(apart)).labels)

@settings(max_examples=500, deadline=None)
@given(scores=st.lists(st.sampled_from([0., .25, .3, .5, .9, math.nan]), min_size=1, max_size=6), finer=st.integers(0, 7), last=st.integers(0, 200))
def test_leaving_the_finest_octave_out_changes_nothing(scores, finer, last):
    n = (1, 9, 36, 144, 576, 2304)[len(scores) - 1]
    sizes, h, made = octaves(n), best_level(scores), []
    def kmeans(k): made.append(k); return torch.zeros(k, 1)
    got = _octave_to_use(kmeans, n, lambda found: [scores[sizes.index(len(c))] for c in found], finer, last)
    want = sizes[min(h + finer, len(sizes) - 1)] if h is not None else min(sizes, key=lambda k: abs(k - last)) if last else 0
    assert len(got) == want and len(set(made)) == len(made)
    assert (sizes[-1] in made) == (len(sizes) == 1 or want == sizes[-1] or best_level([*scores[:-1], -1.]) == len(sizes) - 2)

@pytest.mark.parametrize('scores,level', [([.3, .35, .3], 1), ([.9, .7, .6], None), ([.1, .25, .1], None), ([.1, .3, .1, .4, .2], 3), ([.1, .4, .1, .3, .2], 1), ([.6, .6, .6], None), ([math.nan] * 3, None), ([.9], None), ([.9, .2], None), ([.2, .3, .6], None), ([.2, .5], None), ([.2, .3, .51, .5], 2), ([.2, .3, .24, .1], 1), ([], None)])
def test_a_level_is_a_peak_or_none(scores, level): assert best_level(scores) == level

@settings(max_examples=50, deadline=None)
@given(n=st.integers(1, 60), rows=st.integers(1, 70), batches=st.lists(st.lists(st.integers(0, 10**6), min_size=1, max_size=9), max_size=5))
def test_both_views_of_some_images(n, rows, batches):
    bank, want, looked_at = ViewBank(n, 3, rows), torch.zeros(2, n, 3), some_of(n, rows)
    assert len(set(looked_at.tolist())) == len(looked_at) == min(n, rows) and looked_at.max() < n
    for i, batch in enumerate(batches):
        idx = torch.tensor(list(dict.fromkeys(b % n for b in batch)))
        q, k = points(len(idx), 3, i), points(len(idx), 3, i + 99)
        bank.update(idx, q.half(), k.half())
        want[:, idx] = torch.stack([q, k]).half().float()
    assert torch.equal(bank.views, want[:, looked_at]) and (bank.both[:, -1] == 0).all()

def test_drift_does_not_depend_on_numbers():
    labels = torch.randint(0, 5, (200, 2), generator=torch.Generator().manual_seed(0))
    assert drift(labels, (labels + 3) % 5) == pytest.approx([0, 0])
    other = torch.randint(0, 5, (200, 2), generator=torch.Generator().manual_seed(1))
    assert all(.9 < d < 1.1 for d in drift(labels, other))
    assert math.isnan(drift(labels, torch.full_like(labels, -1))[0])

def test_keys_are_kept_by_index():
    bank = EmbeddingBank(10, 3)
    bank.update(torch.tensor([7, 2]), points(2, 3, 0).half(), 4)
    assert bank.age(6).tolist() == [-1, -1, 2, -1, -1, -1, -1, 2, -1, -1]
    bank.update(torch.tensor([7, 3]), torch.tensor([[math.nan, 0, 0], [0, 1, math.inf]]), 5) # neither kept nor counted
    assert bank.age(6).tolist() == [-1, -1, 2, -1, -1, -1, -1, 2, -1, -1] and bank.keys.isfinite().all()
    other = EmbeddingBank(10, 3); other.load_state_dict(bank.state_dict())
    assert torch.equal(other.keys, bank.keys) and torch.equal(other.seen, bank.seen)

# ---- other devices, other processes

def _worker(rank, world, parts, file, results):
    torch.set_num_threads(1)
    torch.distributed.init_process_group('gloo', init_method=f'file://{file}', rank=rank, world_size=world)
    c = cluster(parts[rank], [6, 30], seed=5, sharded=True)
    torch.save(dict(labels=c.labels, confidence=c.confidence, centroids=c.centroids), f'{results}/{rank}')
    torch.distributed.destroy_process_group()

@pytest.mark.parametrize('cut', [150, 37, 0])
def test_two_processes_cluster_as_one(cut, tmp_path):
    x = points(300, 8, 0)
    one = cluster(x, [6, 30], seed=5)
    parts = [x[:cut], x[cut:]]
    torch.multiprocessing.spawn(_worker, (2, parts, tmp_path/'meet', tmp_path), nprocs=2)
    a, b = (torch.load(tmp_path/str(r), weights_only=True) for r in range(2))
    for c1, ca, cb in zip(one.centroids, a['centroids'], b['centroids']):
        assert torch.equal(ca, cb)
        torch.testing.assert_close(c1, ca, atol=1e-5, rtol=0)
    assert torch.equal(torch.cat([a['labels'], b['labels']]), one.labels)
    torch.testing.assert_close(torch.cat([a['confidence'], b['confidence']]), one.confidence, atol=1e-5, rtol=0)

def _pass_worker(rank, world, file, results):
    "Each process embeds a shard of the images in one pass, and clusters it with the others"
    torch.set_num_threads(1)
    torch.distributed.init_process_group('gloo', init_method=f'file://{file}', rank=rank, world_size=world)
    dls, encoder = small_images()
    mine = range(rank, len(dls.train_ds), world)
    x, _ = embed(encoder, plain_dl(dls, dls.train_ds.subset(mine)), no_bar=True)
    torch.save(dict(labels=cluster(x, [4, 12], sharded=True).labels, x=x), f'{results}/{rank}')
    torch.distributed.destroy_process_group()

def small_images():
    dls = two_view_dls(torch.rand(101, 1, 16, 16, generator=torch.Generator().manual_seed(0)), bs=8, device='cpu')
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return dls, Encoder(create_encoder('small_resnet', 1, 16), 16)

def test_a_sharded_pass_embeds_and_clusters_as_one_process(tmp_path):
    torch.multiprocessing.spawn(_pass_worker, (2, tmp_path/'meet', tmp_path), nprocs=2)
    dls, encoder = small_images()
    x, _ = embed(encoder, plain_dl(dls), no_bar=True)
    parts = [torch.load(tmp_path/str(r), weights_only=True) for r in range(2)]
    assert len(x) % 2 == 1 # an uneven last shard loses and doubles nothing
    order = torch.cat([torch.arange(r, len(x), 2) for r in range(2)])
    torch.testing.assert_close(torch.cat([p['x'] for p in parts]), x[order], atol=1e-5, rtol=0)
    assert torch.equal(torch.cat([p['labels'] for p in parts]), cluster(x[order], [4, 12]).labels)

def test_neighbours_in_all_clusters_are_the_nearest():
    x = points(60, 5, 0)
    near = neighbours(x, spherical_kmeans(x, 6), n_near=4, probes=6)
    assert torch.equal(near.sort(1)[0], (x @ x.T).fill_diagonal_(-2).topk(4).indices.sort(1)[0])

def test_neighbours_of_many_equal_images_and_of_too_few_images():
    x = points(1, 5, 0).expand(30, 5).contiguous()
    near = neighbours(x, spherical_kmeans(x, 1), n_near=3)
    assert near.shape == (30, 3) and (near >= 0).all()
    few = neighbours(x[:2], x[:1], n_near=4)
    assert few.tolist() == [[1, 0, 0, 0], [0, 1, 1, 1]]

@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(2, 20), H=st.integers(1, 3), k=st.integers(1, 5))
def test_neighbours_agree_is_the_share(seed, n, H, k):
    g = torch.Generator().manual_seed(seed)
    labels, near = torch.randint(0, 3, (n, H), generator=g), torch.randint(0, n, (n, k), generator=g)
    want = [[sum(int(labels[j, h] == labels[i, h]) for j in near[i]) / k for h in range(H)] for i in range(n)]
    torch.testing.assert_close(neighbours_agree(labels, near), torch.tensor(want))

def test_merging_follows_the_links():
    fine = torch.arange(12).repeat_interleave(5)                     # twelve clusters of five images
    group = torch.tensor([0, 1, 2] * 4)                              # in three groups
    g = torch.Generator().manual_seed(0)
    near = torch.stack([torch.randperm(60, generator=g) for _ in range(60)])
    near = torch.stack([row[group[fine[row]] == group[fine[i]]][:6] for i, row in enumerate(near)])
    levels = merge_clusters(fine, near, [3, 6, 12, 20])
    assert len(torch.stack([levels[:, 0], group]).unique(dim=1).T) == 3
    for coarse, finer in zip(levels.T, levels.T[1:]): assert len(torch.stack([coarse, finer]).unique(dim=1).T) == len(finer.unique())
    assert [len(l.unique()) for l in levels.T] == [3, 6, 12, 12]

def test_nested_clusters_do_not_mind_odd_data():
    x = points(40, 6, 0)
    assert nested_clusters(x[:1], [1, 3]).labels.tolist() == [[0, 0]]
    same = x[:1].expand(20, 6).contiguous()
    assert (nested_clusters(same, [2, 4]).labels >= 0).all()
    holes = torch.cat([x, torch.zeros(3, 6)])
    c = nested_clusters(holes, [3, 9])
    assert (c.labels[-3:] == -1).all() and (c.confidence[-3:] == 0).all() and (c.labels[:-3] >= 0).all()
    with pytest.raises(ValueError, match='no finite embedding'): nested_clusters(torch.zeros(5, 6))
