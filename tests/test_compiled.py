"Compiled losses: masks from labels, the same numbers, few arrays, and another way where there is no compiler"
import re, shutil
import pytest, torch
from hypothesis import given, strategies as st
from helpers_method import bright_loaders, columns, EVER, fit, learner, logits_and_masks, quick
from torch._inductor.utils import run_and_get_code
from ifnd_nb import compiled as room, contrast, moco
from ifnd_nb.compiled import Compiled, in_one, info_nce_terms, masks_of, Pairs, removed, side_by_side, slope, value
from ifnd_nb.detectors import ClusterDetector, Detector, OracleDetector
from ifnd_nb.contrast import info_nce
from ifnd_nb.registry import strategies
from ifnd_nb.rivals import LotsDetector, TopKDetector

def some_pairs(seed, n=30, bs=6, K=25, H=6, enough=None):
    g = torch.Generator().manual_seed(seed)
    pseudo = torch.randint(-1, 3, (n, H), generator=g).int()
    return Pairs(pseudo, torch.randint(n, (bs,), generator=g), torch.randint(-1, n, (K,), generator=g), enough)

def literal_masks(p):
    out = torch.zeros(len(p.pseudo.T) if p.enough is None else len(p.enough), len(p.idx), len(p.queue_idx))
    for i, a in enumerate(p.idx.tolist()):
        for s, b in enumerate(p.queue_idx.tolist()):
            if b < 0 or a==b: continue
            agree = [int(x==y!=-1) for x, y in zip(p.pseudo[a].tolist(), p.pseudo[b].tolist())]
            out[:, i, s] = torch.tensor(agree if p.enough is None else [int(sum(agree) >= e) for e in p.enough])
    return out.bool()

@quick(40)
@given(st.integers(0, 999), st.sampled_from([None, (3, 6), (3, 255), (1,)]))
def test_both_ways_to_the_masks_are_the_definition(seed, enough):
    pairs = some_pairs(seed, enough=enough)
    assert torch.equal(pairs.masks(), literal_masks(pairs))
    assert torch.equal(torch.stack(masks_of(*pairs.parts())), literal_masks(pairs))

def gradient(f, logits):
    x = logits.clone().requires_grad_()
    loss = f(x)
    loss.backward()
    return loss.detach(), x.grad

def plain(terms, logits, masks):
    loss, *rows = value(logits, *terms(masks))
    return loss, slope(logits, *terms(masks), *rows, torch.ones_like(loss))

@pytest.mark.parametrize('name', strategies)
@pytest.mark.parametrize('share', [0., .3, 1.])
@pytest.mark.parametrize('H', [1, 2, 3])
def test_losses_are_those_of_the_lesson(name, share, H):
    logits, masks = logits_and_masks(H, 5, 40, H, share)
    want = gradient(lambda x: strategies[name](x, masks), logits)
    for a, b in zip(plain(strategies[name].terms, logits, list(masks)), want):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)

def test_logits_and_infonce():
    logits, _ = logits_and_masks(0, 5, 40, 1, .3)
    for a, b in zip(plain(info_nce_terms, logits, ()), gradient(info_nce, logits)):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    pos, neg, drop = torch.rand(3, 1), torch.rand(3, 7), torch.rand(3, 7) < .5
    want = torch.cat([pos, neg.masked_fill(drop, -torch.inf)], 1)
    assert torch.equal(side_by_side(pos, neg, drop), want)
    assert torch.equal(side_by_side(pos, neg, None), torch.cat([pos, neg], 1))

needs_compiler = pytest.mark.skipif(not shutil.which('g++'), reason='no compiler')

@needs_compiler
@pytest.mark.parametrize('name, enough', [('eliminate', None), ('attract', (3, 6)), ('both', (3, 6))])
def test_a_compiler_makes_a_kernel_each_way_and_no_array_but_the_gradient(name, enough):
    torch._dynamo.reset(); in_one.cache_clear()
    pairs = some_pairs(0, n=500, bs=6, K=4000, H=6 if enough else 3, enough=enough)
    logits = 5 * torch.rand(6, 4001, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    want = gradient(lambda x: strategies[name](x, pairs.masks()), logits)
    loss = in_one(strategies[name].terms)
    got, codes = run_and_get_code(lambda: gradient(lambda x: loss(x, *pairs.parts()), logits.float()))
    for a, b in zip(got, want): torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-6)
    large = [re.findall(r'= empty_strided_cpu\(\(\d+, \d{4}\),.*torch\.(\w+)\)', code) for code in codes]
    assert [[o for o in kinds if o!='uint8'] for kinds in large]==[[], ['float32']]
    assert [len(re.findall(r'^cpp_fused', code, re.M)) for code in codes]==[1, 1]

@needs_compiler
def test_compiled_logits():
    torch._dynamo.reset()
    pos, neg, drop, g = torch.rand(6, 1), torch.rand(6, 4000), torch.rand(6, 4000) < .5, torch.rand(6, 4001)
    def both(f):
        a, b = pos.clone().requires_grad_(), neg.clone().requires_grad_()
        out = f(a, b, drop)
        return out.detach(), *torch.autograd.grad(out, (a, b), g)
    for a, b in zip(both(Compiled(side_by_side)), both(side_by_side)): assert torch.equal(a, b)

def test_each_function_has_compilations_of_its_own():
    def made(n): return lambda x: x + n
    f, g = (Compiled(made(n)) for n in (1, 2))
    assert f.f.__code__ is not g.f.__code__ and [int(o.f(torch.tensor(1))) for o in (f, g)]==[2, 3]

def test_where_there_is_no_compiler_another_way_is_taken_and_one_line_says_so(monkeypatch, capsys):
    def fail(f): raise RuntimeError('no Triton\nmore')
    monkeypatch.setattr(torch, 'compile', fail)
    monkeypatch.setattr(Compiled, 'failed', False)
    f, g = (Compiled(lambda x: x + 1) for _ in range(2))
    assert [int(o(torch.tensor(1))) for o in (f, f, g)]==[2, 2, 2] and not room.pays(torch.empty(0))
    assert capsys.readouterr().out=='losses are not compiled, which makes large queues slower: RuntimeError: no Triton\n'

def test_memory_that_runs_out_is_no_want_of_a_compiler(monkeypatch):
    def full(x): raise torch.OutOfMemoryError('CUDA out of memory')
    monkeypatch.setattr(torch, 'compile', lambda f: f)
    with pytest.raises(torch.OutOfMemoryError): Compiled(full)(torch.tensor(1))
    assert not Compiled.failed

@pytest.fixture
def everywhere(monkeypatch):
    "As on a GPU with a long queue, but that the compiler leaves functions as they are; notes which it was given"
    given = []
    monkeypatch.setattr(torch, 'compile', lambda f: given.append(f) or f)
    for place in (room, contrast, moco): monkeypatch.setattr(place, 'pays', lambda logits: True)
    in_one.cache_clear()
    monkeypatch.setattr(room.joined, 'made', None)
    monkeypatch.setattr(ClusterDetector, 'trust', EVER)
    yield given
    in_one.cache_clear()

kinds = {'stable': dict(n_clusters='stable'), 'levels': dict(n_clusters=[3, 6], acceptance=.8), 'oracle': dict(detector='oracle')}

@pytest.mark.parametrize('strategy', strategies)
@pytest.mark.parametrize('kind', kinds)
def test_training_is_the_same(kind, strategy, everywhere, monkeypatch):
    kw = dict(precision='fp32', strategy=strategy, **kinds[kind])
    one = fit(learner(bright_loaders(), **kw), 2)
    assert {f.__name__ for f in everywhere}=={'side_by_side', 'first', 'second'}
    for place in (room, contrast, moco): monkeypatch.setattr(place, 'pays', lambda logits: False)
    other = fit(learner(bright_loaders(), **kw), 2)
    assert columns(one)['removed']==columns(other)['removed'] > 0
    for a, b in zip(one.model.parameters(), other.model.parameters()): torch.testing.assert_close(a, b, rtol=0, atol=2e-3)

@pytest.mark.parametrize('enough', [None, (3, 6)])
def test_a_compiled_loss_comes_with_the_masks_of_the_first_anchors(enough, everywhere):
    class Known(Detector):
        def pairs(self, idx, queue_idx): return found._replace(idx=idx, queue_idx=queue_idx)
    found = some_pairs(0, bs=20, enough=enough)
    _, few = removed(strategies['both'], Known(), torch.rand(20, 26), found.idx, found.queue_idx)
    assert torch.equal(few, literal_masks(found)[:, :16])

def test_who_finds_in_another_way_has_no_pairs(everywhere):
    class Own(ClusterDetector):
        def forward(self, logits, idx, queue_idx): return torch.zeros(1, len(idx), len(queue_idx), dtype=torch.bool)
    class Like(ClusterDetector): pass
    of = torch.arange(3), torch.arange(5)
    assert Own(9).pairs(*of) is None and isinstance(Like(9).pairs(*of), Pairs)
    assert TopKDetector.pairs is LotsDetector.pairs is Detector.pairs and OracleDetector.pairs is not Detector.pairs
    loss, masks = removed(strategies['eliminate'], Own(9), torch.rand(3, 6), *of)
    assert not masks.any() and loss(torch.zeros(3, 6)) > 0
    loss, masks = removed(lambda logits, masks: masks.sum(), Like(9), torch.rand(3, 6), *of) # a strategy of one's own
    assert loss(torch.zeros(3, 6))==0 and masks.shape==(1, 3, 5)
    loss, masks = removed(strategies['attract'], lambda *args: torch.ones(1, 3, 5, dtype=torch.bool), torch.rand(3, 6), *of)
    assert masks.all() and loss(torch.zeros(3, 6)) > 0 # what is no `Detector`, but like one

def test_nothing_is_compiled_on_a_processor(monkeypatch):
    monkeypatch.setattr(torch, 'compile', None)
    fit(learner(bright_loaders(), precision='fp32', queue_size=2**16), 1)
