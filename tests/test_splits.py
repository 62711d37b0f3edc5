"Which images are trained on, and which are held out"
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from ifnd_nb.cli import main
from ifnd_nb.config import run_config
from ifnd_nb.embedding import embed
from ifnd_nb.glyphs import glyphs
from ifnd_nb.ifnd import ifnd_learner
from ifnd_nb.loaders import plain_dl, two_view_dls
from ifnd_nb.sources import image_source
from ifnd_nb.training import split_text
from helpers import folder, loaders, one_line, quiet, refused, save_many, SMALL

pytestmark = pytest.mark.usefixtures('in_a_folder')

def test_channels_of_held_out_images_follow():
    x = np.random.default_rng(0).random((40, 16, 16, 3))
    held = image_source(x)
    for valid in (x, held):
        dls = two_view_dls('digits', valid=valid, bs=64)
        assert next(iter(dls.valid))[0].shape==(40, 1, 16, 16)
    assert held.channels==3
    with pytest.raises(ValueError, match='images has 3 channels, but the loaders have 1'): plain_dl(dls, held)
    assert two_view_dls('digits', channels=3, bs=64).one_batch()[0].shape==(64, 3, 16, 16)

def test_held_out_images_are_left_as_they_were():
    held = image_source(np.zeros((3, 8, 8)), labels=[9, 9, 8])
    dls = two_view_dls('digits', valid=held, bs=64)
    assert dls.valid_ds.labels.tolist()==[9, 9, 8] and held.labels.tolist()==[1, 1, 0] and held.vocab==[8, 9]

def test_coarse_labels_follow_the_split():
    g = glyphs(20, 5)
    dls = two_view_dls(g, bs=16)
    kind = dict(zip(g.labels.tolist(), g.coarse.tolist()))
    assert all(kind[y]==c for ds in (dls.train_ds, dls.valid_ds) for y,
               c in zip(ds.labels.tolist(), ds.coarse.tolist()) if y >= 0)

def test_held_out_images_of_their_own(tmp_path, capsys):
    for c in 'ab': save_many(tmp_path/'t'/c, 6)
    for c in 'b': save_many(tmp_path/'v'/c, 3)
    save_many(tmp_path/'v'/'a', 1); save_many(tmp_path/'w'/'c', 3); save_many(tmp_path/'w'/'a', 3)
    dls = two_view_dls(tmp_path/'t', valid=tmp_path/'v', bs=4)
    assert dls.valid_ds.labels.tolist()==[0, 1, 1, 1] and dls.valid_ds.vocab==['a', 'b']
    assert two_view_dls(tmp_path/'t', valid=tmp_path/'w', bs=4).valid_ds.labels.tolist()==[0, 0, 0, -1, -1, -1]
    said = 'left out of the scores: 3 held-out images of classes that the training images lack (c)\n'
    assert capsys.readouterr().out==said

def test_labels_for_all_parts_of_a_folder():
    for part, n in (('train', 20), ('val', 8)): folder(f's/{part}', ('a', 'b'), n)
    kw, other = dict(bs=8, size=16, device='cpu'), dict(a='x', b='y')
    files = [p for part in ('train', 'val') for p in sorted(Path('s', part).rglob('*.png'))]
    by_path = {'/'.join(p.parts[-3:]): other[p.parent.name] for p in files}
    for labels in (lambda p: other[p.parent.name], by_path, pd.Series(by_path)):
        dls = two_view_dls('s', labels=labels, **kw)
        for ds in dls.train_ds, dls.valid_ds:
            assert [ds.vocab[y] for y in ds.labels]==[other[Path(p).parent.name] for p in ds.paths]
    only_train = {k: v for k, v in by_path.items() if k.startswith('train')}
    assert (two_view_dls('s', labels=only_train, **kw).valid_ds.labels==-1).all()
    for labels in (['x'] * 40, {0: 'x', 1: 'y'}):
        with pytest.raises(ValueError, match='training images alone.*dict by file name or a function'):
            two_view_dls('s', labels=labels, **kw)
    assert len(two_view_dls(['s'], **kw).valid_ds)==16
    with pytest.raises(ValueError, match='names two images'):
        two_view_dls('s', labels={f'a/{i:03}.png': 'x' for i in range(20)}, **kw)
    folder('other', ('a', 'b'), 8)
    dls = two_view_dls('s', valid='other', labels=lambda p: other[p.parent.name], **kw)
    assert dls.vocab==['x', 'y']
    assert [dls.vocab[y] for y in dls.valid_ds.labels]==[other[Path(p).parent.name] for p in dls.valid_ds.paths]

@pytest.mark.parametrize('names,held',
                         [(('train', 'val'), 'val'), (('train', 'valid', 'test'), 'valid'), (('Train', 'Test'), 'Test'),
                          (('training', 'validation'), 'validation')])
def test_parts_become_split_and_labels(names, held, capsys):
    for part in names: folder(f'split/{part}', ('cat', 'dog'), 20 if part.lower().startswith('train') else 6)
    dls = two_view_dls('split', bs=16, size=16, device='cpu')
    assert (len(dls.train_ds), len(dls.valid_ds))==(40, 12) and dls.vocab==dls.valid_ds.vocab==['cat', 'dog']
    assert all(f'/{held}/' in p for p in dls.valid_ds.paths) and dls.train_ds.name=='split'
    assert ('left out: 1 folder beside' in capsys.readouterr().out)==(len(names)==3)
    assert split_text(run_config(data='split'))=='the images that the set holds out itself'
    assert len(image_source('split', train=None))==sum(20 if n.lower().startswith('train') else 6 for n in names) * 2
    assert image_source('split', train=None).vocab==['cat', 'dog']

def test_parts_and_a_wish():
    for name, n in (('s/train', 20), ('s/val', 6), ('other', 4), ('t', 20)): folder(name, ('a', 'b'), n)
    kw = dict(bs=16, size=16, device='cpu')
    assert [len(two_view_dls('s', valid=v, **kw).valid_ds) for v in (None, .25, 0, 'other')]==[12, 10, 0, 8]
    assert all('/val/' not in p for p in two_view_dls('s', valid=.25, **kw).valid_ds.paths)
    assert all('/val/' in p for p in two_view_dls('t', valid='s', **kw).valid_ds.paths)
    assert len(two_view_dls('t', valid=np.float32(.25), **kw).valid_ds)==10

def test_a_part_without_classes_is_no_part_to_score_on():
    folder('kaggle/train', ('a', 'b'), 10), folder('kaggle/test', ('.',), 30)
    dls = two_view_dls('kaggle', bs=8, size=16, device='cpu')
    assert (len(dls.train_ds), len(dls.valid_ds))==(16, 4) and dls.vocab==['a', 'b']

def test_images_that_are_held_out_are_not_trained_on(capsys):
    folder('s', ('a', 'b'), 20)
    folder('s/held', ('a', 'b'), 5)
    dls = two_view_dls('s', valid='s/held', bs=8, size=16, device='cpu')
    assert (len(dls.train_ds), len(dls.valid_ds))==(40, 10)
    assert 'left out of training: 10 images' in capsys.readouterr().out
    with pytest.raises(ValueError, match='valid holds all of the training images'):
        two_view_dls('s', valid='s', bs=8, size=16)

def test_what_is_wrong_with_valid_names_valid(capsys):
    folder('base')
    for valid, words in (('nope/x', "--valid='nope/x' is not a folder"),
                         ('pics.zip', "--valid='pics.zip' is an archive")):
        assert refused('--data', 'base', '--valid', valid)==2 and words in one_line(capsys)

def test_all_images_can_be_trained_on(tmp_path):
    dls = loaders(valid=0)
    assert len(dls.train_ds)==96 and len(dls.valid_ds)==len(dls.valid)==0
    learn = ifnd_learner(dls, queue_size=32, path=tmp_path)
    quiet(learn, lambda l: l.fit(2))
    assert embed(learn.model.body, plain_dl(dls), no_bar=True)[0].shape==(96, 512)

def test_held_out_classes_that_training_lacks_are_left_out_of_the_scores(capsys):
    folder('t', ('a', 'b'), 20), folder('v', ('a', 'b', 'c'), 10)
    main(['--data', 't', '--valid', 'v', *SMALL])
    said = capsys.readouterr().out
    assert 'left out of the scores: 10 held-out images of classes that the training images lack (c)' in said
    assert '20 held-out images: those of' in said

def test_a_class_that_the_split_holds_out_whole(capsys):
    y = torch.cat([torch.arange(2).repeat(40), torch.tensor([2])])
    dls = next(d for seed in range(99)
               if len((d := two_view_dls(torch.zeros(81, 1, 8, 8, dtype=torch.uint8), labels=y, bs=8, seed=seed,
                                         device='cpu')).valid_ds.labels[d.valid_ds.labels==-1]))
    assert (dls.train_ds.labels==2).sum()==0 and 'lack (2)' in capsys.readouterr().out
