"""Write ``docs/environment.md`` from the rules themselves: ``python docs/make_environment_reference.py``."""

from __future__ import annotations

from pathlib import Path

from enginecache.environment import RULES

PATH = Path(__file__).with_name("environment.md")

HEAD = """\
# Environment variables of the builder

Written by `docs/make_environment_reference.py` from the rules in `enginecache/environment.py`.

TensorRT, its compilers and CUDA's libraries read environment variables, and some of those change the plan. So the
building process does not inherit its caller's environment. It receives only the variables that are *passed* or *keyed*
below, with the values that they had when the request's key was made:

- **passed**: the builder receives it. It cannot change a plan, or its effect is in the key or checked in another way.
- **keyed**: the builder receives it, and it is part of the key while it is set, by name and value: the field
  `environment` of `enginecache explain`. An engine that was built with it serves only requests with the same value.
- **removed**: the builder does not receive it, and a build warns that it was left out.
- **unused**: the builder does not receive it; it has no use there.
- **replaced**: enginecache sets it.

Any other variable is not passed. To pass one, name it in the setting `pass_environment`
(`ENGINECACHE_PASS_ENVIRONMENT=NAME,NAME`). Unless a rule passes it anyway, it is then part of the key while it is set.
The same rules apply to the child process that tries an engine before `load`.

A pattern has one `*`, for any characters or none. A rule without a `*` takes precedence over patterns, and an earlier
pattern over a later one. "*traced*" means that TensorRT-RTX 1.7.1.116 asks for the variable during a build;
`tests/test_environment_traced.py` records the names again and fails if one has no rule. "*traced on a GPU*" means that
TensorRT 8.6.0 or the driver 580.159.04 asked for it during a build on an H200 ([hardware](hardware.md)).

| variable | | why | known from |
|---|---|---|---|
"""


def reference() -> str:
    """Return the whole page."""
    return HEAD + "".join(f"| `{pattern}` | {kind} | {why} | {source} |\n" for pattern, kind, why, source in RULES)


if __name__ == "__main__":
    PATH.write_text(reference(), encoding="utf-8")
