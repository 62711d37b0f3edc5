"Names of classes as they are, on paper"
from pathlib import Path
import matplotlib.pyplot as plt, pytest, torch
from ifnd_nb import pictures as pictures_room
from ifnd_nb.cli import main
from ifnd_nb.loaders import two_view_dls
from ifnd_nb.pictures import plot_embedding
from helpers import metrics, pictures

pytestmark = pytest.mark.usefixtures('in_a_folder')

@pytest.mark.parametrize('names',
                         [('US$_to_$', '$5_bill$'), ('_under', r'back\slash$x$'), ('猫', 'кошка'), ('a{b', 'c^_d$'),
                          (' space', '%s')], ids=str)
def test_odd_names_of_classes_are_text(names, capsys, monkeypatch):
    folder = pictures(Path('pics'), 40, 'png', 16)
    for i, name in enumerate(names): (folder/f'class{i}').rename(folder/name)
    legends, real = [], pictures_room._legend
    def noted(ax, names):
        real(ax, names)
        legends.append([t.get_text() for t in ax.get_legend().get_texts()])
    monkeypatch.setattr(pictures_room, '_legend', noted)
    main(['--data', 'pics', '--size', '16', '--bs', '8', '--epochs', '1', '--queue-size', '16', '--n-clusters', '2'])
    assert capsys.readouterr().err=='' and (Path('ifnd_out')/'report.png').exists() and metrics()['knn'] is not None
    assert legends[-1]==sorted(names)
    dls = two_view_dls('pics', size=16, bs=8)
    dls.show_batch()
    plt.gcf().canvas.draw()

def test_plot_embedding_takes_many_points_many_classes_and_no_labels():
    x = torch.randn(3000, 5)
    ax = plot_embedding(x, torch.arange(3000) % 4 - 1, vocab=list('abc'), n_max=1000)
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ['unlabelled', 'a', 'b', 'c']
    assert sum(len(c.get_offsets()) for c in ax.collections) == 1000
    assert plot_embedding(x, torch.arange(3000) % 50).get_legend() is None
    assert plot_embedding(x).get_legend() is None
    assert len(plot_embedding(x[:20], method='tsne').collections[0].get_offsets()) == 20
    with pytest.raises(ValueError, match="choose 'pca' or 'tsne'"): plot_embedding(x, method='umap')
    plt.close('all')
