import signal
import sys

if "--parent" in sys.argv:
    # Ctrl-C and a terminal that hangs up reach everybody: a child leaves them to its launcher, which says what it does
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)

from .main import main

if __name__ == "__main__":
    main()
