"Cells that no test runs, those of the benchmarks and for a GPU, still run: at a tiny size"
import csv, os, subprocess, sys
from pathlib import Path

NBS = Path(__file__).parent.parent/'nbs'

def test_benchmarks_run(tmp_path):
    command = Path(sys.executable).parent/'nbdev-test', NBS/'reference'/'benchmarks.ipynb', '--flags', 'slow slow_epochs cuda'
    env = {**os.environ, 'BENCHMARKS': 'tiny', 'OUT': str(tmp_path), 'CUDA_VISIBLE_DEVICES': '', 'OMP_NUM_THREADS': '1'}
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=NBS.parent)
    assert done.returncode==0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = list(csv.DictReader(open(tmp_path/'gpu.csv')))
    assert {'floor', 'baseline', 'eliminate', 'attract', 'both', 'InfoNCE'} <= {r['name'] for r in rows}
    assert {r['unit'] for r in rows}=={'images/s', 'ratio', 'GiB', 'ms', 's'}
    assert all(float(r['value']) > 0 for r in rows if r['unit']!='GiB')
