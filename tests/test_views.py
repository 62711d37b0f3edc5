"Two views of an image, against references written out"
import numpy as np, pytest, torch
from PIL import Image
from ifnd_nb.views import augmentations, TwoViews
from ifnd_nb.draws import hashed_uniforms
from ifnd_nb.matrices import resample_matrix

def test_hashed_uniforms():
    u = hashed_uniforms(torch.arange(20000), 28, seed=5, epoch=2)
    assert u.min() >= 0 and u.max() < 1
    assert abs(u.mean() - .5) < .005 and abs(u.var() - 1/12) < .002
    assert np.abs(np.corrcoef(u) - np.eye(28)).max() < .035
    later, other = hashed_uniforms(torch.arange(20000), 28, 5, 3), hashed_uniforms(torch.arange(20000), 28, 6, 2)
    for v in (later, other, u.roll(1, 1)): assert np.abs(np.corrcoef(u.flatten(), v.flatten())[0, 1]) < .01
    for seed in (0, -1, 2**40, 2**62): assert hashed_uniforms(torch.tensor([0]), 2, seed).shape==(2, 1)

def test_resample_matrix_agrees_with_pil():
    x = torch.rand(1, 1, 40, 40)
    one = torch.ones(1)
    m = resample_matrix(0*one, one, torch.tensor([False]), 40, 16)
    want = torch.tensor(np.asarray(Image.fromarray(x[0, 0].numpy()).resize((16, 16), Image.Resampling.BILINEAR)))
    assert (m @ x[0] @ m.mT)[0].sub(want).abs().max() < .02

def test_views_agree_with_float64_by_hand():
    "Crop, resize, mirror and blur of one view, written out pixel by pixel from the same draws"
    tfm = TwoViews(16, scale=(.3, .9), flip=1., jitter=0., grey=0., blur=1., sigma=(.5, 1.5))
    x, idx = torch.randint(0, 256, (3, 3, 24, 24), dtype=torch.uint8), torch.tensor([5, 0, 9])
    views = tfm((x, idx))[0]
    u = hashed_uniforms(idx, 28)[:7].double()
    for b in range(3):
        area, ratio = .3 + .6*u[0, b], (3/4) * (16/9)**u[1, b]
        height, width, sigma = min(1, (area/ratio)**.5), min(1, (area*ratio)**.5), .5 + u[6, b]
        def axis(n, start, extent, mirror):
            m = torch.zeros(16, n, dtype=torch.float64)
            for o in range(16):
                at = (15.5 - o if mirror else o + .5) / 16
                centre, wide = (start + extent*at)*n - .5, max(1, extent*n/16)
                for i in range(n): m[o, i] = max(0, 1 - abs(i - centre)/wide)
            g = torch.tensor([[float(np.exp(-.5*((o - i)/float(sigma))**2)) for i in range(16)] for o in range(16)],
                             dtype=torch.float64)
            return (g / g.sum(1, keepdim=True)) @ (m / m.sum(1, keepdim=True))
        down, across = axis(24, u[2, b]*(1 - height), height, False), axis(24, u[3, b]*(1 - width), width, True)
        want = down @ (x[b].double()/255) @ across.T
        assert (views[b] - want).abs().max() < 1e-5

@pytest.mark.parametrize('preset', augmentations)
@pytest.mark.parametrize('channels', [1, 3])
def test_views_differ_per_image_and_per_view(preset, channels):
    torch.manual_seed(0)
    one = torch.randint(0, 256, (1, channels, 40, 40), dtype=torch.uint8).expand(16, -1, -1, -1)
    x_q, x_k, idx, y = TwoViews(32, **augmentations[preset])((one, torch.arange(16), torch.arange(16)))
    for v in (x_q, x_k):
        assert type(v) is torch.Tensor and v.shape==(16, channels, 32, 32) and v.dtype==torch.float32 and 0 <= v.min()
        assert v.max() <= 1
    assert torch.pdist(torch.cat([x_q, x_k]).flatten(1)).min() > .1

def test_a_view_depends_on_image_and_epoch_alone():
    x = torch.randint(0, 256, (12, 3, 32, 32), dtype=torch.uint8)
    t = TwoViews(24, blur=.5, seed=4)
    whole, order = t((x, torch.arange(12))), torch.randperm(12)
    for part in order.split(5): assert torch.allclose(t((x[part], part))[1], whole[1][part], atol=1e-5)
