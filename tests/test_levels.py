"How many clusters stand apart and hold both views: equations, peaks, and what is left where there are none"
import math
import pytest, torch, torch.nn.functional as F
from hypothesis import given, strategies as st
from helpers_method import groups, points, quick
from ifnd_nb.detect import cluster
from ifnd_nb.levels import agreement, best_level, octaves, scores_of_levels, separation, some_of, stable_clusters

torch.set_num_threads(1)

@quick(50)
@given(n=st.integers(1, 10**8))
def test_octaves_rise_by_doubling_and_fit(n):
    levels = octaves(n)
    assert levels == sorted(set(levels)) and 1 <= levels[0] <= max(6, levels[-1])
    assert levels[-1] == min(n, round(2 * math.sqrt(n)))
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
    first, second = (some @ c.centroids[2].T).topk(2, 1).values.T
    assert separation(x, c.centroids, rows=150)[2] == pytest.approx(float(9**.25 * (first - second).mean()), abs=1e-5)

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
    def nearest(v, o): return [max(range(len(o)), key=lambda j: float(i.double() @ o[j].double())) for i in v]
    want = [literal_rand_index(nearest(q, o), nearest(k, o)) for o in c]
    assert agreement(torch.stack([q, k]), c) == pytest.approx(want, abs=1e-9) and all(0 < w < 1 for w in want)
    assert all(abs(o) < .1 for o in agreement(torch.stack([q, k.roll(1, 0)]), c)) # of other images: chance
    holes = torch.stack([q, k])
    holes[0, 3], holes[1, 4], holes[0, 5] = 0, 0, math.nan
    whole = torch.stack([q, k])[:, [i for i in range(90) if i not in (3, 4, 5)]]
    assert agreement(holes, c) == pytest.approx(agreement(whole, c))
    assert agreement(torch.zeros(2, 9, 5), c) == [0] * 3

def alike(x, noise=0.): return torch.stack([x, F.normalize(x + noise * points(*x.shape, 7), dim=1)])

@pytest.mark.parametrize('scores,level', [
    ([.3, .35, .3], 1), ([.9, .7, .6], None), ([.1, .25, .1], None), ([.1, .3, .1, .4, .2], 3),
    ([.1, .4, .1, .3, .2], 1),
    ([.6, .6, .6], None), ([math.nan] * 3, None), ([.9], None), ([.9, .2], None), ([.2, .3, .6], None),
    ([.2, .5], None),
    ([.2, .3, .51, .5], 2), ([.2, .3, .24, .1], 1), ([], None)])
def test_a_level_is_a_peak_or_none(scores, level): assert best_level(scores) == level

# ---- stable clusters

def test_no_number_of_clusters_is_that_of_the_best_level():
    some = stable_clusters(points(400, 12, 0), torch.stack([points(400, 12, 1), points(400, 12, 2)]))
    assert (some.labels == -1).all() and (some.confidence == 0).all() and [len(c) for c in some.centroids] == [0]
    x = F.normalize(points(10, 32, 1).repeat(40, 1) + .3 * points(400, 32, 2), dim=1)
    some, each = stable_clusters(x, alike(x, .1)), cluster(x, octaves(400))
    scores = [s * a for s, a in zip(separation(x, each.centroids).tolist(), agreement(alike(x, .1), each.centroids))]
    h = best_level(scores)
    assert h == 1 and scores_of_levels(x, alike(x, .1), each.centroids) == scores
    assert torch.equal(some.centroids[0], each.centroids[h]) and torch.equal(some.labels[:, 0], each.labels[:, h])
    assert torch.equal(some.confidence[:, 0], each.confidence[:, h])
    other = x[torch.randperm(400, generator=torch.Generator().manual_seed(3))]
    # clusters that stand apart, but part the views
    assert (stable_clusters(x, torch.stack([x, other])).labels == -1).all()

def test_noise_has_no_stable_clusters():
    for seed in range(3):
        x = points(400, 12, seed)
        for finer in (0, 1, 9): # no octave is finer than none
            c = stable_clusters(x, alike(x, .1), finer)
            assert (c.labels == -1).all() and (c.confidence == 0).all() and [len(o) for o in c.centroids] == [0]

def test_views_that_were_not_seen_yet_make_nothing_stable():
    x = groups(400, 10)
    assert (stable_clusters(x, alike(x, .1), seed=0).labels >= 0).all()
    assert (stable_clusters(x, torch.zeros(2, 50, 32), seed=0).labels == -1).all()

@pytest.mark.parametrize('k,finer,want', [(10, 0, 10), (10, 1, 20), (10, 2, 40), (10, 9, 40), (20, 0, 20), (20, 1, 40)])
def test_octaves_finer_as_far_as_there_are_any(k, finer, want):
    x = groups(400, k)
    kw = dict(tau=.2, niter=7, seed=5)
    some, each = stable_clusters(x, alike(x, .1), finer, **kw), cluster(x, want, **kw)
    assert octaves(400) == [5, 10, 20, 40] and [len(c) for c in some.centroids] == [want]
    assert torch.equal(some.labels, each.labels) and torch.equal(some.confidence, each.confidence)

def test_a_second_call_gives_the_same_and_leaves_random_state_alone():
    x, runs = F.normalize(points(10, 32, 1).repeat(40, 1) + .3 * points(400, 32, 2), dim=1), []
    views = alike(x, .1)
    for _ in range(2):
        before = torch.get_rng_state()
        runs.append(stable_clusters(x, views, 1, seed=3))
        assert torch.equal(torch.get_rng_state(), before)
    a, b = runs
    assert torch.equal(a.labels, b.labels) and torch.equal(a.confidence, b.confidence)
    assert torch.equal(a.centroids[0], b.centroids[0])
    assert not torch.equal(stable_clusters(x, views, 1, seed=4).labels, a.labels)

def test_rows_without_an_embedding_have_no_stable_cluster():
    x = groups(400, 10)
    x[3], x[7] = 0, math.nan
    with pytest.warns(UserWarning, match='1 of 400 embeddings are not finite'):
        c = stable_clusters(x, alike(groups(400, 10), .1))
    assert len(c.centroids[0]) == 10 and (c.labels == -1).nonzero()[:, 0].tolist() == [3, 7]
    with pytest.raises(ValueError, match='no finite embedding'):
        stable_clusters(torch.zeros(5, 3), torch.zeros(2, 5, 3))
