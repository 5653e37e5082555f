"""``python -m enginecache``: the command line."""

from enginecache.cli import main

if __name__ == "__main__":
    main()
