"Neighbours, walks along their links, how many clusters stand apart, and that six clusterings agree on them"
import math, warnings
import pytest, torch, torch.nn.functional as F
from hypothesis import example, given, strategies as st
from helpers_method import cone, groups, literal_silhouette, literal_walk, points, quick, recall
from ifnd_nb.kmeans import spherical_kmeans
from ifnd_nb.levels import main_directions, neighbours, silhouette, sizes, smoothed, some_of, stable_clusters

torch.set_num_threads(1)

@quick(50)
@given(n=st.integers(1, 5000), rows=st.integers(1, 6000))
def test_some_are_distinct_rise_and_are_always_the_same(n, rows):
    before, some = torch.get_rng_state(), some_of(n, rows)
    assert len(some) == min(n, rows) and 0 <= some[0] and some[-1] < n and (some.diff() > 0).all()
    assert torch.equal(some_of(n, rows), some) and torch.equal(torch.get_rng_state(), before)

# ---- neighbours

@quick(60)
@given(n=st.integers(1, 60), dim=st.integers(1, 9), k=st.integers(1, 70), distinct=st.integers(1, 60),
       start=st.integers(0, 59), length=st.integers(1, 60), seed=st.integers(0, 10**6))
def test_of_few_the_nearest_others_are_exact(n, dim, k, distinct, start, length, seed):
    x, start = points(distinct, dim, seed)[torch.arange(n) % distinct], start % n
    links = neighbours(x, k)
    assert links.shape == (n, min(k, n - 1)) and links.dtype == torch.int64
    for i, found in enumerate(links.tolist()):
        sims = {j: float(x[i].double() @ x[j].double()) for j in range(n) if j != i}
        assert len(set(found)) == len(found) and i not in found
        assert [sims[j] for j in found] == pytest.approx(sorted(sims.values(), reverse=True)[:len(found)], abs=1e-5)
    some = neighbours(x, k, rows=slice(start, start + length)) # ties may be broken otherwise
    assert some.shape == links[start:start + length].shape
    sims = x @ x.T
    for a, b, s in zip(some, links[start:], sims[start:]): torch.testing.assert_close(s[a], s[b], atol=1e-5, rtol=0)

@pytest.mark.parametrize('x', [groups(6000, 40), groups(6000, 10), cone(groups(6000, 40), .1),
                               torch.cat([groups(5500, 20), groups(1, 1).expand(500, -1)])], ids=range(4))
def test_of_many_most_are_found(x):
    links = neighbours(x)
    assert recall(x, links) > .75
    assert links.shape == (6000, 20) and (links != torch.arange(6000)[:, None]).all()
    assert all(len(set(found)) == 20 for found in links.tolist())
    before = torch.get_rng_state()
    parts = [neighbours(x, rows=slice(i, i + 1500)) for i in range(0, 6000, 1500)]
    assert torch.equal(torch.get_rng_state(), before)
    assert recall(x, torch.cat(parts)) > .75 and (torch.cat(parts) == links).float().mean() > .9

def test_cells_with_too_few_make_no_image_its_own_neighbour():
    x = torch.cat([points(1, 32, 1).repeat(5000, 1), points(40, 32, 5).repeat(2, 1)])
    links = neighbours(x)
    assert (links != torch.arange(len(x))[:, None]).all() and all(len(set(found)) == 20 for found in links.tolist())

# ---- the walk

@quick(60)
@given(n=st.integers(2, 30), k=st.integers(1, 4), dim=st.integers(1, 6), steps=st.integers(0, 5),
       seed=st.integers(0, 10**6))
def test_smoothed_is_a_walk_step_by_step(n, k, dim, steps, seed):
    g, x = torch.Generator().manual_seed(seed), points(n, dim, seed)
    own = torch.arange(n)[:, None]
    links = (own + torch.randint(1, n, (n, k), generator=g)) % n # some of them twice
    want = literal_walk(x, links, steps)
    got = smoothed(x, links, steps).double()
    norm = want.norm(dim=1, keepdim=True) # the smaller it is, the more does float32 turn the row
    torch.testing.assert_close(got * norm, want, atol=1e-5, rtol=0)
    assert ((got.norm(dim=1) - 1).abs() < 1e-5)[norm[:, 0] > 1e-5].all()
    order = torch.randperm(n, generator=g)
    other = smoothed(x[order], order.argsort()[links[order]], steps).double()
    torch.testing.assert_close(other * norm[order], got[order] * norm[order], atol=1e-5, rtol=0)

@pytest.mark.parametrize('spread', [.003, .03, .3, 3.])
def test_a_walk_of_embeddings_in_a_cone_is_exact(spread):
    x = cone(points(400, 128, 0), spread) # of much the same direction, as from an encoder that has learned little
    links = neighbours(x)
    want = literal_walk(x, links, 16)
    assert (smoothed(x, links) * (want / want.norm(dim=1, keepdim=True))).sum(1).min() > .999

def test_smoothed_leaves_embeddings_and_warnings_alone():
    x = groups(200, 5)
    before = x.clone()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        z = smoothed(x, neighbours(x))
    assert torch.equal(x, before) and z.dtype == torch.float32
    y = torch.arange(200) % 5
    assert (z @ z.T)[y[:, None] == y].min() > .99 > .8 > (x @ x.T)[y[:, None] == y].mean() # groups draw together

# ---- how many

@quick(200)
@given(n=st.integers(1, 10**8))
@example(9)
@example(25)
@example(99)
@example(400)
def test_sizes_rise_from_two_and_three_to_the_square_root(n):
    ks = sizes(n)
    assert ks == sorted(set(ks)) and ks[:2] == ([2, 3] if n >= 9 else [])
    assert not ks or ks[-1] == round(math.sqrt(n))
    assert all(abs(b - math.sqrt(2) * a) < 1.25 for a, b in zip(ks, ks[1:]))

@quick(60)
@given(n=st.integers(1, 40), k=st.integers(2, 9), dim=st.integers(1, 8), seed=st.integers(0, 10**6))
def test_silhouette_is_the_equation(n, k, dim, seed):
    x, c = points(n, dim, seed), points(k, dim, seed + 1)
    assert silhouette(x, c) == pytest.approx(literal_silhouette(x, c), abs=1e-4 if dim > 1 else 1e-6)
    assert 0 <= silhouette(x, c) <= 1

def test_silhouette_is_one_on_centroids_and_zero_between_two():
    c = torch.eye(3)
    assert silhouette(c, c) == 1 and silhouette(F.normalize(torch.ones(1, 3), dim=1), c) == 0
    assert silhouette(c[:1].repeat(4, 1), c[:1].repeat(2, 1)) == 0

# ---- stable clusters

def count(c): return [len(o) for o in c.centroids]

def quality(c, y, least):
    "Precision and recall of the pairs that share a cluster at `least` levels or more"
    other = ~torch.eye(len(y), dtype=torch.bool)
    marked = ((c.labels[:, None] == c.labels).sum(2) >= least) & other
    mates = (y[:, None] == y) & other
    return float(mates[marked].float().mean()), float(marked[mates].float().mean())

def test_ten_groups_are_found_from_any_first_centroids():
    x, y, tens, ks = groups(400, 10), torch.arange(400) % 10, 0, sizes(400)
    for seed in range(10):
        c, apart = stable_clusters(x, seed=seed)
        best = ks.index(count(c)[-1])
        assert count(c) == [k for k in ks[best - 2:best + 1] for _ in range(2)] and count(c)[-1] in (7, 10, 14)
        assert apart > .15 and (c.labels >= 0).all() and (c.confidence > 0).all() and (c.confidence <= 1).all()
        precision, found = quality(c, y, 3) # by chance .1
        assert precision > .3 and found > .99
        precision, found = quality(c, y, 6)
        assert precision > .8 and found > .85
        tens += count(c)[-1] == 10
    assert tens > 5

@pytest.mark.parametrize('n', [120, 400])
def test_three_groups_are_found_from_most_first_centroids(n):
    "Both of two starts can end where one group has two centroids"
    y, missed = torch.arange(n) % 3, 0
    for seed in range(10):
        c, apart = stable_clusters(groups(n, 3), seed=seed)
        if apart < .1 or count(c) != [3] * 6:
            missed += 1
            continue
        assert quality(c, y, 3)[1] > .99
        precision, found = quality(c, y, 6)
        assert precision > .99 and found > .75
    assert missed <= 2

def test_of_many_images_some_tell_the_clusters_of_all():
    x, y = groups(9000, 10), torch.arange(9000) % 10
    c, apart = stable_clusters(x)
    some = torch.arange(0, 9000, 7)
    precision, found = quality(c._replace(labels=c.labels[some]), y[some], 6)
    assert apart > .1 and (c.labels >= 0).all() and precision > .6 and found > .75

@pytest.mark.parametrize('n', [12, 21, 40, 60, 400, 1500])
@pytest.mark.parametrize('spread', [.01, 100], ids=['cone', 'all directions'])
def test_noise_has_no_stable_clusters(n, spread):
    for dim in (12, 128):
        for seed in range(3):
            c, apart = stable_clusters(cone(points(n, dim, seed), spread), seed=seed)
            assert apart < .1 and (c.labels == -1).all() and (c.confidence == 0).all() and count(c) == [0] * 6

@pytest.mark.parametrize('n', [9, 20, 60, 400])
def test_a_collapsed_encoder_has_no_stable_clusters(n):
    for seed in range(3):
        c, apart = stable_clusters(points(1, 32, seed).repeat(n, 1))
        assert apart < .1 and (c.labels == -1).all()

def test_levels_are_nearest_centroids_at_and_below_the_best_silhouette():
    x, tau, niter, seed = groups(300, 8, spread=.15), .2, 7, 5
    c, apart = stable_clusters(x, tau=tau, niter=niter, seed=seed)
    v, score = main_directions(x), {}
    z = smoothed(v, neighbours(v))
    for k in sizes(300):
        pair = [spherical_kmeans(z, k, niter, seed + start) for start in (0, 1000)]
        score[k] = max(literal_silhouette(z, o) for o in pair)
    best = max(score, key=score.get)
    below = sizes(300)[:sizes(300).index(best) + 1][-3:]
    assert count(c) == [k for k in below for _ in range(2)] and len(set(count(c))) == 3
    assert apart == pytest.approx(score[best] - score[2], abs=1e-5)
    for h, o in enumerate(c.centroids):
        sims = z.double() @ o.double().T
        torch.testing.assert_close(sims.gather(1, c.labels[:, h:h+1].long())[:, 0], sims.amax(1), atol=1e-6, rtol=0)
        want = (sims / tau).softmax(1).amax(1).float()
        torch.testing.assert_close(c.confidence[:, h], want, atol=1e-5, rtol=0)
    assert not any(torch.equal(c.centroids[h], c.centroids[h + 1]) for h in (0, 2, 4)) # two starts

def test_there_are_labels_from_least_on():
    x = groups(200, 5)
    c, apart = stable_clusters(x)
    same, far = stable_clusters(x, least=apart), stable_clusters(x, least=math.nextafter(apart, 1))
    assert apart > .1 and same[1] == far[1] == apart and torch.equal(same[0].labels, c.labels)
    assert (c.labels >= 0).all() and (far[0].labels == -1).all() and (far[0].confidence == 0).all()
    assert count(far[0]) == [0] * 6 and far[0].labels.shape == (200, 6)
    assert (stable_clusters(points(400, 32, 0), least=0.)[0].labels >= 0).all()

def test_a_second_call_gives_the_same_and_leaves_random_state_alone():
    x, runs = groups(400, 10), []
    for _ in range(2):
        before = torch.get_rng_state()
        runs.append(stable_clusters(x, seed=3))
        assert torch.equal(torch.get_rng_state(), before)
    (a, apart), (b, again) = runs
    assert torch.equal(a.labels, b.labels) and torch.equal(a.confidence, b.confidence) and apart == again > .1
    assert all(torch.equal(o, p) for o, p in zip(a.centroids, b.centroids))
    assert not torch.equal(stable_clusters(x, seed=4)[0].labels, a.labels)

def test_rows_without_an_embedding_have_no_stable_cluster():
    x, there = groups(400, 10), [i for i in range(400) if i not in (3, 7, 9)]
    x[3], x[7], x[9, 2] = 0, math.nan, math.inf
    with pytest.warns(UserWarning, match='2 of 400 embeddings are not finite'): c, apart = stable_clusters(x)
    rest, of_rest = stable_clusters(x[there])
    assert apart == of_rest > .1 and (c.labels[there] >= 0).all() and torch.equal(c.labels[there], rest.labels)
    assert torch.equal(c.confidence[there], rest.confidence)
    assert (c.labels[[3, 7, 9]] == -1).all() and (c.confidence[[3, 7, 9]] == 0).all()

@pytest.mark.filterwarnings('ignore:.*not finite')
@pytest.mark.parametrize('bad', [torch.zeros(5, 3), torch.full((5, 3), math.nan), torch.zeros(0, 3)], ids=range(3))
def test_no_embedding_at_all_is_an_error(bad):
    with pytest.raises(ValueError, match='no finite embedding'): stable_clusters(bad)

def test_embeddings_must_be_of_unit_norm():
    with pytest.raises(ValueError, match='row 2 has norm 3.000'):
        stable_clusters(groups(50, 5) * torch.where(torch.arange(50) == 2, 3, 1)[:, None])

@quick(80)
@given(n=st.integers(1, 40), dim=st.integers(1, 9), distinct=st.integers(1, 40), missing=st.integers(0, 39),
       least=st.sampled_from([-1., .1]), seed=st.integers(0, 10**6))
def test_few_images_never_stop_it(n, dim, distinct, missing, least, seed):
    x = points(distinct, dim, seed)[torch.arange(n) % distinct]
    x[1:1 + missing] = 0
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        c, apart = stable_clusters(x, least, seed=seed)
    there = x.any(1)
    assert c.labels.shape == c.confidence.shape == (n, 6) and len(c.centroids) == 6 and 0 <= apart <= 1
    assert (c.labels[~there] == -1).all() and c.confidence.isfinite().all()
    labelled = int(there.sum()) >= 9 and apart >= least
    assert ((c.labels[there] >= 0) == labelled).all() and all(bool(k) == labelled for k in count(c))
    assert all(o.isfinite().all() for o in c.centroids)

def test_neighbours_may_be_searched_by_another():
    x, y, asked = points(200, 32, 0), torch.arange(200) % 5, []
    x[[0, 1, 2, 3, 4]] = 0
    def of_the_same_group(v):
        asked.append(v)
        return (torch.arange(195)[:, None] + 5 * torch.arange(1, 21)) % 195
    assert stable_clusters(x)[1] < .1
    c, apart = stable_clusters(x, search=of_the_same_group) # noise, but what is linked belongs together
    assert apart > .1 and len(asked) == 1 and torch.equal(asked[0], main_directions(x[5:]))
    c, found = c._replace(labels=c.labels[5:]), quality(c._replace(labels=c.labels[5:]), y[5:], 3)
    assert (c.labels >= 0).all() and found[0] > .3 and found[1] > .99

# ---- main directions

@quick(40)
@given(n=st.integers(2, 40), dim=st.integers(1, 12), keep=st.integers(1, 12), seed=st.integers(0, 999))
def test_main_directions_keep_what_differs_most(n, dim, keep, seed):
    x = torch.randn(n, dim, generator=torch.Generator().manual_seed(seed))
    got = main_directions(x, keep)
    assert got.shape == (n, min(dim, keep)) and got.isfinite().all()
    y = x.double() - x.double().mean(0)
    s, v = torch.linalg.svd(y)[1:]
    if keep < len(s) and s[keep - 1] - s[keep] < .05: return # of two that are as good either will do
    want = y @ v[:keep].T
    far = want.norm(dim=1) > 1e-2 # where a direction means something
    got, want = got.double()[far], F.normalize(want[far], dim=1)
    torch.testing.assert_close(got @ got.T, want @ want.T, atol=1e-3, rtol=0)
