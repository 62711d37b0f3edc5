"k-means against float64"
import numpy as np, torch, torch.nn.functional as F
from hypothesis import assume, given, strategies as st
from helpers_method import points, quick
from ifnd_nb.kmeans import spherical_kmeans

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
