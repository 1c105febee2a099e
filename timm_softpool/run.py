"""``python -m timm_softpool.run SCRIPT [ARG...]``: run one of timm's scripts with our models registered.

``-m MODULE`` instead of ``SCRIPT`` runs a module. (timm's train.py can do without: ``--device-modules timm_softpool``.)
"""
import os
import runpy
import sys

import timm_softpool  # noqa: F401  (registers the models)


def main() -> None:
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ('-h', '--help') or arguments == ['-m']:
        sys.exit(__doc__)
    if arguments[0] == '-m':
        sys.argv = arguments[1:]
        runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)
    elif not os.path.isfile(arguments[0]):
        sys.exit(f'error: there is no script {arguments[0]}')
    else:
        sys.argv = arguments
        sys.path.insert(0, os.path.dirname(os.path.abspath(sys.argv[0])))
        runpy.run_path(sys.argv[0], run_name='__main__')


if __name__ == '__main__':
    main()
