"""Training runs of the tests stay on the CPU, where they are the same to the bit."""

import os

os.environ.setdefault("ACCELERATE_USE_CPU", "true")
