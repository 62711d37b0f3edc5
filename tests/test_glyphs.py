"Rendered characters are the same everywhere, and fit to read"
import hashlib, os, subprocess, sys
import numpy as np, pytest, torch
from ifnd_nb.glyphs import _faces, _glyph, _glyph_colours, glyph_concepts, glyphs

def test_glyphs_are_the_same_in_another_process():
    code = ('import hashlib; from ifnd_nb.glyphs import glyphs; '
            'print(hashlib.sha1(glyphs(30, 4, seed=3).images.numpy().tobytes()).hexdigest())')
    here = hashlib.sha1(glyphs(30, 4, seed=3).images.numpy().tobytes()).hexdigest()
    out = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, check=True,
                         env={**os.environ, 'PYTHONHASHSEED': '1'})
    assert out.stdout.split()[-1]==here

def test_glyph_sets_are_prefixes():
    big, small = glyphs(20, 9), glyphs(15, 4)
    assert torch.equal(big.images.view(20, 9, 3, 32, 32)[:15, :4].flatten(0, 1), small.images)
    assert big.vocab[:15]==small.vocab
    assert not torch.equal(glyphs(15, 4, seed=1).images, small.images)

def test_every_concept_renders_within_the_frame_and_in_contrast():
    n = len(glyph_concepts())
    rng = np.random.default_rng(0)
    for char, _ in glyph_concepts():
        assert len(_faces(char)) >= 4
        for _ in range(2):
            m = _glyph(char, rng.random(16), 32)
            assert m.shape==(32, 32) and m.max() > 60, char
            ys, xs = np.nonzero(m > 40)
            assert max(np.ptp(ys), np.ptp(xs)) + 1 >= 32*.3, char
    u = rng.random((500, 9))
    fg, bg = _glyph_colours(u, 16)
    grey = np.array([.299, .587, .114])
    apart = np.abs((bg.clip(0, 255) @ grey) - (fg @ grey)[:, None, None])
    assert apart.min() > 64
    g = glyphs(n, 1)
    assert g.images.shape==(n, 3, 32, 32) and len(g.coarse)==n and len(g.coarse_vocab)==14
    assert set(g.coarse[:50].tolist())==set(range(14))

def test_glyph_arguments():
    with pytest.raises(ValueError, match='n_concepts=1 '): glyphs(1)
    with pytest.raises(ValueError, match='n_concepts=9999'): glyphs(9999)
    with pytest.raises(ValueError, match='per_concept=0'): glyphs(5, 0)
