"""The dry probe: a real training step on the meta device, every allocation recorded."""

import logging

# On a machine without CUDA, importing it warns of CPU kernels that nobody asks for here.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
