"Embeddings kept by index against a loop"
import math
import torch, torch.nn.functional as F
from hypothesis import given, strategies as st
from helpers_method import points, quick
from ifnd_nb.banks import EmbeddingBank

torch.set_num_threads(1)

def test_keys_are_kept_by_index():
    bank, q, k = EmbeddingBank(10, 3), points(2, 3, 0), points(2, 3, 1)
    bank.update(torch.tensor([7, 2]), q.half(), k.half())
    assert bank.mean.any(1).nonzero()[:, 0].tolist() == [2, 7]
    torch.testing.assert_close(bank.mean[[7, 2]], F.normalize(q.half().float() + k.half().float(), dim=1))
    before = bank.mean.clone()
    bad = torch.tensor([[math.nan, 0, 0], [0, 1, math.inf]])
    for pair in ((bad, points(2, 3, 2)), (points(2, 3, 2), bad)): # not kept
        bank.update(torch.tensor([7, 3]), *pair)
        assert torch.equal(bank.mean, before)
    other = EmbeddingBank(10, 3); other.load_state_dict(bank.state_dict())
    assert torch.equal(other.mean, bank.mean)

@quick(40)
@given(n=st.integers(1, 20), batches=st.lists(st.lists(st.integers(0, 10**6), min_size=1, max_size=9), max_size=5),
       decay=st.sampled_from([0., .5, .9]))
def test_a_running_mean_of_queries_and_keys(n, batches, decay):
    bank, want = EmbeddingBank(n, 3), [torch.zeros(3, dtype=torch.float64) for _ in range(n)]
    bank.decay = decay
    for b, batch in enumerate(batches):
        idx = list(dict.fromkeys(i % n for i in batch))
        q, k = points(len(idx), 3, b), points(len(idx), 3, b + 99)
        bank.update(torch.tensor(idx), q, k)
        for row, i in enumerate(idx):
            new = (q[row] + k[row]).double()
            mean = decay * want[i] + (1 - decay) * new / new.norm()
            want[i] = mean / mean.norm()
    assert torch.allclose(bank.mean.double(), torch.stack(want), atol=1e-5)
