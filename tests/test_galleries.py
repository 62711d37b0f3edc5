"Pictures of what was found say what is missing"
import pytest, torch
from helpers_method import bright_loaders, fit, learner

@pytest.fixture(scope='module')
def dls(): return bright_loaders()

def test_galleries_say_what_is_missing(dls):
    learn = fit(learner(dls, [], n_clusters=[96], acceptance=1.), 2)
    learn.model.detector.pseudo[:, 0] = torch.arange(96)
    with pytest.raises(ValueError, match='no two images share a pseudo label'): learn.ifnd.show_false_negatives()
    learn.model.detector.pseudo[2:] = -1
    learn.ifnd.show_clusters()
    with pytest.raises(ValueError, match='no pseudo labels to show'):
        fit(learner(dls, detector='topk'), 1).ifnd.show_clusters()
