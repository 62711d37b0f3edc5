"What would disturb a lesson in 05_detection: slow references in float64, awkward sizes and values, several processes"
import math, warnings
import numpy as np, pytest, torch
from hypothesis import given, strategies as st
from helpers_method import points, quick
from ifnd_nb.detect import accept, assign, false_negatives, pair_quality
from ifnd_nb.clustering import check_levels, cluster
from ifnd_nb.pairs import drift, near_far_quality
from ifnd_nb.clustering import three_levels
from ifnd_nb.pairs import votes
from ifnd_nb.encoders import create_encoder, Encoder
from ifnd_nb.embedding import embed
from ifnd_nb.loaders import plain_dl, two_view_dls

torch.set_num_threads(1)

@quick(60)
@given(n=st.integers(1, 60), dim=st.integers(1, 9), seed=st.integers(0, 10**6), k=st.integers(1, 20),
       tau=st.floats(.02, 2.))
def test_assign_agrees_with_float64(n, dim, seed, k, tau):
    x, c = points(n, dim, seed), points(k, dim, seed + 1)
    labels, confidence = assign(x, c, tau)
    for i in range(n):
        sims = [float(x[i].double() @ c[j].double()) for j in range(k)]
        assert sims[labels[i]] >= max(sims) - 1e-5
        want = math.exp(max(sims)/tau) / sum(math.exp(s/tau) for s in sims)
        assert confidence[i] == pytest.approx(want, rel=1e-6 + 3e-6/tau) # float32 cosines over tau
    assert labels.dtype == torch.int32

@quick(60)
@given(n=st.integers(1, 40), levels=st.integers(1, 3), rate=st.floats(0, 1), seed=st.integers(0, 10**6),
       ties=st.booleans())
def test_accept_agrees_with_a_sort(n, levels, rate, seed, ties):
    rng = np.random.default_rng(seed)
    labels = torch.tensor(rng.integers(0, 5, (n, levels)), dtype=torch.int32)
    conf = torch.tensor(rng.integers(1, 4, (n, levels)) / 3 if ties else rng.random((n, levels)))
    got, count = accept(labels, conf, rate), math.floor(rate * n + 1e-7)
    for h in range(levels):
        keep = sorted(range(n), key=lambda i: (-conf[i, h].item(), i))[:count]
        assert got[:, h].tolist() == [labels[i, h].item() if i in keep else -1 for i in range(n)]

def labels_and_queue(n, levels, bs, K, seed):
    "Pseudo labels of n images, some without, the images of anchors and of a queue, some slots empty"
    rng = np.random.default_rng(seed)
    pseudo = torch.tensor(rng.integers(-1, 4, (n, levels)), dtype=torch.int32)
    return pseudo, torch.tensor(rng.integers(0, n, bs)), torch.tensor(rng.integers(-1, n, K))

@quick(60)
@given(n=st.integers(1, 30), levels=st.integers(1, 3), bs=st.integers(1, 40), K=st.integers(1, 50),
       seed=st.integers(0, 10**6))
def test_false_negatives_agree_with_a_loop(n, levels, bs, K, seed):
    pseudo, idx, queue = labels_and_queue(n, levels, bs, K, seed)
    mask = false_negatives(pseudo, idx, queue)
    for h in range(levels):
        for a, i in enumerate(idx.tolist()):
            for b, s in enumerate(queue.tolist()):
                assert mask[h, a, b].item() == (s >= 0 and s != i and pseudo[i, h].item() == pseudo[s, h].item() != -1)

@quick(60)
@given(n=st.integers(1, 30), levels=st.integers(1, 7), bs=st.integers(1, 40), K=st.integers(1, 50),
       seed=st.integers(0, 10**6))
def test_votes_agree_with_a_loop(n, levels, bs, K, seed):
    pseudo, idx, queue = labels_and_queue(n, levels, bs, K, seed)
    counted = votes(pseudo, idx, queue)
    assert torch.equal(counted, false_negatives(pseudo, idx, queue).sum(0)) and counted.dtype == torch.uint8
    labels = pseudo.tolist()
    for i, row in zip(idx.tolist(), counted.tolist()):
        assert row == [sum(a == b != -1 for a, b in zip(labels[i], labels[s])) if s not in (-1, i) else 0
                       for s in queue.tolist()]

def test_votes_are_of_labels_never_of_empty_slots_and_never_of_the_own_image():
    pseudo, idx, queue = torch.zeros(4, 255, dtype=torch.int32), torch.tensor([0, 3]), torch.tensor([0, 3, -1, 2, 1])
    assert votes(pseudo, idx, queue).tolist() == [[0, 255, 0, 255, 255], [255, 0, 0, 255, 255]]
    pseudo[3] = pseudo[2] = -1 # an empty slot must not count as the last image, nor no label as a label
    assert votes(pseudo, idx, queue).tolist() == [[0, 0, 0, 0, 255], [0] * 5]
    pseudo[2, :9] = 0
    assert votes(pseudo, idx, queue).tolist() == [[0, 0, 0, 9, 255], [0] * 5]

@quick(60)
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
    whole = pair_quality(pseudo[:, 1], truth).recall[0]
    assert (table.near_recall[1] + table.far_recall[1]) / 2 == pytest.approx(whole, abs=.01)

@pytest.mark.parametrize('bad', [0, [], [3, 0], 2.5, '9', 10, [3, 10]], ids=repr)
def test_numbers_of_clusters_that_cannot_be(bad):
    with pytest.raises(ValueError, match='n_clusters'): check_levels(bad, 9)
    assert check_levels(9, 9)==[9] and check_levels((1, 9), 9)==[1, 9]

@quick(40)
@given(n=st.integers(1, 40), dim=st.integers(1, 5), distinct=st.integers(1, 4), k=st.integers(1, 60),
       seed=st.integers(0, 10**6))
def test_awkward_data_never_stop_a_clustering(n, dim, distinct, k, seed):
    x = points(distinct, dim, seed)[torch.arange(n) % distinct]
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        c = cluster(x, [k, 2*k])
    assert (c.labels >= 0).all() and c.confidence.isfinite().all() and (c.confidence > 0).all()
    assert all(o.isfinite().all() for o in c.centroids)
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

@quick(50)
@given(n=st.integers(1, 10**8))
def test_three_levels_rise_and_fit(n):
    levels = three_levels(n)
    assert levels == sorted(set(levels)) and 1 <= levels[0] and levels[-1] <= n

def test_drift_does_not_depend_on_numbers():
    labels = torch.randint(0, 5, (200, 2), generator=torch.Generator().manual_seed(0))
    assert drift(labels, (labels + 3) % 5) == pytest.approx([0, 0])
    other = torch.randint(0, 5, (200, 2), generator=torch.Generator().manual_seed(1))
    assert all(.9 < d < 1.1 for d in drift(labels, other))
    assert math.isnan(drift(labels, torch.full_like(labels, -1))[0])

# ---- several processes

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

def test_acceptance_rates_are_shares_and_round_as_decimals_do():
    labels, confidence = torch.zeros(100, 1, dtype=torch.int32), torch.ones(100, 1)
    assert (accept(labels, confidence, .29) >= 0).sum() == 29 # .29 * 100 is a little less in floating point
    for rate in (-.1, 1.5):
        with pytest.raises(ValueError, match=f'rate={rate}'): accept(labels, confidence, rate)
