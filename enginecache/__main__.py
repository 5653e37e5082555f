"""``python -m enginecache``: the command line."""

from enginecache.door import main

if __name__ == "__main__":
    main()
