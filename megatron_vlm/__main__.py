"""`python -m megatron_vlm` is `mvlm`, for machines whose PATH lacks the script."""

import sys

from megatron_vlm.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
