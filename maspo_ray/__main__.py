"""`python -m maspo_ray` is `maspo`."""

import sys

from maspo_ray.cli import main

if __name__ == "__main__":
    sys.exit(main())
