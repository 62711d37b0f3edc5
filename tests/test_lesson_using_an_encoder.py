"What the lesson on using an encoder says, against what its saved outputs show"
import re

import pandas as pd
from saved import NBS, cells, output_of, prose_of, source

NAME = 'learn/08_using_an_encoder'

def last_table(piece):
    "The numbers of the last table in an output, row by row, under their names"
    rows = {}
    for line in output_of(NAME, piece).splitlines():
        row = re.fullmatch(r'\s*(.*?)((?:\s+(?:-?\d+\.\d+|NaN))+)', line)
        if row: rows[row[1]] = [float(o) for o in row[2].split()]
    return rows

def curve():
    "{name: accuracy (%) with 1, 2, 5, 10 and 20 labels}; NaN where none was measured"
    return last_table("curve['mean'].unstack()")

def test_removal_happened():
    shown = [list(map(float, l.split())) for l in output_of(NAME, 'ifnd.epoch_table()').splitlines()
             if re.match(r'\d+\s', l) and 'NaN' not in l]
    assert output_of(NAME, 'ifnd.epoch_table()').count('NaN') >= 2 # the first epochs are the baseline's
    _, accepted, removed, precision, recall = shown[-1]
    assert accepted==1 and .05 < removed < .25
    assert precision > .5 and recall > .65

def test_one_label_decides_and_twenty_do_not():
    ifnd, baseline, pixels = (curve()[name] for name in ('IFND', 'baseline', 'raw pixels'))
    assert ifnd[0] > baseline[0] + 10
    assert abs(baseline[0] - pixels[0]) < 6
    assert all(abs(a[4] - ifnd[4]) < 5 for a in (baseline, pixels))
    assert curve()['from scratch'][0] < ifnd[0] - 10

def test_the_baseline_needs_about_four_labels_for_one():
    ifnd, baseline = curve()['IFND'], curve()['baseline']
    assert baseline[1] < ifnd[0] < baseline[3] # between two and ten

def test_the_gain_shrinks_with_labels():
    gain = [row[0] for row in last_table("agg(['mean', 'std', 'min'])").values()]
    assert len(gain)==5 and gain==sorted(gain, reverse=True)
    assert gain[0] > 10 and 0 < gain[-1] < 3.5

def test_ten_seeds_agree():
    t = pd.read_csv(NBS/'results'/'first_command.csv').pivot_table('one_label', 'seed', 'row')
    assert len(t)==10 and (t['trained encoder'] > t['baseline'] + .1).all()

def test_from_scratch_is_below_all():
    rows = curve()
    for i in (0, 2, 4): assert rows['from scratch'][i]==min(r[i] for r in rows.values())

def test_frozen_and_fine_tuned_are_alike_and_ahead_of_scratch():
    output = output_of(NAME, 'def try_out')
    head = next(l for l in output.splitlines() if l.startswith('how'))
    names = re.split(r'\s{2,}', head)[1:]
    ways = pd.DataFrame(last_table('def try_out'), index=names)
    assert (ways.loc['frozen'] - ways.loc['fine-tuned']).abs().max() < 6
    assert ways.loc['frozen', '1'] > ways.loc['from scratch', '1'] + 10

def test_fifty_labels_name_most():
    assert all(row[-1] > .75 for row in last_table('learn.recorder.values').values())

def test_forgotten_normalisation_costs():
    scores = {k: v[0] for k, v in last_table('def raw(x)').items()}
    assert .5 < scores['normalised'] - scores['forgotten'] < 6

def test_luck_decides_with_one_label():
    spread = last_table("same.loc[1].agg(['min', 'max'])")
    assert all(hi - lo > 5 for lo, hi in zip(spread['min'], spread['max']))

def test_solution_1():
    lines = [l.split() for l in output_of(NAME, '# Solution of exercise 1').splitlines()]
    gain = {n: [float(l[-2]) - float(l[-1]) for l in lines if len(l) >= 3 and l[-3]==n] for n in ('1', '20')}
    assert len(gain['1'])==len(gain['20'])==3 and max(gain['1']) < -3
    assert gain['20'][0] < -.5 and max(map(abs, gain['20'][1:])) < 1.5 # raw pixels, then both encoders

def test_solution_2():
    rows = last_table('# Solution of exercise 2')
    gain = {name: after - before for name, (after, before) in rows.items()}
    assert gain['baseline'] > 3 and gain['raw pixels'] > 1
    assert abs(gain['IFND']) < min(4, gain['baseline'], gain['raw pixels'])

def test_shape_of_the_lesson():
    all_cells = cells(NAME)
    assert len(all_cells) <= 45
    assert max(len(source(c).splitlines()) for c in all_cells if c['cell_type']=='code') <= 25
    for heading in ('## What goes wrong', '## Summary', '## Exercises', 'Next: ['): assert heading in prose_of(NAME)
