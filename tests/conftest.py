"""Tests run on the CPU, where one seed gives the same bits each time; those marked `gpu` run on a CUDA GPU, and are
skipped where there is none"""
import pytest, torch
from fastai.torch_core import default_device

CUDA = torch.cuda.is_available() # asked before tests hide the GPU from the processes that they start

def pytest_configure(config):
    config.addinivalue_line('markers', 'gpu: runs on a CUDA GPU')
    default_device(False) # for what modules make before their tests
    torch.set_num_threads(1) # tiny images feed no more

def pytest_collection_modifyitems(items):
    for item in items:
        if not CUDA and item.get_closest_marker('gpu'): item.add_marker(pytest.mark.skip(reason='needs a GPU'))

@pytest.fixture(autouse=True)
def on_device(request, monkeypatch):
    "Where a test works, and the processes that it starts"
    if request.node.get_closest_marker('gpu') is None:
        monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '')
        yield 'cpu'
        return
    default_device(None)
    yield 'cuda'
    default_device(False)

@pytest.fixture
def in_a_folder(tmp_path, monkeypatch):
    "Work in a folder of its own, and draw into files"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('MPLBACKEND', 'Agg')
