"""What every test can rely on."""

from __future__ import annotations

import signal

# A shell that runs the tests in the background starts them with Ctrl-C ignored, and their processes inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
