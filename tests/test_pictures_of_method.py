"Pictures of an embedding"
import pytest, torch
from ifnd_nb.pictures import plot_embedding

def test_plot_embedding_takes_many_points_many_classes_and_no_labels():
    import matplotlib; matplotlib.use('agg')
    import matplotlib.pyplot as plt
    x = torch.randn(3000, 5)
    ax = plot_embedding(x, torch.arange(3000) % 4 - 1, vocab=list('abc'), n_max=1000)
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ['unlabelled', 'a', 'b', 'c']
    assert sum(len(c.get_offsets()) for c in ax.collections) == 1000
    assert plot_embedding(x, torch.arange(3000) % 50).get_legend() is None
    assert plot_embedding(x).get_legend() is None
    assert len(plot_embedding(x[:20], method='tsne').collections[0].get_offsets()) == 20
    with pytest.raises(ValueError, match="choose 'pca' or 'tsne'"): plot_embedding(x, method='umap')
    plt.close('all')
