"Package metadata: `settings.ini` says it once, this file hands it to setuptools"
from configparser import ConfigParser
from pathlib import Path
from setuptools import setup

parser = ConfigParser(delimiters=['='])
parser.read(Path(__file__).parent/'settings.ini', encoding='utf-8')
cfg = parser['DEFAULT']
statuses = ['1 - Planning', '2 - Pre-Alpha', '3 - Alpha', '4 - Beta', '5 - Production/Stable', '6 - Mature', '7 - Inactive']
oldest, newest = (int(cfg[k].split('.')[1]) for k in ('min_python', 'max_python'))

setup(
    description=cfg['description'],
    author=cfg['author'],
    license=cfg['license'],
    keywords=cfg['keywords'].split(),
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg['requirements'].split(),
    package_data={cfg['lib_name']: ['*.mplstyle']},
    extras_require={'dev': cfg['dev_requirements'].split(), **{k: cfg[f'{k}_requirements'].split() for k in ('bench', 'distributed', 'docs', 'log')}},
    entry_points={'console_scripts': cfg['console_scripts'].split('\n'), 'nbdev': [f"{cfg['lib_name']}={cfg['lib_name']}._modidx:d"]},
    classifiers=[f"Development Status :: {statuses[int(cfg['status'])-1]}", 'Intended Audience :: Developers', 'Intended Audience :: Education',
                 'Intended Audience :: Science/Research', 'Natural Language :: English', 'Topic :: Scientific/Engineering :: Artificial Intelligence',
                 *(f'Programming Language :: Python :: 3.{v}' for v in range(oldest, newest + 1))],
)
