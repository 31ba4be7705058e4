"""Stand-in for ComfyUI's main.py: the same flags, HTTP and websocket protocol, without torch and without models.

Run it as the original is run: `python main.py --listen 127.0.0.1 --port 8188 ...`. The code is in `standin/`.
"""

import sys

# The script's own folder is on sys.path, as with ComfyUI; type checkers know the module as local.comfyui.standin.app.
from standin.app import main  # type: ignore[import-not-found]

if __name__ == "__main__":
    sys.exit(main(sys.argv))
