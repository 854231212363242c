"""``python -m apr_dist`` is ``apr-dist``."""

import sys

from apr_dist.cli import main

if __name__ == "__main__":
    sys.exit(main())
