"What the lesson on views says, against its saved outputs, the code and the measurements"
import inspect, re
import pandas as pd, torch
from torchvision import transforms
from saved import NBS, cells, output_of, prose_of, source
from ifnd_nb.glyphs import glyphs
from ifnd_nb.matrices import colour_matrix
from ifnd_nb.views import TwoViews, augmentations

LESSON = 'learn/02_views'
prose = prose_of(LESSON)

def numbers(text): return [float(o) for o in re.findall(r'-?\d+\.\d+', text)]

def test_crops_of_an_epoch():
    "Images, batches and views of the example"
    assert 'an epoch of 10,000 images in batches of 256 then holds about 80 different crops instead of 20,000' in prose
    assert 2 * -(-10_000 // 256)==80 and 2 * 10_000==20_000

def test_a_slice_is_a_matrix():
    printed = output_of(LESSON, 'keep, mirror, halve =')
    assert '[20.0, 30.0, 40.0, 50.0]' in printed and '[5.0, 25.0, 45.0, 65.0]' in printed

def test_torchvision_draws_once_for_each_call():
    "So does the first row of the picture"
    crops = transforms.RandomResizedCrop(32, scale=(.3, .6), antialias=True)(torch.rand(1, 3, 32, 32).expand(8, -1, -1, -1))
    assert (crops==crops[:1]).all()

def test_a_shared_generator_gives_an_image_other_numbers_in_another_batch():
    alone, together = numbers(output_of(LESSON, 'whole = torch.rand(4)'))
    assert abs(alone - together) > .1

def test_a_hash_gives_other_numbers_in_another_epoch():
    now, then = numbers(output_of(LESSON, 'whole = hashed_uniforms('))
    assert abs(now - then) > .1

def test_settings_that_the_prose_names():
    preset = glyphs(2, 1).preset
    assert preset['flip']==0 and preset['hue']==.5 and preset['invert']==.5
    defaults = {o.name: o.default for o in inspect.signature(TwoViews).parameters.values()}
    assert defaults['grey']==.2 and '`grey=.2`' in prose
    assert augmentations['small']=={} # the standard settings
    assert list(augmentations)==['grey', 'small', 'photo']

def test_fruits_are_one_without_colour():
    one = torch.ones(1)
    m, t = colour_matrix(one, one, 0*one, 0*one, one.expand(1, 3))
    ripe, unripe = torch.tensor([.9, .2, .2]), torch.tensor([.2, .556, .2])
    assert (m[0] @ ripe - m[0] @ unripe).abs().max() < .005 and (t==0).all()
    assert '(.9, .2, .2), (.2, .556, .2)' in source(next(c for c in cells(LESSON) if 'ripe, unripe' in source(c)))

def test_gentler_views_on_fashion_mnist():
    "Gentler light costs a little accuracy, and gentler crops gain a little in short runs"
    knn = pd.read_csv(NBS/'results'/'ablation.csv').groupby('change').knn.mean() * 100
    assert .2 < knn['nothing'] - knn['gentler light'] < 2 and .2 < knn['gentler crops'] - knn['nothing'] < 2

def test_a_crop_of_a_crop_is_exact_on_whole_pixels_alone():
    exact, between = numbers(output_of(LESSON, '# Solution of exercise 2'))
    assert exact < 1e-6 and between > .1
