"""
Ends `python prepare/NAME.py` with a one-line message. Such a command puts prepare/ first in Python's path, so that
`import config` finds this file instead of the package config/. `python -m prepare.NAME` does not.
"""
import sys
from pathlib import Path

sys.exit(f'error: start it in the folder of the repository as python -m prepare.{Path(sys.argv[0]).stem}')
