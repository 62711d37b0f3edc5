"What the lesson on the callback says is what its saved outputs show"
from io import StringIO

import pandas as pd
import pytest
from saved import cells, output_of, prose_of, source

NAME = 'learn/07_callback'

def table(piece): return pd.read_csv(StringIO(output_of(NAME, piece)), sep=r'\s{2,}', engine='python', index_col=0)

def by_epoch(piece):
    "A table whose index has a name, on a line of its own"
    lines = output_of(NAME, piece).splitlines()
    names = lines[0].split()
    rows = [l.split() for l in lines if l.strip() and l.split()[0].isdigit()]
    return pd.DataFrame([[float(o) for o in r[1:]] for r in rows], columns=names)

PAPER, DEFAULT = 'real.epoch_table()[columns]', "learn = ifnd_learner(two_view_dls('digits'"

def test_the_callback_has_twelve_lines():
    by_hand = next(source(c) for c in cells(NAME) if source(c).startswith('class MiniIFND'))
    lines = by_hand.splitlines()
    assert sum(not l.lstrip().startswith(('"', 'order')) for l in lines) <= 12 and len(lines) <= 12

def test_the_real_callback_is_compared_with_it():
    same = next(source(c) for c in cells(NAME) if source(c).startswith('real = train('))
    assert 'test_eq(p, q)' in same and 'recorder.losses' in same

def test_logits_have_a_column_for_each_key_and_validation_passes_too():
    told = output_of(NAME, 'class Look(')
    assert 'logits: (64, 4097)' in told and 'training: False' in told and '50% of training' in told

def test_pairs_are_mostly_right_and_three_in_four_are_missed():
    t = by_epoch('class WatchedIFND')
    assert t.accepted[0] == 0 and t.accepted.is_monotonic_increasing
    assert t.precision[1:].min() > .8 and .2 < t.recall.iloc[-1] < .33

def test_the_papers_recipe_gains_about_a_point():
    t = table("worth = {'baseline'")['one-label accuracy']
    assert 0 < t['by hand'] - t['baseline'] < .025

def test_the_default_waits_then_finds_four_in_five():
    paper, t = by_epoch(PAPER), by_epoch(DEFAULT)
    assert (t.accepted[:2] == 0).all() and t.accepted.iloc[-1] == 1
    found = t[t.accepted == 1]
    assert found.fn_recall.between(.7, .9).all() and found.fn_precision.min() > .25
    assert t.removed.iloc[-1] > 2 * paper.removed.iloc[-1] and t.fn_precision.iloc[-1] < paper.fn_precision.iloc[-1]
    assert t.valid_loss.iloc[-1] > paper.valid_loss.iloc[-1]

def test_detectors_on_equal_terms():
    t = table('grid = {')
    levels, likely, sure, oracle = (t.iloc[i] for i in range(4))
    assert levels.precision > sure.precision > likely.precision and levels.recall < .5 < sure.recall <= likely.recall
    assert .4 < likely.precision < .7 and oracle.precision == oracle.recall == 1

def test_fastai_says_what_a_shadowed_attribute_is():
    assert 'Use `self.learn.pred`' in output_of(NAME, 'class Shadow(')

def test_the_first_exercise_is_solved_as_told():
    t = by_epoch('class MostSimilar')
    assert t.fn_precision[0] == pytest.approx(.35, abs=.1) and t.fn_precision[2] == pytest.approx(.67, abs=.1)
    assert t.fn_recall.is_monotonic_decreasing and t.fn_recall[2] < .05 and t.accepted.isna().all()

def test_the_second_exercise_is_solved_as_told():
    t = table('def late(t)')
    assert t.fn_precision['late'] < t.fn_precision['even growth'] and t.fn_recall['late'] > t.fn_recall['even growth']

def test_no_blank_is_left_in_the_prose():
    assert not any(o in prose_of(NAME) for o in ('FRAMES', 'GRID', 'SOLUTION'))
