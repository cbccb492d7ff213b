"""The suite's systems in a browser: `python -m demos.app`, or one of them by itself, as `python -m demos.classify`.

Importing a demo starts nothing and loads no model; models are loaded when they are first asked for, and kept.
"""

import os
from importlib.util import find_spec

if find_spec("gradio") is None:
    raise ImportError("the demos need gradio: pip install 'gated-vision-suite[demo]'")

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported
