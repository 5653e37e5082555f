"""``python -m enginecache``: the command line."""

from enginecache.cli.fast_path import main

if __name__ == "__main__":
    main()
