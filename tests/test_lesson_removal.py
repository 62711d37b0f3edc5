"What the lesson on removal says, against its saved outputs, the code and the measurements"
import inspect, re
import pandas as pd, torch
from saved import NBS, cells, output_of, prose_of, source
from ifnd_nb.detect import pair_quality
from ifnd_nb.detectors import ClusterDetector
from ifnd_nb.ifnd import IFNDCallback

LESSON = 'learn/06_removal'
prose = prose_of(LESSON)

def numbers(text): return [float(o) for o in re.findall(r'-?\d+\.\d+', text)]

def test_nothing_is_set_up_twice():
    code = '\n'.join(source(c) for c in cells(LESSON) if c['cell_type']=='code')
    for name in ('unit', 'push', 'plot_push', 'arrange', 'marks'): assert len(re.findall(rf'^def {name}\(', code, re.M))==1

def test_thirteen_keys_are_marked_on_the_ring():
    assert 'with thirteen marked keys and the anchor\'s own key, a fourteenth' in prose
    assert (torch.arange(1.5, 180, 3) < 40).sum()==13 and len(torch.arange(1.5, 180, 3))==60

def test_half_an_exponential_is_half_the_push_of_the_others():
    marked, rest = numbers(output_of(LESSON, '# Solution of exercise 1'))
    assert .5 < marked < 1 < rest and abs(rest / marked - 2) < .01

def test_wrong_marks_hardly_move_elimination_but_attraction():
    "Cosine of two concepts, with a quarter and a half of the pairs wrong; -0.5 is apart"
    found = output_of(LESSON, '# Solution of exercise 2')
    cosine = {(int(s), n): float(c) for s, n, c in re.findall(r'(\d+)% of the pairs wrong, (\w+): (-?\d\.\d+)', found)}
    assert len(cosine)==6
    for share in (25, 50):
        assert cosine[share, 'eliminate'] < -.3 and abs(cosine[share, 'both'] - cosine[share, 'eliminate']) < .1
        assert cosine[share, 'attract'] > 0
    assert cosine[50, 'attract'] > cosine[25, 'attract']

def test_attracting_what_is_not_there():
    assert 'inf' in output_of(LESSON, "strategies['elimination']")

def precision(share):
    "Of the pairs of 30 characters, where that share of 4,500 images takes the label of a random one"
    g, labels = torch.Generator().manual_seed(0), torch.arange(30).repeat_interleave(150)
    wrong = torch.rand(4500, generator=g) < share
    return pair_quality(torch.where(wrong, labels[torch.randperm(4500, generator=g)], labels), labels).precision.item()

def test_attraction_needs_six_right_pairs_in_ten():
    "Where the gains of the two cross, between the shares of errors of the evidence"
    assert 'about six right pairs in ten' in prose
    knn = 100 * pd.read_csv(NBS/'results'/'strategies.csv').groupby('method').knn.mean()
    over = [knn[f'attract {s}'] - knn[f'eliminate {s}'] for s in (.2, .4)]
    p, q = precision(.2), precision(.4)
    assert .55 < p + (q - p) * over[0] / (over[0] - over[1]) < .65

def test_look_alikes_cost_elimination_a_little():
    "Points of k-NN below the baseline with the same seed, where clusters were trusted at once"
    assert 'only one marked pair in eight was right' in prose
    assert 'about half a point to three points of k-NN accuracy, with each of three seeds' in prose
    runs = pd.read_csv(NBS/'results'/'acceptance.csv').query('data=="glyphs_few"').set_index(['method', 'seed'])
    lost = 100 * (runs.knn['none'] - runs.knn['concepts, all at once'])
    assert len(lost)==3 and .4 < lost.min() < lost.max() < 3
    assert 1/9 < runs.fn_precision['concepts, all at once'].mean() < 1/7

def test_both_is_the_default_and_asks_for_half_and_all_of_six_clusterings():
    assert inspect.signature(IFNDCallback.__init__).parameters['strategy'].default=='both'
    assert 'at least three of six clusterings' in prose and '*sure* pairs in all six' in prose
    shares = {name: share for name, (share, _) in ClusterDetector.trust.items()}
    assert shares==dict(likely=.5, sure=1.) and len(ClusterDetector(10).pseudo.T)==6
