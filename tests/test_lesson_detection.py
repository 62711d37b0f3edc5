"What lesson 05 says is what its saved outputs and the recorded trials show"
import re
import pandas as pd, pytest
from saved import NBS, cells, output_of, prose_of, source

NAME = 'learn/05_detection'

def says(*pieces):
    prose = ' '.join(prose_of(NAME).split())
    assert [p for p in pieces if p not in prose] == []

def numbers(line): return [float(o) for o in re.findall(r'-?\d+\.?\d*', line)]

def rows_of(piece, columns):
    "The table in the output of a cell: the words before its last `columns` numbers -> these numbers"
    found = {}
    for line in output_of(NAME, piece).splitlines():
        words = line.split()
        if len(words) > columns and all(re.fullmatch(r'-?\d+\.?\d*', o) for o in words[-columns:]):
            found[' '.join(words[:-columns])] = [float(o) for o in words[-columns:]]
    return found

def test_it_is_a_sitting():
    assert len(cells(NAME)) <= 45 and not any('#| hide' in source(c) for c in cells(NAME))
    assert [s.count('\n') for c in cells(NAME) if (s := source(c)).count('\n') > 24 and c['cell_type'] == 'code'] == []

def test_half_of_the_images_are_accepted_in_three_lines():
    assert 'accepted: 50%' in output_of(NAME, 'def three_lines')

def test_the_third_point_is_the_least_sure():
    says('The third point is the least sure')
    kappa = numbers(output_of(NAME, 'kappa = ['))
    assert min(kappa) == kappa[2] > .5

def test_few_accepted_are_right_and_all_accepted_find_most():
    says('A tenth accepted is hardly ever wrong, but finds only a few of the pairs.',
         'All accepted finds most of them, and about three in ten are wrong.')
    t = rows_of('ten = {r:', 4) # precision, recall, coverage, lift
    tenth, half, everything = (t[f'{o}% accepted'] for o in (10, 50, 100))
    assert tenth[0] > .98 and tenth[1] < .06
    assert everything[1] > .6 and .22 < 1 - everything[0] < .38
    assert tenth[0] >= half[0] > everything[0] and tenth[1] < half[1] < everything[1]

def test_both_claims_hold_in_the_trials_with_a_warning():
    says('three sets and three seeds each', 'On average over the seeds, pair precision is higher late in training than '
         'early on all of them, and higher where fewer are accepted.', 'on printed characters hardly any early pair is right, at any acceptance rate')
    t = pd.read_csv(NBS/'results'/'detection.csv').query("candidate == 'softmax'")
    assert t.groupby('data').seed.nunique().to_dict() == dict.fromkeys(('digits', 'fashion_mnist', 'glyphs'), 3)
    mean = t.pivot_table(index=['data', 'rate'], columns='stage', values='precision')
    assert (mean.late > mean.early).all()
    by_rate = t.pivot_table(index=['data', 'stage'], columns='rate', values='precision')
    assert (by_rate.diff(axis=1).iloc[:, 1:] < 0).all(axis=None)
    assert by_rate.loc[('glyphs', 'early')].max() < .03

def test_on_digits_it_paid_to_accept_all_at_once():
    says('finds that on digits it pays to accept all images at once')
    one = pd.read_csv(NBS/'results'/'incremental.csv').groupby('method').one_label.mean()
    for s in ('eliminate', 'attract'): assert one[f'{s}, all at once'] > one[f'{s}, linear'] > one['none']

STAGES = ('noise', 'before training', 'after 1 epoch', 'after 8 epochs')

def test_votes_are_used_once_clusters_are_separated():
    says('Noise has a separation of zero', 'even the untrained encoder passes 0.1', 'about a third of them would be wrong',
         'still below 0.2', 'about nine in ten are right', 'The likely pairs are less right, but there are more of them')
    t = pd.DataFrame(rows_of('everyone, rows', 4), STAGES)
    assert t.separation.noise < .05 and t.separation['before training'] > .1
    assert t.separation['after 1 epoch'] < .2 < t.separation['after 8 epochs']
    assert .25 < 1 - t['sure: precision']['after 1 epoch'] < .42 and t['sure: precision']['after 8 epochs'] > .87
    trained = t.drop('noise')
    assert (trained['sure: precision'] > trained['likely: precision']).all()
    assert (trained['sure: recall'] < trained['likely: recall']).all()

def test_the_thresholds_of_separation_are_those_of_the_package():
    from ifnd_nb.detectors import ClusterDetector
    says('From 0.1 on, likely pairs are used (to eliminate), from 0.2 on also the sure ones (to attract).')
    assert ClusterDetector.trust == dict(likely=(.5, .1), sure=(1., .2))

def test_votes_of_four_images():
    says('Images 0 and 1 share all six clusters', 'Image 2 shares four with both', 'Image 3 shares one with image 2')
    v = [numbers(line) for line in re.findall(r'\[([\d, ]+)\]', output_of(NAME, 'six = [['))]
    assert v == [[0, 6, 4, 0], [6, 0, 4, 0], [4, 4, 0, 1], [0, 0, 1, 0]]

def test_errors_read_as_quoted():
    says('"x: row 0 has norm 2.000; embeddings must have unit norm: F.normalize(x, dim=1)"')
    from ifnd_nb.clustering import known_rows
    import torch
    with pytest.raises(ValueError) as said: known_rows(torch.tensor([[2., 0.]]))
    assert str(said.value) == 'x: row 0 has norm 2.000; embeddings must have unit norm: F.normalize(x, dim=1)'
    assert 'false negatives: 0' in output_of(NAME, 'alone = cluster')

def test_solution_of_exercise_1():
    t = pd.DataFrame(rows_of('# Solution of exercise 1', 3), STAGES[1:])
    assert t['marked above .7'].tolist() == sorted(t['marked above .7'], reverse=True)
    assert t['marked above .7']['before training'] > .99 and t['marked above .7']['after 8 epochs'] < .1
    more = t['precision of clusters'] - t['its precision']
    assert more['before training'] < 0 < min(more['after 1 epoch'], more['after 8 epochs'])
    assert t['precision of clusters'].is_monotonic_increasing

def test_solution_of_exercise_2():
    t = pd.DataFrame(rows_of('# Solution of exercise 2', 3), ('marked', 'right', 'wrong'))
    most = 'after 1 epoch, 100%'
    for kind in ('right', 'wrong'):
        assert t.loc[kind, most] > 1.5 * t.loc[kind].drop(most).max()

# ---- the reference on stable clusters

STABLE = 'reference/stable_clusters'

def test_smoothing_helps_most_among_the_nearest_tenth():
    rows = [numbers(line) for line in output_of(STABLE, 'def right_among').splitlines() if line.startswith('nearest')]
    gain = {share: smoothed - plain for share, plain, smoothed in rows}
    assert min(gain.values()) > 0 and max(gain, key=gain.get) == 10 and gain[10] > .1

def test_separation_rises_with_training():
    text = output_of(STABLE, "found, apart = stable_clusters(snapshots")
    late, = re.findall(r'separation: ([\d.]+)', text)
    early, noise = re.findall(r'separation after 1 epoch: ([\d.]+), of noise: ([\d.]+)', text)[0]
    assert float(late) > .2 and .05 < float(early) < .15 and float(noise) < .05

def test_more_votes_are_more_right_and_fewer():
    rows = [numbers(line) for line in output_of(STABLE, "for v in range(1, 7)").splitlines() if re.match(r'\d', line)]
    votes, precision, recall = zip(*rows)
    assert votes == (1, 2, 3, 4, 5, 6)
    assert list(precision) == sorted(precision) and list(recall) == sorted(recall, reverse=True)
