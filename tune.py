"""The command line, run from a checkout; the installed package offers the same as ``wph-tune``."""

from tuner.cli import main

if __name__ == "__main__":
    main()
