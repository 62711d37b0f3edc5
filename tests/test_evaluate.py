"What the notebooks on evaluation do not show: parity with slow references, and odd shapes"
import math
import pytest, torch, torch.nn.functional as F
from fastai.data.load import DataLoader
from hypothesis import given, strategies as st
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from helpers_method import Body, images, loader, modes, points, quick, states
from ifnd_nb import evaluate as ev
from ifnd_nb.embedding import embed, few_of_each
from ifnd_nb.probes import fit_probe, kmeans_labels, linear_probe

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

@quick(40)
@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 12), st.integers(1, 9), st.integers(1, 6),
       st.integers(1, 40), st.sampled_from([.03, .07, 1.]))
def test_knn_equals_float64_loop(seed, n, m, d, c, k, tau):
    k = min(k, n)
    train_x, train_y, x, _ = problem(seed, n, m, d, c)
    for pred, (votes, gap) in zip(ev.knn_predict(train_x, train_y, x, k, tau).tolist(),
                                  slow_votes(train_x, train_y, x, k, tau)):
        if gap > 1e-5: assert votes.get(pred, 0.) >= max(votes.values()) - 1e-4

@quick(40)
@given(st.integers(0, 10**6), st.integers(1, 60), st.integers(1, 20), st.integers(1, 5), st.integers(1, 60),
       st.integers(1, 200))
def test_blocks_change_nothing(seed, n, m, d, k, chunk):
    "In one-hot directions all similarities are exact, and most of them tie: any of equals may be found"
    g, k = torch.Generator().manual_seed(seed), min(k, n)
    train_x, x = (F.one_hot(torch.randint(0, d, (o,), generator=g), d).float() * 3 for o in (n, m))
    whole, blocks = ev.nearest(train_x, x, k), ev.nearest(train_x, x, k, chunk=chunk)
    all_sims = F.normalize(x, dim=1) @ F.normalize(train_x, dim=1).T
    slow = [sorted((float(s) for s in row), reverse=True)[:k] for row in all_sims]
    for sims, idx in (whole, blocks):
        assert sims.tolist() == slow and torch.equal(all_sims.gather(1, idx), sims)
        assert all(len(set(row)) == k for row in idx.tolist())
    train_x, y, x, _ = problem(seed, n, m, d + 1, 4) # no ties
    assert torch.equal(ev.knn_predict(train_x, y, x, k), ev.knn_predict(train_x, y, x, k, chunk=chunk))

def test_bank_larger_than_one_block():
    train_x, train_y, x, _ = problem(0, 2**16 + 500, 3, 4, 5)
    sims, idx = ev.nearest(train_x, x, 7)
    ref = (F.normalize(x, dim=1) @ F.normalize(train_x, dim=1).T).topk(7, 1)
    assert torch.allclose(sims, ref[0], atol=1e-6) and torch.equal(idx, ref[1])

@pytest.mark.parametrize('chunk', [10_000, 3000])
def test_memory_of_a_large_bank_is_bounded(chunk, monkeypatch):
    seen, real = [], torch.Tensor.topk
    monkeypatch.setattr(torch.Tensor, 'topk', lambda s, *args, **kw: (seen.append(s.numel()), real(s, *args, **kw))[1])
    train_x, train_y, x, _ = problem(0, 3000, 200, 4, 5)
    ev.nearest(train_x, x, 5, chunk=chunk)
    assert max(seen) <= chunk and sum(seen) == 3000 * 200

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
    sims, idx = ev.nearest(train_x * 0, x, 3)
    assert (sims == 0).all() and all(len(set(row)) == 3 for row in idx.tolist())

@pytest.mark.parametrize('change,match', [
    (dict(k=0), 'k=0.*between 1 and 20'), (dict(k=21), 'k=21.*holds 20'),
    (dict(train_x=torch.zeros(20, 2, 2)), r'\(N, D\)|\(n, D\)'),
    (dict(x=torch.full((4, 5), math.inf)), 'x.*4 of 4'), (dict(x=torch.zeros(4, 6)), 'different lengths'),
    (dict(train_y=torch.zeros(19, dtype=torch.long)), '19 labels for 20'),
    (dict(train_y=torch.full((20,), -1)), 'unlabelled'), (dict(train_y=torch.zeros(20)), 'class numbers'),
    (dict(train_x=torch.zeros(0, 5), train_y=torch.zeros(0, dtype=torch.long)), "shape")])
def test_knn_errors_name_argument_and_value(change, match):
    train_x, train_y, x, _ = problem(4, 20, 4, 5, 3)
    with pytest.raises(ValueError, match=match):
        ev.knn_predict(**{**dict(train_x=train_x, train_y=train_y, x=x, k=3), **change})

# ---- linear probe and clusters

def test_linear_probe_separates_what_is_separable():
    train_x, train_y, x, y = problem(5, 200, 50, 6, 3)
    shift = 6 * torch.eye(6)[:3]
    assert linear_probe(train_x + shift[train_y], train_y, x + shift[y], y) == 1.
    assert linear_probe(train_x, train_y, x, y) < .6

@pytest.mark.parametrize('classes', [3, 8])
def test_the_probe_is_scikit_learns(classes):
    from sklearn.linear_model import LogisticRegression
    y = torch.arange(160) % classes
    x = points(160, 12, 0) + .3 * points(classes, 12, 1)[y]
    w, bias = fit_probe(x.double(), y, l2=.02, max_iter=1000, chunk=100) # in parts of a few rows
    theirs = LogisticRegression(C=1/(.02*160), max_iter=5000, tol=1e-9).fit(x.double().numpy(), y.numpy())
    torch.testing.assert_close(w, torch.tensor(theirs.coef_), atol=3e-3, rtol=0)
    torch.testing.assert_close(bias - bias.mean(), torch.tensor(theirs.intercept_ - theirs.intercept_.mean()),
                               atol=3e-3, rtol=0)

def test_linear_probe_is_quiet_repeatable_and_clear(recwarn):
    train_x, train_y, x, y = problem(6, 100, 30, 20, 4)
    a = linear_probe(train_x, train_y, x, y, max_iter=1)
    assert a == linear_probe(train_x, train_y, x, y, max_iter=1)
    assert not [w for w in recwarn if 'onverge' in str(w.message)]
    with pytest.raises(ValueError, match='two classes'): linear_probe(train_x, train_y * 0, x, y)

@quick(40)
@given(st.lists(st.tuples(st.integers(-1, 5), st.integers(-1, 7)), min_size=1, max_size=60))
def test_cluster_scores_equal_slow_reference(pairs):
    both = [(y, c) for y, c in pairs if y >= 0 and c >= 0]
    got = ev.cluster_scores(*map(list, zip(*pairs)))
    if not both: assert all(map(math.isnan, got.values())); return
    y, c = zip(*both)
    purity = sum(max(sum(a == k for a, b in both if b == j) for k in set(y)) for j in set(c)) / len(both)
    assert got['purity'] == pytest.approx(purity)
    assert got['nmi'] == pytest.approx(normalized_mutual_info_score(y, c))
    assert got['ari'] == pytest.approx(adjusted_rand_score(y, c))

def test_kmeans_finds_what_is_there_from_a_seed():
    _, y, x, _ = problem(7, 90, 90, 5, 3)
    x = .1 * x + torch.eye(5)[y]
    assert ev.cluster_scores(y, kmeans_labels(x, 3))['ari'] == 1.
    assert torch.equal(kmeans_labels(x, 7, seed=1), kmeans_labels(x, 7, seed=1))
    with pytest.raises(ValueError, match='n_clusters=91'): kmeans_labels(x, 91)

# ---- few labels

@quick(40)
@given(seed=st.integers(0, 10**6), c=st.integers(2, 4), each=st.integers(1, 5), m=st.integers(1, 9))
def test_with_every_label_known_few_labels_are_the_nearest_neighbour(seed, c, each, m):
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(c).repeat(each)
    train_x, x = torch.randn(len(y), 3, generator=g), torch.randn(m, 3, generator=g)
    truth = torch.randint(c, (m,), generator=g)
    want = ev.knn_accuracy(train_x, y, x, truth, k=1)
    assert ev.few_labels_accuracy(train_x, y, x, truth, each, draws=3) == pytest.approx(want)

def test_few_labels_draw_as_many_of_each_class():
    y = torch.tensor([0] * 50 + [1] * 3)
    x = F.one_hot(y, 2).float()
    assert ev.few_labels_accuracy(x, y, x, y, per_class=3) == 1
    with pytest.raises(ValueError, match='per_class=4, but the rarest class has 3'):
        ev.few_labels_accuracy(x, y, x, y, per_class=4)

@quick(30)
@given(seed=st.integers(0, 10**6), c=st.integers(1, 5), each=st.integers(1, 6), data=st.data())
def test_few_labels_equal_a_loop_over_draws(seed, c, each, data):
    per_class = data.draw(st.integers(1, each))
    g = torch.Generator().manual_seed(seed)
    y = 2 * torch.arange(c).repeat(each)[torch.randperm(c * each, generator=g)] # classes need not be consecutive
    train_x, x = torch.randn(len(y), 3, generator=g), torch.randn(5, 3, generator=g)
    truth = y[torch.randint(len(y), (5,), generator=g)]
    known = few_of_each(y, per_class, draws=4, seed=seed)
    for draw in known:
        assert y[draw].tolist() == [2*i for i in range(c) for _ in range(per_class)] and len(draw.unique()) == len(draw)
    want = sum(ev.knn_accuracy(train_x[o], y[o], x, truth, k=1) for o in known) / 4
    assert ev.few_labels_accuracy(train_x, y, x, truth, per_class, draws=4, seed=seed) == pytest.approx(want)

# ---- embed

@quick(40)
@given(st.permutations(range(12)), st.integers(1, 13))
def test_embed_places_rows_by_index(order, bs):
    x, enc = images(12), Body()
    order = torch.tensor(order)
    v, y = embed(enc, [(x[i], i, i * 2) for i in order.split(bs)], no_bar=True)
    assert torch.allclose(v, enc.eval()(x).detach(), atol=1e-6) and y.tolist() == list(range(0, 24, 2))
    assert not v.requires_grad

def test_embed_restores_modes_and_random_state_also_after_an_error():
    enc = Body(); enc.norm.eval()
    dl = DataLoader(list(zip(images(), torch.arange(30))), bs=7, shuffle=True)
    before = modes(enc), states()
    embed(enc, dl, no_bar=True)
    assert (modes(enc), states()) == before
    class Broken(Body):
        def forward(self, x): raise RuntimeError('out of memory')
    enc = Broken(); enc.norm.eval()
    before = states()
    with pytest.raises(RuntimeError, match='out of memory'): embed(enc, loader(), no_bar=True)
    assert modes(enc) == [True, True, False, True] and states() == before

def test_embed_takes_any_callable_memory_format_and_no_labels():
    v, y = embed(lambda x: x.half(), loader(labels=False), no_bar=True)
    assert y is None and v.dtype == torch.float32 and v.shape == (30, 36)
    enc = Body().to(memory_format=torch.channels_last)
    last = [(x.to(memory_format=torch.channels_last), i) for x, i, _ in loader()]
    assert torch.allclose(embed(enc, last, no_bar=True)[0], embed(enc, loader(), no_bar=True)[0], atol=1e-6)

@pytest.mark.parametrize('dl,match', [(loader()[:-1] + loader()[-2:-1], '7 repeated'), (loader()[1:], '7 missing'),
    (DataLoader(list(zip(images(), torch.arange(30))), bs=7, drop_last=True), 'of 30 images.*2 missing')])
def test_embed_refuses_lost_or_repeated_rows(dl, match):
    with pytest.raises(ValueError, match=match): embed(Body(), dl, no_bar=True)
