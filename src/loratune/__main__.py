"""`python -m loratune`."""

import sys

try:
    from loratune.cli import main

    code = main()
except KeyboardInterrupt:  # while there is nobody yet who would hear it
    code = 130
sys.exit(code)
