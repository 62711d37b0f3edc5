"The report is drawn, whatever there is to draw"
from pathlib import Path
import matplotlib.pyplot as plt, pytest, torch
from PIL import Image
from ifnd_nb import report
from ifnd_nb.cli import main
from ifnd_nb.pictures import project_2d
from ifnd_nb.runs import note
from ifnd_nb.start import start_run
from ifnd_nb.training import do_run
from helpers import metrics, pictures, small

pytestmark = pytest.mark.usefixtures('in_a_folder')

def test_each_panel_fails_alone(monkeypatch, capsys):
    learn, cfg, out = start_run(data=small()[1], size=16, bs=8, epochs=1, queue_size=16, strategy='none')
    def broken(*a, **kw): raise RuntimeError('no ink')
    monkeypatch.setattr(report, 'plot_embedding', broken)
    with learn.no_bar(), learn.no_logging(): do_run(learn, cfg, out)
    assert capsys.readouterr().err=='ifnd_train: a panel of the report cannot be drawn: no ink\n'
    assert Image.open(out/'report.png').size[0] > 1000 and metrics()['knn'] is not None

def test_what_scoring_will_lack_is_said_before_training(capsys):
    for i in range(12):
        (p := Path('one')/'a'/f'{i}.png').parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (16, 16), (i, 0, 0)).save(p)
    Path('held/a').mkdir(parents=True), Path('held/b').mkdir(); Path('one/b').mkdir()
    Image.new('RGB', (16, 16)).save('one/b/0.png')
    for c in 'ab': Image.new('RGB', (16, 16)).save(f'held/{c}/0.png')
    learn, cfg, out = start_run(data='one', valid='held', size=16, bs=4, epochs=1)
    assert capsys.readouterr().err==''
    learn.dls.train_ds.labels.zero_()
    report.rehearse(learn, 'small_resnet', note)
    assert 'no linear score: train_y holds only class 0' in capsys.readouterr().err

@pytest.mark.parametrize('bs', [9, 12, 15, 31])
def test_any_batch_is_drawn(bs, capsys):
    main(['--data', str(pictures(Path('pics'), 60, 'png', 16)), '--size', '16', '--bs', str(bs), '--epochs', '1',
          '--queue-size', '16', '--strategy', 'none'])
    assert capsys.readouterr().err=='' and metrics()['knn'] is not None and (Path('ifnd_out')/'report.png').exists()

@pytest.mark.parametrize('labels', [True, False])
def test_blank_images_are_no_end(labels, capsys):
    "t-SNE of equal rows would end the process"
    folder = pictures(Path('pics'), 60, 'png', 16)
    for i, f in enumerate(sorted(folder.rglob('*.png'))):
        if i % 30 < 25: Image.new('RGB', (16, 16)).save(f)
        if not labels: f.rename(folder/f.name)
    main(['--data', 'pics', '--size', '16', '--bs', '8', '--epochs', '1', '--queue-size', '16', '--strategy', 'none'])
    assert capsys.readouterr().err=='' and (Path('ifnd_out')/'report.png').exists()
    with pytest.raises(ValueError, match='all 20 rows of features are alike'): project_2d(torch.ones(20, 4), 'tsne')

def test_without_labels_no_panel_is_empty(monkeypatch, capsys):
    drawn, real = [], report.plot_report
    monkeypatch.setattr(report, 'plot_report', lambda *a, **kw: drawn.append(real(*a, **kw)) or drawn[-1])
    monkeypatch.setattr(plt, 'close', lambda *a: None)
    folder = pictures(Path('pics'), 60, 'png', 16)
    for f in sorted(folder.rglob('*.png')): f.rename(folder/f.name)
    main(['--data', 'pics', '--size', '16', '--bs', '8', '--epochs', '3', '--queue-size', '16', '--n-clusters', '4'])
    assert capsys.readouterr().err=='' and metrics()['removed'] > 0 and metrics()['table'] is None
    assert [ax.get_title()[:8] for ax in drawn[-1].axes]==['Loss: in', 'How much', 'False ne', 'Two view', 'IFND: 48']
    assert all(ax.lines or ax.collections or ax.images for ax in drawn[-1].axes)
