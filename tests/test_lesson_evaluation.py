"What the lesson on evaluation says in prose, against its saved outputs"
import re
import pandas as pd, pytest
from saved import NBS, cells, output_of, prose_of, source

LESSON = 'learn/04_evaluation'

def rows(text):
    "Numbers of each row of a table, by the row's name"
    found = (re.fullmatch(r'(\S.*?)((?:\s+-?[\d.]+)+)', line.strip()) for line in text.splitlines())
    return {m[1]: [float(o) for o in m[2].split()] for m in found if m}

def said(*pieces):
    "These words stand in the prose"
    prose = ' '.join(prose_of(LESSON).split())
    assert [p for p in pieces if p not in prose] == []

@pytest.fixture(scope='module')
def few(): return rows(output_of(LESSON, 'few = pd.DataFrame'))

@pytest.fixture(scope='module')
def table(): return rows(output_of(LESSON, 'table = evaluation_table'))

def test_outputs_are_clean():
    saved = [o for c in cells(LESSON) for o in c.get('outputs', [])]
    assert saved and not [o for o in saved if o.get('name')=='stderr' or o['output_type']=='error']
    assert 'arning' not in ''.join(map(str, saved))

def test_it_fits_a_sitting():
    assert len(cells(LESSON)) <= 45
    assert '#| hide' not in '\n'.join(map(source, cells(LESSON)))

def test_knn_is_saturated():
    said('All three are right about 97 times of 100', 'differ by a handful of the 359')
    knn = [v for v, in rows(output_of(LESSON, 'judged(knn_accuracy).round')).values()]
    assert len(knn)==3 and min(knn) > .96 and max(knn) - min(knn) < 6 / 359
    assert '[359,' in output_of(LESSON, 'banks, queries =')

def test_k_turns_the_order_round():
    said('Raw pixels at k = 1 score above the trained encoder at k = 50')
    by_k = rows(output_of(LESSON, 'by_k = pd.DataFrame')) # of 1, 5, 20, 50 and 200 neighbours
    assert by_k['raw pixels'][0] > by_k['baseline'][3] + .01
    assert by_k['raw pixels'][0] - by_k['raw pixels'][4] > by_k['baseline'][0] - by_k['baseline'][4] > 0

def test_few_labels_tell_apart_and_many_do_not(few):
    said('With one label of each class, the three lie well apart. With a hundred they meet.')
    first, last = ([few[name][i] for name in ('untrained', 'raw pixels', 'baseline')] for i in (0, -1))
    assert first[1] - first[0] > .03 and first[2] - first[1] > .03
    assert max(last) - min(last) < .02

def test_luck_moves_one_draw_by_many_points():
    said('luck moves this score by many points')
    low, high, mean = map(float, re.findall(r'0\.\d+', output_of(LESSON, 'luck = [')))
    assert low + .1 < mean < high - .05
    assert low < float(output_of(LESSON, 'right = (taken == valid_y)')) < high + .01

def test_the_pairs_by_hand():
    assert output_of(LESSON, 'by_hand = (') .strip() == '5 of 6 pairs agree, 3.67 by chance: ARI 0.57'
    said('Clusters of one image each are perfectly pure, and perfectly useless: ARI gives them 0')
    assert rows(output_of(LESSON, 'clusterings = {')) == dict(nmi=[.8, 1, .67, 0], ari=[.57, 1, 0, 0], purity=[1, 1, 1, .5])

def test_how_to_read_the_table(table):
    said('`knn` and `linear` are saturated', 'Training adds more than ten points to the untrained network, and it beats raw pixels',
         'clusters of raw pixels agree with the digits about as well')
    pixels, untrained, trained = (table[f'{name}'] for name in ('raw pixels', 'untrained encoder', 'trained encoder'))
    for i in (0, 2): assert min(o[i] for o in (pixels, untrained, trained)) > 95
    assert trained[1] - untrained[1] > 10 and trained[1] > pixels[1] + 3
    assert trained[3] > untrained[3] + 2 and abs(trained[3] - pixels[3]) < 3
    assert trained[4] > untrained[4] + 2 and abs(trained[4] - pixels[4]) < 5

def test_longer_runs_end_below_raw_pixels():
    said('In ten [longer runs](../reference/training.ipynb), the baseline ends below raw pixels with one label of each digit')
    runs = pd.read_csv(NBS/'results'/'first_command.csv').pivot_table('one_label', 'seed', 'row')
    assert len(runs)==10 and (runs['baseline'] < runs['raw pixels']).all()

def test_scores_of_the_epochs():
    said('`knn` hardly moved, and `one_label` rose by about ten points')
    epochs = [o for name, o in rows(output_of(LESSON, 'learn.epoch_table()')).items() if name.isdigit()]
    assert len(epochs)==5 and abs(epochs[-1][-2] - epochs[0][-2]) < .025 and .07 < epochs[-1][-1] - epochs[0][-1] < .14

def test_what_is_confused():
    said('A 0 takes the right label almost always', 'about half of the time. Where it is wrong, it most often takes the label of a 1')
    confused = rows(output_of(LESSON, 'confused = 100'))
    assert confused['0'][0] > 90
    eight = confused['8']
    assert 40 < eight[8] < 60 and max(eight[:8] + eight[9:])==eight[1] > 10

def test_batchnorm_statistics_raise_both_scores():
    said('No weight changes, but both scores rise')
    made = rows(output_of(LESSON, 'as_made = ['))
    assert all(b > a + .03 for a, b in zip(made['as made'], made['with statistics']))

def test_noise():
    assert float(output_of(LESSON, 'noise = valid_y'))==1
    said('The score is perfect even where all labels are *noise*')
    assert .04 < float(re.match(r'[\d.]+', output_of(LESSON, 'second = nearest'))[0].rstrip(':')) < .17

def test_exercise_2():
    rival, coarse = rows(output_of(LESSON, 'def coarse(x)')).values()
    assert rival[1] - coarse[1] > rival[0] - coarse[0] > 0
