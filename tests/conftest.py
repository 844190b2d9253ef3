"""What all tests get: Ctrl-C that can be tested, also where a shell runs them in its background."""

import signal

# Such a shell has SIGINT ignored, which children inherit, and Python then leaves it so.
signal.signal(signal.SIGINT, signal.default_int_handler)
