"The fused optimiser against fastai's Adam"
import pytest, torch
from fastai.optimizer import Adam
from ifnd_nb.optimiser import fused_adam

def parameters(n=6): return [torch.randn(4, 3, generator=torch.Generator().manual_seed(i), dtype=torch.float64).requires_grad_() for i in range(n)]

def walk(opt, ps, steps, seed=1, without=()):
    g = torch.Generator().manual_seed(seed)
    for t in range(steps):
        for i, p in enumerate(ps):
            grad = torch.randn(p.shape, generator=g, dtype=p.dtype)
            p.grad = None if i in without or not p.requires_grad else grad
        opt.set_hyper('mom', .95 - .01 * t), opt.set_hyper('lr', 1e-3 * (t + 1))
        opt.step(); opt.zero_grad()

def made(opt_func, wd=.1):
    ps = parameters()
    opt = opt_func([ps[:2], ps[2:]], lr=1e-2, wd=wd)
    for p in ps[1:4]: opt.state[p]['do_wd'] = False
    return opt, ps

def close(a, b, rtol=1e-12):
    for p, q in zip(a, b): torch.testing.assert_close(p, q, rtol=rtol, atol=1e-14)

@pytest.mark.parametrize('wd', [0., .1])
def test_steps_are_those_of_fastais_adam(wd):
    (a, pa), (b, pb) = made(Adam, wd), made(fused_adam, wd)
    walk(a, pa, 9), walk(b, pb, 9)
    close(pa, pb)

def test_frozen_groups_and_parameters_without_gradient_stay():
    (a, pa), (b, pb) = made(Adam), made(fused_adam)
    for opt in (a, b): opt.freeze_to(1)
    walk(a, pa, 4, without=(3,)), walk(b, pb, 4, without=(3,))
    close(pa, pb)
    assert torch.equal(pb[3], parameters()[3]) and torch.equal(pb[0], parameters()[0]) and not torch.equal(pb[4], parameters()[4])

@pytest.mark.parametrize('first, then', [(Adam, fused_adam), (fused_adam, Adam), (fused_adam, fused_adam)])
def test_one_goes_on_where_the_other_stopped(first, then):
    (a, pa), (whole, pw) = made(first), made(Adam)
    walk(a, pa, 5), walk(whole, pw, 5)
    b, pb = made(then)
    with torch.no_grad():
        for p, q in zip(pb, pa): p.copy_(q)
    b.load_state_dict(a.state_dict())
    for o, ps in ((b, pb), (whole, pw)): walk(o, ps, 5, seed=2)
    close(pb, pw, 1e-6 if then==Adam else 1e-12) # it finds the number of steps in fp32

def test_a_closure_is_refused():
    with pytest.raises(NotImplementedError, match='closure'): made(fused_adam)[0].step(lambda: 0.)

def test_moments_that_lie_otherwise_are_laid_out_anew():
    g = torch.Generator().manual_seed(0)
    start, grads = torch.randn(4, 3, 2, 2, generator=g), torch.randn(6, 4, 3, 2, 2, generator=g)
    def trained(change):
        p = start.clone().to(memory_format=torch.channels_last).requires_grad_()
        opt = fused_adam([p], lr=.1)
        for t, grad in enumerate(grads):
            if t==3 and change:
                state = opt.state_dict()
                for s in state['state']: s.update({k: v.contiguous() for k, v in s.items() if torch.is_tensor(v)})
                opt.load_state_dict(state)
            p.grad = grad.to(memory_format=torch.channels_last)
            opt.step()
        return p
    torch.testing.assert_close(trained(True), trained(False))
