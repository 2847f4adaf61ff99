"""``python -m mlc`` is the ``mlc`` command."""

from mlc.cli.main import main

if __name__ == "__main__":
    main()
