"""python -m page_primer: the page-primer command."""

import sys

from page_primer.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
