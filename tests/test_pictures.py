"Names of classes as they are, on paper"
from pathlib import Path
import matplotlib.pyplot as plt, pytest
from ifnd_nb import pictures as pictures_room
from ifnd_nb.cli import main
from ifnd_nb.loaders import two_view_dls
from helpers import metrics, pictures

pytestmark = pytest.mark.usefixtures('in_a_folder')

@pytest.mark.parametrize('names', [('US$_to_$', '$5_bill$'), ('_under', r'back\slash$x$'), ('猫', 'кошка'), ('a{b', 'c^_d$'), (' space', '%s')], ids=str)
def test_odd_names_of_classes_are_text(names, capsys, monkeypatch):
    folder = pictures(Path('pics'), 40, 'png', 16)
    for i, name in enumerate(names): (folder/f'class{i}').rename(folder/name)
    legends, real = [], pictures_room._legend
    monkeypatch.setattr(pictures_room, '_legend', lambda ax, names: (real(ax, names), legends.append([t.get_text() for t in ax.get_legend().get_texts()])))
    main(['--data', 'pics', '--size', '16', '--bs', '8', '--epochs', '1', '--queue-size', '16', '--n-clusters', '2'])
    assert capsys.readouterr().err=='' and (Path('ifnd_out')/'report.png').exists() and metrics()['knn'] is not None
    assert legends[-1]==sorted(names)
    dls = two_view_dls('pics', size=16, bs=8)
    dls.show_batch(); plt.gcf().canvas.draw()
