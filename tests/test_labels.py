"Labels of any kind, and which of them are unknown"
import math
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from ifnd_nb.sources import image_source
from helpers import folder, picture

pytestmark = pytest.mark.usefixtures('in_a_folder')

def test_labels_of_any_kind():
    x = np.zeros((4, 8, 8))
    for labels in ([7, 9, 7, -1], np.array([7, 9, 7, -1]), torch.tensor([7, 9, 7, -1]),
                   [torch.tensor(i) for i in (7, 9, 7, -1)], [7, 9, 7, None]):
        images = image_source(x, labels=labels)
        assert images.labels.tolist()==[0, 1, 0, -1] and images.vocab==[7, 9]
    assert image_source(x, labels=['b', 'a', 'b', None]).labels.tolist()==[1, 0, 1, -1]
    assert image_source(x, labels=np.array(['b', 'a', 'b', 'b'])).vocab==['a', 'b']

@pytest.mark.parametrize('labels', [
    ['cat', 'dog', None, 'owl'] * 3, ['cat', 'dog', '', 'owl'] * 3, ['cat', 'dog', -1, 'owl'] * 3,
    pd.Series(['cat', 'dog', None, 'owl'] * 3),
    pd.Series(['cat', 'dog', np.nan, 'owl'] * 3, dtype=object),
    pd.Series(['cat', 'dog', pd.NA, 'owl'] * 3, dtype='string'), np.array(['cat', 'dog', np.nan, 'owl'] * 3),
    pd.Series(['cat', 'dog', None, 'owl'] * 3, dtype='category'),
    pd.DataFrame(dict(y=['cat', 'dog', None, 'owl'] * 3))['y'], pd.Series(['cat', 'dog', None, 'owl'] * 3).values],
    ids=lambda o: type(o).__name__)
def test_missing_names_are_unknown(labels):
    images = image_source(torch.zeros(12, 1, 8, 8, dtype=torch.uint8), labels=labels)
    assert images.vocab==['cat', 'dog', 'owl'] and images.labels.tolist()==[0, 1, -1, 2] * 3

@pytest.mark.parametrize('labels',
                         [pd.Series([0., 1., np.nan] * 4), pd.Series([0, 1, None] * 4, dtype='Int64'),
                          np.array([0, 1, -1] * 4), torch.tensor([0., 1., math.nan] * 4), np.array([0., 1., -1.] * 4),
    np.ma.masked_array([0, 1, 7] * 4, [0, 0, 1] * 4), pd.array([0, 1, pd.NA] * 4, dtype='Int64')], ids=str)
def test_missing_numbers_are_unknown(labels):
    images = image_source(torch.zeros(12, 1, 8, 8, dtype=torch.uint8), labels=labels)
    assert images.vocab==[0, 1] and all(type(v) is int for v in images.vocab) and images.labels.tolist()==[0, 1, -1] * 4

@pytest.mark.parametrize('key',
                         [lambda p: str(p), lambda p: p, lambda p: p.name, lambda p: p.stem,
                          lambda p: f'{p.parent.name}/{p.name}'], ids=range(5))
def test_labels_by_name(key):
    for i in range(3): picture(f'pics/a/{i}.png')
    for i in range(3, 5): picture(f'pics/b/{i}.png')
    files = sorted(Path('pics').rglob('*.png'))
    images = image_source('pics', labels={key(p): 'odd' if int(p.stem) % 2 else 'even' for p in files[:-1]})
    assert images.vocab==['even', 'odd'] and images.labels.tolist()==[0, 1, 0, 1, -1]

def test_labels_by_index_and_by_no_name_that_is_there():
    x = torch.zeros(3, 1, 8, 8, dtype=torch.uint8)
    assert image_source(x, labels={0: 'a', 2: 'b'}).labels.tolist()==[0, -1, 1]
    picture('pics/0.png')
    for source in ('pics', x):
        with pytest.raises(ValueError, match="keys like 'zebra'"): image_source(source, labels={'zebra': 1})

def test_names_that_two_images_have():
    for c in ('cat', 'dog'): picture(f'pics/{c}/0.png')
    with pytest.raises(ValueError, match="'0.png' names two images.*like 'dog/0.png'"):
        image_source('pics', labels={'0.png': 'cat'})

def test_pandas_labels_go_by_their_index():
    folder('base', n=4)
    df = pd.DataFrame(dict(path=sorted(map(str, Path('base').rglob('*.png')))))
    df['label'] = [Path(p).parent.name for p in df['path']]
    right = lambda images: all(images.vocab[y]==Path(p).parent.name for p, y in zip(images.paths, images.labels))
    mixed = df.sample(frac=1, random_state=0)
    for data, labels in ((mixed['path'], df['label']), (mixed['path'], mixed['label']),
                         (df['path'].tolist(), df['label']), (mixed['path'].tolist(), df.set_index('path')['label']),
                         (df['path'], lambda p: p.parent.name)):
        assert right(image_source(data, labels=labels))
    with pytest.raises(ValueError, match='different indices'):
        image_source(df['path'], labels=pd.Series(list('abcabcabcabc'), index=range(5, 17)))
