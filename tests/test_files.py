"Files are whole or not there"
import pytest
from ifnd_nb.files import write_atomic

def test_write_atomic_keeps_the_old_file_when_writing_fails(tmp_path):
    write_atomic(tmp_path/'a', 'old')
    with pytest.raises(TypeError): write_atomic(tmp_path/'a', 3)
    assert (tmp_path/'a').read_text() == 'old' and [p.name for p in tmp_path.iterdir()] == ['a']
