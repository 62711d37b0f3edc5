"What the walkthrough says is what its saved outputs show"
import re
from io import StringIO

import pandas as pd
from saved import output_of, prose_of, source, cells

NAME = 'learn/01_walkthrough'

def table(piece): return pd.read_csv(StringIO(output_of(NAME, piece)), sep=r'\s{2,}', engine='python', index_col=0)

def test_the_baseline_beats_no_training_and_is_about_as_good_as_raw_pixels():
    t = table('(100 * evaluation_table(dls, baseline.model.body').one_label
    assert t['trained encoder'] > t['untrained encoder'] + 5 and abs(t['trained encoder'] - t['raw pixels']) < 8

def test_removal_is_far_ahead_of_the_baseline_with_every_spread():
    t = table("summary = 100 * recorded")
    for name in ('eliminate', 'attract', 'both'):
        assert t['mean'][name] - t['std'][name] > t['mean']['baseline'] + t['std']['baseline'] + 8

def test_this_run_is_like_the_recorded_ones():
    t = table("summary = 100 * recorded")
    for name in ('baseline', 'eliminate', 'attract'): assert abs(float(t['this run'][name]) - t['mean'][name]) < 6

def test_the_two_ways_differ_little_beside_their_gain():
    mean = table("summary = 100 * recorded")['mean']
    assert abs(mean['eliminate'] - mean['attract']) < (min(mean['eliminate'], mean['attract']) - mean['baseline']) / 3

def test_the_oracle_is_the_ceiling():
    best = table("summary = 100 * recorded")['mean'].max()
    oracle = table("detector='oracle'").one_label['trained encoder']
    assert oracle > best + 5 and oracle > 93

def test_early_acceptance_marks_poor_pairs():
    t = table("recipe='paper'")
    assert .4 < t.fn_precision.iloc[0] < .6 < t.fn_precision.iloc[-1] and t.fn_recall.max() < .5

def test_titles_name_what_is_counted():
    "Titles with a number are computed, not written"
    for c in cells(NAME):
        if 'of 36' in source(c) and c['cell_type']=='code': assert 'int(right.sum())' in source(c)
    assert 'of the 36' not in prose_of(NAME)
    assert not re.search(r'\d+\.\d %', prose_of(NAME))
