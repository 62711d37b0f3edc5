"All that can be wrong is said before training, and a run goes on where it was"
import math, os
from pathlib import Path
import numpy as np, pytest, torch
from PIL import Image
from fastai.callback.core import Callback
from ifnd_nb import scoring, training
from ifnd_nb.cli import main
from ifnd_nb.config import run_config
from ifnd_nb.loaders import two_view_dls
from ifnd_nb.runs import load_checkpoint, load_config, RunFiles
from ifnd_nb.start import start_run
from ifnd_nb.training import do_run
from ifnd_nb.weights import load_encoder
from helpers import bad_folder, folder, metrics, one_line, pictures, refused, small, SMALL, TINY

pytestmark = pytest.mark.usefixtures('in_a_folder')

def snapshot(folder): return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob('*')) if p.is_file()}

def empty_folder(tmp_path): p = tmp_path/'empty'; p.mkdir(); (p/'notes.txt').write_text('no image'); return p

@pytest.mark.parametrize('change,words', [
    (dict(data='no/such/folder'), 'no/such/folder'), (dict(data='digit'), "did you mean 'digits'"),
    (dict(data=empty_folder), 'holds no images'),
    (dict(data=bad_folder, bs=4), "4.jpg' is damaged"), (dict(bs=5000), 'bs=5000'),
    (dict(arch='resnet19'), "arch='resnet19'"),
    (dict(strategy='attrack'), "strategy='attrack'"), (dict(arch='alexnet', size=16), 'size=16'),
    (dict(out='/dev/null/run'), '/dev/null/run'),
    (dict(epochs=0), 'epochs=0'), (dict(workers=-1), 'workers=-1'), (dict(tau=0.), 'tau=0'), (dict(lr=-1.), 'lr=-1'),
    (dict(queue_size=0), 'queue_size=0')], ids=lambda o: o if isinstance(o, str) else '-'.join(o))
def test_bad_input_is_one_line_and_leaves_out_as_it_was(change, words, tmp_path):
    change = {k: str(v(tmp_path)) if callable(v) else v for k, v in change.items()}
    out = tmp_path/'out'; out.mkdir(); (out/'mine.txt').write_text('keep')
    before = snapshot(tmp_path)
    with pytest.raises((ValueError, OSError)) as e: start_run(**{'out': str(out), **TINY, **change})
    assert words in str(e.value) and '\n' not in str(e.value)
    assert snapshot(tmp_path) == before

def test_a_resumed_run_keeps_its_arguments(tmp_path, capsys):
    with pytest.raises(SystemExit) as e: main(['--resume', str(tmp_path), '--bs', '9', '--tau', '0.2'])
    assert e.value.code == 2 and 'leave out --bs, --tau' in capsys.readouterr().err

@pytest.mark.parametrize('change',
                         [dict(detector='oracle'), dict(detector='topk', strategy='attract'), dict(detector='quantile'),
                          dict(features='pass'), dict(n_clusters='5,10')], ids=str)
def test_every_detector_and_source_by_its_name(change, tmp_path):
    learn, cfg, _ = start_run(out=tmp_path/'a', **{**TINY, 'strategy': 'eliminate', **change, 'epochs': 2})
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(2, cfg.lr)
    assert len(load_checkpoint(tmp_path/'a')['rows']) == 2 and all(p.isfinite().all() for p in learn.model.parameters())

def test_skip_bad_goes_on(tmp_path, capsys):
    learn, _, _ = start_run(out=tmp_path/'out',
                            **{**TINY, 'data': str(bad_folder(tmp_path)), 'bs': 4, 'skip_bad': True, 'size': 32})
    assert len(learn.dls.train_ds) + len(learn.dls.valid_ds) == 23
    assert 'left out: 1 damaged image' in capsys.readouterr().out

def test_a_checkpoint_of_another_shape_is_refused(tmp_path):
    learn, cfg, out = start_run(out=tmp_path/'a', **TINY)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(1, cfg.lr)
    state = load_checkpoint(out); state['config']['queue_size'] = 99; torch.save(state, out/'checkpoint')
    with pytest.raises(ValueError, match='does not fit this model'): start_run(resume=out)

def test_config_is_there_from_the_start():
    pictures(Path('pics'), 40, 'png', 16)
    learn, cfg, out = start_run(data='pics', size=16, bs=8, epochs=1)
    c = load_config(out)
    assert [p.name for p in out.iterdir()]==['config.json'] and c['data']==str(Path('pics').absolute())
    assert c['out']==str(out.absolute())
    assert c['seed']==42 and c['device']=='cpu' and c['arch']=='small_resnet'
    assert c['versions']['torch']==torch.__version__ and c['queue_size']==4096 and c['size']==16
    assert c.keys() >= run_config(data='pics').told().keys() and c['images']['train']['n']==32

def test_a_score_that_fails_in_training_costs_only_itself(monkeypatch, capsys):
    learn, cfg, out = start_run(data=small()[1], size=16, bs=8, epochs=2, queue_size=16, strategy='none')
    monkeypatch.setattr(scoring, 'knn_accuracy', lambda *a, **kw: (_ for _ in ()).throw(RuntimeError('no neighbours')))
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(2)
    assert len(load_checkpoint(out)['rows'])==2 and all(math.isnan(r['knn']) for r in load_checkpoint(out)['rows'])
    assert capsys.readouterr().err.splitlines()==['ifnd_train: no k-NN score: no neighbours'] * 2

def begun(*more, epochs=3, after=1):
    "A run that was interrupted after some epochs"
    learn, cfg, out = start_run(**{**dict(data='pics', size=16, bs=8, epochs=epochs, queue_size=16, n_clusters='2,4',
                                          out='run'), **dict(more)})
    class Stop(Callback):
        order = RunFiles.order + 1
        def after_epoch(self):
            if self.epoch + 1==after: raise KeyboardInterrupt
    learn.add_cb(Stop())
    with pytest.raises(KeyboardInterrupt), learn.no_bar(), learn.no_logging(): do_run(learn, cfg, out)
    return out

def test_resume_works_from_any_folder(monkeypatch):
    pictures(Path('pics'), 40, 'png', 16), pictures(Path('held'), 10, 'png', 16)
    begun(('valid', 'held'))
    Path('elsewhere/pics').mkdir(parents=True)
    monkeypatch.chdir('elsewhere')
    main(['--resume', '../run'])
    assert len(load_checkpoint('../run')['rows'])==3 and metrics('../run')['knn'] is not None

def add(): Image.new('RGB', (16, 16)).save('pics/class0/new.png')

def remove(): sorted(Path('pics/class0').iterdir())[0].unlink()

def rename(): (f := sorted(Path('pics/class0').iterdir())[0]).rename(f.with_name('zzz.png'))

def same_size():
    "Another picture, in as many bytes where it is not larger"
    f, other = (sorted(Path(f'pics/class{i}').glob('*.png'))[0] for i in (0, 1))
    f.write_bytes(other.read_bytes().ljust(f.stat().st_size, b'\0'))

def replace():
    im = Image.fromarray(np.random.default_rng(1).integers(0, 255, (99, 99, 3), np.uint8))
    im.save(sorted(Path('pics/class0').iterdir())[0])

@pytest.mark.parametrize('change', [add, remove, rename, replace, same_size], ids=lambda f: f.__name__)
@pytest.mark.parametrize('strategy', ['none', 'eliminate'])
def test_resume_says_that_the_images_changed(change, strategy, capsys):
    pictures(Path('pics'), 40, 'png', 16)
    begun(('strategy', strategy), *([('n_clusters', None)] if strategy=='none' else []))
    before = (Path('run')/'checkpoint').read_bytes()
    change()
    with pytest.raises(SystemExit) as e: main(['--resume', 'run'])
    err = capsys.readouterr().err
    assert e.value.code==2 and 'images changed since the run began: ' in err and err.count('\n')==1
    assert (Path('run')/'checkpoint').read_bytes()==before

def test_images_that_moved_are_the_same_images():
    pictures(Path('pics'), 40, 'png', 16)
    begun()
    cfg = load_config('run')
    Path('pics').rename('moved')
    assert two_view_dls('moved', size=16, bs=8).train_ds.fingerprint()==cfg['images']['train']['digest']

def test_training_starts_from_an_encoder():
    main([*small(), '--strategy', 'none', '--out', 'first'])
    learn, cfg, _ = start_run(from_weights='first/encoder.safetensors', data='pics', size=16, bs=8, epochs=1)
    body, _ = load_encoder('first/encoder.safetensors')
    assert all(torch.equal(p, q) for p, q in zip(body.parameters(), learn.model.body.parameters()))
    assert cfg.arch=='small_resnet' and os.path.isabs(cfg.from_weights)
    # short for --from-weights
    main([*small(), '--from', 'first/encoder.safetensors', '--beside-baseline', '--n-clusters', '2', '--out', 'second'])
    assert metrics('second')['knn'] is not None

def test_weights_that_changed_or_went_are_not_started_from_again(capsys):
    for out in ('a', 'b'): main([*small(), '--strategy', 'none', '--seed', '1' if out=='a' else '2', '--out', out])
    begun(('from_weights', 'a/encoder.safetensors'), ('beside_baseline', True))
    Path('b/encoder.safetensors').replace('a/encoder.safetensors')
    capsys.readouterr()
    main(['--resume', 'run']) # the run has a checkpoint, its baseline would start elsewhere
    assert 'the baseline beside it is not' in (err := capsys.readouterr().err) and 'changed since the run began' in err
    assert metrics('run')['knn'] is not None and 'baseline' not in metrics('run')['table']
    Path('a/encoder.safetensors').unlink()
    main(['--resume', 'run'])
    assert metrics('run')['knn'] is not None

def test_a_run_from_a_gpu_goes_on_without_one(capsys, monkeypatch):
    pictures(Path('pics'), 40, 'png', 16)
    begun()
    state = load_checkpoint('run'); state['config']['device'] = 'cuda:0'; torch.save(state, 'run/checkpoint')
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    main(['--resume', 'run'])
    assert 'the run began on cuda:0, which is not there; it goes on on cpu' in capsys.readouterr().err
    assert load_config('run')['device']=='cpu'

def test_new_options_reach_the_learner(monkeypatch):
    seen = {}
    monkeypatch.setattr(training, 'do_run', lambda learn, cfg, out: seen.update(learn=learn, cfg=cfg))
    folder('base')
    main(['--data', 'base', *SMALL, '--acceptance', '.3', '--wd', '.2', '--dim', '24', '--max-cache-gb', '0',
          '--workers', '0'])
    learn = seen['learn']
    assert learn.model.queue.shape[1]==24 and learn.wd==.2 and learn.ifnd.rate(.9)==.3
    assert learn.dls.train_ds.images is None
    main(['--data', 'base', *SMALL, '--acceptance', 'linear'])
    assert seen['learn'].ifnd.rate(.5)==pytest.approx(.5)

def test_fp16_takes_a_gpu(capsys):
    assert refused('--data', 'digits', '--precision', 'fp16', '--device', 'cpu')==2
    said = "ifnd_train: --precision='fp16' works on a CUDA GPU; leave it out on another device"
    assert one_line(capsys)==said

def test_a_resumed_run_has_no_empty_rows_and_knows_where_the_images_went(capsys):
    folder('base')
    main(['--data', 'base', *SMALL, '--out', 'run'])
    Path('base').rename('moved')
    capsys.readouterr()
    assert refused('--resume', 'run', '--epochs', '3')==2 and 'no longer at' in (said := one_line(capsys))
    assert said.endswith('with --data')
    assert refused('--resume', 'run', '--data', 'moved', '--threads', '0')==2 and '--threads=0' in one_line(capsys)
    main(['--resume', 'run', '--epochs', '3', '--data', 'moved'])
    lines = [l for l in capsys.readouterr().out.splitlines() if l.startswith('epoch ')]
    assert [l.split()[1] for l in lines]==['2/3', '3/3']
    for args in (['--lr', '0.001'], ['--dim=128'], ['--bs', '16', '--epochs', '9']): # also what is the default
        assert refused('--resume', 'run', *args)==2 and f'leave out {args[0].split("=")[0]}' in one_line(capsys)
    folder('others', n=21)
    assert refused('--resume', 'run', '--epochs', '4', '--data', 'others')==2
    assert 'changed since the run began' in one_line(capsys)
