"""``python -m momentkv.testing.gpu``."""

import sys

from momentkv.testing.gpu.run import main

if __name__ == "__main__":
    sys.exit(main())
