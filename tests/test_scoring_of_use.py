"Of scoring_of_use"
import math
from pathlib import Path
import pandas as pd, pytest
from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau
from ifnd_nb.encoders import create_encoder
from ifnd_nb.loaders import two_view_dls
from ifnd_nb.moco import moco_learner
from ifnd_nb.scoring import evaluation_table, ScoreCallback
from ifnd_nb.sources import image_source
from helpers import arrays, folder, loaders, quiet

pytestmark = pytest.mark.usefixtures('in_a_folder')

def test_scores_with_missing_labels_are_those_of_the_known(tmp_path):
    x, y = arrays(120)
    some = [v if i % 2 else math.nan for i, v in enumerate(y.tolist())]
    t = evaluation_table(two_view_dls(x, labels=pd.Series(some), size=16, bs=16, device='cpu'), create_encoder('small_resnet', 1, 16), no_bar=True)
    assert t.loc['raw pixels', 'knn']==1 and t.loc['raw pixels', 'linear']==1

def test_the_right_remedy_for_labels_of_held_out_files():
    folder('base')
    files = sorted(map(str, Path('base').rglob('*.png')))
    dls = two_view_dls(files[:40], valid=files[40:], labels=list('ab') * 20, bs=8, size=16, device='cpu')
    with pytest.raises(ValueError, match=r'valid=image_source\(files, labels=...\)'): quiet(moco_learner(dls, cbs=ScoreCallback()), lambda l: l.fit(1))
    dls = two_view_dls(files[:40], valid=image_source(files[40:], labels=list('ab') * 10), labels=list('ab') * 20, bs=8, size=16, device='cpu')
    quiet(moco_learner(dls, queue_size=16, cbs=ScoreCallback()), lambda l: l.fit(1))

def test_few_labels_are_scored(tmp_path):
    x, y = arrays()
    few = [v if i % 12==0 else None for i, v in enumerate(y.tolist())]
    dls = two_view_dls(x, labels=few, size=16, bs=16, valid=image_source(x, labels=y), device='cpu')
    learn = moco_learner(dls, queue_size=16, path=tmp_path, cbs=ScoreCallback())
    quiet(learn, lambda l: l.fit(1))
    assert 0 <= learn.recorder.values[-1][-1] <= 1

@pytest.mark.parametrize('make', [lambda: EarlyStoppingCallback(monitor='knn', patience=3), lambda: ReduceLROnPlateau(monitor='knn', patience=3)])
def test_patience_that_ends_before_the_next_score(make, tmp_path):
    with pytest.raises(ValueError, match='patience=3 epochs, but knn is scored every 4.*patience=4'): quiet(moco_learner(loaders(), queue_size=32, path=tmp_path, cbs=[ScoreCallback(every=4), make()]), lambda l: l.fit(1))

def test_early_stopping_stops_after_scores(tmp_path, capsys):
    learn = moco_learner(loaders(), queue_size=32, path=tmp_path, lr=0., cbs=[ScoreCallback(every=2), EarlyStoppingCallback(monitor='knn', patience=2)])
    quiet(learn, lambda l: l.fit(8))
    knn = [v[-1] for v in learn.recorder.values]
    assert len(knn)==4 and not math.isnan(knn[1]) and not math.isnan(knn[3]) and 'early stopping' in capsys.readouterr().out
