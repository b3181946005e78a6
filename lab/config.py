"""
Ends `python lab/NAME.py` with a line. It puts lab/ first in Python's path, so that `import config` finds this
file instead of the package config/; `python -m lab.NAME` never does.
"""
import sys
from pathlib import Path

sys.exit(f'error: start it in the folder of the repository as python -m lab.{Path(sys.argv[0]).stem}')
