"What the lesson on instance discrimination and the reference on MoCo say, and what their saved outputs show"
import re
import torch
from saved import NBS, cells, output_of, prose_of, source

LESSON, REFERENCE = 'learn/03_instance_discrimination', 'reference/moco'

def numbers(text): return [float(o) for o in re.findall(r'-?\d+\.\d+', text)]

def rows(text):
    "The last number of each line that has one, by what stands before the numbers"
    found = [re.match(r'(.+?)\s{2,}(?:.*\s)?(-?\d+\.\d+)$', line) for line in text.splitlines()]
    return {m[1].strip(): float(m[2]) for m in found if m}

def test_it_fits_an_afternoon():
    code = [source(c) for c in cells(LESSON) if c['cell_type']=='code']
    assert len(cells(LESSON)) <= 45 and max(len(o.splitlines()) for o in code) <= 25
    assert not [o for o in code if '#| hide' in o]

def test_the_algorithm_by_hand_has_about_fifteen_lines():
    by_hand = next(source(c) for c in cells(LESSON) if 'def moco_by_hand' in source(c))
    assert 14 <= len(by_hand.splitlines()) <= 16
    assert 'MoCo in fifteen lines' in prose_of(LESSON)

def test_pulling_alone_collapses_and_pushing_cures_it():
    parts = [source(c) for c in cells(LESSON) if c['cell_type']=='code']
    there = dict(torch=torch, nn=torch.nn)
    for piece in ('from ifnd_nb.all import *', 'def train_on_circle'): exec(next(o for o in parts if piece in o), there)
    exec(next(o for o in parts if 'def pull_and_push' in o).splitlines()[0], there)
    pull, train = (lambda q, k: -(q * k).sum(1).mean()), there['train_on_circle']
    before, pulled, pushed = train(pull, epochs=0), train(pull), train(there['pull_and_push'])
    alike = [(z @ z.T).mean().item() for z in (before, pulled, pushed)]
    assert alike[0] < .5 and alike[1] > .97 and abs(alike[2]) < .2
    def same_digit(z): return (there['digit'][nearest_of(z)] == there['digit'][:, None]).float().mean()
    def nearest_of(z): return (z @ z.T - 9 * torch.eye(len(z))).topk(9).indices
    assert same_digit(pushed) > 1.5 * same_digit(before)
    parts = torch.histc(torch.atan2(pushed[:, 1], pushed[:, 0]), 12, -torch.pi, torch.pi)
    assert (parts > 0).all() # the circle is full

def test_the_fast_form_is_much_faster():
    loop, fast = numbers(output_of(LESSON, 'milliseconds'))
    assert loop > 20 * fast

def test_sixteen_batches_fill_the_queue():
    assert 1024 / 64 == 16
    assert 'Each batch adds 64 negatives' in prose_of(LESSON) and 'After sixteen steps' in prose_of(LESSON)

def test_loss_falls_and_accuracy_rises_from_low():
    lines = [numbers(o) for o in output_of(LESSON, 'table = learn.epoch_table()').splitlines()]
    train, valid, accuracy = zip(*[o for o in lines if len(o)==3])
    assert train[-1] < train[0] and valid[-1] < valid[0]
    assert accuracy[0] < .2 and accuracy[0] < accuracy[-1] < .9

def test_a_guess_is_right_less_than_once_in_a_hundred_times():
    queue = [min(359, n) for n in range(64, 64 * 6 + 1, 64)] # held-out keys after each batch
    assert sum(1 / n for n in queue) / len(queue) < .01

def test_half_of_the_push_needs_a_temperature_of_a_half():
    shares = rows(re.sub(r'^(\d+\.\d+)', r't\1', output_of(LESSON, 'Solution of exercise 1'), flags=re.M))
    assert shares['t0.50'] > .5 > shares['t1.00'] and shares['t0.05'] > .95

def test_few_negatives_and_no_momentum_find_fewer_keys():
    found = rows(output_of(LESSON, 'Solution of exercise 2'))
    many, few, still = (found[f'{n} keys, momentum {m}'] for n, m in ((1024, .99), (16, .99), (1024, 0.)))
    assert many > few + .03 and few > still + .03

def test_the_trap_and_the_next_lesson_are_linked():
    for target in re.findall(r'\]\(([\w./]+\.ipynb)\)', prose_of(LESSON)): assert (NBS/'learn'/target).exists(), target
    assert '../reference/moco.ipynb' in prose_of(LESSON) and 'Next: [evaluation](04_evaluation.ipynb)' in prose_of(LESSON)

def test_batchnorm_leaks_less_with_two_parts():
    lines = [numbers(o) for o in output_of(REFERENCE, 'found.round(2)').splitlines()]
    whole, two = [o[0] - o[1] for o in lines if len(o)==2]
    assert whole > two + .05
