"Each drawing is one figure; its words lie on the canvas, apart from each other, and can be read from afar"
from itertools import combinations

import matplotlib.pyplot as plt, pytest
from matplotlib.text import Text

import ifnd_nb.drawings as drawings

NAMES = [n for n in drawings.__all__ if n.startswith('draw_')]

@pytest.fixture(params=NAMES)
def figure(request):
    "The one figure that a drawing makes"
    plt.close('all')
    assert getattr(drawings, request.param)() is None # no text below it in a notebook
    assert len(plt.get_fignums())==1
    yield plt.gcf()
    plt.close('all')

def words(figure):
    "Text that can be seen, and the box around it in pixels"
    figure.canvas.draw()
    return [(t, t.get_window_extent()) for t in figure.findobj(Text) if t.get_text().strip() and t.get_visible()
            and t.axes is not None and t in t.axes.texts]

def test_there_are_eight():
    assert len(NAMES)==8

def test_words_lie_on_the_canvas(figure):
    wide, high = figure.canvas.get_width_height()
    outside = [t.get_text() for t, b in words(figure) if b.x0 < 0 or b.y0 < 0 or b.x1 > wide or b.y1 > high]
    assert outside==[]

def test_words_do_not_overlap(figure):
    both = [(s.get_text(), t.get_text()) for (s, a), (t, b) in combinations(words(figure), 2) if a.overlaps(b)]
    assert both==[]

def test_words_can_be_read_from_the_back_row(figure):
    assert 9 <= figure.get_figwidth() <= 11
    assert min(t.get_fontsize() for t, _ in words(figure)) >= 12
    assert len(' '.join(t.get_text() for t, _ in words(figure)).split()) <= 45
