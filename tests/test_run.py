"""``python -m timm_softpool.run``, as its user sees it."""
import json
import re
import subprocess
import sys

import pytest

from timm_softpool import run

SCRIPT = '''
import json, sys
import neighbour
import timm
print(json.dumps([__name__, sys.argv, timm.is_model('resnet18_softpool'), neighbour.value]))
'''


@pytest.fixture
def script(tmp_path):
    (tmp_path / 'neighbour.py').write_text('value = 7\n')
    path = tmp_path / 'script_of_timm.py'
    path.write_text(SCRIPT)
    return path


@pytest.fixture
def launch(monkeypatch):
    """``run.main`` for some arguments, and ``sys`` as it was thereafter."""
    def call(*arguments):
        monkeypatch.setattr(sys, 'argv', ['run.py', *map(str, arguments)])
        monkeypatch.setattr(sys, 'path', list(sys.path))
        monkeypatch.delitem(sys.modules, 'neighbour', raising=False)
        run.main()
    return call


def test_a_script_sees_our_models_its_arguments_and_its_neighbours(script):
    process = subprocess.run(
        [sys.executable, '-W', 'ignore', '-m', 'timm_softpool.run', str(script), '--model', 'a b', '-x'],
        capture_output=True, text=True, cwd='/')
    assert process.returncode == 0, process.stderr
    assert json.loads(process.stdout) == ['__main__', [str(script), '--model', 'a b', '-x'], True, 7]


def test_a_module_sees_our_models_and_its_arguments(script, launch, capsys, monkeypatch):
    monkeypatch.syspath_prepend(script.parent)
    launch('-m', 'script_of_timm', '--lr', '0.1')
    assert json.loads(capsys.readouterr().out) == ['__main__', [str(script), '--lr', '0.1'], True, 7]


def test_the_exit_status_of_a_script_is_passed_on(tmp_path, launch):
    (tmp_path / 'fails.py').write_text('import sys; sys.exit(3)')
    with pytest.raises(SystemExit) as exit:
        launch(tmp_path / 'fails.py')
    assert exit.value.code == 3


@pytest.mark.parametrize(('arguments', 'message'), [
    (['nothing.py'], 'there is no script nothing.py'), ([], 'python -m timm_softpool.run SCRIPT'),
    (['-m'], 'python -m timm_softpool.run SCRIPT')], ids=['missing', 'none', 'no module'])
def test_a_script_that_is_not_there_is_a_clear_error(arguments, message, launch):
    with pytest.raises(SystemExit, match=re.escape(message)):
        launch(*arguments)


def test_a_module_that_is_not_there_is_named(launch):
    with pytest.raises(ImportError, match='module_of_nobody'):
        launch('-m', 'module_of_nobody')
