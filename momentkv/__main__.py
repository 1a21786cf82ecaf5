"""``python -m momentkv``: the command ``momentkv``."""

import sys

from momentkv.cli import main

if __name__ == "__main__":
    sys.exit(main())
