import signal
import sys

if (
    "--parent" in sys.argv
):  # Ctrl-C reaches a whole terminal: a child leaves it to its launcher, which says what it does
    signal.signal(signal.SIGINT, signal.SIG_IGN)

from .main import main

if __name__ == "__main__":
    main()
