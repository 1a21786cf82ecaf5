"""lm_eval's command line with the model ``momentkv``."""

import sys

from momentkv.evaluation.lm_eval import main

if __name__ == "__main__":
    sys.exit(main())
