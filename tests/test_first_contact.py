"The first command shows the method, and no finished training is lost or unscored, whatever the images, names, sizes and encoders"
import json, math, os, subprocess, threading, time, types
from pathlib import Path
import matplotlib.pyplot as plt, numpy as np, pandas as pd, pytest, torch
from PIL import Image
from fastai.callback.core import Callback
from ifnd_nb import evaluate, learner, report, runs
from ifnd_nb.loaders import two_view_dls
from ifnd_nb.cli import main
from ifnd_nb.config import run_config
from ifnd_nb.start import start_run
from ifnd_nb.training import do_run
from ifnd_nb.moco import moco_learner
from ifnd_nb.folders import run_files
from ifnd_nb.runs import RunFiles, claim_folder, load_checkpoint, load_config
from ifnd_nb.weights import load_encoder
from test_learner import command, pictures

ROOT = Path(__file__).parent.parent
ROWS, COLUMNS = ['raw pixels', 'untrained encoder', 'baseline', 'trained encoder'], {'knn', 'one_label', 'linear', 'nmi'}

@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('MPLBACKEND', 'Agg')

def metrics(out='ifnd_out'): return json.loads((Path(out)/'metrics.json').read_text())

def small(folder='pics', n=40, **kw):
    "Arguments of a run that takes a second"
    return ['--data', str(pictures(Path(folder), n, 'png', 16, **kw)), '--size', '16', '--bs', '8', '--epochs', '2', '--queue-size', '16']

# ---- the first command

def test_plain_command_compares_with_its_baseline(capsys, monkeypatch):
    drawn, real = [], report.plot_report
    monkeypatch.setattr(report, 'plot_report', lambda *a, **kw: drawn.append(real(*a, **kw)) or drawn[-1])
    monkeypatch.setattr(plt, 'close', lambda *a: None)
    main(['--epochs', '12'])
    out, err = capsys.readouterr()
    assert err==''
    m = metrics()
    assert list(m['table'])==ROWS and all(COLUMNS <= row.keys() and all(math.isfinite(v) for v in row.values()) for row in m['table'].values())
    assert {'removed', 'fn_precision', 'fn_recall', 'lift', 'seconds'} <= m.keys() and m['removed'] > 0 and m['lift'] > 2 and m['seconds'] > 0
    assert m['config']['threads']==torch.get_num_threads()==1 and m['config']['data']=='digits' and [m[c] for c in ('knn', 'one_label')]==[m['table']['trained encoder'][c] for c in ('knn', 'one_label')]
    printed = out.splitlines()
    at = next(i for i, l in enumerate(printed) if 'k-NN' in l and 'one label' in l)
    assert [l[:18].strip() for l in printed[at+1:at+5]]==['raw pixels', 'untrained encoder', 'baseline', 'IFND'] and all(o in printed[at] for o in ('k-NN', 'one label', 'linear', 'NMI'))
    assert 'false negatives removed in' in out and 'times chance' in out
    titles = [ax.get_title() for ax in drawn[-1].axes]
    for words in ('Loss', 'accuracy by epoch', 'How right', 'False negatives found', 'Two views', 'Baseline:', 'IFND:', 'Scores'): assert sum(words in t for t in titles)==1, (words, titles)
    assert all(ax.lines or ax.collections or ax.images or ax.patches for ax in drawn[-1].axes) # no panel is empty
    gallery = next(ax for ax in drawn[-1].axes if 'False negatives' in ax.get_title())
    assert '% of all such pairs are right, 10% by chance' in gallery.get_title() and {t.get_text() for t in gallery.get_legend().get_texts()} >= {'anchor', 'same class'}
    right = next(ax for ax in drawn[-1].axes if 'How right' in ax.get_title())
    assert any('by chance' in t.get_text() for t in right.get_legend().get_texts())

def test_the_baseline_beside_is_the_baseline_alone():
    main([*small(), '--beside-baseline', '--n-clusters', '2,4', '--out', 'both'])
    main([*small(), '--strategy', 'none', '--out', 'alone'])
    a, b = (load_checkpoint(o)['model'] for o in ('both/baseline', 'alone'))
    assert a.keys()==b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())
    assert metrics('both')['table']['baseline']==metrics('alone')['table']['trained encoder'] and list(metrics('both')['table'])==ROWS
    assert {p.name for p in Path('both').iterdir()}=={*run_files, 'baseline'} - {'left_out.txt'}

def test_recorded_runs_of_the_first_command():
    "Ten seeds: far ahead with one label, by k-NN neither ahead nor behind, removing in most epochs"
    t = pd.read_csv(ROOT/'nbs'/'results'/'first_command.csv').set_index(['seed', 'row'])
    gain = t.xs('trained encoder', level='row') - t.xs('baseline', level='row')
    assert len(gain) >= 10 and gain.one_label.min() > 5 * gain.one_label.std() and gain.one_label.mean() > .2 and abs(gain.knn.mean()) < 2 * gain.knn.std() / len(gain)**.5
    assert (t.one_label.xs('baseline', level='row') < t.one_label.xs('raw pixels', level='row')).all() # as notebooks and README say
    assert (t.xs('trained encoder', level='row').removing > .5).all()

# ---- nothing is lost

def test_config_is_there_from_the_start():
    pictures(Path('pics'), 40, 'png', 16)
    learn, cfg, out = start_run(data='pics', size=16, bs=8, epochs=1)
    c = load_config(out)
    assert [p.name for p in out.iterdir()]==['config.json'] and c['data']==str(Path('pics').absolute()) and c['out']==str(out.absolute())
    assert c['seed']==42 and c['device']=='cpu' and c['arch']=='small_resnet' and c['versions']['torch']==torch.__version__ and c['queue_size']==4096 and c['size']==16
    assert c.keys() >= run_config(data='pics').keys() and c['images']['train']['n']==32

def test_encoder_and_metrics_are_written_before_any_score(monkeypatch):
    def killed(*a, **kw): raise KeyboardInterrupt
    monkeypatch.setattr(learner, 'evaluation_table', killed)
    with pytest.raises(SystemExit) as e: main([*small(), '--strategy', 'none'])
    assert e.value.code==130 and load_encoder('ifnd_out/encoder.safetensors')[0] is not None
    m = metrics()
    assert m['knn'] is None and m['table'] is None and m['seconds'] > 0 and m['config']['bs']==8
    monkeypatch.undo()
    os.environ['MPLBACKEND'] = 'Agg'

@pytest.mark.parametrize('part,lost', [('linear_probe', ['linear']), ('few_labels_accuracy', ['one_label']), ('kmeans_labels', ['nmi', 'ari', 'purity'])])
def test_each_score_fails_alone(part, lost, monkeypatch, capsys):
    learn, cfg, out = start_run(data=small()[1], size=16, bs=8, epochs=1, queue_size=16, strategy='none')
    learn.remove_cb(learn.knn)
    def broken(*a, **kw): raise RuntimeError(f'{part} is broken')
    monkeypatch.setattr(evaluate, part, broken)
    with learn.no_bar(), learn.no_logging(): do_run(learn, cfg, out)
    table, said = metrics()['table'], capsys.readouterr().err.splitlines()
    for row in table.values(): assert [k for k, v in row.items() if v is None]==lost
    assert len(said)==3 and all(l.startswith('ifnd_train: ') and f'{part} is broken' in l for l in said) and (out/'report.png').exists()

def test_each_panel_fails_alone(monkeypatch, capsys):
    learn, cfg, out = start_run(data=small()[1], size=16, bs=8, epochs=1, queue_size=16, strategy='none')
    def broken(*a, **kw): raise RuntimeError('no ink')
    monkeypatch.setattr(report, 'plot_embedding', broken)
    with learn.no_bar(), learn.no_logging(): do_run(learn, cfg, out)
    assert capsys.readouterr().err=='ifnd_train: a panel of the report cannot be drawn: no ink\n'
    assert Image.open(out/'report.png').size[0] > 1000 and metrics()['knn'] is not None

def test_a_score_that_fails_in_training_costs_only_itself(monkeypatch, capsys):
    learn, cfg, out = start_run(data=small()[1], size=16, bs=8, epochs=2, queue_size=16, strategy='none')
    monkeypatch.setattr(evaluate, 'knn_accuracy', lambda *a, **kw: (_ for _ in ()).throw(RuntimeError('no neighbours')))
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(2)
    assert len(load_checkpoint(out)['rows'])==2 and all(math.isnan(r['knn']) for r in load_checkpoint(out)['rows'])
    assert capsys.readouterr().err.splitlines()==[f'ifnd_train: no scores after epoch {i}: no neighbours' for i in (1, 2)]

def test_scores_that_are_there_stay_until_there_are_others(monkeypatch, capsys):
    main([*small(), '--strategy', 'none'])
    before = (Path('ifnd_out')/'metrics.json').read_bytes()
    def broken(*a, **kw): raise RuntimeError('broken')
    for failing in (broken, lambda *a, **kw: (_ for _ in ()).throw(KeyboardInterrupt)):
        monkeypatch.setattr(learner, 'evaluation_table', failing)
        try: main(['--resume', 'ifnd_out'])
        except SystemExit as e: assert e.code==130
        assert (Path('ifnd_out')/'metrics.json').read_bytes()==before

def test_what_scoring_will_lack_is_said_before_training(capsys):
    for i in range(12): (p := Path('one')/'a'/f'{i}.png').parent.mkdir(parents=True, exist_ok=True); Image.new('RGB', (16, 16), (i, 0, 0)).save(p)
    Path('held/a').mkdir(parents=True), Path('held/b').mkdir(); Path('one/b').mkdir()
    Image.new('RGB', (16, 16)).save('one/b/0.png')
    for c in 'ab': Image.new('RGB', (16, 16)).save(f'held/{c}/0.png')
    learn, cfg, out = start_run(data='one', valid='held', size=16, bs=4, epochs=1)
    assert capsys.readouterr().err==''
    learn.dls.train_ds.labels.zero_()
    report.rehearse(learn, 'small_resnet', learner.note)
    assert 'no linear score: train_y holds only class 0' in capsys.readouterr().err

@pytest.mark.parametrize('arch,size', [('convnext_tiny', 32), ('swin_t', 32), ('googlenet', 64), ('test_vit', 160)]) # the last one is of timm
def test_any_body_is_scored(arch, size, capsys):
    if arch=='test_vit': pytest.importorskip('timm')
    main(['--data', str(pictures(Path('pics'), 20)), '--arch', arch, '--size', str(size), '--bs', '8', '--epochs', '1', '--queue-size', '16', '--strategy', 'none'])
    m, (out, err) = metrics(), capsys.readouterr()
    assert err=='' and all(v is not None for row in m['table'].values() for v in row.values()) and (Path('ifnd_out')/'report.png').exists()
    body, meta = load_encoder('ifnd_out/encoder.safetensors')
    assert meta['arch']==arch

@pytest.mark.parametrize('bs', [9, 12, 15, 31])
def test_any_batch_is_drawn(bs, capsys):
    main(['--data', str(pictures(Path('pics'), 60, 'png', 16)), '--size', '16', '--bs', str(bs), '--epochs', '1', '--queue-size', '16', '--strategy', 'none'])
    assert capsys.readouterr().err=='' and metrics()['knn'] is not None and (Path('ifnd_out')/'report.png').exists()

def test_one_held_out_image(capsys):
    main(['--data', str(pictures(Path('pics'), 6, 'png', 16)), '--size', '16', '--bs', '4', '--epochs', '1', '--queue-size', '16', '--strategy', 'none'])
    m = metrics()
    assert len(two_view_dls('pics', bs=4).valid_ds)==1 and m['knn'] is not None and (Path('ifnd_out')/'report.png').exists()

def test_a_class_that_is_held_out_entirely(capsys):
    pictures(Path('pics'), 30, 'png', 16)
    for f in sorted(Path('pics/class1').iterdir())[1:]: f.unlink()
    seed = next(s for s in range(200) if len(two_view_dls('pics', bs=4, seed=s).train_ds.labels.unique())==1)
    main(['--data', 'pics', '--size', '16', '--bs', '4', '--epochs', '1', '--queue-size', '16', '--strategy', 'none', '--seed', str(seed)])
    m, err = metrics(), capsys.readouterr().err
    assert m['linear'] is None and m['knn'] is not None and m['one_label'] is not None and (Path('ifnd_out')/'report.png').exists()
    assert 'at the end there will be less' in err and all(l.startswith('ifnd_train: ') for l in err.splitlines())
    assert 'NaN' not in (Path('ifnd_out')/'metrics.json').read_text()

@pytest.mark.parametrize('names', [('US$_to_$', '$5_bill$'), ('_under', r'back\slash$x$'), ('猫', 'кошка'), ('a{b', 'c^_d$'), (' space', '%s')], ids=str)
def test_odd_names_of_classes_are_text(names, capsys, monkeypatch):
    folder = pictures(Path('pics'), 40, 'png', 16)
    for i, name in enumerate(names): (folder/f'class{i}').rename(folder/name)
    legends, real = [], evaluate._legend
    monkeypatch.setattr(evaluate, '_legend', lambda ax, names: (real(ax, names), legends.append([t.get_text() for t in ax.get_legend().get_texts()])))
    main(['--data', 'pics', '--size', '16', '--bs', '8', '--epochs', '1', '--queue-size', '16', '--n-clusters', '2'])
    assert capsys.readouterr().err=='' and (Path('ifnd_out')/'report.png').exists() and metrics()['knn'] is not None
    assert legends[-1]==sorted(names)
    dls = two_view_dls('pics', size=16, bs=8)
    dls.show_batch(); plt.gcf().canvas.draw()

def test_a_loss_that_is_no_number_stops_at_once(monkeypatch):
    learn, cfg, out = start_run(data=small(n=400)[1], size=16, bs=4, epochs=3, queue_size=16, strategy='none')
    class Break(Callback):
        seen = 0
        def before_batch(self):
            if self.training: self.seen += 1
            if self.training and self.epoch==1 and self.iter==3: self.learn.model.encoder_q.head[0].weight.data.fill_(math.nan)
    learn.add_cb(Break())
    monkeypatch.setattr('ifnd_nb.runs.monotonic', iter(range(10**6)).__next__) # each batch takes a second
    with pytest.raises(FloatingPointError, match='nan in epoch 2, and the checkpoint after 1 epochs is kept'), learn.no_bar(), learn.no_logging(): do_run(learn, cfg, out)
    assert next(cb for cb in learn.cbs if isinstance(cb, Break)).seen==len(learn.dls.train) + 4

@pytest.mark.parametrize('labels', [True, False])
def test_blank_images_are_no_end(labels, capsys):
    "t-SNE of equal rows would end the process"
    folder = pictures(Path('pics'), 60, 'png', 16)
    for i, f in enumerate(sorted(folder.rglob('*.png'))):
        if i % 30 < 25: Image.new('RGB', (16, 16)).save(f)
        if not labels: f.rename(folder/f.name)
    main(['--data', 'pics', '--size', '16', '--bs', '8', '--epochs', '1', '--queue-size', '16', '--strategy', 'none'])
    assert capsys.readouterr().err=='' and (Path('ifnd_out')/'report.png').exists()
    with pytest.raises(ValueError, match='all 20 rows of features are alike'): evaluate.project_2d(torch.ones(20, 4), 'tsne')

def test_a_baseline_that_fails_leaves_the_run_whole(monkeypatch, capsys):
    def broken(*a): raise FloatingPointError('the loss became nan')
    monkeypatch.setattr(learner, 'train_baseline', broken)
    main([*small(), '--beside-baseline', '--n-clusters', '2'])
    assert capsys.readouterr().err=='ifnd_train: the run is whole, but the baseline beside it is not: the loss became nan\n'
    assert metrics()['knn'] is not None and list(metrics()['table'])==['raw pixels', 'untrained encoder', 'trained encoder'] and (Path('ifnd_out')/'report.png').exists()

def test_without_labels_no_panel_is_empty(monkeypatch, capsys):
    drawn, real = [], report.plot_report
    monkeypatch.setattr(report, 'plot_report', lambda *a, **kw: drawn.append(real(*a, **kw)) or drawn[-1])
    monkeypatch.setattr(plt, 'close', lambda *a: None)
    folder = pictures(Path('pics'), 60, 'png', 16)
    for f in sorted(folder.rglob('*.png')): f.rename(folder/f.name)
    main(['--data', 'pics', '--size', '16', '--bs', '8', '--epochs', '3', '--queue-size', '16', '--n-clusters', '4'])
    assert capsys.readouterr().err=='' and metrics()['removed'] > 0 and metrics()['table'] is None
    assert [ax.get_title()[:8] for ax in drawn[-1].axes]==['Loss: in', 'How much', 'False ne', 'Two view', 'IFND: 48'] and all(ax.lines or ax.collections or ax.images for ax in drawn[-1].axes)

def test_a_backend_that_is_missing_costs_nothing(tmp_path):
    import sys
    done = subprocess.run([Path(sys.executable).with_name('ifnd_train'), *small(), '--strategy', 'none'], capture_output=True, text=True, env={**os.environ, 'MPLBACKEND': 'module://nothere', 'OMP_NUM_THREADS': '1'})
    assert done.returncode==0 and (Path('ifnd_out')/'report.png').exists(), done.stderr

# ---- folders

def test_runs_that_start_together_have_folders_of_their_own():
    got, gate = [], threading.Barrier(12)
    def claim(i): gate.wait(); got.append((claim_folder(dict(seed=i)), i))
    threads = [threading.Thread(target=claim, args=(i,)) for i in range(12)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert len({p for p, _ in got})==12 and all(load_config(p)['seed']==i for p, i in got)
    assert {p.name for p, _ in got}=={'ifnd_out', *(f'ifnd_out-{i}' for i in range(2, 13))}

def test_one_name_for_two_runs_is_refused_to_the_second():
    won, lost, gate = [], [], threading.Barrier(8)
    def claim(i):
        gate.wait()
        try: won.append(claim_folder(dict(seed=i), 'mine'))
        except FileExistsError as e: lost.append(str(e))
    threads = [threading.Thread(target=claim, args=(i,)) for i in range(8)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert len(won)==1 and len(lost)==7 and all('holds a run already' in e and '--resume mine' in e for e in lost)
    assert [p.name for p in Path('mine').iterdir()]==['config.json']

def test_commands_that_start_together(tmp_path):
    pictures(Path('pics'), 40, 'png', 16)
    args = '--data', 'pics', '--size', '16', '--bs', '8', '--epochs', '1', '--queue-size', '16', '--strategy', 'none'
    done = []
    threads = [threading.Thread(target=lambda s=s: done.append(command(*args, '--seed', s, cwd=tmp_path))) for s in (1, 2)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert [d.returncode for d in done]==[0, 0], done
    for o in ('ifnd_out', 'ifnd_out-2'): assert load_config(o)['seed']==load_checkpoint(o)['config']['seed']==metrics(o)['config']['seed']
    assert load_config('ifnd_out')['seed']!=load_config('ifnd_out-2')['seed']

# ---- going on

def begun(*more, epochs=3, after=1):
    "A run that was interrupted after some epochs"
    learn, cfg, out = start_run(**{**dict(data='pics', size=16, bs=8, epochs=epochs, queue_size=16, n_clusters='2,4', out='run'), **dict(more)})
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
def same_size(): (f := sorted(Path('pics/class0').glob('*.png'))[0]).write_bytes((lambda a, b: b + b'\0' * (len(a) - len(b)) if len(b) <= len(a) else b)(f.read_bytes(), sorted(Path('pics/class1').glob('*.png'))[0].read_bytes()))
def replace(): Image.fromarray(np.random.default_rng(1).integers(0, 255, (99, 99, 3), np.uint8)).save(sorted(Path('pics/class0').iterdir())[0])

@pytest.mark.parametrize('change', [add, remove, rename, replace, same_size], ids=lambda f: f.__name__)
@pytest.mark.parametrize('strategy', ['none', 'eliminate'])
def test_resume_says_that_the_images_changed(change, strategy, capsys):
    pictures(Path('pics'), 40, 'png', 16)
    begun(('strategy', strategy), *([('n_clusters', None)] if strategy=='none' else []))
    before = (Path('run')/'checkpoint').read_bytes()
    change()
    with pytest.raises(SystemExit) as e: main(['--resume', 'run'])
    err = capsys.readouterr().err
    assert e.value.code==2 and 'images changed since the run began: ' in err and err.count('\n')==1 and (Path('run')/'checkpoint').read_bytes()==before

def test_images_that_moved_are_the_same_images():
    pictures(Path('pics'), 40, 'png', 16)
    begun()
    cfg = load_config('run')
    Path('pics').rename('moved')
    assert two_view_dls('moved', size=16, bs=8).train_ds.fingerprint()==cfg['images']['train']['digest']

def test_resume_trains_on(capsys):
    pictures(Path('pics'), 40, 'png', 16)
    args = ['--data', 'pics', '--size', '16', '--bs', '8', '--epochs', '2', '--queue-size', '16', '--out', 'run', '--beside-baseline', '--n-clusters', '2,4']
    main(args)
    first = load_checkpoint('run')['rows']
    main(['--resume', 'run', '--epochs', '4'])
    assert 'going on after 2 of 4 epochs' in capsys.readouterr().out
    for o in ('run', 'run/baseline'): assert len(load_checkpoint(o)['rows'])==4 and len(pd.read_csv(f'{o}/metrics.csv'))==4
    assert repr(load_checkpoint('run')['rows'][:2])==repr(first) and load_config('run')['epochs']==metrics('run')['config']['epochs']==4
    with pytest.raises(SystemExit) as e: main(['--resume', 'run', '--epochs', '3'])
    assert e.value.code==2 and 'epochs=3' in (err := capsys.readouterr().err) and '4 are done' in err

def test_an_extension_that_is_interrupted_at_once_is_remembered(monkeypatch, capsys):
    main([*small(), '--strategy', 'none', '--out', 'run'])
    def interrupted(*a): raise KeyboardInterrupt
    real = learner.train_rest
    monkeypatch.setattr(learner, 'train_rest', interrupted)
    with pytest.raises(SystemExit): main(['--resume', 'run', '--epochs', '4'])
    monkeypatch.setattr(learner, 'train_rest', real)
    main(['--resume', 'run'])
    assert len(load_checkpoint('run')['rows'])==metrics('run')['config']['epochs']==4

def test_a_run_without_a_whole_epoch_begins_again(monkeypatch, capsys):
    pictures(Path('pics'), 40, 'png', 16)
    main([*(args := small()), '--out', 'whole'])
    real = learner.train_rest
    def interrupted(*a): raise KeyboardInterrupt
    monkeypatch.setattr(learner, 'train_rest', interrupted)
    with pytest.raises(SystemExit) as e: main([*args, '--out', 'run'])
    assert e.value.code==130 and '--resume run begins again' in capsys.readouterr().err
    monkeypatch.setattr(learner, 'train_rest', real)
    main(['--resume', 'run'])
    a, b = (load_checkpoint(o)['model'] for o in ('whole', 'run'))
    assert all(torch.equal(v, b[k]) for k, v in a.items())

def test_an_interrupted_baseline_goes_on_to_the_same_bits(monkeypatch, capsys):
    pictures(Path('pics'), 40, 'png', 16)
    args = [*small(), '--beside-baseline', '--n-clusters', '2,4', '--out']
    main([*args, 'whole'])
    real, calls = learner.train_rest, []
    def second_time(learn, cfg):
        calls.append(1)
        if len(calls)==2:
            class Stop(Callback):
                order = RunFiles.order + 1
                def after_epoch(self): raise KeyboardInterrupt
            learn.add_cb(Stop())
        return real(learn, cfg)
    monkeypatch.setattr(learner, 'train_rest', second_time)
    with pytest.raises(SystemExit) as e: main([*args, 'run'])
    assert e.value.code==130 and len(load_checkpoint('run/baseline')['rows'])==1 and (Path('run')/'encoder.safetensors').exists() and metrics('run')['table'] is None
    main(['--resume', 'run'])
    for o in ('', 'baseline/'):
        a, b = (load_checkpoint(f'{r}/{o}')['model'] for r in ('whole', 'run'))
        assert all(torch.equal(v, b[k]) for k, v in a.items())
    assert metrics('whole')['table']==metrics('run')['table']

# ---- starting from weights

def test_training_starts_from_an_encoder():
    main([*small(), '--strategy', 'none', '--out', 'first'])
    learn, cfg, _ = start_run(from_weights='first/encoder.safetensors', data='pics', size=16, bs=8, epochs=1)
    body, _ = load_encoder('first/encoder.safetensors')
    assert all(torch.equal(p, q) for p, q in zip(body.parameters(), learn.model.body.parameters())) and cfg['arch']=='small_resnet' and os.path.isabs(cfg['from_weights'])
    main([*small(), '--from', 'first/encoder.safetensors', '--beside-baseline', '--n-clusters', '2', '--out', 'second']) # short for --from-weights
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

def test_training_starts_from_published_weights(capsys):
    import torchvision
    torch.manual_seed(7)
    net = torchvision.models.resnet18()
    torch.save(net.state_dict(), 'net.pth')
    learn, cfg, _ = start_run(data=small()[1], from_weights='net.pth', arch='resnet18', size=32, bs=8, epochs=1)
    assert torch.equal(learn.model.body.conv1.weight, net.conv1.weight) and learn.model.body.n_features==512
    torch.save(dict(model=net), 'net.pkl'); Path('junk').write_bytes(b'junk')
    for args, words in ((['net.pth', '--arch', 'resnet50'], "does not fit --arch='resnet50'"), (['net.pth'], 'give --arch'), (['none.pth'], 'is no file'), (['junk'], 'damaged'), (['net.pkl'], 'damaged')):
        with pytest.raises(SystemExit) as e: main([*small(), '--out', 'no', '--from-weights', *args])
        err = capsys.readouterr().err
        assert e.value.code==2 and words in err and err.count('\n')==1 and not Path('no').exists()

# ---- devices and other arguments

@pytest.mark.parametrize('args,words', [(['--device', 'cuda'], "device='cuda' is not there; use --device='cpu'"), (['--device', 'gpu'], "device='gpu' is not known"), (['--device', 'mps'], "device='mps' is not there"),
    (['--seed', str(2**40)], 'seed='), (['--seed', '-1'], 'seed=-1'), (['--tau', '.001'], 'tau=0.001'), (['--strategy', 'none', '--beside-baseline'], 'leave out --beside-baseline')], ids=str)
def test_what_cannot_be_is_said_at_once(args, words, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with pytest.raises(SystemExit) as e: main(['--data', 'digits', *args])
    err = capsys.readouterr().err
    assert e.value.code==2 and words in err and err.count('\n')==1 and not Path('ifnd_out').exists()

def test_a_run_from_a_gpu_goes_on_without_one(capsys, monkeypatch):
    pictures(Path('pics'), 40, 'png', 16)
    begun()
    state = load_checkpoint('run'); state['config']['device'] = 'cuda:0'; torch.save(state, 'run/checkpoint')
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    main(['--resume', 'run'])
    assert 'the run began on cuda:0, which is not there; it goes on on cpu' in capsys.readouterr().err and load_config('run')['device']=='cpu'

def test_memory_that_runs_out_is_one_line(capsys):
    with pytest.raises(SystemExit) as e: main([*small(), '--queue-size', str(10**13)])
    err = capsys.readouterr().err
    assert e.value.code==2 and 'memory ran out; use a smaller --bs, --size, --queue-size or --dim' in err and err.count('\n')==1

def test_cifar_has_its_own_size(): assert run_config(data='cifar10')['size']==run_config(data='cifar100')['size']==32

def test_a_named_set_is_the_same_wherever_it_comes_from(monkeypatch):
    from ifnd_nb import data
    class FashionMNIST(torch.utils.data.Dataset):
        def __len__(self): return 100
        def __getitem__(self, i): return Image.new('L', (28, 28), i), i % 10
    monkeypatch.setitem(data._NAMED, 'fashion_mnist', lambda train: FashionMNIST())
    dls = two_view_dls('fashion_mnist', bs=16)
    assert dls.train_ds.name=='fashion_mnist' and dls.train.after_batch[0].scale==data.augmentations['fashion_mnist']['scale']
