"k-means against float64 and faiss's loop; candidates in bf16 against float64; sums in the order of a sort"
import numpy as np, pytest, torch, torch.nn.functional as F
from faiss.contrib.clustering import DatasetAssign, kmeans as faiss_loop
from fake_cuda import CUDA, FakeCuda
from hypothesis import assume, given, strategies as st
from helpers_method import groups, points, quick
from ifnd_nb import kmeans as room
from ifnd_nb.kmeans import candidates, cluster_sums, highest, nearest_by_candidates, nearest_exactly, sorted_sums, spherical_kmeans

torch.set_num_threads(1)

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

@quick(80)
@given(n=st.integers(2, 40), dim=st.integers(2, 6), k=st.integers(1, 6), spread=st.floats(.05, 1.),
       rounds=st.integers(1, 6), seed=st.integers(0, 10**6))
def test_kmeans_agrees_with_float64(n, dim, k, spread, rounds, seed):
    means = points(k, dim, seed + 1)
    x, k = F.normalize(means[torch.arange(n) % k] + spread * points(n, dim, seed), dim=1), min(k, n)
    want, clear = slow_kmeans(x.double(), np.random.RandomState(seed).choice(n, size=k, replace=False), rounds)
    assume(clear) # float32 may decide otherwise where float64 hardly decides
    torch.testing.assert_close(spherical_kmeans(x, k, rounds, seed).double(), want, atol=1e-4, rtol=0)

class ForFaiss(DatasetAssign):
    def __init__(self, x): self.x = x
    def count(self): return len(self.x)
    def dim(self): return self.x.shape[1]
    def get_subset(self, indices): return self.x[torch.as_tensor(indices)]
    def assign_to(self, centroids, weights=None):
        y = nearest_exactly(self.x, F.normalize(centroids, dim=1))
        return y.numpy(), torch.zeros(1), torch.zeros_like(centroids).index_add_(0, y, self.x)

@pytest.mark.parametrize('n, k, repeats', [(200, 9, 1), (300, 40, 30), (64, 64, 1), (90, 30, 10)])
def test_the_loop_is_that_of_faiss_to_the_bit(n, k, repeats, capsys):
    x = points(n // repeats, 8, 0).repeat(repeats, 1) # the same row again and again leaves clusters empty
    for rounds in (1, 7):
        want = F.normalize(faiss_loop(k, ForFaiss(x), niter=rounds, seed=5, verbose=False), dim=1)
        assert torch.equal(spherical_kmeans(x, k, rounds, seed=5), want)

# ---- candidates

@quick(60)
@given(rows=st.integers(1, 9), k=st.integers(1, 40), n=st.integers(1, 5), seed=st.integers(0, 999))
def test_highest(rows, k, n, seed):
    x = torch.randn(rows, k, generator=torch.Generator().manual_seed(seed))
    values, at = highest(x.clone(), n)
    assert torch.equal(values, x.sort(1, descending=True).values[:, :n]) and torch.equal(x.gather(1, at), values)

def exact(x, c): return x.double() @ c.double().T

@quick(60)
@given(n=st.integers(1, 60), k=st.integers(1, 400), dim=st.sampled_from([4, 32, 128]), spread=st.sampled_from([.01, .1, 1.]),
       seed=st.integers(0, 999))
def test_no_other_centroid_is_nearer_than_candidates_say(n, k, dim, spread, seed):
    centres = points(5, dim, seed)
    x, c = (F.normalize(centres[torch.arange(m) % 5] + spread * points(m, dim, seed + m), dim=1) for m in (n, k))
    at, others = candidates(x, c)
    rest = exact(x, c).scatter(1, at, -2.)
    assert (rest.amax(1) <= others.double() + 1e-6).all()
    y, again = nearest_by_candidates(x, c)
    best = exact(x, c).amax(1)
    assert (exact(x, c).gather(1, y[:, None])[:, 0] >= best - 1e-6).all() # all but ties
    assert len(again) <= n

def test_few_rows_are_looked_at_again():
    x = groups(3000, 100, 64, .05)
    y, again = nearest_by_candidates(x, x[:500])
    assert torch.equal(y, nearest_exactly(x, x[:500])) and len(again) < 300

def test_centroids_that_are_equal_are_looked_at_again():
    x = points(50, 16, 0)
    y, again = nearest_by_candidates(x, x[:1].repeat(300, 1))
    assert len(again)==50 and len(y)==50

# ---- sums

@quick(40)
@given(n=st.integers(1, 80), k=st.integers(1, 20), seed=st.integers(0, 999))
def test_sums_in_the_order_of_a_sort(n, k, seed):
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(n, 3, generator=g, dtype=torch.float64), torch.randint(k, (n,), generator=g)
    sums, sizes = sorted_sums(x, y, k, 7)
    torch.testing.assert_close(sums, torch.stack([x[y==j].sum(0) for j in range(k)]), rtol=1e-12, atol=1e-12)
    assert sizes.tolist()==[int((y==j).sum()) for j in range(k)]
    assert torch.equal(cluster_sums(x, y, k)[1], sizes)

def test_a_gpu_sends_a_number_for_each_cluster_and_waits_once_a_round(monkeypatch):
    moved = []
    with FakeCuda() as gpu:
        real = gpu.move
        def move(t, goal, *args):
            if goal is not None and gpu.holds(t)!=(goal.type=='cuda'): moved.append(t.numel())
            return real(t, goal, *args)
        monkeypatch.setattr(gpu, 'move', move)
        monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (9, 0))
        calls, candidates = [], room.candidates
        monkeypatch.setattr(room, 'candidates', lambda *args: calls.append(1) or candidates(*args))
        x, counts = points(6000, 8, 0).to('cuda'), []
        for rounds in (1, 2):
            moved.clear(); gpu.there.clear()
            assert spherical_kmeans(x, 4100, rounds).device==CUDA and calls
            counts.append((len(moved), max(moved), gpu.there.get('nonzero', 0)))
    (first, largest, looks), (second, _, more) = counts
    assert second - first <= 3 and more - looks==1 # sizes, and centroids forth and back where clusters are empty
    assert largest <= 4100 * 8
